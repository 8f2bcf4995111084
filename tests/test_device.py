"""A fold through a GPU's memory, on a GPU that is emulated: the host's bytes, within the budget, whichever queue is slow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_refused, run_cli, tensors_of, tiny_checkpoint, tree, write_synthetic
from emulated_gpu import EmulatedGpu
from test_budget import OPTIONS, least

from pyfold import cluster, fold_checkpoint, gpu_budget, merge_rows
from pyfold.budget import Budget, make_budget
from pyfold.cli import main
from pyfold.clustering import Clustering
from pyfold.device import OnGpu
from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.forecast import Rates, forecast
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.safetensors import ITEM_SIZE, TensorInfo
from pyfold.memory import Pool
from pyfold.ops import GramFile
from pyfold.pipeline import Prepared, prepare
from pyfold.plan import make_plan, parse_size
from pyfold.report import forecast_table, summary
from pyfold.streams import memory_errors

MIB = 2**20
QUEUES = ["up", "kernels", "down"]


@pytest.fixture(scope="module", params=["F32", "F16"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 3 x 2100 x 2200 numbers: three panels of features, the last of them not whole; three of rows."""
    return write_synthetic(tmp_path_factory.mktemp("device") / request.param, 2, 2100, 2200, request.param)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The same on the host."""
    folder = tmp_path_factory.mktemp("host") / "dst"
    fold_checkpoint(source, folder, ratio=0.25)
    return numbers(folder)


def numbers(folder: Path) -> list[object]:
    """The hash of every tensor, and the inertias, in which every bit of G shows."""
    record = json.loads((folder / "pyfold.json").read_text())
    return [record["sha256"], record["groups"]]


def prepared(source: Path, gpu_memory: object, host_memory: object = None) -> Prepared:
    return prepare(source, ratio=0.25, host_memory=host_memory, device="cuda", gpu_memory=gpu_memory, **OPTIONS)


def least_gpu_memory(source: Path) -> int:
    with pytest.raises(PyfoldError, match="gpu_memory: ") as refused:
        prepared(source, "1MiB")
    return least(str(refused.value))


@pytest.mark.parametrize("host", ["whole", "pieces"])
@pytest.mark.parametrize("slow", QUEUES)
def test_a_fold_on_a_gpu(
    source: Path, expected: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str, host: str
) -> None:
    """The kernels are the cpu's, so that the bytes must be too: G on the device, and in strips, the lowest and higher ones."""
    gpu = EmulatedGpu(slow, monkeypatch)
    monkeypatch.setattr("pyfold.pipeline.rss_bytes", lambda: 0)
    fewest = least_gpu_memory(source)
    places = set()
    for memory, more in ((None, 0), (fewest, 0), (fewest + 3 * MIB, 20 * MIB)):
        limit = None
        if host == "pieces":
            with pytest.raises(PyfoldError) as refused:
                prepared(source, memory, "1MiB")
            limit = least(str(refused.value)) + more
        budget = prepared(source, memory, limit).budget
        cut, planned = budget.groups["layers.0.mlp"], budget.gpu["layers.0.mlp"].nbytes
        assert (cut.features is None) == (host == "whole" and cut.strip is None)
        places.add(cut.strip)
        gpu.most = 0
        report = fold_checkpoint(
            source, tmp_path / f"dst-{memory}", ratio=0.25, host_memory=limit, device="cuda", gpu_memory=memory
        )
        print(f"{slow} {host}: strips of {cut.strip}, {cut.features} features, {gpu.most:,} of {planned:,} bytes on the device")
        assert numbers(tmp_path / f"dst-{memory}") == expected
        assert 0.7 * planned <= gpu.most <= planned
        assert report.gpu.peak == gpu.most
        assert gpu.limits[-1] == (memory or gpu.memory)
        assert gpu.taken == 0, "nothing is left there"
        assert not gpu.pinned
        run = json.loads((tmp_path / f"dst-{memory}" / "pyfold-run.json").read_text())
        assert run["gpu"] == {"name": "emulated", "peak": gpu.most, "planned": budget.gpu_peak, "held": 0}
        record = json.loads((tmp_path / f"dst-{memory}" / "pyfold.json").read_text())
        assert record["options"]["clustered_on_host"] == ([] if cut.strip is None else ["layers.0.mlp", "layers.1.mlp"])
        assert record["backend"] == ("reference" if cut.strip is None else f"reference+{record['backend'].partition('+')[2]}")
    assert None in places
    assert len(places) == 3, places


