"""Layers of a billion parameters and more in a memory that does not hold their Gram matrix, beside the plan.

Run by hand: ``pytest bench/bench_layer.py [--scale small] [--cache DIR]``. LLaMA-70B's layer is folded in the small memory and
in a large one, to the same bytes; that of LLaMA-405B (2.6 billion feed-forward parameters, G alone 10.6 GiB) in the small one
only. Takes half an hour and 30 GB of disk; the sources stay in the cache.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import child
import pytest
from conftest import MAKE, Report
from folds import fold

Case = tuple[str, str, str | None, str]  # preset, memory, larger memory to compare with, aim


@dataclass(frozen=True)
class Sizes:
    """make_checkpoint.py's presets, each with its memory; share of the units to remove."""

    cases: tuple[Case, ...]
    ratio: float


SIZES = {
    "full": Sizes((("llama-70b-1layer", "2GiB", "8GiB", "< 2"), ("llama-405b-1layer", "6GiB", None, "< 6")), ratio=0.2),
    "small": Sizes((("small", "300MiB", "2GiB", "< 0.3"),), ratio=0.2),
}


@pytest.mark.parametrize("case", range(2))
def test_layer(report: Report, request: pytest.FixtureRequest, case: int) -> None:
    if case >= len(report.sizes.cases):
        pytest.skip("one case at this scale")
    preset, memory, larger, asked = report.sizes.cases[case]
    source = Path(request.config.getoption("--cache")) / preset
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        assert child.run([sys.executable, MAKE, "--preset", preset, source]).returncode == 0
    result = source.with_name(f"{preset}-folded")
    shutil.rmtree(result, ignore_errors=True)  # a killed run's
    folded = fold(source, result, report.sizes.ratio, memory)
    group = folded.plan["groups"][0]
    report.tables[f"{preset} under {memory}"] = [
        *folded.rows(asked),
        {"measured": "rows of G at once", "value": float(group["rows"] or group["width"]), "asked": None},
    ]
    if larger:
        whole = fold(source, result, report.sizes.ratio, larger)
        assert whole.plan["groups"][0]["rows"] is None, "G is in memory"
        report.tables[f"{preset} under {larger}"] = whole.rows(f"< {float(larger.removesuffix('GiB')):g}")
        assert folded.sha256 == whole.sha256, "the same bytes in both"
        report.notes.append(f"{preset}: the same bytes with {memory} as with {larger}.")
