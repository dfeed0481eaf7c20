"""RoPE: what is exported is what was trained, and rotary angles are exact where bfloat16 positions would not be."""

import copy
import math

import pytest
import torch
from small import scaled_config
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.method.rope import PositionRotary, frequencies, transformers_config

ORIGINAL, TARGET, FACTOR, THETA, DIM = 8192, 65536, 8.0, 500000.0, 128
TYPES = ("linear", "ntk", "dynamic", "yarn", "llama3", "none")
BASE = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "max_position_embeddings": ORIGINAL,
}
# The same model as transformers 4 and transformers 5 write it.
FORMS = {
    "transformers-4": BASE | {"rope_theta": THETA, "rope_scaling": None},
    "transformers-5": BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}},
}
LLAMA_3_1 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def scaled(rope_type: str, base: dict = FORMS["transformers-5"], factor: float = FACTOR, target: int = TARGET) -> dict:
    return scaled_config(base, rope_type, factor, ORIGINAL, target)


def plain(theta: float = THETA) -> torch.Tensor:
    """Inverse frequencies without scaling, by the formula, float64."""
    return theta ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rope_type", TYPES)
def test_scaling_is_exported_for_transformers_4_and_5_and_vllm(form, rope_type):
    base = FORMS[form]
    before = repr(base)
    config = scaled(rope_type, base)
    assert repr(base) == before
    new, old = config["rope_parameters"], config["rope_scaling"]
    kind = "default" if rope_type in ("ntk", "none") else rope_type
    assert new["rope_type"] == kind
    assert new["rope_theta"] == config["rope_theta"]
    # transformers 4 takes theta from beside the scaling and warns of keys that it does not know
    parameters = {key: value for key, value in new.items() if key not in ("rope_theta", "rope_type")}
    # ... and before 4.43 it takes linear and dynamic scaling under the older name alone
    name = "type" if kind in ("linear", "dynamic") else "rope_type"
    assert old == (None if kind == "default" else {name: kind, **parameters})
    if rope_type != "ntk":
        assert config["rope_theta"] == THETA
    if kind != "default":
        assert new["factor"] == FACTOR
    # dynamic NTK reads the original window from this very field
    assert config["max_position_embeddings"] == (ORIGINAL if rope_type == "dynamic" else TARGET)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rope_type", TYPES)
def test_exported_config_gives_the_trained_frequencies_in_transformers(tmp_path, form, rope_type):
    config = scaled(rope_type, FORMS[form])
    ours, factor = frequencies(transformers_config(config))
    transformers_config(config).save_pretrained(tmp_path / "new")
    # As transformers 4 wrote it: rope_parameters unknown.
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    (tmp_path / "old").mkdir()
    AutoConfig.for_model("llama").from_dict(old).save_pretrained(tmp_path / "old")
    for directory in ("new", "old"):
        rotary = LlamaRotaryEmbedding(config=AutoConfig.from_pretrained(tmp_path / directory))
        assert torch.equal(rotary.inv_freq, ours)
        assert rotary.attention_scaling == factor


@pytest.mark.parametrize("rope_type", TYPES)
def test_scaling_a_config_twice_gives_the_same(rope_type):
    """What transformers reads and writes again is what was exported."""
    config = scaled(rope_type)
    again = scaled_config(config, "none", 1.0, ORIGINAL, config["max_position_embeddings"])
    assert again["rope_parameters"] == config["rope_parameters"]


def test_linear_scaling_is_position_over_factor():
    inv_freq, factor = frequencies(transformers_config(scaled("linear")))
    assert factor == 1.0
    torch.testing.assert_close(inv_freq.double(), plain() / FACTOR, rtol=1e-6, atol=0)


def test_rope_type_none_leaves_the_frequencies():
    inv_freq, factor = frequencies(transformers_config(scaled("none")))
    assert factor == 1.0
    torch.testing.assert_close(inv_freq.double(), plain(), rtol=1e-6, atol=0)