def test_the_next_panel_goes_up_before_one_is_computed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the kernels would wait for every copy: what is asked of them may wait for the device."""
    gpu = EmulatedGpu("kernels", monkeypatch)
    values = torch.randn(40, 3 * gpu_budget.PANEL)
    with Pool(0, gpu.pin, gpu.unpin) as pool:
        device = OnGpu(gpu, {"group": gpu_budget.Buffers(40, 6400, values.nbytes, values.nbytes, 0)}, "auto", pool)
        with device.group("group"):
            device.strip(40, 40)
            device.gram(values, transposed=False)
            assert gpu.log == ["up", "up", "kernels", "up", "kernels", "kernels"]
            clusters = device.cluster(30, None)
            gpu.log.clear()
            merged = device.merge(values, clusters, torch.float32, lambda block: None, consumer=False)
            assert gpu.log == ["up", "up", "kernels", "down", "up", "kernels", "down", "kernels", "down"]
            merged.settle()
    expected = cluster(values, n_clusters=30)
    assert torch.equal(clusters.labels, expected.labels)
    assert torch.equal(merged.values, merge_rows(values, expected.labels, 30))


def test_pinned_memory_is_used_again_in_the_least_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host clusters in is not there yet, or no more, while weights go through the pool."""
    source = write_synthetic(tmp_path / "src", 1, 2100, 8200)  # 3 tensors of 9 pieces, for 2 or 3 strips and for merging
    gpu = EmulatedGpu("down", monkeypatch)
    monkeypatch.setattr("pyfold.pipeline.rss_bytes", lambda: 0)
    fewest = least_gpu_memory(source)
    with pytest.raises(PyfoldError, match="host_memory: ") as refused:
        prepared(source, fewest, "1MiB")
    pinned: list[int] = []
    pin, idle = gpu.pin, Pool.shrink
    monkeypatch.setattr(gpu, "pin", lambda block: (pinned.append(block.nbytes), pin(block)))
    shrunk: list[int] = []

    def shrink(pool: Pool) -> None:
        idle(pool)
        shrunk.append(pool._exist - sum(map(len, pool._lent.values())))

    monkeypatch.setattr(Pool, "shrink", shrink)
    fold_checkpoint(
        source, tmp_path / "dst", ratio=0.25, device="cuda", gpu_memory=fewest, host_memory=least(str(refused.value))
    )
    print(f"{len(pinned)} pinned: {sorted(pinned)}")
    assert len(pinned) <= 10
    assert shrunk == [0, 0], "before the host clusters, and in the end"


