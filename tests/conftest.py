"""Two sizes of the suite: `make test` covers, `make test-all` (pytest --all) is exhaustive.

A test that is marked `full` runs under --all alone; a test that draws at random does so a few times, and often under
--all.  The draws have a fresh seed in each run, which the first lines name: --seed repeats them.
"""

import random

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the exhaustive tests too, and many random draws")
    parser.addoption("--seed", type=int, help="of the random draws, to repeat those of an earlier run")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(1_000_000)


def pytest_report_header(config: pytest.Config) -> str:
    return f"random draws: --seed {config.option.seed}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Two workers side by side, file by file: one begins with those that start several processes, Slurm's first, the
    other with tests/unit; the first that runs out of its own helps with the other's.

    What a module sets up is set up once, and ranks have the cores to themselves for most of the time.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "tests/slurm" if file.startswith("tests/slurm") else file  # one Slurm is started, once

        def _assign_work_unit(self, node) -> None:
            first = node is next(iter(self.assigned_work))
            ours = [scope for scope in self.workqueue if scope.startswith("tests/unit/") != first]
            # From the others' end: what they come to last.
            chosen = ours[0] if ours else next(reversed(self.workqueue))
            if first and "tests/slurm" in self.workqueue:
                chosen = "tests/slurm"
            self.workqueue.move_to_end(chosen, last=False)
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