def test_ntk_scaling_changes_the_base_so_that_the_lowest_frequency_is_interpolated():
    config = scaled("ntk")
    assert config["rope_theta"] == pytest.approx(THETA * FACTOR ** (DIM / (DIM - 2)), rel=1e-12)
    inv_freq, factor = frequencies(transformers_config(config))
    assert factor == 1.0
    assert inv_freq[0].item() == 1.0
    assert inv_freq[-1].item() == pytest.approx(plain()[-1].item() / FACTOR, rel=1e-5)


def test_yarn_scaling_keeps_high_frequencies_divides_low_ones_and_raises_attention():
    inv_freq, factor = frequencies(transformers_config(scaled("yarn")))
    assert factor == pytest.approx(0.1 * math.log(FACTOR) + 1.0, rel=1e-12)
    torch.testing.assert_close(inv_freq[:8].double(), plain()[:8], rtol=1e-6, atol=0)
    torch.testing.assert_close(inv_freq[-8:].double(), plain()[-8:] / FACTOR, rtol=1e-6, atol=0)
    ramp = plain() / inv_freq.double()
    assert bool((ramp.diff() >= -1e-6).all())


def test_llama3_scaling_keeps_high_frequencies_and_divides_low_ones():
    inv_freq, factor = frequencies(transformers_config(scaled("llama3")))
    assert factor == 1.0
    wavelength = 2 * math.pi / plain()
    high, low = wavelength < ORIGINAL / 4, wavelength > ORIGINAL
    torch.testing.assert_close(inv_freq[high].double(), plain()[high], rtol=1e-6, atol=0)
    torch.testing.assert_close(inv_freq[low].double(), plain()[low] / FACTOR, rtol=1e-6, atol=0)
    assert high.any()
    assert low.any()


@pytest.mark.parametrize("length", [100, ORIGINAL, ORIGINAL + 1, 20_000, TARGET])
def test_dynamic_scaling_follows_the_length_that_the_input_reaches(length):
    hf = transformers_config(scaled("dynamic"))
    inv_freq, factor = frequencies(hf, length)
    reached = max(length, ORIGINAL)
    theta = THETA * (FACTOR * reached / ORIGINAL - (FACTOR - 1)) ** (DIM / (DIM - 2))
    assert factor == 1.0
    torch.testing.assert_close(inv_freq.double(), plain(theta), rtol=1e-5, atol=0)
    rotary = LlamaRotaryEmbedding(config=hf)
    rotary(torch.zeros(1, 1), torch.tensor([[0, length - 1]]))
    assert torch.equal(rotary.inv_freq, inv_freq)


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters", "type"])
def test_llama3_scaling_of_the_base_is_multiplied(form):
    base = {
        "rope_scaling": BASE | {"rope_theta": THETA, "rope_scaling": {"rope_type": "llama3", **LLAMA_3_1}},
        "type": BASE | {"rope_theta": THETA, "rope_scaling": {"type": "llama3", **LLAMA_3_1}},
        "rope_parameters": BASE | {"rope_parameters": {"rope_type": "llama3", "rope_theta": THETA, **LLAMA_3_1}},
    }[form] | {"max_position_embeddings": 131072}
    config = scaled_config(base, "llama3", 2.0, 131072, 262144)
    assert config["rope_parameters"] == {"rope_type": "llama3", "rope_theta": THETA, **LLAMA_3_1, "factor": 16.0}
    assert config["max_position_embeddings"] == 262144


def test_rope_type_none_keeps_the_scaling_of_the_base():
    base = BASE | {"rope_theta": THETA, "rope_scaling": {"rope_type": "llama3", **LLAMA_3_1}}
    config = scaled("none", base)
    assert config["rope_parameters"] == {"rope_type": "llama3", "rope_theta": THETA, **LLAMA_3_1}


@pytest.mark.parametrize("rope_type", ["linear", "ntk", "dynamic", "yarn"])
def test_other_scaling_on_a_llama3_base_is_refused(rope_type):
    """transformers has no type for both: the one would be lost in the export."""
    base = BASE | {"rope_theta": THETA, "rope_scaling": {"rope_type": "llama3", **LLAMA_3_1}}
    with pytest.raises(InputError, match=f"context.rope.type={rope_type} .* own llama3 scaling: use llama3 or none"):
        scaled(rope_type, base)


