"""The batch scripts without Slurm: their syntax, what a dry run prints, what they refuse in one line."""

import os
import re
import subprocess

import pytest
from small import PATIENCE, ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
EXTEND = [script for script in SCRIPTS if script.name.startswith("extend_")]
SHARED = ("common.sh", "extend.sh", "node.sh")  # sourced by the batch scripts, or run on each node
BATCH = [script for script in SCRIPTS if script.name not in SHARED]
SETTINGS = ("HF_MODEL", "DATA", "RUN", "RECIPE", "VENV", "CONTAINER_IMAGE", "ENDPROMPT_HOME", "NODES", "EXPORT")


def bash(*command: object, **environment: object) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS and not k.startswith(("SLURM_", "EVALUATE_"))}
    values = {key: str(value) for key, value in environment.items()}
    return subprocess.run(
        ["bash", *map(str, command)], capture_output=True, text=True, env={**clean, **values}, timeout=PATIENCE
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_batch_script_is_valid_bash_and_strict(script):
    assert bash("-n", script).returncode == 0
    if script.name != "common.sh":
        assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_help_of_a_batch_script_names_every_required_variable(script):
    said = bash(script, "--help")
    assert said.returncode == 0, said.stderr
    assert "#SBATCH" not in said.stdout
    text = script.read_text()
    text += "".join((ROOT / "slurm" / name).read_text() for name in re.findall(r"^source .*/(\w+\.sh)", text, re.M))
    for name in {*re.findall(r"^ *need(?:_path)? ([A-Z_]+)", text, re.M), "VENV", "CONTAINER_IMAGE"}:
        assert re.search(rf"^ +{name}\b", said.stdout, re.MULTILINE), name


@pytest.mark.parametrize("script", EXTEND, ids=lambda path: path.name)
def test_dry_run_prints_every_command_on_a_laptop(script):
    said = bash(script, "--dry-run", "optim.lr=1e-5")
    assert (said.returncode, said.stderr) == (0, "")
    commands = said.stdout.splitlines()
    tools = [re.search(r"tools/(\w+)\.py|slurm/(evaluate)\.sh", line).group(0) for line in commands]
    wanted = "preflight convert_hf_to_megatron extend convert_megatron_to_hf".split()
    assert tools == [*(f"tools/{name}.py" for name in wanted), "slurm/evaluate.sh"]
    nodes = re.search(r"#SBATCH --nodes=(\d+)", script.read_text()).group(1)
    assert f"--nodes={nodes} " in commands[2]
    recipe = re.search(r"recipes/\w+\.yaml", commands[2]).group(0)
    assert (ROOT / recipe).is_file()
    assert commands[2].endswith("checkpoint.dir=$RUN optim.lr=1e-5")


def test_a_run_that_starts_from_the_huggingface_directory_converts_nothing():
    said = bash(ROOT / "slurm" / "extend_70b.sh", "--dry-run", HF_MODEL="/models/llama", MEGATRON_MODEL="/models/llama")
    assert said.returncode == 0
    assert "convert_hf_to_megatron" not in said.stdout
    assert "model.init_from=/models/llama " in said.stdout


def test_dry_run_shows_the_container_and_its_mounts(tmp_path):
    said = bash(
        ROOT / "slurm" / "extend_8b.sh",
        "--dry-run",
        CONTAINER_IMAGE="nvcr.io#nvidia/pytorch:25.12-py3",
        HF_MODEL="/models/llama",
        DATA="/data/train",
        RUN="/runs/one",
    )
    line = said.stdout.splitlines()[2]
    assert "--container-image=nvcr.io#nvidia/pytorch:25.12-py3" in line
    assert (
        f"--container-mounts={ROOT}:{ROOT},/models/llama:/models/llama,/models:/models,/data:/data,/runs:/runs" in line
    )


@pytest.mark.parametrize("name", ["convert.sh", "prepare_data.sh", "evaluate.sh"])
def test_dry_run_of_the_other_scripts(name):
    said = bash(ROOT / "slurm" / name, "--dry-run")
    assert (said.returncode, said.stderr) == (0, "")
    assert all(line.startswith("srun ") for line in said.stdout.splitlines())


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "needle"),
    [
        ("extend_8b.sh", [], {}, "start it with sbatch"),
        ("extend_8b.sh", ["--fast"], {}, "--fast: not an option"),
        ("extend_8b.sh", ["--dry-run"], {"RECIPE": "recipes/none.yaml"}, "RECIPE=recipes/none.yaml: no such recipe"),
        ("extend_8b.sh", ["--dry-run"], {"ENDPROMPT_HOME": "/nowhere"}, "/nowhere is not the repository"),
        ("extend_8b.sh", [], {"SLURM_JOB_ID": "1"}, "neither VENV nor CONTAINER_IMAGE is set"),
        ("extend_8b.sh", [], {"SLURM_JOB_ID": "1", "VENV": "/nowhere"}, "VENV=/nowhere"),
        ("convert.sh", ["--dry-run", "sideways"], {}, "expected to-megatron or to-hf"),
    ],
)
def test_wrong_use_of_a_batch_script_ends_in_one_line(script, arguments, environment, needle):
    said = bash(ROOT / "slurm" / script, *arguments, **environment)
    assert said.returncode == 2
    (line,) = said.stderr.splitlines()
    assert line.startswith("error: ")
    assert needle in line