def test_the_host_clusters_with_nothing_of_the_group_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is counted on for clustering."""
    gpu = EmulatedGpu("up", monkeypatch)
    n, panel = 2 * gpu_budget.PANEL, gpu_budget.PANEL
    with Pool(0, gpu.pin, gpu.unpin) as pool, GramFile(tmp_path, n) as file:
        device = OnGpu(gpu, {"group": gpu_budget.Buffers(n, 4 * n * n, 4 * n * panel, 4 * n * panel, 0)}, "auto", pool)
        lent: list[int] = []

        def look(**arguments: Any) -> Clustering:
            lent.append(len(pool._lent))
            return cluster(**arguments)

        monkeypatch.setattr("pyfold.device.cluster", look)
        with device.group("group"):
            for begin in range(0, n, panel):
                device.strip(panel, n - begin)
                for _ in range(2):
                    values = pool.empty((n - begin, panel), torch.float32)
                    values.normal_()
                    device.gram(values, transposed=False)
                    device.give_back(values)
                device.spill(file)
            device.cluster(1600, file)
    assert lent == [0]


@pytest.mark.parametrize("slow", QUEUES)
@pytest.mark.parametrize("options", [{"mlp_bias": True}, {"dtype": torch.bfloat16}], ids=str)
def test_small_tensors_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str, options: dict) -> None:
    source = tiny_checkpoint(tmp_path / "src", **options)
    fold_checkpoint(source, tmp_path / "host", ratio=0.25, dtype="float32", layers="0-1")
    EmulatedGpu(slow, monkeypatch)
    fold_checkpoint(source, tmp_path / "gpu", ratio=0.25, dtype="float32", layers="0-1", device="cuda")
    host, gpu = tensors_of(tmp_path / "host"), tensors_of(tmp_path / "gpu")
    assert host.keys() == gpu.keys()
    assert all(torch.equal(host[name], gpu[name]) for name in host)


def test_what_does_not_fit_the_dtype_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of columns beyond fp16, which are looked at where they are written."""
    from conftest import rewrite

    source = tiny_checkpoint(tmp_path / "src", dtype=torch.float16)

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "up_proj" in name:
                tensors[name][:] = tensors[name][:1]

    rewrite(source, grow)
    EmulatedGpu("down", monkeypatch)
    monkeypatch.setattr("pyfold.ops.cpu.CpuBackend.merge_columns", lambda self, x, labels, k, scale, out: out.fill_(torch.inf))
    with pytest.raises(PyfoldError, match=r"down_proj.weight' holds inf folded at element 0"):
        fold_checkpoint(source, tmp_path / "dst", ratio=0.25, device="cuda")
    assert not (tmp_path / "dst").exists()


def test_a_failure_on_the_device_is_raised_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_synthetic(tmp_path / "src", 1, 1100, 1100)
    gpu = EmulatedGpu("up", monkeypatch)

    def fail(*args: object) -> None:
        with memory_errors(torch.device("cuda", 1)):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 1 has ...")

    monkeypatch.setattr(gpu, "ward", fail, raising=False)
    with pytest.raises(MemoryError, match=r"^cuda:1: CUDA out of memory$"):
        fold_checkpoint(source, tmp_path / "dst", ratio=0.25, device="cuda")
    assert not gpu.pinned


