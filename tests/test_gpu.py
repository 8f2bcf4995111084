"""Every op on a real GPU, backends cuda and triton, dtypes and odd shapes, against the fp64 reference; argmins by distance.
And whole folds through its memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_refused, run_cli, tiny_checkpoint, tree, with_tokenizer, write_synthetic
from test_ops import DTYPES, random_labels, rows

import pyfold
from pyfold import ops
from pyfold.clustering import labels_of
from pyfold.errors import PyfoldError
from pyfold.ops.reference import _squared_distances

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ODD = [1, 3, 7, 127, 129]
WIDE = 12288  # features of a LLaMA-7B feed-forward unit


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = ops.backends().get(name, "this version has no such backend")
    assert reason is None, f"on a machine with a GPU {name} must run: {reason}"
    return name


def having(backend: str, op: str) -> str:
    """The backend, if it has the op; a backend need not have every one."""
    try:
        return ops.resolve(backend, "cuda", op)
    except PyfoldError as error:
        pytest.skip(str(error))


def weights_of(n: int) -> torch.Tensor:
    w = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) + 0.05
    return (w / w.max()).cuda()


def spread_rows(n: int, d: int) -> torch.Tensor:
    """Near-orthogonal rows of log-normal norms: joins come one by one."""
    return rows(n, d, seed=3) / d**0.5 * torch.exp(0.5 * rows(n, 1, seed=4))


def function_metric(n: int) -> torch.Tensor:
    h, v = torch.relu(rows(n, 200, seed=5) + rows(n, 1, seed=6)).double(), rows(n, 30, seed=7).double()
    return ((h @ h.T / 200) * (v @ v.T)).float()


def gram_of(kind: str, n: int) -> torch.Tensor:
    if kind == "function":
        return function_metric(n).cuda()
    x = (rows(n, 40) if kind == "gaussian" else spread_rows(n, 2000)).double()
    return (x @ x.T).float().cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 7), (7, 129), (127, 3), (129, 127), (129, WIDE), (1500, 65), (2200, 512)])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_gram(backend: str, dtype: torch.dtype, n: int, d: int, transposed: bool) -> None:
    having(backend, "gram")
    x = rows(n, d, dtype).cuda()
    stored = x.T.contiguous() if transposed else x
    out = torch.full((n, n), torch.nan, device="cuda")
    ops.gram(stored, out=out, transposed=transposed, backend=backend)
    expected = x.double() @ x.double().T
    norms = expected.diagonal().sqrt()
    scale = (norms[:, None] * norms[None, :]).clamp_min(1e-30)
    assert torch.equal(out, out.T)
    # Tensor cores add 16 products at a time and truncate: up to an ulp each, all of one sign in a sum of squares.
    allowed = 3e-6 + (0 if dtype == torch.float32 else d * 2**-27)
    assert float(((out - expected) / scale).abs().max()) < allowed, "fp32 sums; TF32 would be off by 3e-4"
    ops.gram(stored, out=out, accumulate=True, transposed=transposed, backend=backend)
    assert float(((out - 2 * expected) / scale).abs().max()) < 2 * allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_of_a_batch_and_of_a_ragged_list(backend: str, dtype: torch.dtype) -> None:
    having(backend, "gram")
    batch = torch.stack([rows(65, 33, dtype, seed=s) for s in range(5)]).cuda()
    ragged = [rows(n, 20 + n, dtype).cuda() for n in ODD]
    for xs in (list(batch), ragged):
        for x, g in zip(xs, ops.gram(xs, backend=backend), strict=True):
            torch.testing.assert_close(g, (x.double() @ x.double().T).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "spread", "function"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_ward_cuts_like_scipy(backend: str, kind: str, weighted: bool) -> None:
    having(backend, "ward")
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    n = 400
    g = gram_of(kind, n)
    weights = weights_of(n) if weighted else None
    before = g.clone()
    joins = {k: ops.ward(g, k, weights=weights, backend=backend) for k in (2, 40, 200, 320)}
    assert torch.equal(g, before), "the matrix is as it was"
    if weighted:
        for k, got in joins.items():
            expected = ops.ward(g.cpu(), k, weights=weights.cpu(), backend="reference")
            assert torch.equal(labels_of(got, n).cpu(), labels_of(expected, n)), k
        return
    norms = g.double().diagonal()
    distance = (norms[:, None] + norms - 2 * g.double()).clamp_min(0).sqrt().cpu().numpy()
    tree = hierarchy.linkage(distance[torch.triu_indices(n, n, 1).unbind()], "ward")
    for k, got in joins.items():
        cut = torch.from_numpy(hierarchy.fcluster(tree, k, "maxclust")).long()
        assert torch.equal(labels_of(got, n).cpu(), pyfold.clustering.canonical(cut)), k
        assert bool((got.height.diff() >= -1e-6 * got.height[1:]).all())


@pytest.mark.parametrize("n", ODD)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_ward_and_hartigan_match_reference(backend: str, n: int, weighted: bool) -> None:
    having(backend, "hartigan")
    g, weights, k = gram_of("gaussian", n), weights_of(n) if weighted else None, max(1, n // 2)
    joins = ops.ward(g, k, weights=weights, backend=backend)
    expected = ops.ward(g, k, weights=weights, backend="reference")
    assert torch.equal(labels_of(joins, n), labels_of(expected, n))
    start = random_labels(n, k).cuda()
    for limit in (None, 3):
        labels, gains = ops.hartigan(g, start, k, weights=weights, max_moves=limit, backend=backend)
        moved, gained = ops.hartigan(g, start, k, weights=weights, max_moves=limit, backend="reference")
        assert torch.equal(labels, moved)
        torch.testing.assert_close(gains, gained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [*ODD, 2001])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_lloyd(backend: str, n: int, weighted: bool) -> None:
    having(backend, "lloyd")
    g, weights = gram_of("gaussian", n), weights_of(n) if weighted else None
    w = torch.ones(n, dtype=torch.float64, device="cuda") if weights is None else weights
    for k in sorted({1, max(1, n // 20), max(1, n // 2), n}):
        given = random_labels(n, k).cuda()
        labels, distances = ops.lloyd(g, given, k, weights=weights, backend=backend)
        exact, _ = _squared_distances(g, given, k, w)
        chosen = exact.gather(1, labels[:, None])[:, 0]
        tolerance = 3e-6 * float(g.diagonal().max())
        assert float((chosen - exact.min(1).values).max()) <= tolerance
        torch.testing.assert_close(distances.double(), chosen, rtol=0, atol=tolerance)


def test_lloyd_of_a_ragged_list(backend: str) -> None:
    having(backend, "lloyd")
    grams = [gram_of("gaussian", n) for n in ODD]
    labels = [random_labels(n, max(1, n // 2)).cuda() for n in ODD]
    ks = [max(1, n // 2) for n in ODD]
    for (moved, distances), g, given, k in zip(ops.lloyd(grams, labels, ks, backend=backend), grams, labels, ks, strict=True):
        alone = ops.lloyd(g, given, k, backend=backend)
        assert torch.equal(moved, alone[0])
        assert torch.equal(distances, alone[1])


DIRECT = [(1, 1, 1), (7, 3, 3), (129, 127, 64), (127, WIDE, 63), (5000, 128, 1000), (999, 8, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "k"), DIRECT)
def test_assign(backend: str, dtype: torch.dtype, n: int, d: int, k: int) -> None:
    having(backend, "assign")
    x, centroids = rows(n, d, dtype).cuda(), rows(k, d, seed=9).cuda()
    labels, distances = ops.assign(x, centroids, backend=backend)
    exact = torch.cdist(x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = exact.gather(1, labels[:, None])[:, 0]
    tolerance = 3e-6 * float(x.double().square().sum(1).max() + centroids.double().square().sum(1).max())
    assert float((chosen - exact.min(1).values).max()) <= tolerance
    torch.testing.assert_close(distances.double(), chosen, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "k"), DIRECT)
def test_update(backend: str, dtype: torch.dtype, n: int, d: int, k: int) -> None:
    having(backend, "update")
    x, labels = rows(n, d, dtype).cuda(), random_labels(n, k).cuda()
    for weights in (None, weights_of(n)):
        means = ops.update(x, labels, k, weights=weights, backend=backend)
        torch.testing.assert_close(means, ops.update(x, labels, k, weights=weights, backend="reference"), rtol=1e-5, atol=1e-6)


def test_update_is_accurate_for_a_million_members(backend: str) -> None:
    having(backend, "update")
    x = 1000 + torch.randn(1_000_000, 4, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    means = ops.update(x, torch.zeros(len(x), dtype=torch.int64, device="cuda"), 1, backend=backend)
    torch.testing.assert_close(means, x.double().mean(0, keepdim=True).float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h", "n"), [(1, 1), (3, 7), (129, 127), (7, 1001), (33, WIDE), (12, 28672), (3, 70000)])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_merging(backend: str, dtype: torch.dtype, h: int, n: int, contiguous: bool) -> None:
    having(backend, "merge_columns")
    k = max(1, n // 2)
    labels, scale = random_labels(n, k).cuda(), rows(1, n)[0].cuda()
    x = rows(h, n + 1, dtype).cuda()[:, :n]
    x = x.contiguous() if contiguous else x
    y = rows(n, h + 1, dtype).cuda()[:, :h]
    y = y.contiguous() if contiguous else y
    low = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for columns_by, rows_by in ((None, None), (scale, weights_of(n))):
        got = ops.merge_columns(x, labels, k, scale=columns_by, backend=backend)
        expected = ops.merge_columns(x, labels, k, scale=columns_by, backend="reference")
        torch.testing.assert_close(got, expected, rtol=low, atol=1e-5)
        got = ops.merge_rows(y, labels, k, weights=rows_by, backend=backend)
        expected = ops.merge_rows(y, labels, k, weights=rows_by, backend="reference")
        torch.testing.assert_close(got, expected, rtol=low, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clusters_of_one_keep_their_bits(backend: str, dtype: torch.dtype) -> None:
    having(backend, "merge_columns")
    x = rows(200, 1000, dtype).cuda()
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1)).cuda()
    assert torch.equal(ops.merge_columns(x, order, 1000, backend=backend)[:, order], x)
    assert torch.equal(ops.merge_rows(x.T.contiguous(), order, 1000, backend=backend)[order], x.T)


@pytest.mark.parametrize("kind", ["gaussian", "spread", "function"])
def test_cluster_on_the_gpu_is_as_good_as_on_the_cpu(kind: str) -> None:
    n = 1500
    g = gram_of(kind, n)
    for k in (n // 2, n * 4 // 5):
        on_gpu = pyfold.cluster(gram=g, n_clusters=k)
        on_cpu = pyfold.cluster(gram=g.cpu(), n_clusters=k)
        assert on_gpu.backend == "cuda"
        assert abs(on_gpu.inertia - on_cpu.inertia) <= 1e-4 * on_cpu.inertia


def test_the_same_bits_on_every_run(backend: str) -> None:
    n, k = 1001, 500
    x, labels, g = rows(n, 513, torch.float16).cuda(), random_labels(n, k).cuda(), gram_of("gaussian", n)
    calls = {
        "gram": lambda: [ops.gram(x, backend=backend)],
        "ward": lambda: [*ops.ward(g, k, backend=backend)],
        "lloyd": lambda: [*ops.lloyd(g, labels, k, backend=backend)],
        "hartigan": lambda: [*ops.hartigan(g, labels, k, backend=backend)],
        "assign": lambda: [*ops.assign(x, x[:k].float(), backend=backend)],
        "update": lambda: [ops.update(x, labels, k, backend=backend)],
        "merge_rows": lambda: [ops.merge_rows(x, labels, k, backend=backend)],
        "merge_columns": lambda: [ops.merge_columns(x.T.contiguous(), labels, k, backend=backend)],
    }
    ran = 0
    for op, call in calls.items():
        try:
            ops.resolve(backend, "cuda", op)
        except PyfoldError:
            continue
        first = call()
        for _ in range(4):
            assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True)), op
        ran += 1
    assert ran >= 4


def test_another_stream_and_the_callers_tf32_setting(backend: str) -> None:
    having(backend, "gram")
    x = rows(300, 200).cuda()
    expected = ops.gram(x, backend=backend)
    torch.set_float32_matmul_precision("high")
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = ops.gram(x, backend=backend)
        stream.synchronize()
        assert torch.equal(got, expected)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 3 x 6000 x 2500 fp16 numbers: three panels of features, the last not whole; six of rows, 137 MiB of G."""
    return write_synthetic(tmp_path_factory.mktemp("stream") / "src", 2, 6000, 2500, "F16")


