"""Files as version 0.1.0 wrote them, for tests/unit/test_golden.py: what users have on their disks must stay readable.

    python tests/golden/make.py

was run once, at version 0.1.0 (commit c7f3cac, whose names it imports), and is not rerun: later code would write later
files.  It stays to say where the fixtures are from.  Each is an archive that unpacks to a place of its own, and what is
stored names other files relative to that place:

    run.tar.xz         hf/ megatron/ train.* recipe.yaml, and two runs of tools/extend.py:
                       run/      two pipeline stages, asynchronous checkpoints, killed in step 7, newest of step 4
                       adapters/ LoRA on packed documents, one process, finished
    conversion.tar.xz  hf/ megatron/, and two conversions that were interrupted: .again.partial (of hf/, all weights
                       written, not yet described) and .back.partial (of megatron/, two of several weight files)
    dataset.tar.xz     texts.jsonl chats.jsonl hf/, and what tools/prepare_data.py made of them: text.* text-valid.*
                       chat.* (with chat.mask.*), and recipes that read them
    evaluation.tar.xz  hf/ book.txt longbench/ and run/ with hf/ and evaluation/, complete: six suites, two models
    study.tar.xz       study.yaml with its recipe, text and base model, and study/, done, with study.json

recorded.json holds what was read from them then: losses, checksums of tensors, samples, scores.  Preflight and the
planner store nothing: their JSON is for whoever asks.  The study in benchmarks/study is a golden study.json as well.
"""

import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

WINDOW, TARGET, STEPS = 1024, 2048, 12
MODEL = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=264,
    max_position_embeddings=WINDOW,
    tie_word_embeddings=True,
)
RECIPE = f"""
model: {{hf: hf, init_from: megatron}}
context: {{target: {TARGET}, physical: 64, method: end_prompt_random, prompts: [EP_3, EP_2], prompt_loss_weight: 0.5}}
data: {{train: train}}
train: {{steps: {STEPS}, global_batch_size: 4, virtual_distances: [64, 512, 2048], valid_interval: 4, valid_samples: 8}}
optim: {{lr: 1.0e-3, warmup_steps: 2, schedule: cosine, weight_decay: 0.1}}
precision: {{dtype: float32}}
checkpoint: {{dir: run, interval: 4, keep: 1, async: true}}
log: {{tensorboard: false}}
"""
RUN = ["parallel.pipeline=2", "data.train={train: 3, more: 1}", "data.valid=held"]
ADAPTERS = [
    *("checkpoint.dir=adapters", "checkpoint.async=false", "train.valid_interval=0", "train.virtual_distances=[]"),
    *("train.steps=4", "longlora.rank=2", "longlora.train_embeddings=false", "data.packing=documents"),
    "context.method=end_prompt",
]
EVALUATION = [
    *("--hf", "run/hf", "--baseline", "hf", "--text", "book.txt", "--out", "run/evaluation", "--beyond-window"),
    *("--suite", "perplexity,needle,recall,virtual,ruler,longbench", "--lengths", "1024,2048", "--dtype", "float32"),
    *("--scored", "128", "--stride", "512", "--samples", "3", "--depths", "0.2,0.8", "--physical", "64"),
    *("--recall-distances", "128,768", "--distances", "64,512,2048", "--probe-samples", "2", "--threads", "1"),
    *("--ruler-tasks", "niah_single_1,fwe", "--ruler-samples", "2", "--longbench-data", "longbench"),
    *("--longbench-tasks", "qasper,trec"),
]
STUDY = """
base: recipe.yaml
out: study
title: A golden study
about: As version 0.1.0 stored it.
axes: {method: {short: {context.method: short}, end_prompt: {context.method: end_prompt}}, seed: [1, 2]}
overrides: {train.steps: 4, checkpoint.interval: 2, optim.warmup_steps: 1, checkpoint.keep: 1,
  train.valid_interval: 0, train.virtual_distances: [], checkpoint.async: false}
untrained: {interpolated: {context.rope.type: linear}}
evaluation: {suite: [perplexity, recall], lengths: [128, 256], scored: 16, samples: 4, text: train, dtype: float32,
  recall_distances: [90], recall_form: form.json, beyond_window: true, threads: 1}
reference: short
keep: scores
"""
FORM = {"fact": " it {key} {value}", "question": " it {key}", "keys": ["zebra"], "values": ["up", "one"]}
FORM |= {"key_words": 1, "value_words": 2}


