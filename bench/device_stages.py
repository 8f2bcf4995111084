"""What bench/device.py runs, a process each: build, tests, ceilings, every op at the shapes of folding, compute-sanitizer.

A stage takes the folder for partial results and returns rows of the table; what it measured before it was stopped stays there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
N, D, WIDTHS = 11008, 12288, (5504, 8806)  # a LLaMA-7B feed-forward layer
# Without the project's own options, which need plugins that this machine may lack.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
Row = dict[str, Any]


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def partial(out: Path, stage: str) -> Path:
    return out / f"device-{stage}.partial.json"


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median of what one call takes on the device, launches included."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return median(times)


def kernel_seconds(call: Callable[[], object], name: str) -> float | None:
    """Mean time of the kernels whose name contains ``name``, without what lies between launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    found = [event for event in profile.key_averages() if name in event.key]
    count = sum(event.count for event in found)
    return sum(event.device_time_total for event in found) / count / 1e6 if count else None


def row(case: str, took: float, flops: float = 0, moved: float = 0, ceiling: float = 0, **more: Any) -> Row:
    """``ceiling`` in FLOP/s or bytes/s, whichever the case is measured against."""
    rate = (flops or moved) / took
    result: Row = {"case": case, "ms": took * 1e3}
    if flops:
        result["TFLOP/s"] = flops / took / 1e12
    if moved:
        result["GB/s"] = moved / took / 1e9
    if ceiling:
        result["share of ceiling"] = rate / ceiling
    if "contender_s" in more:
        contender = more.pop("contender_s")
        result |= {"contender ms": contender * 1e3, "ratio": contender / took}
    return {**result, **more}


def features(kind: str, n: int = N, d: int = D, k: int = WIDTHS[0]) -> torch.Tensor:
    from rows import make_rows

    if kind == "spread":  # near-orthogonal rows of log-normal norms
        x = torch.randn(n, d, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) / d**0.5
        return (x * torch.exp(0.5 * torch.randn(n, 1, device="cuda", generator=torch.Generator("cuda").manual_seed(1)))).half()
    return make_rows(kind, n, d, k).half().cuda()


def labels_for(n: int, k: int) -> torch.Tensor:
    from rows import make_labels

    return make_labels(n, k, torch.Generator().manual_seed(0)).cuda()


def ceilings(out: Path) -> dict[str, float]:
    """Bytes/s of a copy and FLOP/s of cuBLAS, as this run measured them."""
    file = out / "device-ceilings.json"
    rows = json.loads(file.read_text())
    return {r["case"]: r.get("GB/s", 0) * 1e9 or r["TFLOP/s"] * 1e12 for r in rows}


# Stages


def build(out: Path) -> list[Row]:
    from torch.utils.cpp_extension import CUDA_HOME

    begin, folder = time.perf_counter(), ROOT / "build" / "device"
    definitions = {
        "PYFOLD_CUDA": "ON",
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": ROOT / "pyfold",
        "Python_EXECUTABLE": sys.executable,
    }
    if not shutil.which("nvcc") and CUDA_HOME:
        definitions["CMAKE_CUDA_COMPILER"] = Path(CUDA_HOME, "bin", "nvcc")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, *generator, *(f"-D{k}={v}" for k, v in definitions.items())], check=True, stdout=2
    )
    subprocess.run(["cmake", "--build", folder, "--parallel", str(os.cpu_count())], check=True, stdout=2)
    return [row("extension from source", time.perf_counter() - begin)]


