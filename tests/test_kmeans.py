"""k-means: the same answers whatever the kind of input, starts and refinements that do what they say, and the edges."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfold
from pyfold.clustering.differences import settle, sharpened, squared_distances
from pyfold.clustering.partition import canonical, fill_empty
from pyfold.clustering.regime import RATES, Problem, choose, estimate

WAYS = [  # init, refine: both regimes, every start and refinement
    (None, "auto"),
    ("ward", "lloyd"),
    ("k-means++", "hartigan"),
    ("k-means++", "lloyd"),
    ("random", "lloyd"),
    ("k-means++", None),
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(n: int, d: int, k: int, seed: int = 0, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around K centres, and the centre of each."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.cat([torch.arange(k), torch.randint(k, (n - k,), generator=generator)])
    centres = 2 * torch.randn(k, d, generator=generator)
    return centres[truth] + spread * torch.randn(n, d, generator=generator), truth


def same_partition(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(canonical(a), canonical(b))


def check(x: Any, result: pyfold.KMeansResult, k: int, weights: torch.Tensor | None = None, tolerance: float = 1e-5) -> None:
    """What holds for every result: no empty cluster, canonical labels, centroids that are means, an inertia that is theirs."""
    points, labels = torch.as_tensor(x).double(), torch.as_tensor(result.labels)
    centroids = torch.as_tensor(result.centroids).double()
    assert torch.equal(torch.unique(labels), torch.arange(k))
    assert torch.equal(canonical(labels), labels)
    w = torch.ones(len(points), dtype=torch.float64) if weights is None else weights
    means = torch.zeros_like(centroids).index_add_(0, labels, w[:, None] * points)
    means /= torch.zeros(k, dtype=torch.float64).index_add_(0, labels, w)[:, None]
    scale = float(points.abs().max()) or 1.0
    torch.testing.assert_close(centroids / scale, means / scale, rtol=tolerance, atol=tolerance)
    exact = float(
        (w * ((points - means)[torch.arange(0)] if len(points) == 0 else (points - means[labels])).square().sum(1)).sum()
    )
    energy = float((w * (points - points.mean(0)).square().sum(1)).sum())
    assert result.inertia == pytest.approx(exact, rel=1e-4, abs=1e-9 * energy + 1e-24 * scale**2)


@pytest.mark.parametrize(("init", "refine"), WAYS)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (3, 1, 3), (7, 3, 1), (129, 7, 127), (127, 5, 64), (300, 17, 12)])
def test_every_way_at_odd_shapes(init: str | None, refine: str | None, n: int, d: int, k: int) -> None:
    x = normal(n, d)
    result = pyfold.kmeans(x, k, init=init, refine=refine)
    check(x, result, k)
    assert result.init == (init or "ward")
    if k == n:
        assert result.inertia == 0


def test_the_default_is_cluster() -> None:
    x = normal(200, 30)
    result, expected = pyfold.kmeans(x, 80), pyfold.cluster(x, n_clusters=80)
    assert (result.init, result.refine, result.regime) == ("ward", "hartigan", "gram")
    assert torch.equal(result.labels, expected.labels)
    assert result.inertia == pytest.approx(expected.inertia, rel=1e-6)
    assert result.n_iter == expected.n_moves + 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_in_numpy_out(dtype: type) -> None:
    x = normal(60, 4).numpy().astype(dtype)
    frozen = x.copy()
    frozen.flags.writeable = False
    expected = pyfold.kmeans(torch.from_numpy(x), 9)
    swapped = x.astype(np.dtype(dtype).newbyteorder())
    for given_x in (x, frozen, np.asfortranarray(x), np.ascontiguousarray(x[::-1])[::-1], swapped):
        result = pyfold.kmeans(given_x, 9)
        assert isinstance(result.labels, np.ndarray)
        assert result.labels.dtype == np.int64
        assert result.centroids.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert np.array_equal(result.labels, expected.labels.numpy())
        assert result.inertia == expected.inertia


@pytest.mark.parametrize(("init", "refine"), WAYS)
def test_lists_and_batches_are_the_problems_one_by_one(init: str | None, refine: str | None) -> None:
    xs = [normal(40, 6, seed=1), normal(9, 30, seed=2).double(), normal(70, 2, seed=3).bfloat16(), torch.ones(5, 3)]
    ks = [7, 4, 30, 2]
    options: dict[str, Any] = {"init": init, "refine": refine}
    together = pyfold.kmeans(xs, ks, **options)
    assert isinstance(together, list)
    for x, k, result in zip(xs, ks, together, strict=True):
        alone = pyfold.kmeans(x, k, **options)
        assert torch.equal(result.labels, alone.labels)
        assert torch.equal(result.centroids, alone.centroids)
        assert (result.inertia, result.n_iter) == (alone.inertia, alone.n_iter)
    batch = torch.stack([normal(30, 4, seed=s) for s in range(3)])
    stacked = pyfold.kmeans(batch, 8, **options)
    assert stacked.labels.shape == (3, 30)
    assert stacked.centroids.shape == (3, 8, 4)
    for b in range(3):
        alone = pyfold.kmeans(batch[b], 8, **options)
        assert torch.equal(stacked.labels[b], alone.labels)
        assert (float(stacked.inertia[b]), int(stacked.n_iter[b])) == (alone.inertia, alone.n_iter)


@pytest.mark.parametrize(("init", "refine"), WAYS)
def test_same_bits_on_one_and_two_threads_and_on_every_run(init: str | None, refine: str | None) -> None:
    """Large enough for torch to split work over many rows between threads; a single row is the next test's."""
    x, _ = blobs(2500 if init in ("k-means++", "random") and refine == "lloyd" else 1500, 16, 40, spread=1.0)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            for points in (x, x.double() + 3):
                results.append(pyfold.kmeans(points, 40, init=init, refine=refine, max_iter=15, seed=3))
    finally:
        torch.set_num_threads(before)
    for result in results[2:]:
        expected = results[0] if result.centroids.dtype == torch.float32 else results[1]
        assert torch.equal(result.labels, expected.labels)
        assert torch.equal(result.centroids, expected.centroids)
        assert (result.inertia, result.n_iter) == (expected.inertia, expected.n_iter)


