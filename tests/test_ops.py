"""Every op on every SIMD level and dtype, at odd shapes, against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS

from pyfold import ops
from pyfold.clustering import labels_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 3, 7, 47, 48, 49, 127, 129, 400]
FEATURES = [1, 5, 127, 512, 513, 1100]


def rows(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_labels(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(k), torch.randint(0, k, (n - k,), generator=generator)])
    return labels[torch.randperm(n, generator=generator)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("d", FEATURES)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_gram_matches_reference(backend: str, dtype: torch.dtype, n: int, d: int, transposed: bool) -> None:
    x = rows(n, d, dtype)
    stored = x.T.contiguous() if transposed else x
    got = ops.gram(stored, transposed=transposed, backend=backend)
    expected = x.double() @ x.double().T
    norms = expected.diagonal().sqrt()
    assert torch.equal(got, got.T)
    assert float(((got - expected).abs() / (norms[:, None] * norms[None, :]).clamp_min(1e-30)).max()) < 2e-6


def test_gram_accumulates_parts_in_place(backend: str) -> None:
    x = rows(130, 1100)
    whole = ops.gram(x, backend=backend)
    parts = ops.gram(x[:, :512].contiguous(), backend=backend)
    ops.gram(x[:, 512:], out=parts, accumulate=True, backend=backend)  # a strided view
    assert torch.equal(whole, parts)


def test_gram_entries_depend_on_their_rows_alone(backend: str) -> None:
    x = rows(301, 700)
    x[200] = x[3]
    order = torch.randperm(301, generator=torch.Generator().manual_seed(2))
    g = ops.gram(x, backend=backend)
    assert torch.equal(ops.gram(x[order].contiguous(), backend=backend), g[order][:, order])
    assert g[3, 3] == g[200, 200] == g[3, 200]


SPREADS = {
    "one feature above all": lambda x: x * torch.where(torch.arange(700) == 5, 1e3, 1.0),
    "one feature far from zero": lambda x: x + torch.where(torch.arange(700) == 5, 1e4, 0.0),
    "mean far from zero": lambda x: x + 100,
    "log-normal": lambda x: (3 * x).exp(),
    "two values": lambda x: torch.where(x > 0, 1.0, -0.5),
    "one feature of half the rows above all": lambda x: torch.where(
        torch.arange(len(x))[:, None] % 2 == 0,
        x.sign(),
        torch.where(torch.arange(700) == 511, 1.0, 0.49 * 2.0**-22 * x.sign()),
    ),
    "norms from 1e-15 to 1e15": lambda x: x * torch.logspace(-15, 15, len(x))[:, None],
}


@pytest.mark.parametrize("spread", SPREADS)
def test_gram_is_accurate_whatever_the_spread(spread: str, backend: str) -> None:
    x = SPREADS[spread](rows(100, 700)).contiguous()
    norms = x.double().norm(dim=1)
    error = (ops.gram(x, backend=backend).double() - x.double() @ x.double().T).abs() / norms / norms[:, None]
    assert float(error.max()) <= (6e-7 if backend == "cpu:amx" and "half" not in spread else 5e-6)


def test_gram_multiplies_fp16_exactly(backend: str) -> None:
    """Rows of one huge number, no two in the same column, and tiny ones down to the least: every product counts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.exp2(-24 + 14 * torch.rand(100, 700, generator=generator)) * rows(100, 700).sign()
    x[:50].fill_diagonal_(65504.0)
    x = x.half()
    assert int((x.abs() == 2.0**-24).sum()) > 1000
    g, exact, most = ops.gram(x, backend=backend), x.double() @ x.double().T, x.double().abs() @ x.double().abs().T
    assert float(((g - exact).abs() / most).max()) <= 3e-6
    # Sums of so few bits that fp32 holds them: exact whatever the order.
    x[:, 100:] = torch.randint(-1, 2, (100, 600), generator=generator).half() * 2.0**-24
    x[:, 50:100] = torch.randint(-1023, 1024, (100, 50), generator=generator).half() * 2.0**-24
    x[:, :50] = 65504.0 * torch.eye(100, 50)
    others = ~torch.eye(100, dtype=torch.bool)
    exact = x.double() @ x.double().T
    assert torch.equal(ops.gram(x, backend=backend).double()[others], exact[others])