def tool(name: str, *arguments: object) -> str:
    """Run tools/NAME.py here, and return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (command, done.stderr, done.stdout)
    return done.stdout


def whole_seconds(*directories: Path) -> None:
    """Times of change that an archive keeps: conversions and evaluations tell files apart by them."""
    for directory in directories:
        for path in [directory, *directory.rglob("*")]:
            os.utime(path, (1_790_000_000, 1_790_000_000))


def model(place: Path) -> None:
    from small import small_llama

    small_llama(place / "hf", dtype="bfloat16", **MODEL)
    whole_seconds(place / "hf")


def pack(place: Path, name: str) -> None:
    """All of a place as an archive that says nothing of who made it."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime = int(entry.mtime)
        return entry

    with lzma.open(HERE / f"{name}.tar.xz", "wb", preset=9 | lzma.PRESET_EXTREME) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for path in sorted(place.iterdir()):
                archive.add(path, arcname=path.name, filter=plain)
    print(f"{name}: {(HERE / f'{name}.tar.xz').stat().st_size:,} bytes")


def tensors(directory: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a Hugging Face directory, by name."""
    import torch
    from safetensors import safe_open

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                value = file.get_tensor(name)
                digest = hashlib.sha256(f"{value.dtype} {list(value.shape)}".encode())
                digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                found[name] = digest.hexdigest()[:16]
    return found


def checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}


def prepared(place: Path) -> None:
    """train, more and held: prepared text of several documents."""
    from small import text

    for number, (name, documents, words) in enumerate((("train", 40, 60), ("more", 10, 90), ("held", 8, 60))):
        lines = [json.dumps({"text": text(words + 7 * at, 100 * number + at)}) for at in range(documents)]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        tool("prepare_data", "--input", f"{name}.jsonl", "--tokenizer", "hf", "--out", name, "--workers", 1)
        (place / f"{name}.jsonl").unlink()


def run(place: Path) -> dict:
    from parallel.jobs import Jobs, steps_of

    model(place)
    tool("convert_hf_to_megatron", "--hf", "hf", "--out", "megatron", "--workers", 1)
    prepared(place)
    (place / "recipe.yaml").write_text(RECIPE)
    outside = Path(tempfile.mkdtemp())
    jobs = Jobs(outside)
    jobs.run("recipe.yaml", *RUN, f"checkpoint.dir={outside / 'whole'}")
    job = jobs.start("recipe.yaml", *RUN, trouble=("hang", 0, 7))
    while len(steps_of(place / "run")) < 6 or not (place / "run/checkpoints/iter_0000004").exists():
        time.sleep(0.1)
    time.sleep(1)
    job.kill()
    (place / "run" / "lock").write_text("")  # the test machine would wait for the holder's heartbeat
    tool("extend", "recipe.yaml", *ADAPTERS)
    for name in ("run", "adapters"):
        tool("convert_megatron_to_hf", "--megatron", f"{name}/checkpoints", "--out", outside / name, "--workers", 1)
    return {
        "overrides": RUN,
        "steps": steps_of(outside / "whole"),
        "exported": tensors(outside / "run"),
        "adapters": {
            "overrides": ADAPTERS,
            "steps": steps_of(place / "adapters"),
            "merged": tensors(outside / "adapters"),
        },
        "inspected": json.loads(tool("inspect_checkpoint", "run/checkpoints", "--json")),
    }


def conversion(place: Path) -> dict:
    import pytest

    from endprompt_megatron.convert import layout, units
    from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
    from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

    model(place)
    tool("convert_hf_to_megatron", "--hf", "hf", "--out", "megatron", "--workers", 1)
    whole_seconds(place / "megatron")
    original, count = units._once, []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def once(*arguments: object) -> dict:
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(1)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "write_latest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert_hf_to_megatron(Path("hf"), Path("again"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "_once", once)
        with pytest.raises(KeyboardInterrupt):
            convert_megatron_to_hf(Path("megatron"), Path("back"), max_shard_size="5KB")
    outside = Path(tempfile.mkdtemp())
    tool("convert_megatron_to_hf", "--megatron", "megatron", "--out", outside / "back", "--max-shard-size", "5KB")
    return {
        "place": str(place),
        "megatron": checksums(place / "megatron"),
        "back": checksums(outside / "back"),
        "tensors": tensors(outside / "back"),
        "kept": {name: checksums(place / name) for name in (".again.partial", ".back.partial")},
    }


def dataset(place: Path) -> dict:
    from chat_files import chat_tokenizer, conversations, write_chats
    from small import small_llama, text

    fields = MODEL | {"vocab_size": 312}
    small_llama(place / "hf", dtype="bfloat16", tokenizer=False, **fields)
    chat_tokenizer(place / "hf")
    (place / "hf" / "model.safetensors").unlink()
    lines = [json.dumps({"text": text(30 + 11 * number, number)}) for number in range(30)]
    (place / "texts.jsonl").write_text("\n".join([*lines, lines[3], json.dumps({"text": ""})]) + "\n")
    write_chats(place / "chats.jsonl", conversations(20))
    options = ("--tokenizer", "hf", "--workers", 1, "--held-out", 0.2)
    tool("prepare_data", "--input", "texts.jsonl", "--out", "text", "--dedup", "--min-tokens", 40, *options)
    tool("prepare_data", "--input", "chats.jsonl", "--chat", "--out", "chat", *options)
    base = "model: {hf: hf}\ntrain: {steps: 6, global_batch_size: 4}\ncheckpoint: {dir: run}\n"
    recipes = {
        "text": "context: {target: 2048, physical: 128, method: end_prompt_random, prompts: [EP_3, EP_2]}\n"
        "data: {train: text, valid: text-valid}\n",
        "packed": "context: {target: 2048, physical: 256, method: end_prompt}\n"
        "data: {train: text, packing: documents}\n",
        "recall": "context: {target: 2048, physical: 256, recall: {tokens: 16, key: 4, cue: 'Again:'}}\n"
        "data: {train: text}\n",
        "chat": "context: {target: 1024, physical: 1024, method: short, rope: {type: keep}}\n"
        "data: {train: chat, kind: chat, packing: documents}\n",
    }
    samples = {}
    for name, recipe in recipes.items():
        (place / f"{name}.yaml").write_text(base + recipe)
        count = 1 if name == "chat" else 3
        samples[name] = json.loads(tool("inspect_data", f"{name}.yaml", "--samples", count, "--json"))
    looked = tool("inspect_data", "--prefix", "chat", "--tokenizer", "hf", "--samples", 2, "--json")
    return {
        "files": {name: sha for name, sha in checksums(place).items() if name.startswith(("text", "chat"))},
        "samples": samples,
        "documents": json.loads(looked),
    }


def evaluation(place: Path) -> dict:
    from small import text

    of = place.parent / "run"
    shutil.copytree(of / "hf", place / "hf")
    (place / "run").mkdir()
    for name in ("recipe.yaml", "metrics.jsonl", "data_seen.json"):
        if (of / "run" / name).exists():
            shutil.copy(of / "run" / name, place / "run" / name)
    checkpoints = of / "run" / "checkpoints"
    tool("convert_megatron_to_hf", "--megatron", checkpoints, "--out", "run/hf", "--dtype", "bfloat16", "--workers", 1)
    (place / "book.txt").write_text(text(1500, seed=9))
    for name in ("data/qasper.jsonl", "data/trec.jsonl", "config/dataset2prompt.json"):
        (place / "longbench" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / "longbench" / name, place / "longbench" / name)
    whole_seconds(place)
    tool("evaluate", *EVALUATION)
    for plot in (place / "run/evaluation").glob("*.png"):
        plot.unlink()
    return {"options": EVALUATION}


def study(place: Path) -> dict:
    of = place.parent / "run"
    for name in ("hf", "megatron"):
        shutil.copytree(of / name, place / name)
    for path in of.glob("train.*"):
        shutil.copy(path, place / path.name)
    (place / "recipe.yaml").write_text(RECIPE)
    (place / "study.yaml").write_text(STUDY)
    (place / "form.json").write_text(json.dumps(FORM))
    whole_seconds(place)
    tool("study", "study.yaml")
    for path in (place / "study").rglob("*.png"):
        path.unlink()
    for path in (place / "study").rglob("*.log"):
        path.unlink()
    return {"listed": tool("study", "study.yaml", "--list").splitlines()}


def main() -> None:
    base = Path("/tmp/golden")  # what conversions store of their absolute paths
    recorded = json.loads((HERE / "recorded.json").read_text()) if (HERE / "recorded.json").exists() else {}
    for made in (run, conversion, dataset, evaluation, study):
        name = made.__name__
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        place = base / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        os.chdir(place)
        recorded[name] = made(place)
        pack(place, name)
        lines = [f' "{key}": {json.dumps(value, sort_keys=True)}' for key, value in recorded.items()]
        (HERE / "recorded.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
