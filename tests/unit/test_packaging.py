"""What an installation and a reader rely on: requirements, recipes, `--help`, the layout."""

import ast
import builtins
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from small import PATIENCE

from endprompt_megatron.config.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SOURCES = sorted([*(ROOT / "endprompt_megatron").rglob("*.py"), *(ROOT / "tools").glob("*.py")])

# Module -> distribution, where the names differ.
DISTRIBUTIONS = {"megatron": "megatron-core", "yaml": "pyyaml", "google": "protobuf"}
# Used if there, never required: each import is guarded where it stands.
OPTIONAL = {
    *("lm_eval", "transformer_engine", "mpi4py", "wandb", "apex", "pynvml", "nvidia_resiliency_ext", "vllm"),
}


def requirements(name: str) -> dict[str, Requirement]:
    """The requirements of a file by canonical name; comments, blank lines and options left out."""
    lines = (line.split(" #")[0].strip() for line in (ROOT / name).read_text().splitlines())
    parsed = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def test_a_machine_without_a_gpu_is_never_asked_for_apex_or_transformer_engine():
    for name in ("requirements.txt", "requirements-dev.txt", "constraints.txt"):
        assert not {"apex", "transformer-engine"} & set(requirements(name)), name
    # On the public package index `apex` is an unrelated web toolkit.
    assert "apex" not in requirements("requirements-gpu.txt")


def test_the_tested_versions_satisfy_the_ranges():
    pinned = {}
    for name, requirement in requirements("constraints.txt").items():
        (only,) = requirement.specifier
        assert only.operator == "==", name
        pinned[name] = Version(only.version)
    wanted = {**requirements("requirements.txt"), **requirements("requirements-dev.txt")}
    for name, requirement in wanted.items():
        assert name in pinned, f"{name} has no tested version in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} does not allow {pinned[name]}"


def test_every_module_that_is_imported_is_required():
    required = set(requirements("requirements.txt"))
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for top in {name.partition(".")[0] for name in names}:
                if top in sys.stdlib_module_names or top in OPTIONAL or top == "endprompt_megatron":
                    continue
                assert DISTRIBUTIONS.get(top, top) in required, f"{path.relative_to(ROOT)} imports {top}"


def test_nothing_names_an_index_or_a_registry():
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-gpu.txt", "constraints.txt", "Makefile"):
        text = (ROOT / name).read_text()
        assert not re.search(r"index-url|find-links|trusted-host|https?://", text), name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    recipe = load_recipe(path)
    assert recipe.context.target > recipe.context.original or recipe.context.rope.type == "keep"
    assert recipe.context.physical <= recipe.context.target


def test_the_published_recipe_is_the_published_setting():
    recipe = load_recipe(ROOT / "recipes" / "llama3_8b_64k.yaml")
    assert (recipe.context.original, recipe.context.target, recipe.context.physical) == (8192, 65536, 8192)
    assert (recipe.context.method, recipe.context.rope.type, recipe.context.rope.factor) == ("end_prompt", "linear", 8)
    assert (recipe.train.tokens, recipe.train.global_batch_size, recipe.train.steps) == (1_000_000_000, 64, 1908)
    assert (recipe.optim.lr, recipe.optim.warmup_steps, recipe.optim.schedule) == (2e-5, 20, "constant")
    assert (recipe.optim.weight_decay, recipe.precision.dtype) == (0.0, "bfloat16")


@pytest.mark.parametrize("name", TOOLS)
def test_help_comes_without_the_heavy_imports(name, tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / f"{name}.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "usage:" in result.stdout
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    }
    for module in ("torch", "transformers", "megatron.core", "matplotlib", "pyarrow"):
        assert module not in imported, f"tools/{name}.py --help imports {module}"


@pytest.mark.parametrize("path", [*RECIPES, ROOT / "Makefile", *SOURCES], ids=lambda path: path.name)
def test_nothing_is_left_half_done(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 420  # about 400
    for word in ("TO" + "DO", "FIX" + "ME", "Not" + "ImplementedError"):
        assert word not in text


LAYOUT = {
    ".": "Makefile README.md benchmarks constraints.txt docs pyproject.toml recipes requirements.txt "
    "requirements-dev.txt requirements-gpu.txt .ci/run",
    "endprompt_megatron": "train.py config method model training distributed checkpoint convert tokenizer data "
    "evaluate report study demo plan preflight common",
    "recipes": "llama3_8b_64k.yaml smollm2_135m_demo.yaml",
    "tests": "unit parallel",
    "tools": "convert_hf_to_megatron.py convert_megatron_to_hf.py prepare_data.py extend.py evaluate.py report.py "
    "coverage.py demo.py plan.py preflight.py",
}


@pytest.mark.parametrize("directory", LAYOUT)
def test_what_the_layout_promises_exists(directory):
    missing = [name for name in LAYOUT[directory].split() if not (ROOT / directory / name).exists()]
    assert not missing


def test_scripts_are_executable_and_shell_is_strict():
    for path in [ROOT / ".ci" / "run", *(ROOT / "slurm").glob("*.sh")]:
        text = path.read_text()
        assert "set -euo pipefail" in text or path.name == "common.sh", path.name
        # extend.sh is sourced by the batch scripts and never run.
        assert os.access(path, os.X_OK) == (path.name != "extend.sh"), path.name


def test_make_alone_lists_every_command():
    result = subprocess.run(["make"], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    for command in ("demo", "demo-control", "test", "lint", "clean"):
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE), command


@pytest.mark.parametrize(
    ("module", "spared"),
    [
        ("convert.to_megatron", {"megatron.core", "transformers"}),
        ("convert.to_hf", {"megatron.core", "transformers"}),
        ("data.corpus.prepare", {"torch", "megatron.core", "transformers"}),
        ("plan.plan_page", {"torch", "megatron.core", "transformers"}),
        ("evaluate.evaluate_command", {"torch", "megatron.core", "transformers"}),
        ("report.page", {"torch", "megatron.core", "transformers"}),
    ],
)
def test_a_tools_module_spares_the_imports_it_does_not_need(module, spared):
    """Each of these takes seconds to import, and worker processes pay for it again."""
    code = f"import sys, endprompt_megatron.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not spared & set(loaded.split())


def test_no_two_modules_of_the_package_have_the_same_name():
    paths = {}
    for path in (ROOT / "endprompt_megatron").rglob("*.py"):
        if path.stem != "__init__":
            paths.setdefault(path.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in paths.items() if len(found) > 1} == {}


def test_no_module_of_the_package_shadows_the_standard_library_or_a_builtin():
    taken = {*sys.stdlib_module_names, *dir(builtins)} - {"__init__", "__main__"}
    names = {path.stem for path in (ROOT / "endprompt_megatron").rglob("*.py")} - {"__init__", "__main__"}
    assert names & taken == set()