def test_gram_of_integers_is_exact(backend: str) -> None:
    small = torch.randint(-1000, 1001, (40, 12), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(ops.gram(small, backend=backend).double(), small.double() @ small.double().T)
    large = torch.tensor(
        [[1.0], [-1.0], [4194303.0], [8355711.0], [-8355711.0], [8355712.0], [-4194304.0]]
    )  # 0x7f7f7f: 3 digits
    assert torch.equal(ops.gram(large, backend=backend)[:2], torch.cat([large, -large], 1).T)


def test_gram_of_extreme_numbers(backend: str) -> None:
    """Numbers whose products fit fp32 although their units' product, or one's unit times the other's number, does not."""
    x = torch.tensor([[3e38, 0.0], [0.0, 3e38], [1e-38, 0.0], [1e-45, 1e-45], [0.0, 0.0]])
    expected = (x.double() @ x.double().T).float()
    torch.testing.assert_close(ops.gram(x, backend=backend), expected, rtol=1e-6, atol=3e-45)


def test_gram_shows_which_rows_are_not_finite(backend: str) -> None:
    x = rows(40, 600)
    x[3, 550], x[17, 2] = float("nan"), float("inf")
    g = ops.gram(x, backend=backend)
    assert not g[[3, 17]].isfinite().any()
    kept = [i for i in range(40) if i not in (3, 17)]
    assert g[kept][:, kept].isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 20, 63, 126, 127])
def test_ward_matches_reference(backend: str, k: int) -> None:
    g = ops.gram(rows(127, 40), backend="reference")
    weights = torch.rand(127, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    before = g.clone()
    got = ops.ward(g, k, weights=weights, backend=backend)
    expected = ops.ward(g, k, weights=weights, backend="reference")
    assert torch.equal(g, before), "the matrix is as it was"
    assert torch.equal(labels_of(got, 127), labels_of(expected, 127))
    torch.testing.assert_close(got.height, expected.height, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5, 20, 63, 100, 127])
