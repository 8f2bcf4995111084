"""The CUDA kernels without a GPU: compiled by g++ and run as fibers (tests/cuda_on_host), against the CPU's and the reference.

Blocks, warps and lanes run in shuffled orders: a result that depends on them, or a barrier that some thread misses, fails.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from pyfold import ops
from pyfold.clustering import labels_of
from pyfold.ops import Joins

ROOT = Path(__file__).parents[1]
HOST = ROOT / "tests" / "cuda_on_host"
COMPILER = shutil.which("g++")
FLAGS = "-std=c++17 -O1 -ffp-contract=off -fno-gnu-unique -fno-extern-tls-init -Wno-unknown-pragmas".split()
GUARD = 0x5A

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


def compile_on_host(out: Path, *sources: Path, shared: bool = True) -> Path:
    flags = [*FLAGS, *(["-shared", "-fPIC"] if shared else []), f"-I{HOST}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}"]
    subprocess.run(
        [str(COMPILER), *flags, "-x", "c++", *map(str, sources), str(HOST / "emulator.cpp"), "-o", str(out)], check=True
    )
    return out


class WardProblem(ctypes.Structure):
    _fields_ = (
        ("gram", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("n_clusters", ctypes.c_int64),
        ("lo", ctypes.c_void_p),
        ("hi", ctypes.c_void_p),
        ("height", ctypes.c_void_p),
    )


class HartiganProblem(ctypes.Structure):
    _fields_ = (
        ("gram", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("n_clusters", ctypes.c_int64),
        ("max_moves", ctypes.c_int64),
        ("labels", ctypes.c_void_p),
        ("gains", ctypes.c_void_p),
        ("moves", ctypes.c_void_p),
    )


class OnHost:
    """The library's ops over lists of problems, as the bindings call them; the workspace is dirty and guarded."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def _call(self, op: str, problems: ctypes.Array, seed: int) -> None:
        ctypes.c_uint32.in_dll(self.library, "cuda_on_host_seed").value = seed
        size = getattr(self.library, f"pyfold_cuda_{op}_workspace")
        size.restype = ctypes.c_size_t
        count = ctypes.c_int64(len(problems))
        bytes_ = size(problems, count)
        workspace = torch.full((bytes_ + 4096,), GUARD, dtype=torch.uint8)
        aligned = -workspace.data_ptr() % 256
        assert (
            getattr(self.library, f"pyfold_cuda_{op}")(problems, count, ctypes.c_void_p(workspace.data_ptr() + aligned), None)
            == 0
        )
        assert bool((workspace[:aligned] == GUARD).all())
        assert bool((workspace[aligned + bytes_ :] == GUARD).all())

    def ward(
        self, grams: Sequence[torch.Tensor], ks: Sequence[int], weights: Sequence[torch.Tensor], seed: int = 1
    ) -> list[Joins]:
        joins = []
        for g, k in zip(grams, ks, strict=True):
            n = len(g) - k
            joins.append(Joins(torch.full((n,), -1), torch.full((n,), -1), torch.full((n,), torch.nan, dtype=torch.float64)))
        before = [g.clone() for g in grams]
        problems = [
            WardProblem(g.data_ptr(), w.data_ptr(), len(g), k, *(t.data_ptr() for t in j))
            for g, k, w, j in zip(grams, ks, weights, joins, strict=True)
        ]
        self._call("ward", (WardProblem * len(problems))(*problems), seed)
        assert all(torch.equal(g, b) for g, b in zip(grams, before, strict=True)), "the matrices are as they were"
        return joins

    def hartigan(
        self,
        grams: Sequence[torch.Tensor],
        starts: Sequence[torch.Tensor],
        ks: Sequence[int],
        weights: Sequence[torch.Tensor],
        max_moves: int = 5000,
        seed: int = 1,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        labels = [start.clone() for start in starts]
        gains = [torch.full((max_moves,), torch.nan, dtype=torch.float64) for _ in grams]
        moves = torch.full((len(grams),), -1)
        problems = [
            HartiganProblem(g.data_ptr(), w.data_ptr(), len(g), k, max_moves, *(t.data_ptr() for t in (label, gain, made)))
            for g, w, k, label, gain, made in zip(grams, weights, ks, labels, gains, moves, strict=True)
        ]
        self._call("hartigan", (HartiganProblem * len(problems))(*problems), seed)
        return [(label, gain[:made]) for label, gain, made in zip(labels, gains, moves.tolist(), strict=True)]


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> OnHost:
    sources = [ROOT / "csrc/cuda" / name for name in ("ward.cu", "hartigan.cu")]
    return OnHost(compile_on_host(tmp_path_factory.mktemp("cuda") / "kernels.so", *sources))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clustered(n: int) -> torch.Tensor:
    centres = torch.randn(max(1, n // 4), 24, generator=generator(n))
    return centres[torch.randint(0, len(centres), (n,), generator=generator(1))] + 0.3 * torch.randn(
        n, 24, generator=generator(2)
    )


def spread_norms(n: int) -> torch.Tensor:
    """Near-orthogonal rows of log-normal norms: every row's nearest neighbour is the shortest one, so joins come one by one."""
    x = torch.randn(n, 2000, generator=generator(3)) / 2000**0.5
    return x * torch.exp(0.5 * torch.randn(n, 1, generator=generator(4)))


def function_metric(n: int) -> torch.Tensor:
    h = torch.relu(torch.randn(n, 200, generator=generator(5)) + torch.randn(n, 1, generator=generator(6)))
    v = torch.randn(n, 30, generator=generator(7))
    return (ops.gram(h) / 200 * ops.gram(v)).contiguous()


KINDS: dict[str, Callable[[int], torch.Tensor]] = {
    "clustered": lambda n: ops.gram(clustered(n)),
    "spread": lambda n: ops.gram(spread_norms(n)),
    "function": function_metric,
}
SIZES = [1, 2, 3, 7, 127, 129, 300]


def weights_of(n: int, weighted: bool) -> torch.Tensor:
    if not weighted:
        return torch.ones(n, dtype=torch.float64)
    w = torch.rand(n, dtype=torch.float64, generator=generator(8)) + 0.05
    return w / w.max()


def random_labels(n: int, k: int) -> torch.Tensor:
    labels = torch.cat([torch.arange(k), torch.randint(0, k, (n - k,), generator=generator(9))])
    return labels[torch.randperm(n, generator=generator(10))]


def check_in_height_order(joins: Joins, n: int, k: int) -> None:
    assert len(joins.lo) == n - k
    assert bool((joins.lo < joins.hi).all())
    assert bool((joins.height.diff() >= 0).all())
    assert len(torch.unique(joins.lo)) == n - k, "a row retires once"


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_ward_cuts_like_the_cpu(on_host: OnHost, kind: str, weighted: bool) -> None:
    """All sizes and several cuts in one call."""
    cases = [(n, k) for n in SIZES for k in sorted({1, max(1, n // 20), max(1, n // 2), max(1, n * 4 // 5), n})]
    grams = [KINDS[kind](n) for n, _ in cases]
    weights = [weights_of(n, weighted) for n, _ in cases]
    got = on_host.ward(grams, [k for _, k in cases], weights)
    for (n, k), g, w, joins in zip(cases, grams, weights, got, strict=True):
        expected = ops.ward(g, k, weights=w, backend="auto")
        check_in_height_order(joins, n, k)
        torch.testing.assert_close(joins.height, expected.height, rtol=1e-5, atol=1e-6)
        assert torch.equal(labels_of(joins, n), labels_of(expected, n)), (n, k)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_hartigan_moves_like_the_cpu(on_host: OnHost, kind: str, weighted: bool) -> None:
    """From random labels, many moves; from Ward's cut, few."""
    cases = [(n, k) for n in SIZES for k in sorted({1, max(1, n // 20), max(1, n // 2), n})]
    grams = [KINDS[kind](n) for n, _ in cases]
    weights = [weights_of(n, weighted) for n, _ in cases]
    starts = [
        random_labels(n, k) if n < 300 else labels_of(ops.ward(g, k, weights=w), n)
        for (n, k), g, w in zip(cases, grams, weights, strict=True)
    ]
    got = on_host.hartigan(grams, starts, [k for _, k in cases], weights)
    for (n, k), g, w, start, (labels, gains) in zip(cases, grams, weights, starts, got, strict=True):
        expected, expected_gains = ops.hartigan(g, start, k, weights=w)
        assert torch.equal(labels, expected), (n, k)
        torch.testing.assert_close(gains, expected_gains, rtol=1e-9, atol=1e-12)
