"""What Transformer Engine is told by its environment, on the GPU that a recipe would run on."""

import os
import sys

import pytest

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed import te
from endprompt_megatron.distributed.hardware import of_kind

HOPPER = of_kind("h100")
ATTENTION, PICKLES = "NVTE_DPA_FP8_RECIPE", "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    return os.environ


def recipe(fp8_recipe: str, attention: bool = False) -> Recipe:
    made = Recipe()
    made.precision.fp8, made.precision.fp8_recipe, made.precision.fp8_attention = "hybrid", fp8_recipe, attention
    return made


def test_fp8_attention_with_current_scaling_gets_delayed_scaling_on_hopper(environment):
    te.set_environment(recipe("tensorwise", attention=True), "test", HOPPER)
    assert environment[ATTENTION] == "DelayedScaling"
    assert PICKLES not in environment


def test_setting_variables_after_transformer_engine_was_imported_is_an_error(environment, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", object())
    te.set_environment(recipe("tensorwise"), "test", HOPPER)
    with pytest.raises(RuntimeError, match="imported already"):
        te.set_environment(recipe("tensorwise", attention=True), "test", HOPPER)
    environment[ATTENTION] = "DelayedScaling"
    te.set_environment(recipe("tensorwise", attention=True), "test", HOPPER)


def test_an_environment_variable_that_contradicts_the_recipe_is_refused(environment):
    environment[ATTENTION] = "F16"
    with pytest.raises(InputError, match=f"{ATTENTION}=F16 is set, and test needs {ATTENTION}=DelayedScaling"):
        te.set_environment(recipe("tensorwise", attention=True), "test", HOPPER)


def test_a_deterministic_run_keeps_transformer_engine_from_other_algorithms(environment):
    made = recipe("delayed")
    made.train.deterministic = True
    assert te.set_environment(made, "test", HOPPER)["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"


@pytest.mark.parametrize("chosen", [None, "0"])
def test_scales_of_delayed_scaling_are_loaded_on_resume_unless_the_user_forbids_it(environment, chosen):
    if chosen is not None:
        environment[PICKLES] = chosen
    te.set_environment(recipe("delayed"), "test", HOPPER)
    assert environment[PICKLES] == (chosen or "1")


def test_the_loss_is_the_projects_own_beside_transformer_engine_too(monkeypatch):
    from endprompt_megatron.model import llama

    monkeypatch.setattr(llama, "has_transformer_engine", lambda: True)
    chosen = llama._fusions(shared_positions=True, deterministic=True)
    assert "cross_entropy_loss_fusion" not in chosen
    assert (chosen["apply_rope_fusion"], chosen["deterministic_mode"]) == (True, True)


@pytest.mark.parametrize(
    ("hidden", "fp8", "method", "sms"), [(8192, False, "pipeline", 16), (16384, True, "ring_exchange", 1)]
)
def test_user_buffers_are_set_as_nvidia_sets_them_on_an_h100(monkeypatch, hidden, fp8, method, sms):
    """With a stand-in for Transformer Engine, that keeps what it is told."""
    from types import SimpleNamespace

    from unit.test_shape import config

    from endprompt_megatron.model.shape import shape_of

    told = {}
    modes = SimpleNamespace(FP8="fp8", NONE="none")
    base = SimpleNamespace(UserBufferQuantizationMode=modes, initialize_ub=lambda **options: told.update(options))
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module", SimpleNamespace(base=base))
    monkeypatch.setattr(te, "here", lambda: HOPPER)
    made = recipe("tensorwise")
    made.precision.fp8, made.precision.bf16_edge_layers = "hybrid" if fp8 else None, 1 if fp8 else 0
    made.parallel.tensor, made.parallel.context, made.parallel.overlap_tensor = 4, 2, True
    te.share_buffers(made, shape_of(config(hidden, 28672, 80, 64, 8, 128256), "config.json"))
    assert told["shape"] == [4096, hidden]
    assert told["quantization_modes"] == (["fp8", "none"] if fp8 else ["none"])
    settings = told["ub_cfgs"][0]
    assert (settings["fc2_fprop"]["method"], settings["fc2_fprop"]["num_sm"]) == (method, sms)
    assert settings["qkv_wgrad"]["num_sm"] == 24
    assert len(settings) == 10
    assert len(told["ub_cfgs"]) == len(told["quantization_modes"])
