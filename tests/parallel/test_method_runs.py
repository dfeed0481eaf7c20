"""Whole runs of the methods that differ most: trained, validated, stopped, and resumed with a larger budget."""

import json

import pytest
from parallel.jobs import Jobs
from small import run_tool, small_llama, text

from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

RECALL = "context.recall={tokens: 12, key: 4, cue: 'Again:', share: 0.75}"
RUNS = {
    "full": ["context.method=full", "context.physical=256", "parallel.recompute=full", "parallel.context=2"],
    "curriculum-recall": [
        "context.method=end_prompt_curriculum",
        "context.curriculum_samples=24",
        RECALL,
        "parallel.context=2",
    ],
    "multi-recall": ["context.method=end_prompt_multi", "context.anchors=2", RECALL, "train.micro_batch_size=2"],
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    directory = tmp_path_factory.mktemp("methods")
    small_llama(directory / "hf")
    convert_hf_to_megatron(directory / "hf", directory / "megatron")
    (directory / "corpus.jsonl").write_text("".join(json.dumps({"text": text(300, n)}) + "\n" for n in range(60)))
    prepared = run_tool(
        "prepare_data",
        *("--input", directory / "corpus.jsonl", "--tokenizer", directory / "hf", "--out", directory / "train"),
    )
    assert prepared.returncode == 0, prepared.stderr
    (directory / "recipe.yaml").write_text(
        f"model: {{hf: {directory / 'hf'}, init_from: {directory / 'megatron'}}}\n"
        "context: {target: 256, physical: 128, prompts: [EP_3, EP_2]}\n"
        f"data: {{train: {directory / 'train'}, valid: '9,1'}}\n"
        "train: {steps: 8, global_batch_size: 4, valid_interval: 4, valid_samples: 4, virtual_distances: [256]}\n"
        "optim: {lr: 1.0e-2, warmup_steps: 1}\n"
        "checkpoint: {dir: UNSET, interval: 4}\n"
        "log: {tensorboard: false}\n"
    )
    return directory, Jobs(tmp_path_factory.mktemp("jobs"))


def lines(directory, key):
    read = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if key in line]


def test_too_little_held_out_text_for_a_probe_is_said_in_one_line(setup):
    directory, jobs = setup
    keys = [*RUNS["multi-recall"][:3], "train.valid_samples=1"]
    said = jobs.run(directory / "recipe.yaml", f"checkpoint.dir={directory / 'little'}", *keys, ranks=1, codes=(2,))
    assert "train.valid_samples=1: the held-out samples have" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "multi-recall" else pytest.mark.full) for name in RUNS]
)
def test_it_trains_and_a_larger_budget_goes_on_where_it_stopped(setup, name):
    directory, jobs = setup
    recipe, keys = directory / "recipe.yaml", RUNS[name]
    jobs.run(recipe, f"checkpoint.dir={directory / name}", *keys)
    steps = lines(directory / name, "loss")
    assert len(steps) == 8
    assert steps[-1]["loss_context"] < steps[0]["loss_context"]
    assert all((line["loss_prompt"] is None) == (name == "full") for line in steps)
    assert [line["step"] for line in lines(directory / name, "valid_loss")] == [0, 4, 8]

    resumed = f"{name}-resumed"
    jobs.run(recipe, f"checkpoint.dir={directory / resumed}", "train.steps=4", *keys)
    jobs.run(recipe, f"checkpoint.dir={directory / resumed}", *keys)
    for key in ("step", "loss", "loss_prompt", "grad_norm", "targets"):
        assert [line[key] for line in lines(directory / resumed, "loss")] == [line[key] for line in steps], key
    if name != "full":
        said = jobs.run(recipe, f"checkpoint.dir={directory / resumed}", *keys, "context.recall.key=5", codes=(2,))
        assert "context.recall.key=5" in said
        assert "trained with" in said
