"""The partition: against SciPy on real weights, and the properties any correct one has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfold
from pyfold import ops
from pyfold.clustering import canonical, labels_of

LAYERS = (0, 7, 14, 20, 25, 29)
REAL = [0.5, 0.8, 0.9]


def exact_inertia(x: torch.Tensor, labels: torch.Tensor) -> float:
    """From the features, in fp64."""
    k = int(labels.max()) + 1
    sums = torch.zeros((k, x.shape[1]), dtype=torch.float64).index_add_(0, labels, x.double())
    centroids = sums / torch.bincount(labels)[:, None]
    return float(((x.double() - centroids[labels]) ** 2).sum())


def same_partition(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(canonical(a), canonical(b))


@pytest.mark.parametrize("layer", LAYERS)
def test_real_layers_against_scipy(smollm2_features: dict[int, torch.Tensor], layer: int) -> None:
    """Ward's cut has SciPy's inertia; refinement makes it strictly lower; the reported inertia is the true one."""
    from scipy.cluster.hierarchy import fcluster, linkage

    x = smollm2_features[layer]
    n = len(x)
    tree = linkage(x.double().numpy(), "ward")
    for share in REAL:
        k = int(share * n)
        scipy_labels = torch.from_numpy(fcluster(tree, k, "maxclust").astype(np.int64)) - 1
        assert len(torch.unique(scipy_labels)) == k
        scipy_inertia = exact_inertia(x, scipy_labels)
        cut = labels_of(ops.ward(ops.gram(x), k), n)
        result = pyfold.cluster(x, n_clusters=k)
        exact = exact_inertia(x, result.labels)
        print(
            f"layer {layer} K/N {share}: ward/scipy - 1 = {exact_inertia(x, cut) / scipy_inertia - 1:+.1e}, "
            f"refined/scipy - 1 = {exact / scipy_inertia - 1:+.2e} in {result.n_moves} moves, "
            f"reported/exact - 1 = {result.inertia / exact - 1:+.1e}"
        )
        assert exact_inertia(x, cut) == pytest.approx(scipy_inertia, rel=1e-6)
        assert exact < scipy_inertia
        assert result.n_moves > 0
        assert result.inertia == pytest.approx(exact, rel=1e-5)
        assert result.ward_inertia == pytest.approx(scipy_inertia, rel=1e-5)


def gram_of(kind: str, n: int) -> torch.Tensor:
    """Gram matrices as folding meets them: weights, contributions of units (h = activations, V = consumer), spread norms."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 48, generator=generator) @ torch.randn(48, 192, generator=generator) + torch.randn(
        n, 192, generator=generator
    )
    if kind == "function metric":
        h = torch.relu(torch.randn(512, 48, generator=generator) @ torch.randn(48, n, generator=generator))
        return ((h.T @ h) / 512 * (x @ x.T)).contiguous()
    if kind == "spread norms":
        x = torch.randn(n, 400, generator=generator) * torch.exp(0.5 * torch.randn(n, 1, generator=generator))
    return ops.gram(x)


@pytest.mark.parametrize("kind", ["weights", "function metric", "spread norms"])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.9])
def test_wards_cut_is_scipys(kind: str, share: float, backend: str) -> None:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    n = 150 if backend == "reference" else 600
    g = gram_of(kind, n)
    exact = g.double()
    squares = exact.diagonal()[:, None] + exact.diagonal() - 2 * exact
    distances = squareform(squares.clamp_min(0).sqrt().fill_diagonal_(0).numpy(), checks=False)
    k = int(share * n)
    expected = torch.from_numpy(fcluster(linkage(distances, "ward"), k, "maxclust").astype(np.int64)) - 1
    cut = labels_of(ops.ward(g, k, backend=backend), n)
    assert same_partition(cut, expected) or ops.inertia(g, cut, k) == pytest.approx(ops.inertia(g, expected, k), rel=1e-6)


@pytest.mark.parametrize("layer", [0, 14, 20, 29])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_inertia_never_rises_between_refinement_passes(
    smollm2_features: dict[int, torch.Tensor], layer: int, share: float
) -> None:
    x = smollm2_features[layer]
    k = int(share * len(x))
    g = ops.gram(x)
    labels = labels_of(ops.ward(g, k), len(x))
    last = exact_inertia(x, labels)
    while True:
        labels, gains = ops.hartigan(g, labels, k, max_moves=8)
        if not len(gains):
            break
        now = exact_inertia(x, labels)
        assert now < last
        last = now