@pytest.mark.parametrize(
    "error",
    [
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: an illegal memory access was encountered\nsee ..."),
        RuntimeError("cuda ward: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    ],
    ids=["torch", "kernel", "cublas"],
)
def test_a_device_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: RuntimeError
) -> None:
    """Its first failure, though all that is asked of it later fails too."""
    source = write_synthetic(tmp_path / "src", 1, 1100, 1100)
    gpu = EmulatedGpu("up", monkeypatch)
    release = gpu.release

    def fail(*args: object) -> None:
        def fail_again() -> None:
            release()
            raise RuntimeError("CUDA error: and again")

        monkeypatch.setattr(gpu, "release", fail_again)
        raise error

    monkeypatch.setattr(gpu, "ward", fail, raising=False)
    assert main(["fold", str(source), str(tmp_path / "dst"), "--ratio", "0.25", "--device", "cuda"]) == 1
    first = str(error).partition("\n")[0]
    assert capsys.readouterr().err.startswith(f"pyfold: the device failed: {first}")
    monkeypatch.setattr(gpu, "release", release)
    monkeypatch.setattr(gpu, "ward", lambda *args: torch.zeros(2) @ torch.zeros(3), raising=False)
    with pytest.raises(RuntimeError, match="size"):
        main(["fold", str(source), str(tmp_path / "other"), "--ratio", "0.25", "--device", "cuda"])


def test_a_run_goes_on_where_it_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another budget to the same bytes, but not with one that moves the clustering from the device to the host."""
    source = write_synthetic(tmp_path / "src", 2, 2100, 1100)
    gpu = EmulatedGpu("down", monkeypatch)

    def stop(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise OSError(5, "stopped")

    with pytest.raises(OSError, match="stopped"):
        fold_checkpoint(source, tmp_path / "dst", ratio=0.25, device="cuda", progress=stop)
    refusal = r"an unfinished run with clustered_on_host \[\] instead of \['layers.0.mlp', 'layers.1.mlp'\]; repeat its command"
    with pytest.raises(PyfoldError, match=refusal):
        fold_checkpoint(source, tmp_path / "dst", ratio=0.25, device="cuda", gpu_memory=least_gpu_memory(source))
    with pytest.raises(PyfoldError, match="an unfinished run with"):
        fold_checkpoint(source, tmp_path / "dst", ratio=0.25)
    with monkeypatch.context() as updated:
        updated.setattr(gpu, "libraries", "torch 1, CUDA 3")
        with pytest.raises(PyfoldError, match="an unfinished run with libraries torch 1, CUDA 2 instead of torch 1, CUDA 3"):
            fold_checkpoint(source, tmp_path / "dst", ratio=0.25, device="cuda")
    fewest = prepared(source, None).budget.gpu_peak
    report = fold_checkpoint(source, tmp_path / "dst", ratio=0.25, device="cuda", gpu_memory=fewest)
    fold_checkpoint(source, tmp_path / "whole", ratio=0.25, device="cuda")
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")
    assert f"GPU         peak memory {gpu.peak() >> 20}" in summary(report)


def test_a_plan_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_synthetic(tmp_path / "src", 2, 2100, 1100)
    gpu = EmulatedGpu("down", monkeypatch)
    for memory in (gpu.memory, least_gpu_memory(source)):
        plan, gpu.most = prepared(source, memory), 0
        planned = forecast(plan)
        print(forecast_table(planned))
        assert gpu.most <= plan.processor.limit - gpu_budget.OVERHEAD + 12 * MIB, "the probes keep to the budget too"
        assert planned.gpu_peak == plan.budget.gpu_peak <= memory
        assert planned.copying > 0
        assert main(["plan", str(source), "--ratio", "0.25", "--device", "cuda", "--gpu-memory", str(memory)]) == 0
        assert f"GPU memory  {planned.gpu_peak / MIB:.0f} MiB at the peak" in capsys.readouterr().out


def test_seconds_where_the_host_only_reads_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one thread does comes one after another; threads and device run beside one another."""
    source = write_synthetic(tmp_path / "src", 1, 300, 200)
    EmulatedGpu("down", monkeypatch)
    plan = prepared(source, None)
    fast = 1e15
    even = Rates(gram={"F32": fast}, products={}, clustering=0, hash=1e3, read=1e3, write=fast, up=fast, down=fast)
    for rates, seconds, limited_by in (
        (even, 2 * plan.checkpoint.nbytes / 1e3, "reading and hashing"),
        (replace(even, read=fast, write=1e3), 2 * plan.plan.nbytes / 1e3, "hashing and writing"),
        (replace(even, read=fast, up=1e2), 2 * 4 * 3 * 300 * 200 / 1e2, "copying to and from the GPU"),
        (replace(even, gram={"F32": 1e3}), 300 * 300 * 200 * 3 / 1e3, "computing"),
    ):
        monkeypatch.setattr("pyfold.forecast.probe", lambda *args, rates=rates: rates)
        planned = forecast(plan)
        assert planned.seconds == pytest.approx(seconds, rel=1e-3)
        assert planned.limited_by == limited_by


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "src")
    cases = {
        ("--device", "tpu"): ["device: expected cpu, cuda or cuda:N, got 'tpu'"],
        ("--gpu-memory", "1GiB"): ["gpu_memory: needs device cuda, got device cpu"],
    }
    if not torch.cuda.is_available():
        cases[("--device", "cuda:0", "--gpu-memory", "1GiB")] = ["device: cuda:0 cannot be used: "]
    for options, message in cases.items():
        for command in (("fold", source, tmp_path / "dst", "--ratio", "0.25"), ("plan", source)):
            done = run_cli(*command, *options)
            check_refused(done.returncode, done.stderr, message)
    done = run_cli("fold", source, tmp_path / "dst", "--ratio", "0.25", "--device", "cuda", "--ray")
    check_refused(done.returncode, done.stderr, ["ray: tasks compute on CPUs, got device cuda"])