def folded_on_gpu(source: Path, target: Path, memory: int | None) -> dict[str, Any]:
    """In a process of its own, whose peak is that of this fold."""
    limit = ["--gpu-memory", memory] if memory else []
    done = run_cli("fold", source, target, "--ratio", "0.2", "--device", "cuda", "--json", *limit)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_fold_keeps_to_its_gpu_memory(checkpoint: Path, tmp_path: Path) -> None:
    """As torch's allocator counts; and the bytes do not depend on the budget where it clusters in the same place."""
    refused = run_cli("fold", checkpoint, tmp_path / "none", "--ratio", "0.2", "--device", "cuda", "--gpu-memory", "1MiB")
    check_refused(refused.returncode, refused.stderr, ["gpu_memory: layers.0.mlp needs at least"])
    least = int(refused.stderr.partition("(")[2].partition(" bytes")[0].replace(",", ""))
    whole = folded_on_gpu(checkpoint, tmp_path / "whole", None)
    folds = {
        "fits": folded_on_gpu(checkpoint, tmp_path / "fits", whole["gpu"]["planned"]),
        "least": folded_on_gpu(checkpoint, tmp_path / "least", least),
        "higher": folded_on_gpu(checkpoint, tmp_path / "higher", least + (40 << 20)),
    }
    for name, fold in {"whole": whole, **folds}.items():
        gpu = fold["gpu"]
        print(f"{name}: {gpu['peak'] >> 20} MiB of {gpu['planned'] >> 20} planned, {gpu['held'] >> 20} held before")
        assert gpu["planned"] - (120 << 20) <= gpu["peak"] <= gpu["planned"], "112 MiB are for libraries and small tensors"
        assert gpu["held"] > 0
        memory = gpu["planned"] if name != "whole" else 1 << 40
        planned = run_cli("plan", checkpoint, "--ratio", "0.2", "--device", "cuda", "--gpu-memory", memory, "--json")
        assert planned.returncode == 0, planned.stderr
        assert fold["peak_rss_bytes"] <= json.loads(planned.stdout)["peak"]
    assert tree(tmp_path / "fits") == tree(tmp_path / "whole")
    assert tree(tmp_path / "least") == tree(tmp_path / "higher")
    for host, group in zip(folds["least"]["groups"], whole["groups"], strict=True):
        assert host["inertia"] == pytest.approx(group["inertia"], rel=1e-4)
        assert host["total_inertia"] == pytest.approx(group["total_inertia"], rel=1e-5)