def test(out: Path) -> list[Row]:
    begin = time.perf_counter()
    # Most of the time goes into compiling Triton's kernels: in eight processes, where pytest can.
    parallel = ["-n", "8"] if find_spec("xdist") else []
    done = subprocess.run([*PYTEST, *parallel, "tests/test_gpu.py"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"})
    result = row("tests/test_gpu.py", time.perf_counter() - begin, note="passed" if done.returncode == 0 else "FAILED")
    if done.returncode:
        partial(out, "test").write_text(json.dumps([result]))
        raise SystemExit(f"tests/test_gpu.py: pytest's exit code {done.returncode}")
    return [result]


def measure_ceilings(out: Path) -> list[Row]:
    source, target = torch.randn(2, 2**29, device="cuda")
    rows = [row("copy", seconds(lambda: target.copy_(source)), moved=2 * source.nbytes)]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        n = 8192
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        rows.append(row(str(dtype).removeprefix("torch."), seconds(lambda a=a, b=b: a @ b), flops=2 * n**3))
    (out / "device-ceilings.json").write_text(json.dumps(rows))
    return rows


def gram(out: Path) -> list[Row]:
    from pyfold import ops
    from pyfold.ops import cuda

    limit, rows, flops = ceilings(out), [], N * (N + 1) * D
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x, g = torch.randn(N, D, device="cuda", dtype=dtype), torch.empty(N, N, device="cuda")
        name = str(dtype).removeprefix("torch.")
        repeats = 10 if dtype != torch.float32 else 3
        whole = seconds(lambda x=x, g=g: cuda._add_product(x, x.T, g, False), repeats)
        took = seconds(lambda x=x, g=g: ops.gram(x, out=g, backend="cuda"), repeats)
        rows.append(row(f"gram {name}", took, flops, ceiling=limit[name], contender="torch.mm, full", contender_s=whole))
    x, chosen = torch.randn(N, D, device="cuda", dtype=torch.float16), cuda.PANEL
    for panel in (512, 768, 1024, 1408, 2048, 2816):  # is the constant in pyfold/ops/cuda.py this device's best?
        cuda.PANEL = panel
        took = seconds(lambda: ops.gram(x, out=g, backend="cuda"), 5)
        note = "chosen" if panel == chosen else ""
        rows.append(row(f"gram float16, panels of {panel}", took, flops, ceiling=limit["float16"], note=note))
    return rows


def cluster(out: Path) -> list[Row]:
    """Ward, Hartigan and the whole default method; inertia beside the CPU's; the worst cases for Ward's rounds."""
    import pyfold
    from pyfold import ops
    from pyfold.clustering import labels_of

    rows = []
    for kind in ("fitted", "gaussian", "planted", "spread", "function"):
        if kind == "function":
            h, v = torch.relu(features("gaussian", d=512) + features("gaussian", d=1)), features("fitted", d=512)
            x, g = None, ops.gram(h) * ops.gram(v)
        else:
            x = features(kind)
            g = ops.gram(x)
        for k in WIDTHS:
            took = seconds(lambda g=g, k=k: ops.ward(g, k), 3)
            joins = ops.ward(g, k)
            rows.append(row(f"ward {kind} K={k}", took))
            cut = labels_of(joins, N)
            took = seconds(lambda g=g, k=k, cut=cut: ops.hartigan(g, cut, k), 3)
            moves = len(ops.hartigan(g, cut, k)[1])
            rows.append(row(f"hartigan {kind} K={k}", took, note=f"{moves} moves"))
            whole = (lambda x=x, k=k: pyfold.cluster(x, n_clusters=k)) if x is not None else None
            whole = whole or (lambda g=g, k=k: pyfold.cluster(gram=g, n_clusters=k))
            took, note = seconds(whole, 3), f"inertia {whole().inertia:.8g}"
            if kind == "fitted" and k == WIDTHS[0]:
                on_cpu = pyfold.cluster(x.cpu(), n_clusters=k).inertia
                note += f", relative to the CPU backend's {whole().inertia / on_cpu - 1:+.1e}"
            rows.append(row(f"cluster {kind} K={k}", took, note=note))
            if x is not None:  # what cluster() adds: checks that the input is finite, the inertia before and after
                refined = lambda x=x, k=k: ops.hartigan(h := ops.gram(x), labels_of(ops.ward(h, k), N), k)  # noqa: E731
                rows.append(row(f"  features to labels {kind} K={k}", seconds(refined, 3)))
            partial(out, "cluster").write_text(json.dumps(rows))
    return rows


def lloyd(out: Path) -> list[Row]:
    from pyfold import ops

    limit, rows = ceilings(out)["copy"], []
    x = features("fitted")
    g = ops.gram(x)
    for k in (16, *WIDTHS):
        labels = labels_for(N, k)

        def plain(k: int = k, labels: torch.Tensor = labels) -> torch.Tensor:
            mass = torch.bincount(labels, minlength=k)
            sums = torch.zeros(N, k, device="cuda").index_add_(1, labels, g)
            totals = torch.zeros(k, device="cuda").index_add_(0, labels, sums.gather(1, labels[:, None])[:, 0])
            return (totals / mass**2 - 2 * sums / mass).argmin(1)

        slow = seconds(plain, 5)
        for backend in ("cuda", "triton"):
            if ops.backends().get(backend, "absent") is not None or not _has(backend, "lloyd"):
                continue
            call = _backend(backend, "lloyd", [g], [labels], [k], [torch.ones(N, dtype=torch.float64, device="cuda")])
            took = seconds(call)
            more = {"contender": "torch index_add + argmin", "contender_s": slow}
            rows.append(row(f"lloyd {backend} K={k}", took, moved=g.nbytes, ceiling=limit, **more))
            if backend == "cuda" and (alone := kernel_seconds(call, "nearest")):
                rows.append(row(f"  its pass over G K={k}", alone, moved=g.nbytes, ceiling=limit))
    return rows


def merge(out: Path) -> list[Row]:
    from pyfold import ops

    limit, rows, hidden = ceilings(out)["copy"], [], 4096
    x = torch.randn(N, hidden, device="cuda").half()
    y = x.T.contiguous()
    for k in WIDTHS:
        labels = _canonical(labels_for(N, k))
        by_rows, by_columns = (torch.empty(s, device="cuda", dtype=x.dtype) for s in ((k, hidden), (hidden, k)))
        moved = x.nbytes + by_rows.nbytes
        slow = {
            "merge_rows": seconds(lambda k=k, labels=labels: x.new_zeros(k, hidden).index_add_(0, labels, x)),
            "merge_columns": seconds(lambda k=k, labels=labels: y.new_zeros(hidden, k).index_add_(1, labels, y)),
        }
        for backend in ("cuda", "triton"):
            for op, source, target in (("merge_rows", x, by_rows), ("merge_columns", y, by_columns)):
                if ops.backends().get(backend, "absent") is not None or not _has(backend, op):
                    continue
                call = _backend(backend, op, source, labels, k, None, target)
                more = {"contender": "torch index_add", "contender_s": slow[op]}
                rows.append(row(f"{op} {backend} K={k}", seconds(call), moved=moved, ceiling=limit, **more))
                kernel = {"merge_rows": "mean_rows", "merge_columns": "sum_columns"}[op]
                if backend == "cuda" and (alone := kernel_seconds(call, kernel)):
                    rows.append(row(f"  its kernel K={k}", alone, moved=moved, ceiling=limit))
    return rows


def direct(out: Path) -> list[Row]:
    """One k-means iteration (assign, update) on 10^6 points, beside the peers' iteration from the same centroids."""
    from pyfold import ops

    n, d, k = 1_000_000, 128, 1024
    limit, rows = ceilings(out), []
    x = torch.randn(n, d, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).half()
    start = x[torch.randperm(n, device="cuda")[:k]]
    labels, _ = ops.assign(x, start.float())
    assign = _backend("auto", "assign", [x], [start.float()])
    update = _backend("auto", "update", [x], [labels], [k], [None])
    rows.append(row("assign", seconds(assign), flops=2 * n * d * k, ceiling=limit["float16"]))
    rows.append(row("update", seconds(update), moved=x.nbytes, ceiling=limit["copy"]))
    took = seconds(lambda: (assign(), update()))
    rows.append(row("assign + update", took))
    peers: dict[str, Callable[[int], object]] = {}
    if find_spec("flash_kmeans"):
        import flash_kmeans

        peers["flash-kmeans"] = lambda iterations: flash_kmeans.batch_kmeans_Euclid(
            x[None], n_clusters=k, max_iters=iterations, tol=-1.0, init_centroids=start[None].clone()
        )
    if find_spec("flashlib"):
        import flashlib

        peers["flashlib"] = lambda iterations: flashlib.flash_kmeans(
            x, n_clusters=k, max_iters=iterations, tol=-1.0, init_centroids=start.clone()
        )
    for name in ("flash-kmeans", "flashlib"):
        if name not in peers:
            rows.append({"case": "assign + update", "contender": f"{name} {version_of(name)}"})
            continue
        one, eleven = (seconds(lambda i=i, name=name: peers[name](i), 5) for i in (1, 11))
        per_iteration = (eleven - one) / 10
        more = {"contender": f"{name} {version_of(name)}", "contender_s": per_iteration}
        rows.append(row("assign + update", took, note="contender: (11 iterations - 1) / 10", **more))
        partial(out, "direct").write_text(json.dumps(rows))
    return rows


def batch(out: Path) -> list[Row]:
    """64 problems in few launches: Gram, Ward, Hartigan."""
    from pyfold import ops
    from pyfold.clustering import labels_of

    count, n, d, k = 64, 512, 576, 256
    xs = [features("gaussian", n, d).float() + s * 1e-3 for s in range(count)]

    def solve() -> list[tuple[torch.Tensor, torch.Tensor]]:
        grams = ops.gram(xs)
        cuts = [labels_of(joins, n) for joins in ops.ward(grams, k)]
        return ops.hartigan(grams, cuts, k)

    rows, more = [], {}
    if find_spec("sklearn"):
        from sklearn.cluster import KMeans

        begin = time.perf_counter()
        for x in xs[:4]:
            KMeans(k, n_init=1, random_state=0).fit(x.cpu().numpy())
        more = {"contender": "scikit-learn KMeans, 4 of 64 x 16", "contender_s": (time.perf_counter() - begin) * 16}
    rows.append(row(f"{count} x ({n}, {d}) K={k}", seconds(solve, 5), **more))
    rows.append(row("  gram", seconds(lambda: ops.gram(xs), 5)))
    grams = ops.gram(xs)
    rows.append(row("  ward", seconds(lambda: ops.ward(grams, k), 5)))
    return rows


def sanitize(out: Path) -> list[Row]:
    """compute-sanitizer over small tests of the CUDA kernels; allocations not cached, so that each has its own bounds."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [{"case": "compute-sanitizer", "note": "absent"}]
    rows, failures = [], []
    tests = "cuda and (ragged_list or clusters_of_one or (hartigan and 7) or (merging and 127) or (test_update and 129))"
    for check in ("memcheck", "racecheck"):
        begin = time.perf_counter()
        # Not API errors: libraries probe for what a driver may lack, and what matters raises in the test.
        command = [tool, "--tool", check, "--report-api-errors", "no", "--error-exitcode", "9"]
        command += [*PYTEST, "-x", "tests/test_gpu.py", "-k", tests]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=50, capture_output=True, text=True)
            verdict = "clean" if done.returncode == 0 else f"exit code {done.returncode}: {done.stdout[-1500:]}"
        except subprocess.TimeoutExpired:
            verdict = "not finished in 50 s"
        rows.append(row(check, time.perf_counter() - begin, note=verdict.splitlines()[0]))
        if verdict != "clean":
            failures.append(f"{check}: {verdict}")
    partial(out, "sanitize").write_text(json.dumps(rows))
    if failures:
        raise SystemExit("\n".join(failures))
    return rows


def _backend(name: str, op: str, *arguments: Any) -> Callable[[], Any]:
    """The op without the public checks, some of which wait for the device."""
    from pyfold.ops import registry

    run = registry.call(op, name, torch.device("cuda"))
    return lambda: run(*arguments)


def _has(backend: str, op: str) -> bool:
    from pyfold import ops
    from pyfold.errors import PyfoldError

    try:
        ops.resolve(backend, "cuda", op)
    except PyfoldError:
        return False
    return True


def _canonical(labels: torch.Tensor) -> torch.Tensor:
    from pyfold.clustering import canonical

    return canonical(labels)


# Seconds, and what runs; in order, the build and the tests first.
STAGES: dict[str, tuple[float, Callable[[Path], list[Row]]]] = {
    "build": (150, build),
    "test": (120, test),
    "ceilings": (30, measure_ceilings),
    "gram": (30, gram),
    "lloyd": (30, lloyd),
    "merge": (20, merge),
    "cluster": (90, cluster),
    "direct": (45, direct),
    "batch": (30, batch),
    "sanitize": (105, sanitize),
}
