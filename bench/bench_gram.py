"""The Gram matrix alone, N x D features of every dtype to fp32: pyfold's half product against torch.mm and numpy's ssyrk.

Run by hand: ``pytest bench/bench_gram.py [--scale small]``. Rooflines: torch.mm of large square matrices, in fp32 (FMA units)
and in bf16 (tiles or dot units, where the processor has them). With tiles pyfold sums several bf16 products for one of fp32 or
fp16, so both rooflines are printed for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from conftest import Report
from pytest_benchmark.fixture import BenchmarkFixture

from pyfold import ops


@dataclass(frozen=True)
class Sizes:
    """N points, D features; side of the rooflines' squares; rounds, of which the best counts."""

    n: int
    d: int
    square: int
    rounds: int


SIZES = {
    "full": Sizes(n=11008, d=12288, square=8192, rounds=3),
    "small": Sizes(n=1024, d=1152, square=2048, rounds=5),
}
ASKED = {"pyfold fp32": ">= 1.7", "pyfold bf16": ">= 3.5"}  # times as fast as the fp32 torch.mm
CONTENDERS = (
    "torch.mm fp32",
    "torch.mm bf16, rounded to bf16",
    "numpy ssyrk fp32",
    "pyfold fp32",
    "pyfold fp16",
    "pyfold bf16",
    "roofline fp32",
    "roofline bf16",
)


@pytest.fixture(scope="module")
def seconds(report: Report) -> Iterator[dict[str, float]]:
    """Contender -> best seconds. Becomes a table."""
    table = report.tables.setdefault("Gram matrix", [])
    best: dict[str, float] = {}
    yield best
    sizes = report.sizes
    full = 2.0 * sizes.n**2 * sizes.d
    roofs = {
        f"done / roofline {dtype}": 2.0 * sizes.square**3 / best.pop(f"roofline {dtype}")
        for dtype in ("fp32", "bf16")
        if f"roofline {dtype}" in best
    }
    for contender, taken in best.items():
        # torch.mm computes the whole product; the others one triangle, diagonal included, and mirror it.
        done = full if "torch.mm" in contender else sizes.n * (sizes.n + 1.0) * sizes.d
        table.append(
            {
                "contender": contender,
                "seconds": taken,
                "x as fast as torch.mm fp32": best["torch.mm fp32"] / taken if "torch.mm fp32" in best else None,
                "asked": ASKED.get(contender),
                "GFLOP/s of 2 N² D": full / taken / 1e9,
                "GFLOP/s done": done / taken / 1e9,
                **{name: done / taken / roof for name, roof in roofs.items()},
            }
        )
    for name, roof in roofs.items():
        report.notes.append(
            f"{name.removeprefix('done / ')}: torch.mm of squares, side {sizes.square}, {roof / 1e9:.1f} GFLOP/s."
        )


@pytest.mark.parametrize("contender", CONTENDERS)
def test_gram(benchmark: BenchmarkFixture, seconds: dict[str, float], report: Report, contender: str) -> None:
    sizes = report.sizes
    shape = (sizes.square, sizes.square) if "roofline" in contender else (sizes.n, sizes.d)
    dtype = torch.bfloat16 if "bf16" in contender else torch.float16 if "fp16" in contender else torch.float32
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    points = x.numpy() if "numpy" in contender else x
    multiply = {"pyfold": ops.gram, "numpy": lambda x: x @ x.T}.get(contender.split()[0], lambda x: torch.mm(x, x.T))
    benchmark.pedantic(multiply, args=(points,), rounds=sizes.rounds, warmup_rounds=1)
    seconds[contender] = benchmark.stats.stats.min
