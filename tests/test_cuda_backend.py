"""pyfold.ops.cuda without a GPU: its kernels and bindings compiled by g++, run as fibers (tests/cuda_on_host) on CPU tensors.

Blocks, warps and lanes run in shuffled orders, and shared memory starts as NaN: a missing barrier or a result that depends
on the order shows as a difference. What this cannot show is a GPU's own: timing, caches, asynchronous copies.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from types import ModuleType

import pybind11
import pytest
import torch
from conftest import ROOT
from test_ops import DTYPES, random_labels, rows

from pyfold.clustering import labels_of
from pyfold.ops import Joins, cuda, reference

HOST = ROOT / "tests" / "cuda_on_host"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
MODULE = """
#include "cuda/bindings.h"
extern "C" uint32_t cuda_on_host_seed;
PYBIND11_MODULE(_C_on_host, m) {
    pyfold::cuda::bind(m);
    m.def("seed", [](uint32_t seed) { cuda_on_host_seed = seed; });
}
"""
H100 = (232448, 233472, 2048)
ODD = [1, 3, 7, 127, 129]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="session")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The bindings, linked to the kernels and the emulator in a library of their own: it overwrites its thread-locals."""
    folder = tmp_path_factory.mktemp("cuda_on_host")
    module = folder / f"_C_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    (folder / "module.cpp").write_text(MODULE)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-gnu-unique", "-fno-extern-tls-init", "-shared", "-fPIC"]
    folders = [HOST, ROOT / "csrc", ROOT / "csrc" / "cuda", pybind11.get_include(), sysconfig.get_path("include")]
    flags += ["-Wno-unknown-pragmas", *(f"-I{include}" for include in folders)]
    for out, sources in {
        folder / "libkernels.so": [*KERNELS, HOST / "emulator.cpp"],
        module: [ROOT / "csrc" / "cuda" / "bindings.cpp", folder / "module.cpp"],
    }.items():
        link = [f"-L{folder}", "-lkernels", f"-Wl,-rpath,{folder}"] if out == module else []
        subprocess.run(["g++", *flags, "-x", "c++", *map(str, sources), "-x", "none", *link, "-o", str(out)], check=True)
    spec = importlib.util.spec_from_file_location("_C_on_host", module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(autouse=True)
def backend(on_host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    @contextlib.contextmanager
    def stream_of(tensor: torch.Tensor) -> Iterator[int]:
        yield 0

    monkeypatch.setattr(cuda, "_C", on_host, raising=False)
    monkeypatch.setattr(cuda, "_stream_of", stream_of)
    monkeypatch.setattr(cuda, "_limits", lambda device: (H100, 3))
    monkeypatch.setattr(cuda, "_mixed", lambda: False)  # a GPU's product
    on_host.seed(1)
    return on_host


def gram_of(n: int, seed: int = 0) -> torch.Tensor:
    x = rows(n, 20, seed=seed).double()
    return (x @ x.T).float().contiguous()


def weights_of(n: int, weighted: bool) -> torch.Tensor:
    if not weighted:
        return torch.ones(n, dtype=torch.float64)
    w = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) + 0.05
    return w / w.max()


def uneven_labels(n: int, k: int) -> torch.Tensor:
    """Cluster 0 takes half of the points: longer than a group of 32 lanes sums together."""
    labels = random_labels(n, k)
    labels[(torch.arange(n) % 2 == 0) & (torch.bincount(labels, minlength=k)[labels] > 1)] = 0
    return torch.unique(labels, return_inverse=True)[1]


LLOYD_CASES = [(n, k) for n in [*ODD, 200] for k in sorted({1, 2, 5, n // 2, n - 1, n}) if 1 <= k <= n]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("limits", [H100, (1500, 3000, 2048), (520, 520, 128)], ids=["two rows", "one row", "in place"])
def test_lloyd_matches_reference(monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int, int], weighted: bool) -> None:
    """All sizes in one call; the tile that each chip's shared memory allows."""
    monkeypatch.setattr(cuda, "_limits", lambda device: (limits, 3))
    labels = [uneven_labels(n, k) if k == 5 else random_labels(n, k) for n, k in LLOYD_CASES]
    ks = [int(label.max()) + 1 for label in labels]
    grams = [gram_of(len(label)) for label in labels]
    weights = [weights_of(len(label), weighted) for label in labels]
    got = cuda.lloyd(grams, labels, ks, weights)
    for (moved, distances), g, given, k, w in zip(got, grams, labels, ks, weights, strict=True):
        exact, _ = reference._squared_distances(g, given, k, w)
        scale = g.diagonal().max()
        _, expected = reference.lloyd([g], [given], [k], [w])[0]
        torch.testing.assert_close(distances, expected, rtol=0, atol=float(3e-6 * scale))
        chosen = exact.gather(1, moved[:, None])[:, 0]
        assert float((chosen - exact.min(1).values).max()) <= 3e-6 * scale
        stayed = moved == given
        own = exact.gather(1, given[:, None])[:, 0]
        assert bool((own[~stayed] > chosen[~stayed] - 3e-6 * scale).all())


def test_lloyd_breaks_ties_by_staying_then_by_index() -> None:
    """Four points at the origin and four at e: every cluster of a kind is equally near."""
    x = torch.tensor([[0.0], [0.0], [0.0], [0.0], [1.0], [1.0], [1.0], [1.0]])
    labels = torch.tensor([3, 1, 0, 2, 4, 5, 4, 0])
    [(moved, distances)] = cuda.lloyd([x @ x.T], [labels], [6], [weights_of(8, False)])
    assert moved.tolist() == [3, 1, 1, 2, 4, 5, 4, 4]  # point 2 leaves (0, 0.5), point 7 goes to the first of 4 and 5
    assert distances.tolist() == [0.0] * 8


def test_results_do_not_depend_on_the_order_of_blocks_and_threads(backend: ModuleType) -> None:
    g, labels, w = gram_of(200), uneven_labels(200, 30), weights_of(200, True)
    k = int(labels.max()) + 1
    x = rows(200, 33)
    runs = []
    for seed in (0, 2, 3):
        backend.seed(seed)
        runs.append([*cuda.lloyd([g], [labels], [k], [w])[0], *cuda.update([x], [labels], [k], [w])])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


CUTS = [(1, 1), (3, 2), (7, 3), (60, 20), (60, 1), (60, 60)]


def test_ward_through_the_backend() -> None:
    grams, ks = [gram_of(n) for n, _ in CUTS], [k for _, k in CUTS]
    weights = [weights_of(n, True) for n, _ in CUTS]
    before = [g.clone() for g in grams]
    got = cuda.ward(grams, ks, weights)
    assert all(torch.equal(g, b) for g, b in zip(grams, before, strict=True)), "the matrices are as they were"
    for a, b, (n, _) in zip(got, reference.ward(before, ks, weights), CUTS, strict=True):
        assert torch.equal(labels_of(Joins(*a), n), labels_of(Joins(*b), n))
        torch.testing.assert_close(a[2], b[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_moves", [0, 1, 2**63 - 1])
def test_hartigan_through_the_backend(monkeypatch: pytest.MonkeyPatch, max_moves: int) -> None:
    """With room for a few moves a launch, so that some problems need several."""
    monkeypatch.setattr(cuda, "_GAINS", 5)
    labels = [random_labels(n, k) for n, k in CUTS]
    problems = ([gram_of(n) for n, _ in CUTS], labels, [k for _, k in CUTS], [weights_of(n, True) for n, _ in CUTS], max_moves)
    for a, b in zip(cuda.hartigan(*problems), reference.hartigan(*problems), strict=True):
        assert torch.equal(a[0], b[0])
        torch.testing.assert_close(a[1], b[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_update_matches_reference(dtype: torch.dtype, weighted: bool) -> None:
    """Ragged problems in one call: whole packs, single columns, strided rows, a cluster of many pieces."""
    shapes = [(1, 1), (3, 7), (127, 129), (129, 8), (700, 16), (40, 600)]
    xs = [rows(n, d + 3, dtype, seed=n)[:, :d] for n, d in shapes]
    ks = [max(1, n // 2) if n != 700 else 2 for n, _ in shapes]
    labels = [random_labels(n, k) for (n, _), k in zip(shapes, ks, strict=True)]
    weights = [weights_of(n, True) if weighted else None for n, _ in shapes]
    for aligned in (False, True):
        given = [x.contiguous() for x in xs[3:5]] if aligned else xs
        part = slice(3, 5) if aligned else slice(None)
        got = cuda.update(given, labels[part], ks[part], weights[part])
        expected = reference.update(given, labels[part], ks[part], weights[part])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_update_is_accurate_for_long_clusters() -> None:
    """A running fp32 sum of these would be off by 1e-4."""
    x = 1000 + rows(40000, 4)
    [means] = cuda.update([x], [torch.zeros(40000, dtype=torch.int64)], [1], [None])
    torch.testing.assert_close(means, x.double().mean(0, keepdim=True).float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 7), (7, 129), (129, 3), (127, 64), (20, 1100)])
def test_merge_rows_matches_reference(dtype: torch.dtype, to: torch.dtype, n: int, d: int) -> None:
    labels, k = random_labels(n, max(1, n // 2)), max(1, n // 2)
    strided = rows(n, d + 1, dtype)[:, :d]
    for x in (strided, strided.contiguous()):
        for weights in (None, weights_of(n, True)):
            got, expected = torch.full((k, d), torch.nan, dtype=to), torch.empty((k, d), dtype=to)
            cuda.merge_rows(x, labels, k, weights, got)
            reference.merge_rows(x, labels, k, weights, expected)
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h", "n"), [(1, 1), (7, 3), (3, 129), (129, 7), (64, 127), (5, 300)])
def test_merge_columns_matches_reference(dtype: torch.dtype, to: torch.dtype, h: int, n: int) -> None:
    labels, k = random_labels(n, max(1, n // 2)), max(1, n // 2)
    strided = rows(h, n + 1, dtype)[:, :n]
    for x in (strided, strided.contiguous()):
        for scale in (None, rows(1, n)[0]):
            got, expected = torch.full((h, k), torch.nan, dtype=to), torch.empty((h, k), dtype=to)
            cuda.merge_columns(x, labels, k, scale, got)
            reference.merge_columns(x, labels, k, scale, expected)
            torch.testing.assert_close(got, expected, rtol=1.6e-2 if to == torch.bfloat16 else 1e-3, atol=1e-5)


@pytest.mark.parametrize("shared", [800, 1100, 1700], ids=["in place", "one row", "two rows"])
def test_merge_columns_on_chips_with_less_shared_memory(monkeypatch: pytest.MonkeyPatch, shared: int) -> None:
    monkeypatch.setattr(cuda, "_limits", lambda device: ((shared, 2 * (shared + 1024), 2048), 3))
    x, labels = rows(9, 200, torch.float16), random_labels(200, 90)
    got, expected = torch.empty((9, 90)), torch.empty((9, 90))
    cuda.merge_columns(x, labels, 90, None, got)
    reference.merge_columns(x, labels, 90, None, expected)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_nonfinite(dtype: torch.dtype, bad: float) -> None:
    x = rows(50, 33, dtype)
    assert cuda.first_nonfinite(x) is None
    x[17, 5] = x[40, 1] = bad
    assert cuda.first_nonfinite(x) == 17 * 33 + 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_rows_into_memory_that_is_not_aligned(dtype: torch.dtype) -> None:
    x, labels = rows(40, 16, dtype), random_labels(40, 10)
    expected = torch.empty(10, 16, dtype=dtype)
    cuda.merge_rows(x, labels, 10, None, expected)
    got = torch.empty(161, dtype=dtype)[1:].view(10, 16)
    cuda.merge_rows(x, labels, 10, None, got)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clusters_of_one_keep_their_bits(dtype: torch.dtype) -> None:
    x = rows(50, 24, dtype)
    x[3, 5] = -0.0
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    by_rows, by_columns = torch.empty_like(x), torch.empty_like(x.T.contiguous())
    cuda.merge_rows(x, order, 50, weights_of(50, True), by_rows)
    cuda.merge_columns(x.T.contiguous(), order, 50, None, by_columns)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(by_rows[order].view(bits), x.view(bits))
    assert torch.equal(by_columns.T[order].contiguous().view(bits), x.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_gram_in_panels(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, transposed: bool) -> None:
    """Sizes around a panel's, one shape (a batched product) and several; both triangles, added to what was there."""
    monkeypatch.setattr(cuda, "PANEL", 32)
    for sizes in ([1, 3, 31, 32, 33, 129], [7, 7, 7]):
        xs = [rows(n, 24, dtype, seed=at) for at, n in enumerate(sizes)]
        stored = [x.T.contiguous() for x in xs] if transposed else xs
        outs = [torch.full((n, n), torch.nan) for n in sizes]
        cuda.gram(stored, outs, False, transposed)
        cuda.gram(stored, outs, True, transposed)
        for x, out in zip(xs, outs, strict=True):
            assert torch.equal(out, out.T)
            torch.testing.assert_close(out, (2 * x.double() @ x.double().T).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_some_rows_of_gram(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, transposed: bool) -> None:
    """Strips of one panel, of several, and to the end, in two halves of the features: the whole's bits."""
    monkeypatch.setattr(cuda, "PANEL", 32)
    x = rows(129, 48, dtype)

    def strip(begin: int, end: int) -> torch.Tensor:
        out = torch.full((end - begin, 129 - begin), torch.nan)
        for at, half in enumerate((x[begin:, :24], x[begin:, 24:])):
            cuda.gram([half.T if transposed else half], [out], at > 0, transposed)
        return out

    whole = strip(0, 129)
    for begin, end in [(0, 32), (32, 96), (64, 129), (128, 129)]:
        out = strip(begin, end)
        assert torch.equal(out, whole[begin:end, begin:])
        assert torch.equal(out[:, : end - begin], out[:, : end - begin].T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_apart_are_copied(dtype: torch.dtype) -> None:
    x = rows(40, 33, dtype)
    for rows_, columns in ((slice(3, 20), slice(5, 21)), (slice(7, 8), slice(0, 33)), (slice(0, 40), slice(32, 33))):
        there, back = torch.zeros(40, 50, dtype=dtype), torch.zeros(40, 33, dtype=dtype)
        cuda.copy_rows(there[rows_, columns], x[rows_, columns])
        cuda.copy_rows(back[rows_, columns], there[rows_, columns])
        assert torch.equal(back[rows_, columns], x[rows_, columns])
        assert back.count_nonzero() == x[rows_, columns].count_nonzero(), "and nothing else"


@pytest.mark.parametrize(("n", "k"), [(1, 1), (48, 36), (2100, 1575), (11008, 8806), (28672, 22938), (28672, 1)])
def test_memory_of_clustering_is_what_is_planned(backend: ModuleType, n: int, k: int) -> None:
    """Half of G once more for Ward, and little else."""
    planned = cuda.clustering_bytes(n, k)
    ward, hartigan = (
        backend.cuda_ward_workspace([(0, 0, n, k, 0, 0, 0)]),
        backend.cuda_hartigan_workspace([(0, 0, n, k, 1, 0, 0, 0)]),
    )
    assert max(ward, hartigan + 8 * cuda._GAINS) <= planned + 2**16
    assert planned - max(ward, hartigan) <= 320 * n + 24 * k + 8 * cuda._GAINS


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_products_are_never_tf32_and_the_setting_comes_back(before: str) -> None:
    torch.set_float32_matmul_precision(before)
    try:
        with cuda.full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch < 2.9 has one switch")
def test_the_newer_tf32_switch_comes_back_too() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"  # the older switch now raises when it is read
    try:
        with cuda.full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


CHIPS = {
    "A100": (166912, 167936, 2048),
    "RTX 3090": (101376, 102400, 1536),
    "H100": H100,
    "T4-like": (49152, 65536, 1024),
}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_tiles_fit_the_chip(backend: ModuleType, chip: tuple[int, int, int]) -> None:
    per_block, per_sm, threads_per_sm = chip
    for n in [1, 3, 127, 512, 4096, 11008, 14336, 28672, 60000]:
        tiles = {"lloyd": backend.cuda_lloyd_tile(n, chip)}
        tiles |= {item: backend.cuda_columns_tile(n, item, chip) for item in (2, 4)}
        for threads, held, shared, blocks in tiles.values():
            assert threads % 32 == 0
            assert 64 <= threads <= 1024
            assert shared + 512 <= per_block
            assert blocks >= 1
            assert blocks * threads <= threads_per_sm
            assert blocks * (shared + 512 + 1024) <= per_sm or blocks == 1
            assert held > 0 or shared == 0
        assert tiles["lloyd"][2] >= tiles["lloyd"][1] * 4 * n
        assert all(tiles[item][2] >= tiles[item][1] * item * n for item in (2, 4))


def test_tiles_of_the_shapes_that_folding_meets(backend: ModuleType) -> None:
    """LLaMA-7B and -70B feed-forward layers."""
    assert backend.cuda_lloyd_tile(11008, CHIPS["H100"]) == (1024, 2, 88096, 1)
    assert backend.cuda_lloyd_tile(28672, CHIPS["H100"])[1] == 2
    assert backend.cuda_lloyd_tile(28672, CHIPS["A100"])[1] == 1
    assert backend.cuda_lloyd_tile(28672, CHIPS["RTX 3090"])[1] == 0
    assert backend.cuda_columns_tile(11008, 2, CHIPS["H100"]) == (1024, 4, 88064, 2)
    assert backend.cuda_columns_tile(11008, 4, CHIPS["H100"])[1] == 2