def test_folds_in_one_process(checkpoint: Path, tmp_path: Path) -> None:
    """What the first leaves behind, and what its caller has there, is neither the second's nor lost."""
    mine = torch.ones(50 << 20, dtype=torch.uint8, device="cuda")
    fraction = torch.cuda.get_per_process_memory_fraction()
    for target in ("first", "second"):
        report = pyfold.fold_checkpoint(checkpoint, tmp_path / target, ratio=0.2, device="cuda", gpu_memory="512MiB")
        assert report.gpu.peak <= report.gpu.planned <= 512 << 20
        assert report.gpu.held >= mine.nbytes
    assert tree(tmp_path / "first") == tree(tmp_path / "second")
    assert torch.cuda.get_per_process_memory_fraction() == fraction
    assert bool((mine == 1).all())


def test_a_fold_on_a_gpu_is_as_good_as_on_the_host(checkpoint: Path, tmp_path: Path) -> None:
    fold_on_host = run_cli("fold", checkpoint, tmp_path / "host", "--ratio", "0.2", "--json")
    assert fold_on_host.returncode == 0, fold_on_host.stderr
    there = folded_on_gpu(checkpoint, tmp_path / "gpu", None)
    for here, group in zip(json.loads(fold_on_host.stdout)["groups"], there["groups"], strict=True):
        assert group["inertia"] == pytest.approx(here["inertia"], rel=1e-4)
        assert group["total_inertia"] == pytest.approx(here["total_inertia"], rel=1e-5)
    with pytest.raises(PyfoldError, match="there is no cuda:99"):
        pyfold.fold_checkpoint(checkpoint, tmp_path / "none", ratio=0.2, device="cuda:99")
    planned = run_cli("plan", checkpoint, "--ratio", "0.2", "--device", "cuda", "--gpu-memory", "1GiB", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["gpu_peak"] == there["gpu"]["planned"]


@pytest.mark.parametrize("given", [[], ["--allocate", "auto"], ["--calibration", "none"]], ids=["text", "auto", "noise"])
def test_a_fold_by_function_is_as_good_as_on_the_host(given: list[str], tmp_path: Path) -> None:
    """Each on the text that it writes; and within its memory."""
    pytest.importorskip("transformers")
    source = with_tokenizer(tiny_checkpoint(tmp_path / "src", width=400, hidden_size=128))
    options = ["--ratio", "0.25", "--metric", "function", "--json", *given]
    folds = {}
    for name, where in (("host", []), ("gpu", ["--device", "cuda", "--gpu-memory", "512MiB"])):
        done = run_cli("fold", source, tmp_path / name, *options, *where)
        assert done.returncode == 0, done.stderr
        folds[name] = json.loads(done.stdout)
    gpu = folds["gpu"]["gpu"]
    print(f"{gpu['peak'] >> 20} MiB, {folds['gpu']['seconds']:.1f} s; on the host {folds['host']['seconds']:.1f} s")
    assert 0 < gpu["peak"] <= 512 << 20
    lost = [[group["output_error"] for group in folds[name]["groups"]] for name in ("host", "gpu")]
    assert sum(lost[1]) == pytest.approx(sum(lost[0]), rel=0.1)
    planned = run_cli("plan", source, *options, "--device", "cuda", "--gpu-memory", "512MiB")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["gpu_peak"] <= gpu["planned"] == 512 << 20
    assert run_cli("verify", tmp_path / "gpu").returncode == 0
