"""Two sizes of the suite: `make test` covers, `make test-all` (pytest --all) is exhaustive.

A test that is marked `full` runs under --all alone; a test that draws at random does so a few times, and often under
--all.  The draws have a fresh seed in each run, which the first lines name: --seed repeats them.
"""

import os
import random

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the exhaustive tests too, and many random draws")
    parser.addoption("--seed", type=int, help="of the random draws, to repeat those of an earlier run")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        given = getattr(config, "workerinput", {})  # what the process that started this worker says
        config.option.seed = given.get("seed", random.SystemRandom().randrange(1_000_000))
    if os.environ.get("PYTEST_XDIST_WORKER", _WITH_RANKS) != _WITH_RANKS:
        os.nice(19)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"random draws: --seed {config.option.seed}"


_WITH_RANKS = "gw0"  # the worker that has the tests with several processes
# Of those tests the ones that run beside the others: of two ranks or less, or short.
_BESIDE = tuple(f"tests/parallel/test_{name}.py" for name in ("engine_megatron", "convert_layouts", "method_runs"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Workers side by side: one has the tests that start several processes, the others those of tests/unit, file by
    file, and a few of the first kind at the end.

    Ranks and Slurm's jobs then have their ports, and the other workers give way to them: ranks that wait for each other
    at every step take five times as long where each of them also waits for a core.  What a module sets up is set up
    once.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return file if file.startswith(("tests/unit/", *_BESIDE)) else "several processes"

        def _assign_work_unit(self, node) -> None:
            for scope in _BESIDE:
                if scope in self.workqueue:
                    self.workqueue.move_to_end(scope)
            if "several processes" in self.workqueue:
                self.workqueue.move_to_end("several processes", last=node.gateway.id != _WITH_RANKS)
            super()._assign_work_unit(node)

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.all:
        return
    full = [item for item in items if item.get_closest_marker("full")]
    if full:
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture
def draws(request: pytest.FixtureRequest) -> random.Random:
    """Random draws of a test: others in each run, the same ones for the same --seed.  Said where the test fails."""
    print(f"--seed {request.config.option.seed}")
    return random.Random(f"{request.config.option.seed} {request.path.name} {request.node.name}")


@pytest.fixture
def few_or_many(request: pytest.FixtureRequest):
    """few_or_many(3, 20): the first number, or the second under --all."""
    return lambda few, many: many if request.config.option.all else few
