"""Runs over packed documents: stopped and resumed, on other layouts, with validation and probes."""

import json
import random

import pytest
from parallel.jobs import Jobs
from small import run_tool, small_llama, text

from endprompt_megatron.common.files import read_json
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

FLOAT32 = "precision.dtype=float32"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def setup(tmp_path_factory, jobs):
    """A model, a corpus of short and long documents, a recipe that packs them; and the losses of the whole run."""
    directory = tmp_path_factory.mktemp("packing")
    small_llama(directory / "hf")
    convert_hf_to_megatron(directory / "hf", directory / "megatron")
    lengths = random.Random(1)
    documents = [text(int(lengths.lognormvariate(2.5, 1.0)) + 1, seed) for seed in range(600)]
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    (directory / "corpus.jsonl").write_text("".join(lines))
    prepared = run_tool(
        "prepare_data",
        *("--input", directory / "corpus.jsonl", "--tokenizer", directory / "hf", "--out", directory / "train"),
    )
    assert prepared.returncode == 0, prepared.stderr
    (directory / "recipe.yaml").write_text(
        f"model: {{hf: {directory / 'hf'}, init_from: {directory / 'megatron'}}}\n"
        "context: {target: 256, physical: 64, prompts: [EP_3, EP_2], method: end_prompt_random}\n"
        f"data: {{train: {directory / 'train'}, valid: '9,1', packing: documents, align: 4}}\n"
        "train: {steps: 30, global_batch_size: 4, valid_interval: 15, valid_samples: 8, virtual_distances: [64, 256]}\n"
        "optim: {lr: 1.0e-3, warmup_steps: 2, schedule: cosine}\n"
        "checkpoint: {dir: UNSET, interval: 4}\n"
        "log: {tensorboard: false}\n"
    )
    for name, overrides in (("whole", []), ("float32", [FLOAT32])):
        jobs.run(directory / "recipe.yaml", f"checkpoint.dir={directory / name}", *overrides, ranks=1)
    return directory


@pytest.fixture
def run(jobs, setup):
    """Run the recipe into a directory of that name; what it said."""

    def start(name, *overrides, ranks=1, codes=(0,)):
        return jobs.run(setup / "recipe.yaml", f"checkpoint.dir={setup / name}", *overrides, ranks=ranks, codes=codes)

    return start


def stop(jobs, setup, name, *overrides):
    """Start a run that gets SIGTERM in its seventh step: it stops with 75 before its end."""
    arguments = setup / "recipe.yaml", f"checkpoint.dir={setup / name}", *overrides
    jobs.run(*arguments, ranks=1, codes=(75,), trouble=("SIGTERM", 0, 7))
    assert 7 <= steps(setup, name)[-1]["step"] < 30


def metrics(directory, name):
    return [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]


def steps(directory, name):
    return [line for line in metrics(directory, name) if "loss" in line]


def validations(directory, name):
    return [line for line in metrics(directory, name) if "valid_loss" in line]


@pytest.mark.full
def test_resume_after_sigterm_is_bit_exact(jobs, setup, run):
    stop(jobs, setup, "stopped")
    run("stopped")
    for key in ("step", "loss", "loss_prompt", "grad_norm", "targets"):
        assert [line[key] for line in steps(setup, "stopped")] == [line[key] for line in steps(setup, "whole")], key
    assert validations(setup, "stopped") == validations(setup, "whole")


def test_it_learns_and_says_how_full_the_rows_are(setup, run):
    said = run("said", "train.steps=3", "train.valid_interval=0")
    assert "rows of 64 tokens" in said
    assert "% of them real" in said
    found = steps(setup, "whole")
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    # Of 4 rows of 64 tokens nearly all are real, and each sample has one token without a target.
    assert all(150 < line["targets"] < 256 for line in found)


def test_validation_and_probes_run_over_packed_documents(setup):
    found = validations(setup, "whole")
    assert [line["step"] for line in found] == [0, 15, 30]
    assert found[-1]["valid_loss"] < found[0]["valid_loss"]
    assert all(set(line["virtual"]) == {"64", "256"} for line in found)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["train.micro_batch_size=4"]),
        (2, []),
        (2, ["parallel.context=2", "train.micro_batch_size=2"]),
        (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.micro_batch_size=2"]),
        (2, ["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch_size=2"]),
    ],
    ids=["micro-batch-4", "dp2", "cp2", "pp2-vpp2", "tp2-sp"],
)
def test_layouts_train_on_the_same_rows(setup, run, ranks, overrides):
    name = "-".join([*overrides, "float32"]).replace("=", "-")
    run(name, FLOAT32, *overrides, ranks=ranks)
    assert_like_float32(setup, name)
    for ours, alone in zip(validations(setup, name), validations(setup, "float32"), strict=True):
        assert ours["valid_loss"] == pytest.approx(alone["valid_loss"], rel=1e-5)
        for distance, at in ours["virtual"].items():
            assert at["loss"] == pytest.approx(alone["virtual"][distance]["loss"], rel=1e-5)


def assert_like_float32(setup, name):
    for ours, alone in zip(steps(setup, name), steps(setup, "float32"), strict=True):
        assert (ours["step"], ours["targets"]) == (alone["step"], alone["targets"])
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_a_run_goes_on_with_another_number_of_replicas_and_ranks(jobs, setup, run):
    stop(jobs, setup, "moved", FLOAT32)
    run("moved", FLOAT32, "parallel.context=2", ranks=4)
    assert_like_float32(setup, "moved")


def test_another_alignment_is_refused_on_resume(run, setup):
    said = run("whole", "data.align=8", codes=(2,))
    assert "data.align=8" in said
    assert "trained with 4" in said


def test_the_recipe_as_resolved_names_the_alignment(setup, run):
    plain = ["data.valid=null", "train.virtual_distances=[]", "train.valid_interval=0"]
    run("resolved", "train.steps=3", "data.align=null", *plain)
    from omegaconf import OmegaConf

    assert OmegaConf.load(setup / "resolved" / "recipe.yaml").data.align == 1
    [description] = (setup / "resolved" / "index").glob("packed-*.json")
    assert read_json(description, "a packed epoch")["align"] == 1
