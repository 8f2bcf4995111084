"""The Triton backend against fp64: on the GPU where there is one, else in Triton's interpreter; and compiled for every chip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyfold import ops
from pyfold.ops import registry, triton
from pyfold.ops.triton import tiles

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Shared memory that one block may use, in bytes (CUDA programming guide, technical specifications per compute capability).
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTERS = 64 << 10  # of a multiprocessor


def points(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def partition(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(k), torch.randint(0, k, (n - k,), generator=generator)])
    return labels[torch.randperm(n, generator=generator)].to(DEVICE)


def weights_of(n: int, seed: int = 5) -> torch.Tensor:
    return (torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5).to(DEVICE)


def squared_distances(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def check_assigned(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor, distances: torch.Tensor) -> None:
    """The chosen centroid is as near as the nearest up to fp32 rounding, and its distance is right."""
    every = squared_distances(x, centroids)
    chosen = every.gather(1, labels[:, None])[:, 0]
    reach = x.double().norm(dim=1) * centroids.double().norm(dim=1).max()
    assert bool((chosen - every.min(1).values <= 1e-6 * reach).all())
    torch.testing.assert_close(distances, chosen.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (3, 129, 3), (7, 3, 7), (127, 16, 70), (129, 129, 16), (3, 12288, 2)])
def test_assign_takes_the_nearest(dtype: torch.dtype, n: int, d: int, k: int) -> None:
    x, centroids = points(n, d, dtype), points(k, d, seed=1)
    check_assigned(x, centroids, *ops.assign(x, centroids, backend="triton"))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_assign_tells_centroids_apart_that_round_to_the_same(dtype: torch.dtype) -> None:
    centroids = points(1, 32, dtype, seed=1).float().repeat(2, 1)
    centroids[1] *= 1 + torch.finfo(dtype).eps / 8
    x = torch.cat([centroids * s for s in (0.5, 0.9, 1.1, 2.0)]).to(dtype)
    rounded = centroids.to(dtype).float()
    assert torch.equal(rounded[0], rounded[1]), "a rounded centroid cannot tell"
    labels, distances = ops.assign(x, centroids, backend="triton")
    check_assigned(x, centroids, labels, distances)
    assert set(labels.tolist()) == {0, 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assign_ties_go_to_the_lowest_index_at_distance_zero(dtype: torch.dtype) -> None:
    x = points(20, 33, dtype)
    labels, distances = ops.assign(x, x.float().repeat(3, 1), backend="triton")
    assert labels.tolist() == list(range(20))
    assert not distances.any()


def test_assign_takes_centroids_beyond_the_points_type() -> None:
    x = points(9, 8, torch.float16) * 1000
    centroids = points(5, 8, seed=1) * torch.tensor([[1e6], [1e3], [1e-6], [1e3], [0.0]], device=DEVICE)
    check_assigned(x, centroids, *ops.assign(x, centroids, backend="triton"))


def test_assign_of_a_strided_view_and_points_in_another_order() -> None:
    wide = points(70, 50, torch.float16)
    x, centroids = wide[:, 3:36], points(12, 33, seed=1)
    labels, distances = ops.assign(x, centroids, backend="triton")
    check_assigned(x, centroids, labels, distances)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    moved, moved_distances = ops.assign(x[order].contiguous(), centroids, backend="triton")
    assert torch.equal(moved, labels[order])
    torch.testing.assert_close(moved_distances, distances[order])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (7, 129, 7), (127, 3, 63), (3, 12288, 2), (1700, 5, 2), (1100, 20, 1)])
def test_update_takes_the_mean(dtype: torch.dtype, weighted: bool, n: int, d: int, k: int) -> None:
    x, labels = points(n, d, dtype) + 3, partition(n, k)
    weights = weights_of(n) if weighted else None
    expected = ops.update(x, labels, k, weights=weights, backend="reference")
    got = ops.update(x, labels, k, weights=weights, backend="triton")
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    alone = torch.bincount(labels, minlength=k)[labels] == 1
    assert torch.equal(got[labels[alone]], x[alone].float())


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 1), (7, 7), (127, 63), (129, 1), (129, 129), (200, 180), (520, 10)])
def test_lloyd_moves_every_point_to_its_nearest_cluster(weighted: bool, n: int, k: int) -> None:
    x, before = points(n, 24), partition(n, k)
    gram = ops.gram(x, backend="reference")
    weights = weights_of(n) if weighted else None
    labels, distances = ops.lloyd(gram, before, k, weights=weights, backend="triton")
    every = squared_distances(x, ops.update(x, before, k, weights=weights, backend="reference"))
    chosen = every.gather(1, labels[:, None])[:, 0]
    rounding = 3e-6 * float(gram.diagonal().max())
    assert bool((chosen <= every.min(1).values + rounding).all())
    assert bool(((distances - chosen).abs() <= rounding).all())
    own = every.gather(1, before[:, None])[:, 0]
    assert bool((labels == before)[own <= every.min(1).values].all()), "the nearest cluster is never left"


def test_lloyd_stays_among_equals() -> None:
    x = points(40, 8).repeat(3, 1)  # three copies of each point, each a cluster of its own: all three at distance 0
    before = torch.randperm(120, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels, distances = ops.lloyd(ops.gram(x, backend="reference"), before, 120, backend="triton")
    assert torch.equal(labels, before)
    assert not distances.any()


def test_lloyd_leaves_for_the_lowest_of_equals() -> None:
    x = torch.tensor([[0.0], [4.0], [5.0], [5.0], [3.0]], device=DEVICE)
    labels, distances = ops.lloyd(x @ x.T, torch.tensor([0, 0, 1, 2, 3], device=DEVICE), 4, backend="triton")
    assert labels.tolist() == [0, 1, 1, 2, 3], "4 is 1 from clusters 1, 2 and 3 and 2 from its own"
    assert distances.tolist() == [4, 1, 0, 0, 0]


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (7, 3, 4), (129, 40, 64), (5, 1100, 3), (60, 5, 1)])
def test_merges_match_reference(dtype: torch.dtype, to: torch.dtype, n: int, d: int, k: int) -> None:
    x, labels = points(n, d, dtype), partition(n, k)
    # The interpreter rounds to bfloat16 toward zero.
    tolerance = {"rtol": 2 * torch.finfo(to).eps, "atol": n * 2.0**-23}
    for w in (None, weights_of(n)):
        expected = ops.merge_rows(x, labels, k, weights=w, dtype=torch.float32, backend="reference")
        got = ops.merge_rows(x, labels, k, weights=w, dtype=to, backend="triton")
        torch.testing.assert_close(got.float(), expected, **tolerance)
    columns = x[:, :7].T.contiguous()
    for scale in (None, weights_of(n).float()):
        expected = ops.merge_columns(columns, labels, k, scale=scale, dtype=torch.float32, backend="reference")
        got = ops.merge_columns(columns, labels, k, scale=scale, dtype=to, backend="triton")
        torch.testing.assert_close(got.float(), expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cluster_of_one_keeps_its_bits(dtype: torch.dtype) -> None:
    x = points(33, 20, dtype)
    x[::3] = -0.0
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    place = torch.randperm(33, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows = ops.merge_rows(x, place, 33, weights=weights_of(33), backend="triton")
    columns = ops.merge_columns(x.T.contiguous(), place, 33, backend="triton")
    assert torch.equal(rows[place].view(bits), x.view(bits))
    assert torch.equal(columns.T[place].contiguous().view(bits), x.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lists_of_problems_give_what_each_gives(dtype: torch.dtype) -> None:
    sizes = [(40, 9, 5), (1, 3, 1), (21, 20, 21)]
    xs = [points(n, d, dtype, seed=i) for i, (n, d, _) in enumerate(sizes)]
    ks = [k for _, _, k in sizes]
    labels = [partition(n, k) for n, _, k in sizes]
    weights = [weights_of(n) for n, _, _ in sizes]
    means = ops.update(xs, labels, ks, weights=weights, backend="triton")
    nearest = ops.assign(xs, means, backend="triton")
    grams = [ops.gram(x, backend="reference") for x in xs]
    moved = ops.lloyd(grams, labels, ks, weights=weights, backend="triton")
    for i, x in enumerate(xs):
        check_assigned(x, means[i], *nearest[i])
        torch.testing.assert_close(means[i], ops.update(x, labels[i], ks[i], weights=weights[i], backend="triton"))
        alone = ops.lloyd(grams[i], labels[i], ks[i], weights=weights[i], backend="triton")
        assert torch.equal(moved[i][0], alone[0])
        torch.testing.assert_close(moved[i][1], alone[1])


def test_every_run_gives_the_same_bits() -> None:
    x, labels, weights = points(50, 20, torch.float16), partition(50, 15), weights_of(50)
    gram = ops.gram(x, backend="reference")

    def run() -> list[torch.Tensor]:
        means = ops.update(x, labels, 15, weights=weights, backend="triton")
        return [means, *ops.assign(x, means, backend="triton"), *ops.lloyd(gram, labels, 15, weights=weights, backend="triton")]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.fixture(scope="module")
def compiled_kernels() -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, Path(__file__).with_name("triton_compile.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_into_what_the_chip_has(compiled_kernels: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in compiled_kernels} == {80, 90, 100}
    assert len({row["kernel"] for row in compiled_kernels}) == 10
    for row in compiled_kernels:
        assert row["stack"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED[row["arch"]], row
        assert row["registers"] * row["warps"] * 32 <= REGISTERS, row
        assert not row["tf32"], row


def test_two_blocks_of_the_screen_share_a_multiprocessor(compiled_kernels: list[dict[str, Any]]) -> None:
    rows = [r for r in compiled_kernels if r["constants"].get("SCREEN") == "True" and r["constants"].get("BLOCK_D") == "128"]
    rows = [r for r in rows if r["kernel"] == "_nearest" and r["arch"] in (80, 90)]
    assert len(rows) == 4
    for row in rows:
        assert 2 * row["registers"] * row["warps"] * 32 <= REGISTERS, row
        assert 2 * (row["shared"] + 1024) <= SHARED[row["arch"]] + 1024, row  # a block's own KB is not in the limit of a block


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (300, 70, 65), (10**6, 1024, 128), (11008, 5504, 12288)])
def test_tiles_fit_every_chip(arch: int, n: int, k: int, d: int) -> None:
    for itemsize, exact in ((4, True), (2, True), (2, False)):
        tile = tiles.assign(arch, itemsize, n, k, d, exact=exact)
        for size in (tile.rows, tile.columns, tile.depth):
            assert size >= 16
            assert size & (size - 1) == 0
        panels = tile.rows if d <= tile.depth else tile.rows * tile.num_stages
        assert (panels + tile.columns * tile.num_stages) * tile.depth * itemsize <= SHARED[arch]
        limit = min(tile.max_registers or 255, REGISTERS // (tile.num_warps * 32))
        assert tile.rows * tile.columns // (tile.num_warps * 32) <= limit // 2, "sums in at most half of the registers"
        assert tile.rows * d < 2**31, "offsets within a tile are int32"


def test_splits_fill_the_chip_and_no_more() -> None:
    assert tiles.splits(8000, 16, 132) == 1
    assert tiles.splits(2, 300, 132) == 264
    assert tiles.splits(2, 7, 132) == 7
    assert tiles.lloyd_splits(22, 11008, 132) == 30
    assert tiles.lloyd_splits(1, 100, 132) == 2


def test_unavailable_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in str(triton.unavailable())
    with pytest.raises(ValueError, match="no CUDA device"):
        registry.resolve("triton", "cpu", "assign")
    monkeypatch.setattr(triton, "find_spec", lambda _: None)
    assert "pip install triton" in str(triton.unavailable())


def test_ops_that_triton_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="ward"):
        ops.ward(torch.eye(3, device=DEVICE), 1, backend="triton")


def test_importing_pyfold_leaves_triton_alone() -> None:
    code = "import sys, pyfold, pyfold.ops; pyfold.ops.backends(); sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
