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


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Side by side (-n 2 --dist loadgroup): a file of tests/unit is a group; all tests that start several processes are
    # one, so that they have each other's ports and cores to themselves.
    for item in items:
        folder = item.path.parent.name
        group = f"{folder}/{item.path.name}" if folder == "unit" else "several processes"
        item.add_marker(pytest.mark.xdist_group(group))
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
