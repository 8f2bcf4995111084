"""Widths of all groups under one budget, from each group's error at every width.

Where errors are convex in the width, taking units where the next one helps most per parameter is optimal; other curves count by
their lower convex hull, and the result is within one step of a hull of the best.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Curve(NamedTuple):
    """Of one group: its error with K = 1..N units kept, (N,) float64, and the parameters that a unit costs."""

    errors: NDArray[np.float64]
    cost: int


def allocate(curves: Sequence[Curve], budget: int, *, multiple_of: int = 1) -> list[int]:
    """Widths of least total error whose parameters are at most ``budget``.

    Parameters
    ----------
    curves : sequence of Curve
    budget : int
        Parameters that all groups together may keep.
    multiple_of : int
        Every width is a multiple of it, or the group's own.

    Returns
    -------
    list of int
        A width for each group, at least ``multiple_of`` (or all its units, if it has fewer).

    Raises
    ------
    ValueError
        If the budget does not hold the least widths.
    """
    choices = [_choices(len(curve.errors), multiple_of) for curve in curves]
    at = [0] * len(curves)
    left = budget - sum(int(widths[0]) * curve.cost for widths, curve in zip(choices, curves, strict=True))
    if left < 0:
        raise ValueError(f"a budget of {budget} parameters is {-left} short of the least widths")
    steps: list[tuple[float, int, int]] = []  # gain per parameter, negative; group; where on its hull it leads

    def offer(group: int) -> None:
        """The steepest way on from where a group is, as far as the budget goes."""
        widths, curve, here = choices[group], curves[group], at[group]
        ahead = widths[here + 1 :]
        ahead = ahead[(ahead - widths[here]) * curve.cost <= left]
        if len(ahead):
            gains = (curve.errors[widths[here] - 1] - curve.errors[ahead - 1]) / ((ahead - widths[here]) * curve.cost)
            best = len(gains) - 1 - int(np.argmax(gains[::-1]))
            heapq.heappush(steps, (-float(gains[best]), group, here + 1 + best))

    for group in range(len(curves)):
        offer(group)
    while steps:
        _, group, to = heapq.heappop(steps)
        cost = int(choices[group][to] - choices[group][at[group]]) * curves[group].cost
        if cost <= left:  # as offered; else the budget has shrunk since
            left -= cost
            at[group] = to
        offer(group)
    return [int(widths[i]) for widths, i in zip(choices, at, strict=True)]


def common_width(curves: Sequence[Curve], budget: int, *, multiple_of: int = 1) -> int:
    """The largest one width for all groups, which are of one size, within ``budget``; errors as :func:`allocate`."""
    [n] = {len(curve.errors) for curve in curves}
    widths = _choices(n, multiple_of)
    fits = widths[widths * sum(curve.cost for curve in curves) <= budget]
    if not len(fits):
        raise ValueError(f"a budget of {budget} parameters does not hold one width of {widths[0]}")
    return int(fits[-1])


def total_error(curves: Sequence[Curve], widths: Sequence[int]) -> float:
    """Of all groups at their widths."""
    return float(sum(curve.errors[width - 1] for curve, width in zip(curves, widths, strict=True)))


def _choices(n: int, multiple_of: int) -> NDArray[np.int64]:
    return np.unique(np.append(np.arange(multiple_of, n, multiple_of), n))