@pytest.mark.parametrize("layer", [0, 14, 20, 29])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_permuting_real_units_permutes_partition_and_keeps_function(
    smollm2_features: dict[int, torch.Tensor], layer: int, share: float
) -> None:
    x = smollm2_features[layer]
    n, hidden = len(x), 576
    k = int(share * n)
    result = pyfold.cluster(x, n_clusters=k)

    def folded(features: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        gate, up = (ops.merge_rows(part.contiguous(), labels, k, dtype=torch.float32) for part in features.split(hidden, 1)[:2])
        down = ops.merge_columns(features[:, 2 * hidden :].T.contiguous(), labels, k, dtype=torch.float32)
        return (torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)) @ down.T

    inputs = torch.randn(64, hidden, generator=torch.Generator().manual_seed(0))
    expected = folded(x, result.labels, inputs)
    for seed in range(5):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        permuted = pyfold.cluster(x[order].contiguous(), n_clusters=k)
        assert permuted.inertia == pytest.approx(result.inertia, rel=1e-9)
        assert same_partition(permuted.labels, result.labels[order])
        got = folded(x[order].contiguous(), permuted.labels, inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def points(max_n: int = 40) -> st.SearchStrategy[torch.Tensor]:
    """Small matrices with exact ties, duplicates, zeros and norms far apart."""
    values = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 3.0, 1e-3, 1e3])

    def build(shape: tuple[int, int]) -> st.SearchStrategy[torch.Tensor]:
        n, d = shape
        return st.lists(values, min_size=n * d, max_size=n * d).map(lambda v: torch.tensor(v).reshape(n, d))

    return st.tuples(st.integers(1, max_n), st.integers(1, 6)).flatmap(build)


@settings(max_examples=200, deadline=None)
@given(points(), st.data())
def test_any_matrix_gives_a_partition_no_worse_than_ward(x: torch.Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(x)))
    result = pyfold.cluster(x, n_clusters=k)
    assert torch.equal(torch.unique(result.labels), torch.arange(k)), "K clusters, none empty"
    assert torch.equal(canonical(result.labels), result.labels)
    noise = 1e-5 * result.total_inertia
    assert result.inertia <= result.ward_inertia + noise
    assert result.inertia == pytest.approx(exact_inertia(x, result.labels), rel=1e-5, abs=noise)
    assert torch.equal(pyfold.cluster(x, n_clusters=k).labels, result.labels), "the same on every run"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 30))
