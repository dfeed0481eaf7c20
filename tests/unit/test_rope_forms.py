"""Every form in which a config can say its RoPE: read, exported and trained as transformers computes it."""

import json
import math
from pathlib import Path

import pytest
import torch
from small import scaled_config
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.method.rope import PositionRotary, transformers_config
from endprompt_megatron.model.shape import shape_of

WINDOW, DIM = 64, 8
LENGTHS = (16, WINDOW, WINDOW + 1, 2 * WINDOW, 5 * WINDOW)
BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.2,
}
ORIGINAL = {"original_max_position_embeddings": WINDOW}
LISTS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 3.0, 4.0]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Types with what their formula takes, given in full and left to defaults.
SCALINGS = {
    "default": ("default", {}),
    "linear": ("linear", {"factor": 4.0}),
    "linear-integer": ("linear", {"factor": 4}),
    "dynamic": ("dynamic", {"factor": 4.0}),
    "yarn": ("yarn", {"factor": 4.0, **ORIGINAL}),
    "yarn-without-original": ("yarn", {"factor": 4.0}),
    "yarn-without-factor": ("yarn", {"factor": None, **ORIGINAL}),
    "yarn-knobs": ("yarn", {"factor": 4.0, **ORIGINAL, "beta_fast": 8, "beta_slow": 2, "truncate": False}),
    "yarn-attention": ("yarn", {"factor": 4.0, **ORIGINAL, "attention_factor": 0.9}),
    "yarn-mscale": ("yarn", {"factor": 4.0, **ORIGINAL, "mscale": 0.7, "mscale_all_dim": 1.0}),
    "llama3": ("llama3", {**LLAMA3, **ORIGINAL}),
    "llama3-without-original": ("llama3", LLAMA3),
    "longrope": ("longrope", {"factor": 4.0, **ORIGINAL, **LISTS}),
    "longrope-without-factor": ("longrope", {**ORIGINAL, **LISTS}),
    "longrope-attention": ("longrope", {"factor": 4.0, "attention_factor": 1.3, **ORIGINAL, **LISTS}),
}


def _forms(kind: str, values: dict) -> dict[str, dict]:
    """One RoPE with base 5000 as the versions of transformers write it."""
    return {
        "rope_parameters": {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **values}},
        "theta-at-top": {"rope_theta": 5000.0, "rope_parameters": {"rope_type": kind, **values}},
        "rope_scaling": {"rope_theta": 5000.0, "rope_scaling": {"rope_type": kind, **values}},
        "type": {"rope_theta": 5000.0, "rope_scaling": {"type": kind, **values}},
        "both-names": {"rope_theta": 5000.0, "rope_scaling": {"type": kind, "rope_type": kind, **values}},
    }


FORMS = {
    f"{name}-{form}": given for name, (kind, values) in SCALINGS.items() for form, given in _forms(kind, values).items()
}
FORMS |= {
    "nothing": {},
    "theta-alone": {"rope_theta": 5000.0},
    "null": {"rope_theta": 5000.0, "rope_scaling": None, "rope_parameters": None},
    "empty": {"rope_scaling": {}, "rope_parameters": {}},
    "names-disagree": {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0, **ORIGINAL}},
    "both-disagree": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "theta-inside-rope_scaling": {
        "rope_theta": 7.0,
        "rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 9.0},
    },
    "phi-3": {**ORIGINAL, "max_position_embeddings": 4 * WINDOW, "rope_scaling": {"type": "longrope", **LISTS}},
    "original-at-top-and-inside": {
        "original_max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    },
    "qwen2.5-1m": {"max_position_embeddings": 16, "rope_scaling": {"type": "yarn", "factor": 4.0, **ORIGINAL}},
    "extended-window": {
        "max_position_embeddings": 4 * WINDOW,
        "rope_scaling": {"rope_type": "yarn", "factor": None, **ORIGINAL},
    },
}