@pytest.mark.parametrize("rope_type", ["ntk", "dynamic", "yarn", "llama3"])
def test_scaling_on_a_linear_base_is_refused(rope_type):
    base = BASE | {"rope_theta": THETA, "rope_scaling": {"type": "linear", "factor": 2.0}}
    with pytest.raises(InputError, match="own linear scaling: use linear or none"):
        scaled(rope_type, base)


def rotary(rope_type: str = "linear") -> PositionRotary:
    return PositionRotary(transformers_config(scaled(rope_type)), DIM)


def far(b: int = 1) -> torch.Tensor:
    """Position ids [b, s] of a context and a terminal prompt at the end of two windows."""
    rows = [[*range(6), TARGET - 2 + i, TARGET - 1 + i, 2 * TARGET - 1] for i in range(b)]
    return torch.tensor(rows, dtype=torch.int64)


@pytest.mark.parametrize("b", [1, 3])
def test_angles_have_one_row_a_sample_in_float32(b):
    angles = rotary().rotary_angles(far(b))
    assert angles.shape == (9, b, 1, DIM)
    assert angles.dtype == torch.float32
    assert torch.equal(angles[..., : DIM // 2], angles[..., DIM // 2 :])
    for row in range(b):
        assert torch.equal(angles[:, row : row + 1], rotary().rotary_angles(far(b)[row : row + 1]))


@pytest.mark.parametrize("position", [65535, 131071])
@pytest.mark.parametrize("rope_type", ["linear", "ntk", "yarn", "llama3", "none"])
def test_angles_of_far_positions_are_products_of_exact_integers(rope_type, position):
    module = rotary(rope_type)
    angles = module.rotary_angles(torch.tensor([[position]]))[0, 0, 0, : DIM // 2]
    exact = position * module.inv_freq.double()
    # One rounding of the product to float32, none of the position.
    assert float(((angles.double() - exact).abs() / exact).max()) <= 2.0**-24
    # In bfloat16 the position alone would be off by one part in 65536, half a radian or more at the top frequency.
    assert float(torch.tensor(position).bfloat16()) != position
    before = module.rotary_angles(torch.tensor([[position - 1]]))[0, 0, 0, : DIM // 2]
    assert bool((angles > before).all())


@pytest.mark.parametrize("rope_type", TYPES)
def test_angles_give_the_cosines_and_sines_of_transformers(rope_type):
    module = rotary(rope_type)
    cos, sin = LlamaRotaryEmbedding(config=transformers_config(scaled(rope_type)))(torch.zeros(2, 1), far(2))
    angles = module.rotary_angles(far(2))[:, :, 0].transpose(0, 1)
    torch.testing.assert_close(angles.cos() * module.attention_factor, cos, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(angles.sin() * module.attention_factor, sin, rtol=1e-5, atol=1e-6)


def test_rotary_forward_is_not_stale_after_position_ids_change():
    """Megatron caches a rotary module's forward by sequence length."""
    module = rotary()
    for positions in (torch.arange(9)[None], far(), torch.arange(9)[None] + 7):
        module.position_ids = positions
        assert torch.equal(module(9), module.rotary_angles(positions))


def test_dynamic_angles_do_not_depend_on_what_came_before():
    """transformers keeps the grown frequencies until a short input comes; ours are those of each input alone."""
    module = rotary("dynamic")
    short = torch.arange(9)[None]
    first = module.rotary_angles(short)
    module.rotary_angles(far())
    assert torch.equal(module.rotary_angles(short), first)
    assert not torch.equal(module.rotary_angles(far())[:6], first[:6])


def test_config_is_not_changed_by_what_transformers_makes_of_it():
    config = scaled("linear")
    before = copy.deepcopy(config)
    transformers_config(config)
    assert config == before
    assert "rope_theta" not in config["rope_scaling"]