@pytest.mark.parametrize(("n", "d", "k"), [(300, 256, 4), (11, 100_000, 3)], ids=["regime", "one row a chunk"])
def test_same_bits_where_threads_could_tell(n: int, d: int, k: int) -> None:
    """Shapes at which more threads make G the cheaper way, and whose rows torch sums one at a time."""
    x = normal(n, d)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(pyfold.kmeans(x, k, init="k-means++"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert (result.regime, result.refine, result.inertia) == (results[0].regime, results[0].refine, results[0].inertia)
        assert torch.equal(result.labels, results[0].labels)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["k-means++", "random"]), st.integers(2, 80), st.integers(1, 8))
def test_inertia_never_rises(seed: int, init: str, n: int, d: int) -> None:
    x = normal(n, d, seed=seed)
    k = seed % n + 1
    last = float("inf")
    for max_iter in range(1, 8):
        result = pyfold.kmeans(x, k, init=init, refine="lloyd", max_iter=max_iter, tol=0, seed=seed)
        assert result.inertia <= last * (1 + 1e-6) + 1e-6
        assert result.n_iter <= max_iter
        last = result.inertia
    check(x, result, k)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 60), st.integers(1, 10))
def test_permuting_points_permutes_the_partition(seed: int, n: int, d: int) -> None:
    x = normal(n, d, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    k = seed % n + 1
    a, b = pyfold.kmeans(x, k), pyfold.kmeans(x[order], k)
    assert same_partition(b.labels, a.labels[order])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 7), min_size=1, max_size=9), st.sampled_from(WAYS), st.integers(0, 3))
def test_duplicates_end_together(seed: int, copies: list[int], way: tuple[str | None, str | None], more: int) -> None:
    """As many clusters as distinct points: exactly those. More: duplicates are split, and no cluster is empty."""
    distinct = normal(len(copies), 3, seed=seed) + 10 * torch.arange(len(copies))[:, None]
    truth = torch.arange(len(copies)).repeat_interleave(torch.tensor(copies))
    truth = truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))]
    x = distinct[truth]
    k = min(len(copies) + more, len(x))
    init, refine = way
    result = pyfold.kmeans(x, k, init=init, refine=refine, seed=seed)
    check(x, result, k)
    assert result.inertia <= 1e-10 * float(x.square().sum())
    if k == len(copies) and (init != "random" or refine == "lloyd"):
        assert same_partition(result.labels, truth)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_a_start_repeats_no_value_while_others_remain(init: str) -> None:
    x = torch.cat([torch.zeros(5000, 2), 1e-3 * torch.arange(1.0, 9).repeat(2, 1).T, 100 + torch.ones(2, 2)])
    result = pyfold.kmeans(x, 10, init=init, refine="lloyd", tol=0)
    assert result.inertia == 0
    assert len(torch.unique(result.centroids, dim=0)) == 10


