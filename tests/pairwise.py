"""Cases that cover every pair of values of any two axes.

Faults that need three axes at once are rare; those that need two are what a list of cases with one axis varied at a
time overlooks.  The covering set is made greedily, the same each time.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping

Case = dict[str, str]
Allowed = Callable[[Case], bool]


def covering(axes: Mapping[str, Iterable[str]], allowed: Allowed = lambda case: True) -> list[Case]:
    """Allowed cases that together hold each pair of values that any allowed case holds.

    `allowed` is asked about whole cases.  Axes: two or more.
    """
    axes = {name: list(values) for name, values in axes.items()}
    # In order, so that ties are broken alike in every run: a set of strings has another order each time.
    missing = {
        frozenset([(one, a), (two, b)]): None
        for (one, first), (two, second) in itertools.combinations(axes.items(), 2)
        for a, b in itertools.product(first, second)
    }
    cases = []
    while missing:
        pair = next(iter(missing))
        case = _completed(dict(sorted(pair, key=lambda each: list(axes).index(each[0]))), axes, missing, allowed)
        if case is None:  # no allowed case holds it
            del missing[pair]
            continue
        cases.append({name: case[name] for name in axes})
        for held in itertools.combinations(case.items(), 2):
            missing.pop(frozenset(held), None)
    return cases


def _completed(case: Case, axes: dict[str, list[str]], missing: dict, allowed: Allowed) -> Case | None:
    """The case with every axis set, value by value the one that covers most; None if that is never allowed."""
    left = [name for name in axes if name not in case]
    if not left:
        return case if allowed(case) else None

    def gained(name: str, value: str) -> int:
        return sum(frozenset([(name, value), held]) in missing for held in case.items())

    # The axis that has most to gain first, and on it the values from the best to the worst.
    name = max(left, key=lambda name: max(gained(name, value) for value in axes[name]))
    for value in sorted(axes[name], key=lambda value: -gained(name, value)):
        found = _completed({**case, name: value}, axes, missing, allowed)
        if found is not None:
            return found
    return None


def named(case: Case) -> str:
    """The id of a case in a list of tests."""
    return "-".join(case.values())


def first_of_each(first: Iterable[str], second: Iterable[str]) -> list:
    """Parameters (one, other) of a test: the first of either axis with all of the other; the rest under --all."""
    import pytest

    first, second = list(first), list(second)
    return [
        pytest.param(one, other, marks=[] if one == first[0] or other == second[0] else pytest.mark.full)
        for one, other in itertools.product(first, second)
    ]