def test_hartigan_matches_reference(backend: str, k: int) -> None:
    g = ops.gram(rows(127, 40), backend="reference")
    weights = torch.rand(127, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    start = random_labels(127, k)
    labels, gains = ops.hartigan(g, start, k, weights=weights, backend=backend)
    expected, expected_gains = ops.hartigan(g, start, k, weights=weights, backend="reference")
    assert torch.equal(labels, expected)
    torch.testing.assert_close(gains, expected_gains)


@pytest.mark.parametrize("k", [3, 30, 90])
def test_each_move_lowers_the_inertia_by_its_gain(backend: str, k: int) -> None:
    g = ops.gram(rows(127, 20))
    start = random_labels(127, k)
    _, gains = ops.hartigan(g, start, k, backend=backend)
    assert len(gains) > 20
    assert bool((gains > 0).all())
    inertia = ops.inertia(g, start, k)
    for moves in range(1, len(gains) + 1, 5):
        labels, first = ops.hartigan(g, start, k, max_moves=moves, backend=backend)
        assert torch.equal(first, gains[:moves])
        assert ops.inertia(g, labels, k) == pytest.approx(inertia - float(gains[:moves].sum()), rel=1e-9)


def test_hartigan_keeps_sums_of_large_clusters_right(backend: str) -> None:
    centres = rows(3, 8) * 4
    x = centres.repeat_interleave(100, 0) + rows(300, 8, seed=1)
    g = ops.gram(x)
    labels, gains = ops.hartigan(g, random_labels(300, 3), 3, backend=backend)
    expected, _ = ops.hartigan(g, random_labels(300, 3), 3, backend="reference")
    assert len(gains) > 100
    assert torch.equal(labels, expected)


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (7, 3, 4), (129, 1100, 64), (48, 33, 48), (60, 5, 1)])
def test_merges_match_reference(backend: str, dtype: torch.dtype, to: torch.dtype, n: int, d: int, k: int) -> None:
    x = rows(n, d, dtype)
    labels = random_labels(n, k)
    generator = torch.Generator().manual_seed(4)
    weights = torch.rand(n, dtype=torch.float64, generator=generator) + 0.5
    scale = torch.rand(n, generator=generator) + 0.5
    # One rounding of the result; before it an fp32 sum of m products, off by (m + 1) u sum |product| at most.
    largest = int(torch.bincount(labels).max())
    products = ops.merge_columns(x.float().abs().T.contiguous(), labels, k, scale=scale, backend="reference")
    tolerance = {"rtol": 1.01 * torch.finfo(to).eps, "atol": (largest + 1) * 2.0**-24 * 2 * float(products.max())}
    for w in (None, weights):
        expected = ops.merge_rows(x, labels, k, weights=w, dtype=torch.float32, backend="reference")
        got = ops.merge_rows(x, labels, k, weights=w, dtype=to, backend=backend)
        torch.testing.assert_close(got.float(), expected, **tolerance)
        out = torch.full((k, d), torch.nan, dtype=to)
        assert ops.merge_rows(x, labels, k, weights=w, out=out, backend=backend) is out
        assert torch.equal(out, got)
    columns = x.T.contiguous()
    for s in (None, scale):
        expected = ops.merge_columns(columns, labels, k, scale=s, dtype=torch.float32, backend="reference")
        got = ops.merge_columns(columns, labels, k, scale=s, dtype=to, backend=backend)
        torch.testing.assert_close(got.float(), expected, **tolerance)