def test_exact_duplicates_fold_together(seed: int, copies: list[int], d: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randn(len(copies), d, generator=generator) + 10 * torch.arange(len(copies))[:, None]
    truth = torch.arange(len(copies)).repeat_interleave(torch.tensor(copies))
    truth = truth[torch.randperm(len(truth), generator=generator)]
    for dtype in ops.FLOATS:
        x = distinct.to(dtype)[truth]
        result = pyfold.cluster(x, n_clusters=len(copies))
        assert same_partition(result.labels, truth)
        assert result.inertia <= 1e-6 * result.total_inertia


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 60), st.integers(1, 20))
def test_permuting_points_permutes_the_partition(seed: int, n: int, d: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    k = int(torch.randint(1, n + 1, (), generator=generator))
    order = torch.randperm(n, generator=generator)
    a, b = pyfold.cluster(x, n_clusters=k), pyfold.cluster(x[order], n_clusters=k)
    assert same_partition(b.labels, a.labels[order])


def test_weights_count_points() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    copies = torch.arange(30) % 3 + 1
    weighted = pyfold.cluster(x, n_clusters=10, weights=copies.double())
    repeated = pyfold.cluster(x.repeat_interleave(copies, 0), n_clusters=10)
    assert same_partition(weighted.labels.repeat_interleave(copies), repeated.labels)
    assert weighted.inertia == pytest.approx(repeated.inertia, rel=1e-5)


def test_edge_counts() -> None:
    x = torch.randn(9, 3)
    assert torch.equal(pyfold.cluster(x, n_clusters=9).labels, torch.arange(9))
    assert pyfold.cluster(x, n_clusters=9).inertia == pytest.approx(0, abs=1e-6)
    assert torch.equal(pyfold.cluster(x, n_clusters=1).labels, torch.zeros(9, dtype=torch.int64))
    assert torch.equal(pyfold.cluster(torch.zeros(4, 2), n_clusters=2).labels.unique(), torch.arange(2))
    assert torch.equal(pyfold.cluster(torch.randn(1, 1), n_clusters=1).labels, torch.zeros(1, dtype=torch.int64))


def test_refinement_ends_at_the_origin() -> None:
    """A point at the origin has no energy to measure a gain against: rounding alone must not move it back and forth."""
    x = torch.tensor([[1.0], [2], [3], [-3], [-1], [-2], [-3], [3], [0]])
    for k in range(1, 10):
        for backend in ("cpu", "reference"):
            result = pyfold.cluster(x, n_clusters=k, backend=backend)
            assert result.n_moves < 20
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        half = torch.randint(-3, 4, (6, 2), generator=generator).float()
        x = torch.cat([half, -half, torch.zeros(1, 2)])
        assert pyfold.cluster(x, n_clusters=int(torch.randint(2, 12, (), generator=generator))).n_moves < 50


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e20])
def test_the_scale_of_weights_does_not_matter(unit: float) -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    expected = pyfold.cluster(x, n_clusters=25, weights=weights)
    result = pyfold.cluster(x, n_clusters=25, weights=weights * unit)
    assert torch.equal(result.labels, expected.labels)
    assert result.inertia == pytest.approx(expected.inertia * unit)
    rows = pyfold.merge_rows(x, result.labels, 25, weights=weights * unit)
    torch.testing.assert_close(rows, pyfold.merge_rows(x, result.labels, 25, weights=weights))


def test_gram_input_is_left_alone_and_numpy_is_taken() -> None:
    x = np.random.default_rng(0).standard_normal((50, 7))
    g = ops.gram(torch.from_numpy(x).float())
    before = g.clone()
    from_gram = pyfold.cluster(gram=g, n_clusters=20)
    assert torch.equal(g, before)
    assert torch.equal(from_gram.labels, pyfold.cluster(x, n_clusters=20).labels)
    assert from_gram.backend.startswith("cpu:")


def test_reference_backend_agrees(smollm2_features: dict[int, torch.Tensor]) -> None:
    x = smollm2_features[14][:200].contiguous()
    assert torch.equal(pyfold.cluster(x, n_clusters=120).labels, pyfold.cluster(x, n_clusters=120, backend="reference").labels)


def test_norms_far_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 10, generator=generator) * torch.logspace(-3, 3, 60)[:, None]
    result = pyfold.cluster(x, n_clusters=30)
    assert result.inertia == pytest.approx(exact_inertia(x, result.labels), rel=1e-4)


def test_bad_points_say_what_is_wrong() -> None:
    x = torch.randn(5, 3)
    bad = x.clone()
    bad[3, 1] = float("nan")
    for error, match, options in (
        (TypeError, "either x= .* or gram=", {"n_clusters": 2}),
        (TypeError, "either x= .* or gram=", {"x": x, "gram": ops.gram(x), "n_clusters": 2}),
        (ValueError, "got nan at row 3", {"x": bad, "n_clusters": 2}),
        (ValueError, "n_clusters: expected 1 to 5", {"x": x, "n_clusters": 6}),
        (TypeError, "n_clusters: expected an integer, got 4.0", {"x": x, "n_clusters": 4.0}),
        (ValueError, "expected a non-empty matrix", {"x": torch.randn(3), "n_clusters": 2}),
        (TypeError, "got torch.int64", {"x": torch.ones(3, 3).long(), "n_clusters": 2}),
        (ValueError, "scale the features", {"x": x * 1e16, "n_clusters": 2}),
        (ValueError, "spread of at most 1e.06", {"x": x, "n_clusters": 2, "weights": torch.tensor([1.0, 1, 1, 1, 1e-7])}),
        (ValueError, "finite values off the diagonal", {"gram": torch.tensor([[1.0, float("nan")], [0, 1]]), "n_clusters": 1}),
    ):
        with pytest.raises(error, match=match):
            pyfold.cluster(**options)
