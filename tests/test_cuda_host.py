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
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-gnu-unique", "-fno-extern-tls-init", "-Wno-unknown-pragmas"]
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
        before = [g.clone() for g in grams]
        joins = self.ward_joins(grams, ks, weights, seed)
        assert all(torch.equal(g, b) for g, b in zip(grams, before, strict=True)), "the matrices are as they were"
        return joins

    def ward_joins(
        self, grams: Sequence[torch.Tensor], ks: Sequence[int], weights: Sequence[torch.Tensor], seed: int = 1
    ) -> list[Joins]:
        joins = []
        for g, k in zip(grams, ks, strict=True):
            n = len(g) - k
            joins.append(Joins(torch.full((n,), -1), torch.full((n,), -1), torch.full((n,), torch.nan, dtype=torch.float64)))
        problems = [
            WardProblem(g.data_ptr(), w.data_ptr(), len(g), k, *(t.data_ptr() for t in j))
            for g, k, w, j in zip(grams, ks, weights, joins, strict=True)
        ]
        self._call("ward", (WardProblem * len(problems))(*problems), seed)
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


@pytest.mark.parametrize("kind", KINDS)
def test_ward_cuts_like_the_cpu(on_host: OnHost, kind: str) -> None:
    """All sizes, several cuts, with weights and without, in one call."""
    cases = [(n, k) for n in SIZES for k in ([1, (n + 1) // 2, n] if n < 200 else [n * 2 // 5, n * 4 // 5])]
    grams = [KINDS[kind](n) for n, _ in cases]
    weights = [weights_of(n, weighted=i % 2 == 0) for i, (n, _) in enumerate(cases)]
    got = on_host.ward(grams, [k for _, k in cases], weights)
    for (n, k), g, w, joins in zip(cases, grams, weights, got, strict=True):
        expected = ops.ward(g, k, weights=w, backend="auto")
        check_in_height_order(joins, n, k)
        torch.testing.assert_close(joins.height, expected.height, rtol=1e-5, atol=1e-6)
        assert torch.equal(labels_of(joins, n), labels_of(expected, n)), (n, k)


@pytest.mark.parametrize("kind", KINDS)
def test_hartigan_moves_like_the_cpu(on_host: OnHost, kind: str) -> None:
    """From random labels, many moves; from Ward's cut, few."""
    cases = [(n, k) for n in SIZES for k in ([1, 1 + n // 10, n] if n < 128 else [(n + 1) // 2])]
    grams = [KINDS[kind](n) for n, _ in cases]
    weights = [weights_of(n, weighted=i % 2 == 0) for i, (n, _) in enumerate(cases)]
    starts = [
        random_labels(n, k) if n < 128 else labels_of(ops.ward(g, k, weights=w), n)
        for (n, k), g, w in zip(cases, grams, weights, strict=True)
    ]
    got = on_host.hartigan(grams, starts, [k for _, k in cases], weights)
    for (n, k), g, w, start, (labels, gains) in zip(cases, grams, weights, starts, got, strict=True):
        expected, expected_gains = ops.hartigan(g, start, k, weights=w)
        assert torch.equal(labels, expected), (n, k)
        torch.testing.assert_close(gains, expected_gains, rtol=1e-9, atol=1e-12)


def test_exact_ties_and_duplicates(on_host: OnHost) -> None:
    """All points equal, a lattice, zero rows among others, every row many times: cuts of the same inertia as the CPU's."""
    lattice = torch.cartesian_prod(*[torch.arange(5.0)] * 3)
    zeros = torch.cat([torch.zeros(40, 8), torch.randn(80, 8, generator=generator(11))])
    copies = torch.randn(30, 8, generator=generator(12)).repeat(4, 1)
    for x, ks in ((torch.ones(100, 3), [1, 37]), (lattice, [1, 20, 60]), (zeros, [60, 81, 90]), (copies, [12, 30, 70])):
        for weighted in (False, True):
            g, w = ops.gram(x), weights_of(len(x), weighted)
            for k, joins in zip(ks, on_host.ward([g.clone() for _ in ks], ks, [w] * len(ks)), strict=True):
                check_in_height_order(joins, len(x), k)
                labels = labels_of(joins, len(x))
                assert len(torch.unique(labels)) == k
                if x is lattice:
                    continue  # ties between unlike pairs lead to different cuts
                expected = labels_of(ops.ward(g, k, weights=w), len(x))
                scale = float((w * g.diagonal()).sum())
                got, wanted = ops.inertia(g, labels, k, w), ops.inertia(g, expected, k, w)
                assert got == pytest.approx(wanted, rel=1e-6, abs=1e-6 * scale)


def test_ward_ends_on_a_matrix_that_is_not_symmetric(on_host: OnHost) -> None:
    """Nearest neighbours may then form a cycle: the joins made so far stand, no device hangs."""
    g = torch.eye(3) + torch.tensor([[0, 0.2, 0.1], [0.1, 0, 0.2], [0.2, 0.1, 0]])
    upper = g.triu() + g.triu(1).T
    joins = on_host.ward_joins([g], [1], [weights_of(3, False)])[0]
    assert joins.lo.tolist() == [-1, -1]
    assert torch.equal(g, upper)


def test_a_cluster_of_many(on_host: OnHost) -> None:
    """Sums of clusters longer than a warp; starts from which hundreds of points move."""
    x = torch.randn(3, 8, generator=generator(13)).repeat_interleave(60, 0) * 4 + torch.randn(180, 8, generator=generator(14))
    g, w = ops.gram(x), weights_of(180, True)
    start = random_labels(180, 3)
    ((labels, gains),) = on_host.hartigan([g], [start], [3], [w])
    expected, expected_gains = ops.hartigan(g, start, 3, weights=w)
    assert len(gains) > 60
    assert torch.equal(labels, expected)
    torch.testing.assert_close(gains, expected_gains)
    ((stopped, first),) = on_host.hartigan([g], [start], [3], [w], max_moves=20)
    ((labels, rest),) = on_host.hartigan([g], [stopped], [3], [w])
    assert len(first) == 20
    assert torch.equal(labels, expected)
    torch.testing.assert_close(torch.cat([first, rest]), gains)


@pytest.mark.parametrize("kind", KINDS)
def test_any_schedule_gives_the_same_bits(on_host: OnHost, kind: str) -> None:
    g, w = KINDS[kind](90), weights_of(90, True)
    start = random_labels(90, 20)
    wards = [on_host.ward([g], [45], [w], seed=seed)[0] for seed in (0, 5, 6)]
    moves = [on_host.hartigan([g], [start], [20], [w], seed=seed)[0] for seed in (0, 5, 6)]
    for again in wards[1:]:
        assert all(torch.equal(a, b) for a, b in zip(wards[0], again, strict=True))
    for again in moves[1:]:
        assert all(torch.equal(a, b) for a, b in zip(moves[0], again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_the_points_permutes_the_partition(on_host: OnHost, kind: str) -> None:
    n, k = 127, 60
    g, w = KINDS[kind](n), weights_of(n, True)
    order = torch.randperm(n, generator=generator(15))
    permuted = g[order][:, order].contiguous()
    plain, other = on_host.ward([g, permuted], [k, k], [w, w[order].contiguous()])
    assert torch.equal(plain.height, other.height)
    labels = labels_of(plain, n)
    assert same_partition(labels[order], labels_of(other, n))
    starts = [labels, labels[order]]
    (refined, _), (again, _) = on_host.hartigan([g, permuted], starts, [k, k], [w, w[order].contiguous()])
    assert same_partition(refined[order], again)


def same_partition(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a[:, None] == a[None, :], b[:, None] == b[None, :])


PLANTED = {
    "a barrier that some threads miss": (
        "if (threadIdx.x < 40) __syncthreads();",
        "a barrier that not all threads reach",
    ),
    "a shuffle that a lane misses": (
        "if (threadIdx.x != 7) out[0] = __shfl_sync(0xffffffffu, 1, 0);",
        "a warp-wide call that not all lanes of its mask reach",
    ),
    "shared memory past its end": (
        "dynamic_shared<int>()[blockDim.x] = 1;",
        "a write past the dynamic shared memory",
    ),
    "a missing barrier": (
        "int* x = dynamic_shared<int>(); x[threadIdx.x] = 1; out[threadIdx.x] = x[63 - threadIdx.x];",
        "stale",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_caught(tmp_path: Path, fault: str) -> None:
    body, report = PLANTED[fault]
    source = tmp_path / "fault.cu"
    source.write_text(
        "#include <cstdio>\n"
        '#include "cuda/launch.h"\n'
        "using namespace pyfold::cuda;\n"
        f"__global__ void kernel(int* out) {{ (void)out; {body} }}\n"
        "int main() { int out[64] = {}; launch(kernel, 1, 64, 64 * sizeof(int), nullptr, out);\n"
        '             for (int x : out) if (x < 0) return fputs("stale", stderr), 1; }\n'
    )
    program = compile_on_host(tmp_path / "fault", source, shared=False)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode != 0
    assert report in run.stderr
