#!/usr/bin/env python3
"""Make what the study stands on: corpus, tokenizer, and a small LLaMA trained from nothing by tools/extend.py.

    python benchmarks/study/prepare.py [--out runs/study]

What is there already is not made again.  The model learns with method `full` and no RoPE scaling, in rows of 256 tokens
of the corpus with distances that fit them.  OUT/base is the Hugging Face model of window 256 that the study extends.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import corpus  # noqa: E402

from endprompt_megatron.errors import InputError, run_cli  # noqa: E402
from endprompt_megatron.evaluate.recall import Form, form_as_json  # noqa: E402
from endprompt_megatron.files import staged_directory, write_text  # noqa: E402
from endprompt_megatron.prompts import PROMPTS  # noqa: E402

WINDOW, TARGET, VOCABULARY = 256, 2048, 1536
# Of each text: documents, seed, tokens of a document, longest distance, share of facts.
TEXTS = {
    "near": (400, 1, 8192, 200, 0.4),
    "far": (160, 2, 8192, TARGET - 128, 0.2),
    "held_out": (24, 3, 8192, TARGET - 128, 0.2),
}
MODEL = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=WINDOW,
    tie_word_embeddings=True,
    initializer_range=0.02,
    bos_token_id=0,
    eos_token_id=1,
)
LESSON = {"tokens": 3_000_000, "global_batch_size": 16, "micro_batch_size": 16, "log_interval": 10}


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="where everything goes (runs/study)")
    out = parser.parse_args().out
    (out / "data").mkdir(parents=True, exist_ok=True)
    form = corpus.recall_form()
    write_text(out / "recall.json", form_as_json(Form(**form)))
    for name, what in TEXTS.items():
        path = out / "data" / f"{name}.jsonl"
        if not path.exists():
            corpus.write_jsonl(path, corpus.documents(*what))
    if not (out / "untaught").exists():
        untaught(out / "untaught", out / "data" / "near.jsonl")
    for name in TEXTS:
        if not (out / "data" / f"{name}.idx").exists():
            source, prefix = out / "data" / f"{name}.jsonl", out / "data" / name
            tool("prepare_data.py", "--input", source, "--tokenizer", out / "untaught", "--out", prefix)
    if (out / "base").exists():
        return
    recipe = {
        "model": {"hf": str(out / "untaught"), "init_from": str(out / "untaught")},
        # Nothing is extended: the window of the config that is exported is the row, and RoPE stays as it is.
        "context": {
            **{"method": "full", "original": WINDOW // 2, "target": WINDOW, "physical": WINDOW},
            "rope": {"type": "none"},
        },
        "data": {"train": str(out / "data" / "near")},
        "train": LESSON,
        "optim": {"lr": 2e-3, "min_lr": 2e-4, "schedule": "cosine", "warmup_steps": 50},
        "precision": {"dtype": "float32"},
        "checkpoint": {"dir": str(out / "lesson"), "interval": 500, "keep": 1},
        "log": {"tensorboard": False},
    }
    write_text(out / "lesson.yaml", json.dumps(recipe, indent=1))
    tool("extend.py", out / "lesson.yaml")
    checkpoints = out / "lesson" / "checkpoints"
    tool("convert_megatron_to_hf.py", "--megatron", checkpoints, "--out", out / "base", "--workers", 1)


def untaught(directory: Path, corpus_file: Path) -> None:
    """A random LLaMA with a tokenizer in which every word of the corpus is one token."""
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
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **MODEL))
    with staged_directory(directory) as staging:
        model.save_pretrained(staging)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1])
        fast.save_pretrained(staging)


def tool(name: str, *arguments: object) -> None:
    """Run one of this repository's tools; its exit code becomes ours if it fails."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    print(f"$ {' '.join(command[1:])}", flush=True)
    code = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_cli(main)
