#!/usr/bin/env python3
"""Make what the study stands on: corpus, tokenizer, and a small LLaMA trained from nothing by tools/extend.py.

    python benchmarks/study/prepare.py [--out runs/study] [--seed N]

What is there already is not made again.  The model learns with method `full` and no RoPE scaling: first the drills,
in rows of 32 and 64 tokens, then text in rows of 256.  OUT/base_N is the Hugging Face model of window 256 that the
study extends; another seed gives other first weights and another order of the same text.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import corpus  # noqa: E402

from endprompt_megatron.common.errors import InputError, run_cli  # noqa: E402
from endprompt_megatron.common.files import staged_directory, write_text  # noqa: E402
from endprompt_megatron.evaluate.suites.recall_inputs import Form, form_as_json  # noqa: E402
from endprompt_megatron.method.prompts import PROMPTS  # noqa: E402

WINDOW, TARGET, VOCABULARY = 256, 2048, 640
# Of each text: documents, seed, kind, tokens of a document, then longest distance and share of facts, or keys.
TEXTS = {
    "drill_4": (60, 4, corpus.drill, 8192, 4),
    "drill_8": (250, 5, corpus.drill, 8192, 8),
    "near": (640, 1, corpus.document, 8192, 240, 0.6),
    "far": (400, 2, corpus.document, 8192, 2 * TARGET, 0.12),
    "development": (24, 6, corpus.document, 8192, 2 * TARGET, 0.12),
    "held_out": (24, 3, corpus.document, 8192, 2 * TARGET, 0.12),
}
MODEL = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=WINDOW,
    tie_word_embeddings=True,
    initializer_range=0.1,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    bos_token_id=0,
    eos_token_id=1,
)
STEP = 2048  # tokens
# Text, tokens of a row, tokens of the lesson, learning rate at its end.
LESSONS = (("drill_4", 32, 300_000, 1e-3), ("drill_8", 64, 2_000_000, 1e-3), ("near", WINDOW, 5_000_000, 5e-5))


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="where everything goes (runs/study)")
    parser.add_argument("--seed", type=int, default=0, help="of first weights and order of text (0)")
    options = parser.parse_args()
    out, seed = options.out, options.seed
    (out / "data").mkdir(parents=True, exist_ok=True)
    form = corpus.recall_form()
    write_text(out / "recall.json", form_as_json(Form(**form)))
    for name, what in TEXTS.items():
        path = out / "data" / f"{name}.jsonl"
        if not path.exists():
            corpus.write_jsonl(path, corpus.documents(*what))
    model = out / f"untaught_{seed}"
    if not model.exists():
        untaught(model, out / "data" / "near.jsonl", seed)
    for name in TEXTS:
        if not (out / "data" / f"{name}.idx").exists():
            source, prefix = out / "data" / f"{name}.jsonl", out / "data" / name
            tool("prepare_data.py", "--input", source, "--tokenizer", model, "--out", prefix)
    for number, (text, row, tokens, min_lr) in enumerate(LESSONS, 1):
        run = out / f"lesson_{number}_{seed}"
        learned = out / f"base_{seed}" if number == len(LESSONS) else run / "hf"
        if not learned.exists():
            lesson(run, model, learned, out / "data" / text, row, tokens, min_lr, seed)
        model = learned


def lesson(run: Path, model: Path, learned: Path, text: Path, row: int, tokens: int, min_lr: float, seed: int) -> None:
    """Train `model` on rows of a text, at the places where they stand, and write it to `learned`."""
    recipe = {
        "model": {"hf": str(model), "init_from": str(model)},
        # Nothing is extended: RoPE stays as it is.  The last row is the window that the base model's config names.
        "context": {
            **{"method": "full", "original": row // 2, "target": row, "physical": row},
            "rope": {"type": "none"},
        },
        "data": {"train": str(text)},
        "train": {
            "tokens": tokens,
            "seed": 1234 + seed,
            "global_batch_size": 2048 // row,
            "micro_batch_size": 2048 // row,
            "log_interval": 50,
        },
        "optim": {"lr": 1e-3, "min_lr": min_lr, "schedule": "cosine", "warmup_steps": 50, "weight_decay": 0.0},
        "precision": {"dtype": "float32"},
        "checkpoint": {"dir": str(run), "interval": 1000, "keep": 1},
        "log": {"tensorboard": False},
    }
    write_text(run.with_suffix(".yaml"), json.dumps(recipe, indent=1))
    tool("extend.py", run.with_suffix(".yaml"))
    tool("convert_megatron_to_hf.py", "--megatron", run / "checkpoints", "--out", learned, "--workers", 1)


def untaught(directory: Path, corpus_file: Path, seed: int) -> None:
    """A random LLaMA with a tokenizer in which every word of the corpus is one token.

    Its first steps of attention are easy to find: see `easy_to_teach`.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [json.loads(line)["text"] for line in corpus_file.read_text(encoding="utf-8").splitlines()[:100]]
    tokenizer.train_from_iterator(
        [*texts, *(f" {prompt}" for prompt in PROMPTS.values() for _ in range(2000))], trainer
    )
    split = [word for word in corpus.every_word() if len(tokenizer.encode(f" {word}").ids) != 1]
    if split:
        raise InputError(f"{len(split)} words are more than one token, such as {split[0]}: enlarge the vocabulary")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **MODEL))
    easy_to_teach(model)
    with staged_directory(directory) as staging:
        model.save_pretrained(staging)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1])
        fast.save_pretrained(staging)


def easy_to_teach(model: "transformers.LlamaForCausalLM") -> None:
    """Begin where looking up is soon learned: random weights in which two matrices of a head agree.

    A head attends to what resembles its query (q = k) and hands on what it reads (o is v transposed).  In the first
    layer q is k turned back by RoPE by one position: along the direction that all embeddings share, that prefers the
    token before.
    """
    import torch

    config = model.config
    size = config.hidden_size // config.num_attention_heads
    angles = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings += torch.randn(config.hidden_size) * embeddings.std()
        for back, layer in zip((1.0, 0.0), model.model.layers, strict=True):
            attention = layer.self_attn
            first, second = attention.k_proj.weight.unflatten(0, (-1, 2, size // 2)).unbind(1)
            cos, sin = (back * angles).cos()[:, None], (back * angles).sin()[:, None]
            turned = torch.stack((first * cos + second * sin, second * cos - first * sin), 1)
            attention.q_proj.weight.copy_(turned.flatten(0, 2))
            attention.o_proj.weight.copy_(0.3 * attention.v_proj.weight.T)


def tool(name: str, *arguments: object) -> None:
    """Run one of this repository's tools; its exit code becomes ours if it fails."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    print(f"$ {' '.join(command[1:])}", flush=True)
    code = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_cli(main)