def test_merges_past_the_caches_match_reference(backend: str) -> None:
    """Results of more than 4 MiB, their rows at any place in a cache line."""
    x = rows(1500, 2101, torch.float16)
    labels = random_labels(1500, 1003)
    for got, expected in (
        (ops.merge_rows(x, labels, 1003, backend=backend), ops.merge_rows(x, labels, 1003, backend="reference")),
        (
            ops.merge_columns(x.T.contiguous(), labels, 1003, backend=backend),
            ops.merge_columns(x.T.contiguous(), labels, 1003, backend="reference"),
        ),
    ):
        assert got.numel() * got.itemsize > 4 << 20
        torch.testing.assert_close(got, expected, rtol=torch.finfo(torch.float16).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merges_have_the_same_bits_at_every_level(dtype: torch.dtype) -> None:
    x = rows(700, 333, dtype)
    labels = torch.cat([random_labels(400, 301), torch.zeros(300, dtype=torch.int64)])  # one cluster past an fp32 block
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(700, dtype=torch.float64, generator=generator) + 0.5
    scale = torch.rand(700, generator=generator) + 0.5
    merged = [
        (
            ops.merge_rows(x, labels, 301, weights=weights, backend=level),
            ops.merge_columns(x.T.contiguous(), labels, 301, scale=scale, backend=level),
        )
        for level in BACKENDS
    ]
    for other in merged[1:]:
        assert all(torch.equal(a, b) for a, b in zip(merged[0], other, strict=True))


def test_means_of_large_clusters_keep_their_accuracy(backend: str) -> None:
    """One fp32 sum of 300,000 rows near 1 would be off by 1e-4 and more."""
    x = rows(300_000, 2) * 0.01 + 1
    mean = ops.merge_rows(x, torch.zeros(len(x), dtype=torch.int64), 1, backend=backend)
    torch.testing.assert_close(mean[0].double(), x.double().mean(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_pattern_keeps_its_bits(backend: str, dtype: torch.dtype) -> None:
    """Rows and columns alone in their cluster, through the fp32 path: subnormals, signed zeros, the largest."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    x = x[torch.isfinite(x)]
    alone = torch.arange(len(x))
    assert torch.equal(ops.merge_rows(x, alone, len(x), backend=backend).view(torch.int16), x.view(torch.int16))
    merged = ops.merge_columns(x[None, :], alone, len(x), backend=backend)
    assert torch.equal(merged[0].view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrowing_rounds_like_torch(backend: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(4000) * 10.0 ** torch.randint(-9, 5, (4000,)), torch.tensor([65519.0, 65520.0, -0.0, 2.0**-25])])
    alone = torch.arange(len(x))
    got = ops.merge_columns(x[None, :], alone, len(x), dtype=dtype, backend=backend)[0]
    assert torch.equal(got, x.to(dtype))


def test_merging_equal_rows_gives_the_row(backend: str) -> None:
    for dtype in DTYPES:
        x = rows(4, 300, dtype).repeat_interleave(torch.tensor([1, 2, 5, 9]), 0)
        labels = torch.arange(4).repeat_interleave(torch.tensor([1, 2, 5, 9]))
        eps = torch.finfo(torch.float32).eps if dtype == torch.float32 else 0.0
        merged = ops.merge_rows(x, labels, 4, backend=backend)
        torch.testing.assert_close(merged, rows(4, 300, dtype), rtol=4 * eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_first_nonfinite(backend: str, dtype: torch.dtype, value: float) -> None:
    x = torch.zeros(200_001, dtype=dtype)
    assert ops.first_nonfinite(x, backend=backend) is None
    x[[70_001, 200_000]] = value
    assert ops.first_nonfinite(x, backend=backend) == 70_001


def test_results_are_bitwise_equal_on_one_and_two_threads(backend: str) -> None:
    x = rows(500, 1300)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        g = ops.gram(x, backend=backend)
        joins = ops.ward(g, 250, backend=backend)
        labels, gains = ops.hartigan(g, labels_of(joins, 500), 250, backend=backend)
        merged = (
            ops.merge_rows(x, labels, 250, backend=backend),
            ops.merge_columns(x.T.contiguous(), labels, 250, backend=backend),
        )
        results.append((g, *joins, labels, gains, *merged))
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_inertia_is_the_sum_of_squares() -> None:
    x = rows(90, 30)
    weights = torch.rand(90, dtype=torch.float64) + 0.5
    labels = random_labels(90, 20)
    centroids = ops.merge_rows(x, labels, 20, weights=weights, backend="reference").double()
    expected = float((weights[:, None] * (x.double() - centroids[labels]) ** 2).sum())
    assert ops.inertia(ops.gram(x), labels, 20, weights) == pytest.approx(expected, rel=1e-6)


def test_bad_tensors_say_expected_and_got() -> None:
    g = ops.gram(rows(5, 3))
    labels = torch.tensor([0, 0, 1, 1, 2])
    for error, match, call in (
        (TypeError, "x: expected float32, float16 or bfloat16, got torch.int64", lambda: ops.gram(torch.ones(2, 2).long())),
        (ValueError, r"x: expected a non-empty matrix, got shape \(0, 3\)", lambda: ops.gram(torch.ones(0, 3))),
        (ValueError, "x: expected contiguous rows", lambda: ops.gram(rows(4, 5).T)),
        (ValueError, r"out: expected shape \(5, 5\), got \(3, 3\)", lambda: ops.gram(rows(5, 3), out=torch.empty(3, 3))),
        (ValueError, "n_clusters: expected 1 to 5 .*, got 6", lambda: ops.ward(g, 6)),
        (ValueError, "n_clusters: expected 1 to 5 .*, got 0", lambda: ops.ward(g, 0)),
        (ValueError, "weights: expected positive", lambda: ops.ward(g, 2, weights=torch.tensor([1.0, 1, 1, 1, -1]))),
        (ValueError, r"weights: expected shape \(5,\)", lambda: ops.ward(g, 2, weights=torch.ones(4))),
        (ValueError, "labels: expected int64", lambda: ops.hartigan(g, labels.int(), 3)),
        (ValueError, r"labels: expected values in \[0, 2\), got 0 to 2", lambda: ops.hartigan(g, labels, 2)),
        (ValueError, "got none in cluster 3", lambda: ops.merge_rows(rows(5, 3), labels, 4)),
        (ValueError, "scale: expected float32", lambda: ops.merge_columns(rows(3, 5), labels, 3, scale=torch.ones(4))),
        (ValueError, "out: expected contiguous", lambda: ops.merge_rows(rows(5, 3), labels, 3, out=torch.empty(3, 2))),
        (ValueError, "got 'tpu'", lambda: ops.gram(rows(2, 2), backend="tpu")),
        (ValueError, "this build and CPU have the SIMD levels", lambda: ops.gram(rows(2, 2), backend="cpu:sve")),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("n", [1, 3, 7, 127, 129])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_lloyd_moves_to_the_nearest_centroid(n: int, weighted: bool, backend: str) -> None:
    """Judged by distance, from the points in fp64."""
    x = rows(n, 20)
    k = max(1, n // 2)
    labels = random_labels(n, k)
    weights = torch.rand(n, dtype=torch.float64) + 0.5 if weighted else None
    centroids = ops.merge_rows(x, labels, k, weights=weights, backend="reference").double()
    distance = torch.cdist(x.double(), centroids, compute_mode="donot_use_mm_for_euclid_dist").square()
    moved, distances = ops.lloyd(ops.gram(x), labels, k, weights=weights, backend=backend)
    chosen = distance.gather(1, moved[:, None])[:, 0]
    scale = float(x.double().square().sum(1).max())
    torch.testing.assert_close(chosen, distance.min(1).values, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(distances.double(), chosen, rtol=0, atol=1e-5 * scale)


def test_lloyd_stays_among_equals(backend: str) -> None:
    x = torch.tensor([[0.0], [0.0], [0.0], [0.0], [2.0]])
    labels = torch.tensor([2, 1, 0, 2, 3])
    moved, distances = ops.lloyd(ops.gram(x), labels, 4, backend=backend)
    assert moved.tolist() == labels.tolist()
    assert distances.tolist() == [0.0] * 5


def test_a_list_of_problems_is_the_problems_one_by_one(backend: str) -> None:
    sizes = [(1, 3, 1), (40, 7, 20), (3, 5, 3), (129, 20, 60)] + ([(1600, 9, 30)] if backend != "reference" else [])
    xs = [rows(n, d) for n, d, _ in sizes]
    counts = [k for _, _, k in sizes]
    weights = [torch.rand(n, dtype=torch.float64) + 0.5 for n, _, _ in sizes]
    grams = ops.gram(xs, backend=backend)
    joins = ops.ward(grams, counts, weights=weights, backend=backend)
    cuts = [labels_of(j, len(x)) for j, x in zip(joins, xs, strict=True)]
    passes = ops.lloyd(grams, cuts, counts, weights=weights, backend=backend)
    refined = ops.hartigan(grams, cuts, counts, weights=weights, backend=backend)
    means = ops.update(xs, cuts, counts, weights=weights, backend=backend)
    for i, (x, k, w) in enumerate(zip(xs, counts, weights, strict=True)):
        g = ops.gram(x, backend=backend)
        assert torch.equal(grams[i], g)
        for got, expected in (
            (joins[i], ops.ward(g, k, weights=w, backend=backend)),
            (passes[i], ops.lloyd(g, cuts[i], k, weights=w, backend=backend)),
            (refined[i], ops.hartigan(g, cuts[i], k, weights=w, backend=backend)),
            ([means[i]], [ops.update(x, cuts[i], k, weights=w, backend=backend)]),
        ):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "d", "k"), [(1, 1, 1), (3, 7, 3), (7, 129, 2), (127, 3, 63), (129, 600, 129), (20, 12288, 10), (900, 40, 450)]
)
def test_assign_finds_the_nearest(n: int, d: int, k: int, dtype: torch.dtype, backend: str) -> None:
    """Judged by distance in fp64."""
    x, centroids = rows(n, d, dtype), rows(k, d, seed=1)
    centroids[: k // 2] = x[: k // 2].float()  # some of them exactly on a point
    labels, distances = ops.assign(x, centroids, backend=backend)
    distance = torch.cdist(x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = distance.gather(1, labels[:, None])[:, 0]
    scale = float(x.double().square().sum(1).max())
    torch.testing.assert_close(chosen, distance.min(1).values, rtol=0, atol=2e-6 * scale)
    torch.testing.assert_close(distances.double(), chosen, rtol=1e-5, atol=1e-12 * scale)


def test_assign_prefers_the_lowest_index_among_equals(backend: str) -> None:
    centroids = rows(5, 33).repeat(40, 1)
    labels, distances = ops.assign(rows(5, 33), centroids, backend=backend)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert float(distances.max()) < 1e-9


def test_assign_reads_strided_rows_and_gives_the_same_bits_on_any_number_of_threads(backend: str) -> None:
    wide = rows(1500, 90)
    x, centroids = wide[:, 3:73], rows(100, 70, seed=2)
    expected = ops.assign(x.contiguous(), centroids, backend=backend)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got = ops.assign(x, centroids, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    torch.set_num_threads(2)


def test_update_is_the_mean_of_a_million_points(backend: str) -> None:
    x = torch.rand(1_000_000, 3) + 1
    labels = torch.zeros(len(x), dtype=torch.int64)
    labels[:7] = 1
    means = ops.update(x, labels, 2, backend=backend)
    expected = torch.stack([x[7:].double().mean(0), x[:7].double().mean(0)])
    torch.testing.assert_close(means.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("d", [64, 600])
@pytest.mark.parametrize("spread", [2e-3, 2e-2])
def test_assign_decides_near_ties(d: int, spread: float, backend: str) -> None:
    """Centroids closer to each other than products are off by, one of them far away; each of them twice."""
    x = rows(1, d) * (1 + spread * rows(300, d, seed=1))
    centroids = rows(1, d) * (1 + spread * rows(200, d, seed=2))
    centroids[70] *= 100
    distance = torch.cdist(x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    labels, _ = ops.assign(x, torch.cat([centroids, centroids]), backend=backend)
    assert int(labels.max()) < 200, "the first of two equals"
    excess = distance.gather(1, labels[:, None])[:, 0] - distance.min(1).values
    # Products in fp32 are off by 1e-7 to 1e-6, at worst 4e-6 on AMX and 3e-5 elsewhere.
    assert float(excess.max()) <= 1e-8 * float(x.double().square().sum(1).max())


def test_assign_of_tiny_points(backend: str) -> None:
    labels, _ = ops.assign(torch.tensor([[1e-20]]), torch.tensor([[-0.5e-20], [1e-20]]), backend=backend)
    assert labels.tolist() == [1]


def test_results_are_on_the_cpu_whatever_the_default_device(backend: str) -> None:
    x, labels = rows(9, 4), torch.arange(9) % 3
    expected = ops.assign(x, x[:3].contiguous(), backend=backend)
    g = ops.gram(x)
    joins = ops.ward(g, 3, backend=backend)
    with torch.device("meta"):
        got = ops.assign(x, x[:3].contiguous(), backend=backend)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(ops.update(x, labels, 3, backend=backend), ops.merge_rows(x, labels, 3, backend=backend))
        weights = torch.ones(9, dtype=torch.float64, device="cpu")
        assert all(torch.equal(a, b) for a, b in zip(ops.ward(g, 3, weights=weights, backend=backend), joins, strict=True))
