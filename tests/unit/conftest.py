import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ruler_files
from small import small_llama
from unit.starting import RECIPE, extend_here, write_tokens


@pytest.fixture(scope="session")
def ground(tmp_path_factory) -> Path:
    """A model, its checkpoint, data and a recipe that is right, all named relative to the directory."""
    from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

    root = tmp_path_factory.mktemp("ground")
    small_llama(root / "hf")
    convert_hf_to_megatron(root / "hf", root / "megatron")
    write_tokens(root / "train", 4000)
    write_tokens(root / "short", 20)
    write_tokens(root / "foreign", 4000, below=400)
    (root / "file").write_text("in the way")
    (root / "recipe.yaml").write_text(RECIPE)
    return root


@pytest.fixture
def place(tmp_path, ground) -> Path:
    """A copy to break."""
    return shutil.copytree(ground, tmp_path / "place")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A small model to evaluate."""
    return small_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model_dir):
    from endprompt_megatron.evaluate.engines.transformers_engine import TransformersEngine

    return TransformersEngine(model_dir, "cpu", dtype="float32")


@pytest.fixture(scope="session")
def process():
    """A process of its own: training redirects parts of torch where there is no GPU."""
    from parallel.ranks import Ranks

    pool = Ranks(1)
    yield pool
    pool.close()


@pytest.fixture
def extend(process):
    """tools/extend.py, run in a directory with arguments: exit code, stdout, stderr."""

    def run(directory: Path, *arguments: str, world_size: int = 1) -> SimpleNamespace:
        code, out, err = process.run(1, extend_here, str(directory), list(map(str, arguments)), world_size)[0]
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


@pytest.fixture
def at(monkeypatch):
    """Run preflight in a directory, as one process: findings by check, and the exit code."""
    from endprompt_megatron.preflight.checks import Options
    from endprompt_megatron.preflight.checks import run as preflight

    def run(directory: Path, *overrides: str, **options) -> tuple[dict, int]:
        monkeypatch.chdir(directory)
        for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
            monkeypatch.delenv(name, raising=False)
        outcome = preflight("recipe.yaml", list(overrides), Options(**options))
        return {finding.check: finding for finding in outcome.findings}, outcome.code

    return run


@pytest.fixture(scope="session")
def ruler(tmp_path_factory) -> Path:
    """Self-made sources for RULER, and a tokenizer."""
    return ruler_files.write_all(tmp_path_factory.mktemp("ruler") / "files")


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> Path:
    """What reports.py makes: made/ with models and texts, run/ with a training and an evaluation by every suite."""
    from unit import reports

    root = tmp_path_factory.mktemp("measured")
    reports.sources(root / "made")
    reports.trained(root / "run", root / "made")
    reports.evaluated(root / "made", root / "run" / "evaluation", suites=reports.SUITES)
    return root


@pytest.fixture(scope="session")
def pieces(ruler):
    from endprompt_megatron.tokenizer import load_tokenizer

    return load_tokenizer(ruler / "tokenizer")


@pytest.fixture
def asking(ruler):
    """RulerSettings of these sources, with changes."""
    from endprompt_megatron.evaluate.suites.ruler import RulerSettings

    def made(**changes) -> RulerSettings:
        return RulerSettings(**{"lengths": (8192,), "samples": 2, **ruler_files.settings(ruler), **changes})

    return made
