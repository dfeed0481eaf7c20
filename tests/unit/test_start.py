"""Training does not start from what is missing, broken or of another model: one line, exit code 2."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small import ROOT, assert_one_line_error, edit_json, run_tool
from unit.starting import write_tokens


def checkpoint(place: Path) -> Path:
    return place / "megatron/iter_0000000"


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# name: (overrides, damage, what the line says)
MODEL = {
    "no-config": ([], lambda p: (p / "hf/config.json").unlink(), ["hf/config.json", "no such file"]),
    "broken-config": ([], lambda p: halve(p / "hf/config.json"), ["hf/config.json", "cannot be read"]),
    "other-family": ([], lambda p: edit_json(p / "hf/config.json", model_type="gpt2"), ["model_type=gpt2", "llama"]),
    "window": (
        [],
        lambda p: edit_json(p / "hf/config.json", max_position_embeddings="64"),
        ["hf/config.json", "max_position_embeddings=64"],
    ),
    "no-tokenizer": (
        [],
        lambda p: [path.unlink() for path in (p / "hf").glob("tokenizer*")],
        ["hf", "holds no tokenizer"],
    ),
    "no-init": (["model.init_from=null"], lambda p: None, ["model.init_from is missing", "convert_hf_to_megatron.py"]),
    "init-nowhere": (["model.init_from=nowhere"], lambda p: None, ["model.init_from nowhere", "no such directory"]),
    "init-not-one": (["model.init_from=."], lambda p: None, ["model.init_from .", "no complete checkpoint"]),
    "init-incomplete": (
        [],
        lambda p: (checkpoint(p) / "endprompt.json").unlink(),
        ["model.init_from megatron", "no complete checkpoint"],
    ),
    "init-of-another": (
        [],
        lambda p: edit_json(checkpoint(p) / "hf/config.json", num_hidden_layers=3),
        ["model.init_from=megatron", "another model", "num_layers=3", "model.hf has 4"],
    ),
    "other-hf": (
        [],
        lambda p: edit_json(p / "hf/config.json", intermediate_size=128),
        ["model.init_from=megatron", "ffn_size=112", "model.hf has 128"],
    ),
    "init-truncated": (
        [],
        lambda p: halve(checkpoint(p) / "__0_0.distcp"),
        ["megatron/iter_0000000", "cannot be read"],
    ),
    "init-part-missing": (
        [],
        lambda p: (checkpoint(p) / "__0_0.distcp").unlink(),
        ["megatron/iter_0000000", "cannot be read"],
    ),
    "init-metadata": ([], lambda p: halve(checkpoint(p) / ".metadata"), ["megatron/iter_0000000", "cannot be read"]),
    "scaled-twice": (
        [],
        lambda p: edit_json(p / "hf/config.json", rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        ["context.rope.type=linear", "the model's own yarn scaling", "use yarn or none"],
    ),
    "data-nowhere": (["data.train=nowhere"], lambda p: None, ["nowhere.idx", "no such file", "prepare_data.py"]),
    "data-a-number": (["data.train=5"], lambda p: None, ["data.train=5", "PREFIX"]),
    "data-weight": (["data.train={train: -1}"], lambda p: None, ["data.train", "-1", "above 0"]),
    "data-weight-word": (
        ["data.train={train: much}"],
        lambda p: None,
        ["data.train", "weight=much of train", "a number"],
    ),
    "data-too-short": (["data.train=short"], lambda p: None, ["data.train=short", "20 tokens", "shorter than one"]),
    "data-cut": ([], lambda p: halve(p / "train.bin"), ["train.bin", "4000 bytes"]),
    "data-foreign-manifest": (
        [],
        lambda p: (p / "train.json").write_text('{"vocab_size": 400}'),
        ["data.train=train", "vocab_size=400", "320"],
    ),
    "data-of-another-tokenizer": (
        [],
        lambda p: (p / "train.json").write_text('{"tokenizer_sha256": "ids1:0123456789"}'),
        ["data.train=train", "another tokenizer (ids1:01234567)", "model.hf=hf (ids1:", "prepare it again"],
    ),
    "valid-nowhere": (["data.valid=nowhere"], lambda p: None, ["nowhere.idx", "no such file"]),
    "valid-split-0": (["data.valid='100,0'"], lambda p: None, ["data.valid=100,0", "above 0"]),
    "valid-split-empty": (["data.valid='99,1'"], lambda p: None, ["for validation", "shorter than one sample"]),
    "prompt-unknown": (["context.prompts=[EP_9]"], lambda p: None, ["context.prompts=EP_9", "EP_1, EP_2, EP_3"]),
    "prompt-too-long": (["context.physical=8"], lambda p: None, ["physical length of 8", "39 tokens"]),
    "tokenizer-of-another": (
        [],
        lambda p: edit_json(p / "hf/config.json", vocab_size=40),
        ["token id", "vocabulary of 40", "tokenizer"],
    ),
}


@pytest.mark.parametrize("case", MODEL)
def test_training_does_not_start(place, extend, case):
    overrides, damage, needles = MODEL[case]
    damage(place)
    assert_one_line_error(extend(place, "recipe.yaml", *overrides), *needles)
    assert not (place / "run/metrics.jsonl").exists()


def test_token_outside_the_vocabulary_is_refused(ground, extend):
    """Without a manifest it shows only when it is read."""
    result = extend(ground, "recipe.yaml", "data.train=foreign", "train.steps=40", "checkpoint.dir=foreign-run")
    assert_one_line_error(result, "foreign.bin", "token id", "320")


def test_run_goes_on_only_with_the_recipe_and_the_checkpoint_it_was_started_with(place, extend):
    arguments = ["recipe.yaml", "train.steps=1", "optim.warmup_steps=0"]
    done = extend(place, *arguments)
    assert done.returncode == 0, done.stderr
    assert "done already" in extend(place, *arguments).stdout
    changed = extend(place, *arguments[:1], "context.target=128")
    assert_one_line_error(changed, "context.target=128", "run/checkpoints/iter_0000001", "256", "checkpoint.dir")
    # The same data under another path goes on, other data under the same path does not.
    for suffix in (".bin", ".idx"):
        (place / f"train{suffix}").rename(place / f"moved{suffix}")
    assert "done already" in extend(place, *arguments, "data.train=moved").stdout
    write_tokens(place / "train", 5000, seed=9)
    assert_one_line_error(extend(place, *arguments), "data.train: train is not the data", "(train as it was then)")
    for other in ("data.train={moved: 2}", "data.train=[moved, train]", "data.train={moved: {prompts: [EP_2]}}"):
        changed = extend(place, *arguments, other)
        assert_one_line_error(changed, "was trained with train: keep its sources, their weights and prompts")
    (place / "moved.bin").rename(place / "train.bin")
    (place / "moved.idx").rename(place / "train.idx")
    halve(next((place / "run/checkpoints/iter_0000001").glob("*.distcp")))
    assert_one_line_error(extend(place, "recipe.yaml"), "run/checkpoints", "only damaged ones", "iter_0000001.damaged")


@pytest.fixture
def anywhere(place) -> Path:
    """The recipe with absolute paths, for any working directory."""
    path = place / "recipe.yaml"
    recipe = path.read_text()
    for name in ("hf", "megatron", "train", "run"):
        recipe = recipe.replace(f": {name}", f": {place / name}")
    path.write_text(recipe)
    return path


@pytest.mark.parametrize("processes", [1, 2])
def test_command_line_says_one_line_and_exits_2(anywhere, processes):
    result = run_tool("extend", anywhere, "context.target=64", "--processes", processes)
    assert_one_line_error(result, "recipe.yaml: context.target=64")


def test_a_start_that_waits_for_ranks_that_nobody_starts_ends_with_the_reason(anywhere):
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ENDPROMPT_START_SECONDS": "2"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        alone["MASTER_PORT"] = str(free.getsockname()[1])
    result = run_tool("extend", anywhere, env=alone)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for said in ("WORLD_SIZE=2 processes should meet at 127.0.0.1:", "within 2 s", "ENDPROMPT_START_SECONDS"):
        assert said in errors[0]
    assert "Traceback" not in result.stderr


def test_ranks_that_fail_together_say_one_line(anywhere):
    result = run_tool("extend", anywhere, "--processes", 2, "model.init_from=nowhere", env={"OMP_NUM_THREADS": "1"})
    assert_one_line_error(result, "model.init_from nowhere", "no such directory")


def test_the_training_loop_is_imported_without_megatron_which_would_read_the_environment_too_early():
    """Transformer Engine takes its variables on import, and the recipe's are set when the loop begins."""
    code = "import sys, endprompt_megatron.train; print([name for name in sys.modules if name.startswith('megatron')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_groups_are_not_bound_to_a_device_and_wait_as_long_as_they_are_told(monkeypatch):
    """Bound to one, they would connect at once, and send and receive over one communicator."""
    import torch.distributed as dist

    from endprompt_megatron.distributed import runtime

    given = {}
    monkeypatch.setattr(runtime, "has_cuda", lambda: True)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([("a store", 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options, backend=backend))
    runtime._initialise_process_group(runtime.Launch(0, 1, 0), 90.0)
    assert given["backend"] == "nccl"
    assert given.get("device_id") is None
    assert given["timeout"].total_seconds() == 90