def test_empty_clusters_take_the_farthest_distinct_points() -> None:
    x = torch.tensor([[0.0], [1], [9], [9], [8], [0], [0]])
    labels = torch.tensor([1, 1, 1, 1, 1, 3, 3])
    distances = torch.tensor([0.1, 0.2, 5, 5, 4, 0, 0])
    assert fill_empty(labels, distances, x, 4).tolist() == [1, 1, 0, 1, 2, 3, 3]
    # Two distinct values, five clusters: duplicates are split by index, and nothing is left empty.
    x = torch.tensor([[0.0], [0], [0], [1], [1], [1]])
    labels = torch.tensor([4, 4, 4, 4, 4, 4])
    filled = fill_empty(labels, torch.tensor([1.0, 1, 1, 2, 2, 2]), x, 5)
    assert sorted(filled.unique().tolist()) == [0, 1, 2, 3, 4]
    assert filled[3] != filled[0]
    full = torch.tensor([0, 1, 0, 1, 0, 1])
    assert fill_empty(full, torch.zeros(6), x, 2) is full


@pytest.mark.parametrize(("init", "refine"), WAYS)
@pytest.mark.parametrize(
    ("unit", "offset"),
    [(1e30, 0.0), (1e-30, 0.0), (1e-42, 0.0), (1.0, 1e4), (1e12, 1e15)],
    ids=["huge", "tiny", "subnormal", "far", "both"],
)
def test_scale_and_origin_do_not_matter(init: str | None, refine: str | None, unit: float, offset: float) -> None:
    x, truth = blobs(120, 4, 6, spread=0.05)
    moved = (x.double() * unit + offset).float()
    result = pyfold.kmeans(moved, 6, init=init, refine=refine, n_init=1 if init is None else 4)
    if refine is not None:
        assert same_partition(result.labels, truth)
    if unit != 1e-42:  # there the points themselves have few bits left
        check(moved, result, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("init", "refine"), [(None, "auto"), ("ward", "lloyd"), ("k-means++", "hartigan"), ("k-means++", "lloyd")]
)
def test_tight_groups_far_apart(init: str | None, refine: str | None, dtype: torch.dtype) -> None:
    """fp32 inner products are off by 0.5 where the squared distances that matter are 0.005."""
    truth = torch.arange(8).repeat(50)
    corners = 0.4 * torch.tensor([[-1.0, 0], [1, 0], [0, 1], [0, -1]])
    centres = torch.cat([corners + torch.tensor([3000.0, 0]), corners - torch.tensor([3000.0, 0])])
    x = (centres[truth].double() + 0.05 * normal(400, 2).double()).to(dtype)
    result = pyfold.kmeans(x, 8, init=init, refine=refine, n_init=1 if init in (None, "ward") else 4)
    assert same_partition(result.labels, truth)
    check(x, result, 8, tolerance=1e-7)
    model = pyfold.KMeans(8, init=result.centroids.numpy(), refine="lloyd").fit(x.numpy())
    assert same_partition(torch.from_numpy(model.labels_), truth)
    # Inner products over G alone: the same from differences, for the same partition.
    g = sharpened(pyfold.ops.gram(x.float()), x.float())
    assert torch.equal(g, g.T)
    exact = torch.cdist(x.float().double(), x.float().double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(-2 * g.double(), exact, rtol=2e-4, atol=0)


def test_points_that_inner_products_cannot_decide() -> None:
    """All centroids look alike to scores that are off by 1."""
    centroids = 4000 + 0.1 * torch.arange(6.0)[:, None] * torch.ones(1, 2)
    x = centroids.repeat_interleave(5, 0) + 0.01 * normal(30, 2)
    wrong = torch.arange(30) % 6
    labels, distances = settle(x, centroids, wrong, squared_distances(x, wrong, centroids))
    assert torch.equal(labels, torch.arange(6).repeat_interleave(5))
    torch.testing.assert_close(distances, squared_distances(x, labels, centroids), rtol=1e-5, atol=0)


@pytest.mark.parametrize("init", [None, "k-means++"])
def test_a_far_point_of_weight_0_has_no_say(init: str | None) -> None:
    x = normal(60, 3)
    far = x.clone()
    far[7] = 1e30
    weights = (torch.arange(60) != 7).double()
    result = pyfold.kmeans(far, 5, weights=weights, init=init)
    expected = pyfold.kmeans(x[weights > 0], 5, init=init)
    assert torch.equal(result.labels[weights > 0], expected.labels)
    assert result.inertia == expected.inertia


@pytest.mark.parametrize("far", [1e12, 1e30])
def test_a_far_row_of_init_has_no_say(far: float) -> None:
    x, truth = blobs(200, 3, 6, spread=0.5)
    start = x[[int((truth == c).nonzero()[0]) for c in range(6)]].double()
    for dtype in (torch.float32, torch.float64):
        near, result = (
            pyfold.kmeans(x.to(dtype), 7, init=torch.cat([start, torch.full((1, 3), row)]), refine="lloyd")
            for row in (1e3, far)
        )
        assert torch.equal(result.labels, near.labels)
        assert result.inertia == near.inertia


def test_float64_keeps_what_float32_would_lose() -> None:
    x, truth = blobs(90, 3, 5, spread=0.05)
    far = x.double() * 1e-6 + 1e3
    result = pyfold.kmeans(far.numpy(), 5)
    assert same_partition(torch.from_numpy(result.labels), truth)
    check(far, result, 5, tolerance=1e-12)
    huge = pyfold.kmeans(x.double() * 1e150, 5)
    assert same_partition(huge.labels, truth)
    limit = pyfold.kmeans(np.array([[1.7e308], [1.6e308], [-1.7e308], [-1.5e308]]), 2)
    np.testing.assert_allclose(limit.centroids, [[1.65e308], [-1.6e308]], rtol=1e-7)


def test_zero_points_and_norms_far_apart() -> None:
    x = torch.cat([torch.zeros(4, 5), 1e6 * normal(20, 5), normal(20, 5, seed=1)])
    for init, refine in WAYS:
        result = pyfold.kmeans(x, 20, init=init, refine=refine)
        check(x, result, 20)
        assert len(torch.unique(result.labels[:4])) == 1
    check(torch.zeros(6, 2), pyfold.kmeans(torch.zeros(6, 2), 4), 4)
    check(torch.zeros(6, 2), pyfold.kmeans(torch.zeros(6, 2), 4, init="k-means++"), 4)


@pytest.mark.parametrize(("init", "refine"), [(None, "auto"), ("k-means++", "lloyd")])
def test_weights_count_points_and_zero_is_no_point(init: str | None, refine: str | None) -> None:
    x, _ = blobs(60, 4, 7, spread=0.02)
    w = torch.arange(60) % 4
    weighted = pyfold.kmeans(x, 7, weights=w.double(), init=init, refine=refine, n_init=5)
    repeated = pyfold.kmeans(x.repeat_interleave(w, 0), 7, init=init, refine=refine, n_init=5)
    assert same_partition(weighted.labels.repeat_interleave(w), repeated.labels)
    assert weighted.inertia == pytest.approx(repeated.inertia, rel=1e-5)
    idle = w == 0
    nearest = torch.cdist(x[idle].double(), weighted.centroids.double()).argmin(1)
    assert torch.equal(weighted.labels[idle], nearest)


def test_weights_of_any_kind() -> None:
    x, w = normal(40, 3), np.arange(1.0, 41)
    backwards = np.ascontiguousarray(w[::-1])[::-1]
    frozen = w.copy()
    frozen.flags.writeable = False
    expected = pyfold.kmeans(x, 4, weights=w), pyfold.cluster(x, n_clusters=4, weights=torch.from_numpy(w))
    for weights in (backwards, frozen, w.astype(">f8"), w.astype(np.int32), torch.from_numpy(w).float()):
        assert pyfold.kmeans(x, 4, weights=weights).inertia == expected[0].inertia
        result = pyfold.cluster(np.ascontiguousarray(x.numpy()[::-1])[::-1], n_clusters=4, weights=weights)
        assert result.inertia == expected[1].inertia
    heavy, ones = torch.full((40,), 1e307, dtype=torch.float64), torch.ones(40)
    results = [pyfold.kmeans(x / 100, 4, init="random", weights=weights) for weights in (heavy, ones)]
    assert torch.equal(results[0].labels, results[1].labels)
    assert results[0].inertia == pytest.approx(1e307 * results[1].inertia)


@pytest.mark.parametrize(("n", "d", "k"), [(2000, 8, 20), (3000, 2, 5), (3000, 2, 40)])
def test_no_worse_than_scikit_learn_on_blobs(n: int, d: int, k: int) -> None:
    from sklearn.cluster import KMeans

    x = blobs(n, d, k, spread=0.4)[0].numpy()
    theirs = [KMeans(k, n_init=1, random_state=s).fit(x).inertia_ for s in range(20)]
    ours = [pyfold.kmeans(x, k, init="k-means++", refine="lloyd", seed=s).inertia for s in range(20)]
    assert np.mean(ours) <= 1.02 * np.mean(theirs)
    assert min(ours) <= 1.001 * min(theirs)
    assert pyfold.kmeans(x, k).inertia <= 1.001 * min(theirs)


def test_many_seeds_come_from_several_samples() -> None:
    """K above one round of seeds: the later rounds must know the earlier ones."""
    x = torch.arange(9000.0)[:, None] * torch.tensor([[1.0, -1.0]])
    result = pyfold.kmeans(x, 2500, init="k-means++", refine=None)
    check(x, result, 2500)
    even = 9000 * ((9000 / 2500) ** 2 - 1) / 12 * 2  # inertia of clusters of one size
    assert result.inertia < 3 * even


def test_given_centroids_are_where_it_starts() -> None:
    x, truth = blobs(200, 3, 6, spread=0.05)
    means = torch.zeros(6, 3).index_add_(0, truth, x) / torch.bincount(truth)[:, None]
    for centroids in (means, means.numpy(), means.double()):
        result = pyfold.kmeans(x, 6, init=centroids)
        assert (result.init, result.n_iter) == ("given", 1), "one pass, which moves no centroid by more than tol"
        assert same_partition(result.labels, truth)
    # A start that Lloyd alone cannot mend stays where it leads.
    line = torch.tensor([[0.0], [1], [10], [11], [20], [21]])
    assert pyfold.kmeans(line, 3, init=torch.tensor([[0.0], [1], [15]]), refine="lloyd").labels.tolist() == [0, 1, 2, 2, 2, 2]


def test_restarts_keep_the_best() -> None:
    x, _ = blobs(400, 2, 12, spread=0.1)
    single = pyfold.kmeans(x, 12, init="random", refine="lloyd")
    several = pyfold.kmeans(x, 12, init="random", refine="lloyd", n_init=8)
    assert several.inertia < single.inertia
    assert pyfold.kmeans(x, 12, init="random", refine="lloyd", seed=1).inertia != single.inertia


def test_tolerance_stops_earlier() -> None:
    x = normal(3000, 4)
    strict = pyfold.kmeans(x, 30, init="random", refine="lloyd", tol=0)
    loose = pyfold.kmeans(x, 30, init="random", refine="lloyd", tol=1e-2)
    assert strict.regime == loose.regime == "direct"
    assert loose.n_iter < strict.n_iter < 300
    assert strict.inertia < loose.inertia < 1.1 * strict.inertia


def test_regime_model() -> None:
    gib = 2**30

    def choice(n: int, d: int, k: int, init: str | None, free: int = 64 * gib, **options: Any) -> Any:
        settings = {"init": init, "refine": "auto", "max_iter": 300, "n_init": 1, "rates": RATES["cpu"], "bytes_free": free}
        return choose(Problem(n, d, k, **options.pop("problem", {})), **{**settings, **options})

    taken, refused, why = choice(11008, 12288, 5504, None)
    assert (taken.regime, taken.init, taken.refine) == ("gram", "ward", "hartigan")
    assert (refused.regime, refused.init, refused.refine) == ("direct", "k-means++", "lloyd")
    assert taken.memory >= 4 * 11008**2
    assert taken.flops == 11008**2 * 12288
    taken, refused, why = choice(200_000, 128, 1024, None)
    assert (taken.regime, taken.init, taken.refine) == ("direct", "k-means++", "lloyd")
    assert "160,926,924,288 bytes for G" in why
    assert taken.memory < gib
    assert choice(11008, 12288, 5504, "k-means++")[0].regime == "gram", "G costs as much as one pass, and there are many"
    assert choice(20_000, 16, 10, "random")[0].regime == "direct"
    assert choice(4000, 4000, 1000, "k-means++", free=10**6)[0].regime == "direct", "G does not fit"
    assert choice(4000, 16, 10, "random", refine="hartigan")[0].regime == "gram", "Hartigan needs G"
    with pytest.raises(ValueError, match=r"'ward'.*40000 points.*bytes for G, 1,073,741,824 are free"):
        choice(40_000, 16, 10, "ward", free=gib)
    with pytest.raises(ValueError, match=r"'hartigan'.*Gram matrix"):
        choice(40_000, 16, 10, None, free=gib, refine="hartigan")
    for dtype in (torch.float32, torch.bfloat16):
        parts = 4 * 12000 * 3072 + 4 * 12000**2 + 40 * 2**20  # a copy, G, and its packed panels
        assert choice(12000, 3072, 100, "ward", problem={"dtype": dtype})[0].memory > parts
    settings = {"max_iter": 300, "n_init": 1, "rates": RATES["cuda"]}
    one = estimate(Problem(512, 576, 256), "gram", "ward", "hartigan", **settings)
    many = estimate(Problem(512, 576, 256, batch=64), "gram", "ward", "hartigan", **settings)
    assert (many.flops, many.memory) == (64 * one.flops, 64 * one.memory)
    for n in (100, 1000, 10_000):
        a, b = (
            estimate(Problem(m, 64, 50), r, "k-means++", "lloyd", **settings) for m, r in ((n, "direct"), (2 * n, "direct"))
        )
        assert a.seconds < b.seconds
        assert a.memory < b.memory


def test_explain_says_what_kmeans_takes() -> None:
    for n, d, k in ((200, 300, 100), (6000, 2, 8)):
        x = normal(n, d)
        for init in (None, "k-means++", "ward"):
            explanation = pyfold.explain(x, k, init=init)
            result = pyfold.kmeans(x, k, init=init)
            taken = explanation.taken
            assert (taken.regime, taken.init, taken.refine) == (result.regime, result.init, result.refine)
            assert explanation.backend == result.backend
            assert str(pyfold.explain((n, d), k, init=init)) == str(explanation)
    text = str(pyfold.explain((64, 512, 576), 256))
    assert "64 x N=512, D=576, K=256, float32 on cpu" in text
    assert "takes" in text
    assert "refuses" in text
    several = pyfold.explain([normal(9, 3), normal(5, 2).bfloat16()], [3, 2])
    assert [one.problem.dtype for one in several] == [torch.float32, torch.bfloat16]
    with pytest.raises(ValueError, match="n_clusters: expected 1 to 9"):
        pyfold.explain((9, 3), 10)
    with pytest.raises(ValueError, match=r"shape \(N, D\)"):
        pyfold.explain((9,), 1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no CUDA device"):
            pyfold.explain((9, 3), 2, device="cuda")


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "x: expected a NumPy array or a torch tensor, got str", {"x": "points"}),
    (TypeError, "x: expected floating-point numbers, got torch.int64", {"x": torch.ones(5, 3).long()}),
    (TypeError, "x: expected floating-point numbers, got torch.int64", {"x": np.ones((5, 3), dtype=np.int64)}),
    (TypeError, "x: expected floating-point numbers, got <U1", {"x": np.array([["a"]])}),
    (TypeError, "x: expected every value, got a masked array", {"x": np.ma.masked_array(np.ones((5, 3)))}),
    (TypeError, "x: expected a dense tensor", {"x": torch.eye(5).to_sparse()}),
    (ValueError, r"x: expected a non-empty matrix \(N, D\), got shape \(3,\)", {"x": torch.ones(3)}),
    (ValueError, r"got shape \(0, 3\)", {"x": torch.ones(0, 3)}),
    (ValueError, r"got shape \(0, 4, 3\)", {"x": torch.ones(0, 4, 3)}),
    (ValueError, "at least one problem", {"x": []}),
    (ValueError, "x: expected finite values, got nan at row 3", {"x": torch.tensor([[0.0], [1], [2], [float("nan")]])}),
    (ValueError, "x: expected finite values, got -inf at row 1", {"x": np.array([[0.0], [-np.inf], [2]])}),
    (ValueError, "n_clusters: expected 1 to 5 .*points.*, got 6", {"n_clusters": 6}),
    (ValueError, "n_clusters: expected 1 to 5 .*points.*, got 0", {"n_clusters": 0}),
    (TypeError, "n_clusters: expected an integer, got 2.0", {"n_clusters": 2.0}),
    (TypeError, "n_clusters: expected an integer, got True", {"n_clusters": True}),
    (ValueError, "n_clusters: expected one for each of 2 problems, got 1", {"x": [torch.ones(3, 1)] * 2, "n_clusters": [2]}),
    (TypeError, "n_clusters: expected one for each of 2 problems, got 2.5", {"x": [torch.ones(3, 1)] * 2, "n_clusters": 2.5}),
    (TypeError, r"n_clusters: .* 1 problems, got array\(2\)", {"x": [torch.ones(3, 1)], "n_clusters": np.array(2)}),
    (TypeError, "n_clusters: expected one number for a batch", {"x": torch.ones(2, 3, 1), "n_clusters": [2, 3]}),
    (ValueError, "init: expected None, 'ward'.*, got 'k-means'", {"init": "k-means"}),
    (ValueError, r"init: expected centroids of shape \(2, 3\), got \(3, 3\)", {"init": torch.ones(3, 3)}),
    (TypeError, "init: expected a NumPy .*got NoneType", {"x": [torch.ones(3, 1)] * 2, "init": [None, torch.ones(2, 1)]}),
    (TypeError, "init: expected a NumPy .*got str", {"x": [torch.ones(3, 1)] * 2, "init": ["ward", "ward"]}),
    (ValueError, "init: expected finite values", {"init": torch.full((2, 3), float("inf"))}),
    (ValueError, "init: expected device cpu, got meta", {"init": torch.ones(2, 3, device="meta")}),
    (ValueError, "refine: expected 'auto'.*, got 'elkan'", {"refine": "elkan"}),
    (TypeError, "n_init: expected an integer, got 'auto'", {"n_init": "auto"}),
    (ValueError, "max_iter: expected at least 1, got 0", {"max_iter": 0}),
    (ValueError, "seed: expected at least 0, got -1", {"seed": -1}),
    (ValueError, "tol: expected a finite number of at least 0, got -1", {"tol": -1}),
    (ValueError, "tol: .*got nan", {"tol": float("nan")}),
    (ValueError, "weights: expected finite values of at least 0, .*got -1", {"weights": torch.tensor([1.0, 1, 1, 1, -1])}),
    (ValueError, "weights: .*not all 0", {"weights": torch.zeros(5)}),
    (ValueError, r"weights: expected shape \(5,\), got \(4,\)", {"weights": torch.ones(4)}),
    (ValueError, "weights: expected a spread of at most 1e.06", {"weights": torch.tensor([1.0, 1, 1, 1, 1e-7])}),
    (TypeError, "weights: expected .*, got complex128", {"weights": np.ones(5, dtype=complex)}),
    (TypeError, "weights: expected a NumPy array or a torch tensor, got list", {"weights": [1, 1, 1, 1, 1]}),
    (ValueError, "points of positive weight.*got 2", {"weights": torch.tensor([1.0, 0, 0, 0, 0])}),
    (ValueError, "backend: expected auto, .* got 'gpu'", {"backend": "gpu"}),
]


@pytest.mark.parametrize(("error", "match", "options"), BAD, ids=[f"{i}-{next(iter(b[2]))}" for i, b in enumerate(BAD)])
def test_bad_input_says_what_is_wrong(error: type[Exception], match: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        pyfold.kmeans(**{"x": normal(5, 3), "n_clusters": 2, **options})


def test_importing_pyfold_is_light_and_scikit_learn_optional() -> None:
    code = (
        "import sys, pyfold; assert not {'torch', 'sklearn'} & set(sys.modules)\n"
        "sys.modules['sklearn'] = None\n"
        "import torch; pyfold.kmeans(torch.ones(3, 1), 1)\n"
        "try: pyfold.KMeans\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pyfold.KMeans needs scikit-learn" in done.stdout
    assert "pip install 'pyfold[sklearn]'" in done.stdout