def llama(width: int, hidden: int, dtype: str = "F16") -> Checkpoint:
    """One feed-forward layer, as its header says."""
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    size = width * hidden * ITEM_SIZE[dtype]
    tensors = {name: TensorInfo(name, Path("model"), dtype, shape, 0, size) for name, shape in shapes.items()}
    return Checkpoint(Path("."), {}, tensors, None)


def budget_of(checkpoint: Checkpoint, gpu_memory: int, host_memory: int = 8 << 30, dtype: str = "keep") -> Budget:
    width = checkpoint.tensors["gate"].shape[0]
    group = FoldGroup("mlp", 0, width, "intermediate_size", ("gate", "up"), ("down",), (), "gain", "silu")
    options = {"width": None, "layers": None, "multiple_of": None, "max_shard_size": "5GB"}
    plan = make_plan(checkpoint, [group], ratio=0.2, dtype=dtype, **options)
    return make_budget(checkpoint, plan, host_memory, 700 << 20, gpu_memory=gpu_memory)


@pytest.mark.parametrize(
    ("width", "hidden", "gpu_memory", "clustered_there"),
    [
        (11008, 4096, "1GiB", True),
        (11008, 4096, "700MiB", False),
        (28672, 8192, "1GiB", False),
        (28672, 8192, "8GiB", True),
        (53248, 16384, "1GiB", False),
        (48, 32, "128MiB", True),
    ],
)
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_budgets_of_known_shapes(width: int, hidden: int, dtype: str, gpu_memory: str, clustered_there: bool) -> None:
    limit = parse_size(gpu_memory)
    checkpoint = llama(width, hidden, dtype)
    budget = budget_of(checkpoint, limit)
    cut = budget.groups["mlp"]
    print(f"{budget.gpu['mlp']}, peak {budget.gpu_peak / MIB:.0f} MiB; host {cut}")
    assert budget.clustered_on_host == ([] if clustered_there else ["mlp"])
    assert budget.gpu_peak <= limit
    assert budget.peak <= 8 << 30
    if not clustered_there:
        assert cut.features % gpu_budget.PANEL == 0
        assert cut.strip >= 1024 * 4 * width
        assert budget.gpu_peak > 0.9 * limit or cut.strip >= 2048 * 4 * width, "as high as there is room for"


@pytest.mark.parametrize("dtype", ["keep", "float32"])
@pytest.mark.parametrize("source_dtype", ["F16", "F32"])
def test_the_least_that_is_named_will_do(source_dtype: str, dtype: str) -> None:
    checkpoint = llama(28672, 8192, source_dtype)
    with pytest.raises(PyfoldError, match="gpu_memory: mlp needs at least") as refused:
        budget_of(checkpoint, 100 * MIB, dtype=dtype)
    needs = least(str(refused.value))
    assert budget_of(checkpoint, needs, dtype=dtype).gpu_peak == needs
    with pytest.raises(PyfoldError, match="gpu_memory: mlp needs at least"):
        budget_of(checkpoint, needs - 1, dtype=dtype)
    for gpu_memory in (needs, 1 << 40):
        with pytest.raises(PyfoldError, match="host_memory: mlp needs at least") as refused:
            budget_of(checkpoint, gpu_memory, host_memory=701 << 20, dtype=dtype)
        host = least(str(refused.value))
        assert budget_of(checkpoint, gpu_memory, host_memory=host, dtype=dtype).peak <= host
