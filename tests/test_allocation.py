"""Widths under a budget: the best there are, by trying all."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyfold.allocation import Curve, allocate, common_width, total_error


@st.composite
def problems(draw: st.DrawFn, *, convex: bool) -> tuple[list[Curve], int]:
    curves = []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, 6))
        drops = np.array(draw(st.lists(st.integers(0, 50), min_size=n - 1, max_size=n - 1)), dtype=np.float64)
        if convex:
            drops = np.sort(drops)[::-1]
        errors = np.append(drops[::-1].cumsum()[::-1], 0.0)
        curves.append(Curve(errors, 1 if convex else draw(st.integers(1, 4))))
    least, most = (sum(k * curve.cost for k, curve in zip(ks, curves, strict=True)) for ks in _ends(curves))
    return curves, draw(st.integers(least, most + 2))


def _ends(curves: list[Curve]) -> tuple[list[int], list[int]]:
    return [1] * len(curves), [len(curve.errors) for curve in curves]


def _best(curves: list[Curve], budget: int) -> float:
    every = product(*(range(1, len(curve.errors) + 1) for curve in curves))
    fits = (ks for ks in every if sum(k * c.cost for k, c in zip(ks, curves, strict=True)) <= budget)
    return min(total_error(curves, ks) for ks in fits)


@given(problems(convex=True))
def test_convex_errors_are_allocated_as_well_as_can_be(problem: tuple[list[Curve], int]) -> None:
    curves, budget = problem
    widths = allocate(curves, budget)
    assert sum(widths) <= budget
    assert total_error(curves, widths) == pytest.approx(_best(curves, budget))


@given(problems(convex=False))
def test_any_errors_are_allocated_within_one_step_of_the_best(problem: tuple[list[Curve], int]) -> None:
    curves, budget = problem
    widths = allocate(curves, budget)
    assert sum(k * curve.cost for k, curve in zip(widths, curves, strict=True)) <= budget
    largest = max(float(curve.errors[0]) for curve in curves)
    assert total_error(curves, widths) <= _best(curves, budget) + largest + 1e-9


@given(problems(convex=True), st.integers(1, 4))
def test_widths_are_multiples_or_whole(problem: tuple[list[Curve], int], multiple: int) -> None:
    curves, _ = problem
    budget = sum(len(curve.errors) for curve in curves)
    widths = allocate(curves, budget, multiple_of=multiple)
    assert widths == [len(curve.errors) for curve in curves], "all fits"
    tight = sum(min(multiple, len(curve.errors)) for curve in curves)
    for k, curve in zip(allocate(curves, tight, multiple_of=multiple), curves, strict=True):
        assert k == min(multiple, len(curve.errors))


def test_a_fragile_group_keeps_its_units() -> None:
    errors = np.linspace(1, 0, 10) ** 2
    fragile, robust = allocate([Curve(100 * errors, 3), Curve(errors, 3)], 36)
    assert fragile + robust == 12
    assert fragile == 10


def test_common_width_is_the_largest_that_fits() -> None:
    curves = [Curve(np.linspace(1, 0, 10), 3)] * 4
    assert common_width(curves, 4 * 3 * 7) == 7
    assert common_width(curves, 4 * 3 * 8 - 1) == 7
    assert common_width(curves, 4 * 3 * 7, multiple_of=4) == 4


def test_a_budget_that_holds_nothing_is_refused() -> None:
    curves = [Curve(np.linspace(1, 0, 10), 3)] * 2
    with pytest.raises(ValueError, match="2 short of the least widths"):
        allocate(curves, 4)
    with pytest.raises(ValueError, match="does not hold one width of 4"):
        common_width(curves, 23, multiple_of=4)