def cosines(config: object, length: int) -> torch.Tensor:
    """Cosines and sines of positions 0 to length - 1, by transformers, attention factor included."""
    positions = torch.arange(length)[None]
    return torch.stack(LlamaRotaryEmbedding(config=config)(torch.zeros(1, 1), positions))


def loaded(config: dict, directory: Path) -> object:
    """transformers' object for a config.json, read from the file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("form", FORMS)
def test_export_and_training_compute_the_rope_of_the_base(tmp_path, form, family):
    base = {"model_type": family, **BASE, **FORMS[form], "sliding_window": None}
    theirs = loaded(base, tmp_path / "base")
    window = shape_of(base, "config.json").window
    for kind, target in (("keep", window), ("none", 8 * WINDOW)):
        export = scaled_config(base, kind, 1.0, window, target)
        assert shape_of(export, "config.json").rope == shape_of(export | {"rope_scaling": None}, "config.json").rope
        old = {key: value for key, value in export.items() if key != "rope_parameters"}
        configs = loaded(export, tmp_path / kind), loaded(old, tmp_path / f"{kind}-old"), transformers_config(export)
        rotary = PositionRotary(configs[-1], DIM)
        for length in LENGTHS:
            expected = cosines(theirs, length)
            for config in configs:
                assert torch.equal(cosines(config, length), expected), (kind, length)
            angles = rotary.rotary_angles(torch.arange(length)[None])[:, 0, 0]
            ours = torch.stack((angles.cos(), angles.sin())) * rotary.attention_factor
            torch.testing.assert_close(ours, expected[:, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", [name for name in FORMS if "rope_parameters" in name or "-" not in name])
def test_logits_of_base_and_export_are_the_same_inside_and_beyond_the_window(tmp_path, form):
    base = {"model_type": "llama", **BASE, **FORMS[form]}
    export = scaled_config(base, "none", 1.0, WINDOW, 8 * WINDOW)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(loaded(base, tmp_path / "base")).eval()
    other = AutoModelForCausalLM.from_config(loaded(export, tmp_path / "export")).eval()
    other.load_state_dict(model.state_dict())
    for length in (WINDOW // 2, 3 * WINDOW):
        ids = torch.arange(length)[None] * 7 % BASE["vocab_size"]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize(
    ("given", "window"),
    [
        ({}, WINDOW),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 4 * WINDOW),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 4 * WINDOW),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 4 * WINDOW),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, **ORIGINAL}, "max_position_embeddings": 250}, 250),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, WINDOW),
        ({"rope_scaling": {"rope_type": "longrope", **ORIGINAL, **LISTS}, "max_position_embeddings": 192}, 192),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, **ORIGINAL}, "max_position_embeddings": 512}, 512),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, **ORIGINAL}}, 512),
    ],
)
def test_window_is_the_one_that_the_model_is_made_for(given, window):
    assert shape_of({"model_type": "llama", **BASE, **given}, "config.json").window == window


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rope_scaling": {"rope_type": "ntk", "factor": 8.0}}, "rope_scaling.rope_type=ntk is not supported"),
        ({"rope_parameters": {"rope_type": "su"}}, "rope_parameters.rope_type=su is not supported; supported are"),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, "rope_scaling.factor='8' should be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor=True should be"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor=0 should be"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing; linear RoPE needs it"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor is missing"),
        ({"rope_scaling": {"type": "longrope", **LISTS, "long_factor": [1.0]}}, "list of 4 positive numbers, half of"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 4}}, "rope_scaling.short_factor is missing"),
        ({"rope_scaling": "linear"}, "rope_scaling=linear should be an object or null"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "RoPE by kind of layer is not supported"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": "64"}},
            "='64' should be",
        ),
        ({"rope_theta": "1e4"}, "rope_theta=1e4 should be a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 4.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            },
            "rope_parameters.rope_theta=500000.0 is lost beside rope_scaling",
        ),
    ],
)
def test_what_transformers_cannot_compute_is_refused_by_key_and_value(given, message):
    with pytest.raises(InputError, match=r"^config.json: ") as refused:
        shape_of({"model_type": "llama", **BASE, **given}, "config.json")
    assert message in str(refused.value)


def own(kind: str, factor: float, original: int = WINDOW, **more) -> dict:
    values = {"rope_type": kind, "factor": factor, "rope_theta": 10000.0, **more}
    if kind != "linear":
        values |= {"original_max_position_embeddings": original}
    return {"model_type": "llama", **BASE, "max_position_embeddings": int(WINDOW * factor), "rope_parameters": values}


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_extension_in_two_stages_is_the_extension_by_the_product(kind):
    base = {"model_type": "llama", **BASE}
    first = scaled_config(base, kind, 2.0, WINDOW, 2 * WINDOW)
    twice = scaled_config(first, kind, 4.0, 2 * WINDOW, 8 * WINDOW)
    assert twice == scaled_config(base, kind, 8.0, WINDOW, 8 * WINDOW)


def test_attention_factor_of_a_second_stage_is_that_of_both_factors():
    export = scaled_config(own("yarn", 2.0, attention_factor=0.1 * math.log(2) + 1), "yarn", 2.0, 2 * WINDOW, 256)
    assert PositionRotary(transformers_config(export), DIM).attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    # A model that has another than the paper's keeps it ...
    export = scaled_config(own("yarn", 2.0, attention_factor=1.0), "yarn", 2.0, 2 * WINDOW, 256)
    assert export["rope_parameters"]["attention_factor"] == 1.0
    # ... unless the recipe gives one.
    export = scaled_config(own("yarn", 2.0, attention_factor=1.0), "yarn", 2.0, 128, 256, attention_factor=1.2)
    assert export["rope_parameters"]["attention_factor"] == 1.2


def test_knobs_of_the_recipe_reach_the_export():
    base = {"model_type": "llama", **BASE}
    export = scaled_config(base, "yarn", 4.0, WINDOW, 256, beta_fast=16.0, beta_slow=2.0, truncate=False)
    assert export["rope_parameters"].items() >= {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}.items()
    export = scaled_config(base, "longrope", 4.0, WINDOW, 256, long_factor=[1.0, 2.0, 3.0, 4.0])
    assert export["rope_parameters"]["short_factor"] == [1.0] * 4
    export = scaled_config(base, "none", 4.0, WINDOW, 256, theta=80000.0)
    assert export["rope_parameters"] == {"rope_type": "default", "rope_theta": 80000.0}
    assert export["rope_theta"] == 80000.0


def test_long_factors_of_another_head_are_refused():
    with pytest.raises(InputError, match=r"context.rope.long_factor should be a list of 4 positive numbers"):
        scaled_config({"model_type": "llama", **BASE}, "longrope", 4.0, WINDOW, 256, long_factor=[1.0] * 64)


def test_linear_and_dynamic_scaling_are_exported_as_transformers_before_4_43_reads_them():
    """transformers 4.31 to 4.42 and vLLM before 0.6: {"type", "factor"} and nothing else, the factor a float."""
    for kind in ("linear", "dynamic"):
        old = scaled_config({"model_type": "llama", **BASE}, kind, 4, WINDOW, 256)["rope_scaling"]
        assert old == {"type": kind, "factor": 4.0}
        assert isinstance(old["factor"], float)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_of_a_sample_do_not_depend_on_what_shares_its_micro_batch(kind):
    knobs = {"long_factor": LISTS["long_factor"]} if kind == "longrope" else {}
    config = scaled_config({"model_type": "llama", **BASE}, kind, 4.0, WINDOW, 256, **knobs)
    rotary = PositionRotary(transformers_config(config), DIM)
    near, far = torch.arange(16)[None], torch.arange(100, 116)[None] * 2
    both = rotary.rotary_angles(torch.cat((near, far)))
    assert torch.equal(both[:, :1], rotary.rotary_angles(near))
    assert torch.equal(both[:, 1:], rotary.rotary_angles(far))
