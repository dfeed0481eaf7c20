"""The helper that picks the layouts, methods and models which are tested together."""

import itertools

import pytest
from pairwise import covering, named

AXES = {
    "layout": ["tp1", "tp2", "pp2", "cp2", "dp2", "cp4"],
    "method": ["a", "b", "c", "d", "e"],
    "rope": ["linear", "yarn", "dynamic", "none"],
    "rows": ["1", "2", "3"],
}


def every(axes: dict, rule) -> list[dict]:
    """The product of the axes as far as it is allowed."""
    cases = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [case for case in cases if rule(case)]


def refused(case: dict) -> bool:
    return (case["layout"].startswith("cp") and case["rope"] == "dynamic") or (
        case["method"] == "e" and case["rows"] == "3" and case["rope"] != "none"
    )


def allowed(case: dict) -> bool:
    return not refused(case)


def pairs(cases: list[dict]) -> set:
    return {frozenset(pair) for case in cases for pair in itertools.combinations(case.items(), 2)}


@pytest.mark.parametrize("rule", [lambda case: True, allowed], ids=["all-allowed", "some-refused"])
def test_a_covering_set_holds_every_pair_that_the_product_holds(rule):
    chosen = covering(AXES, rule)
    assert pairs(chosen) == pairs(every(AXES, rule))
    assert all(rule(case) for case in chosen)
    assert all(list(case) == list(AXES) for case in chosen)
    assert len({named(case) for case in chosen}) == len(chosen)


def test_a_covering_set_is_small():
    """The two longest axes alone ask for 6 x 5 cases; the product has 360."""
    assert 30 <= len(covering(AXES)) <= 36
    ten = {f"axis{number}": ["0", "1"] for number in range(10)}
    assert len(covering(ten)) <= 12  # of 1024


def test_a_covering_set_is_the_same_in_every_run():
    assert covering(AXES, allowed) == covering(AXES, allowed)
    reordered = {name: AXES[name] for name in reversed(AXES)}
    assert pairs(covering(reordered, allowed)) == pairs(covering(AXES, allowed))


def test_a_pair_that_needs_a_third_value_which_is_refused_is_left_out():
    axes = {"a": ["0", "1"], "b": ["0", "1"], "c": ["0", "1"]}
    chosen = covering(axes, lambda case: not (case["a"] == case["b"] == "1"))
    assert frozenset([("a", "1"), ("b", "1")]) not in pairs(chosen)
    assert len(pairs(chosen)) == 11


def test_a_case_is_named_by_its_values():
    assert named(covering(AXES)[0]) == "tp1-a-linear-1"
