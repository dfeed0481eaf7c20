"""The vLLM engine against transformers: the same losses and the same greedy answers.

VLLM_PYTHON=…/python pytest tests/engines; see test_other_engines.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from engines.test_other_engines import python_with, run
from small import small_llama

from endprompt_megatron.evaluate.engines.transformers_engine import TransformersEngine

HERE = Path(__file__).resolve().parent
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def test_losses_and_answers_equal_transformers(tmp_path):
    python = python_with("vllm", "VLLM_PYTHON")
    model = small_llama(
        tmp_path / "model", hidden_size=256, intermediate_size=256, num_hidden_layers=2, rope_parameters=LINEAR,
        max_position_embeddings=256, eos_token_id=None,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tokens, prompts = rng.integers(3, 300, (2, 200)), [rng.integers(3, 300, n).tolist() for n in (60, 10, 100, 33)]
    asked = {"tokens": tokens.tolist(), "prompts": prompts, "expected": [7, 8, 9], "last": 150, "longest": 256}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    run(
        [python, HERE / "vllm_asked.py", model, tmp_path / "asked.json", tmp_path / "out.json"],
        {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    found = json.loads((tmp_path / "out.json").read_text())

    engine = TransformersEngine(model, "cpu", dtype="float32")
    losses, correct = engine.token_losses(tokens, last=150)
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-4, atol=1e-4)
    assert found["correct"] == correct.tolist()
    answer = engine.answer(prompts[0], [7, 8, 9], 6)
    assert found["generated"] == answer.generated
    np.testing.assert_allclose(found["logprobs"], answer.logprobs, rtol=1e-4, atol=1e-4)
    assert found["ranks"] == answer.ranks.tolist()
    assert found["together"] == [engine.generate(ids, 4 + number) for number, ids in enumerate(prompts)]
    assert found["ended"] == answer.generated[: answer.generated.index(answer.generated[3])]
    assert "takes no position ids" in found["refused"]
    assert found["described"]["vllm"]


@pytest.mark.skipif(__import__("importlib").util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_refused_in_one_line(tmp_path):
    from small import assert_one_line_error, run_tool

    result = run_tool("evaluate", "--hf", tmp_path, "--lengths", 64, "--out", tmp_path / "out", "--engine", "vllm")
    assert_one_line_error(result, "--engine vllm: vllm is not installed here; pip install vllm")
