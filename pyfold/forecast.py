"""What a fold will take, before a weight is read: memory, work, bytes, seconds, and what limits it.

Memory is the budget that the fold itself keeps to. Seconds come from a model whose rates are probed in at most 3 seconds: the
Gram kernel, clustering, hashing, and the disks of source and destination.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfold import ops
from pyfold.clustering import cluster
from pyfold.families.writing import dtype_of
from pyfold.function_forecast import Pace, Phase, Writing
from pyfold.gpu_budget import PANEL
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.safetensors import ITEM_SIZE, dtype_name, torch_dtype
from pyfold.jobs import make_jobs, reads_of
from pyfold.memory import Pool, empty
from pyfold.pipeline import Prepared
from pyfold.reads import gram_reads, strips_of
from pyfold.streams import Gpu, Queue

_PRODUCT = 2048  # rows and columns of what torch multiplies, as long as a batch on its way through a layer is about
_COPIED_ROWS = 1 << 13  # of a panel on its way to a GPU, and back: 16 MiB
_DISK_BYTES = 1 << 27  # of a probe, unless half a second is over before
_PROBE_SECONDS = 0.5
# Seconds per entry of G that are looked at; measured at N = 11008 and 28672 on rows like SmolLM2's, 2 cores of a Xeon with AMX.
_WARD_START, _WARD_JOIN, _HARTIGAN = 2.8e-9, 1.2e-8, 5.3e-9
_CLUSTERING_PROBE = (4096, 3276)  # N, K: where G outgrows the caches, as a layer's does
_CLUSTERED = 512  # features of what a GPU is to cluster: 32768 points of them
_SPILLED = 3e-9  # seconds a byte of G takes longer in a file: written twice over, read row by row (N = 28672)
_MEMORY = 5e9  # bytes/s of merging, of checking, of making room: two passes at the bandwidth of memory, and page faults


@dataclass(frozen=True)
class Rates:
    """FLOP/s of the half product by dtype, and of torch's products for the function metric; clustering, x as slow as where it
    was measured; bytes/s of the others.

    ``up`` and ``down``: to and from a GPU; infinite without one.
    """

    gram: dict[str, float]
    products: dict[str, float]
    clustering: float
    hash: float
    read: float
    write: float
    up: float
    down: float


@dataclass(frozen=True)
class GroupForecast:
    """A group to be folded: features of its weights and rows of G in hand at once (None: all), bytes, seconds of computing."""

    name: str
    width: int
    folded_width: int
    features: int | None
    rows: int | None
    memory: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """A fold to be; bytes and seconds.

    Attributes
    ----------
    groups : list of GroupForecast
        In the order in which they will be folded.
    phases : list of Phase
        One after another; by weights all is folding.
    peak, process, ahead, spare : int
        VmHWM of the process; what interpreter and imports hold of it, what may be read ahead, and lie idle to be used again.
    flops : float
        Of folding.
    bytes_read, bytes_written : int
    disk_free, disk_needed : int
        Of the destination.
    seconds : float
        Of all phases; what follows is of folding.
    computing, reading_and_writing, hashing, copying : float
        Seconds each would take alone; copying is to and from a GPU.
    limited_by : str
        The longest of these; with a GPU, of the threads that read and hash, and that check, hash and write, and of the device.
    rates : Rates
    gpu_peak, gpu_held : int or None
        What torch reserves of a GPU at most, and what context and libraries hold of it.
    """

    groups: list[GroupForecast]
    phases: list[Phase]
    peak: int
    process: int
    ahead: int
    spare: int
    flops: float
    bytes_read: int
    bytes_written: int
    disk_free: int
    disk_needed: int
    seconds: float
    computing: float
    reading_and_writing: float
    hashing: float
    copying: float
    limited_by: str
    rates: Rates
    gpu_peak: int | None
    gpu_held: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def beyond(self, max_seconds: float) -> list[str]:
        """What to say where text takes longer to write than a user would wait."""
        return [
            f"writing text takes {phase.seconds:,.0f} s, longer than {max_seconds:,.0f}; give a text with --calibration FILE"
            for phase in self.phases
            if isinstance(phase, Writing) and phase.seconds > max_seconds
        ]


def forecast(prepared: Prepared, destination: Path | None = None) -> Forecast:
    """The forecast of a prepared fold. Probes for at most 3 s; ``destination``'s disk only where it is given."""
    checkpoint, plan, budget = prepared.checkpoint, prepared.plan, prepared.budget
    dtypes = {checkpoint.tensors[name].dtype for group, _ in plan.groups for name in group.tensors}
    products = set()
    if prepared.text is not None:
        dtypes = {"F32", dtype_name(prepared.processor.dtype)}
        products = dtypes | {dtype_name(dtype_of(checkpoint))}
    where = _existing(destination or checkpoint.path)
    gpu = prepared.processor.gpu
    with prepared.processor.limited():
        rates = probe(prepared, dtypes, products, where if destination else None)
    pace = None if prepared.text is None else Pace(prepared, rates)
    phases = pace.before() if pace else []
    folds, up, down, merged = {}, 0, 0, 0
    for attention, k in plan.heads:
        assert pace, "heads are folded by function"
        name, n = attention.name, attention.n_groups
        folds[name] = GroupForecast(name, n, k, None, None, *pace.folding_heads(attention, k))
    for group, k in plan.groups:
        members = [checkpoint.tensors[name] for name in group.tensors]
        n, cut = group.width, budget.groups[group.name]
        made = sum(prod(plan.tensors[info.name][1]) * ITEM_SIZE[plan.tensors[info.name][0]] for info in members)
        merged += made
        moved = sum(info.nbytes for info in members) + (0 if gpu else made)
        strips = strips_of(group, cut)
        up += sum(read.nbytes for begin, _ in strips for read in gram_reads(group, members, cut, begin) if read.rows)
        up += sum(info.nbytes for info in members)
        down += made + 4 * sum((end - begin) * (n - begin) for begin, end in strips if cut.strip is not None)
        if pace:
            flops, seconds = pace.folding(group, k)
        else:
            flops = float(n) * sum(info.n_parameters for info in members)
            seconds = sum(float(n) * info.n_parameters / rates.gram[info.dtype] for info in members)
        seconds += rates.clustering * _clustering(n, k) + moved / _MEMORY
        seconds += _SPILLED * 4 * n * n * (cut.strip is not None)
        rows = None if cut.strip is None else strips[0][1]
        folds[group.name] = GroupForecast(group.name, n, k, cut.features, rows, cut.nbytes, flops, seconds)
    groups = [folds[name] for name in plan.folds]
    reads = [read for job in make_jobs(checkpoint, plan) for read in reads_of(job, budget)]
    bytes_read = sum(read.info.nbytes if read.rows is None else read.nbytes for read in reads)
    hashed = sum(read.info.nbytes if read.rows is None else read.nbytes if read.digest else 0 for read in reads)
    folded = {name for group, _ in plan.groups for name in group.tensors}
    folded |= {name for attention, _ in plan.heads for name in attention.names}
    changed = [tensor for name, tensor in plan.tensors.items() if name in folded or tensor[0] != checkpoint.tensors[name].dtype]
    written = sum(prod(shape) * ITEM_SIZE[dtype] for dtype, shape in changed)  # what is hashed as it is written
    others = sum(info.nbytes for name, info in checkpoint.tensors.items() if name not in folded)
    passed_by, again = pace.passed_by() if pace else (0.0, 0)
    bytes_read += again
    stages = {
        "computing": sum(group.seconds for group in groups) + others / _MEMORY + passed_by,
        "reading and writing": bytes_read / rates.read + plan.nbytes / rates.write,
        "hashing": (hashed + written) / rates.hash,
        "copying to and from the GPU": max(up / rates.up, down / rates.down),
    }
    if gpu:  # the kernels leave the cores to threads, in each of which one thing comes after another
        beside = {
            "computing": stages["computing"],
            "reading and hashing": bytes_read / rates.read + hashed / rates.hash,
            "hashing and writing": merged / _MEMORY + written / rates.hash + plan.nbytes / rates.write,
            "copying to and from the GPU": stages["copying to and from the GPU"],
        }
        seconds, limited_by = max((took, stage) for stage, took in beside.items())
    else:  # the stages overlap, but hashing takes its share of the cores from the kernels
        computing = stages["computing"] + stages["hashing"] / torch.get_num_threads()
        seconds, limited_by = max(computing, *stages.values()), max(stages, key=lambda stage: stages[stage])
    phases.append(Phase("folding", budget.peak, seconds, bytes_read, budget.gpu_peak))
    return Forecast(
        groups=groups,
        phases=phases,
        peak=max(phase.memory for phase in phases),
        process=budget.process,
        ahead=budget.ahead,
        spare=budget.spare,
        flops=sum(group.flops for group in groups),
        bytes_read=sum(phase.bytes_read for phase in phases),
        bytes_written=plan.nbytes,
        disk_free=shutil.disk_usage(where).free,
        disk_needed=plan.nbytes + budget.spilled,
        seconds=sum(phase.seconds for phase in phases),
        computing=stages["computing"],
        reading_and_writing=stages["reading and writing"],
        hashing=stages["hashing"],
        copying=stages["copying to and from the GPU"],
        limited_by=limited_by,
        rates=rates,
        gpu_peak=max((phase.gpu_memory for phase in phases if phase.gpu_memory), default=None),
        gpu_held=gpu.held if gpu else None,
    )


def probe(prepared: Prepared, dtypes: set[str], products: set[str], destination: Path | None) -> Rates:
    """Measure the rates, of the Gram kernel and of torch's products by dtype: about two seconds, at most 3."""
    gpu = prepared.processor.gpu
    up, down = _copy_rates(gpu) if gpu else (float("inf"), float("inf"))
    generator = torch.Generator().manual_seed(0)
    n = 4096  # points and features: large enough that G is not what counts
    x = torch.randn(n, n, generator=generator)
    while gpu and n > 1024 and 12 * n * n > prepared.processor.room():  # points, G, and a product of low precision
        n //= 2
    gram = gpu.empty((n, n), torch.float32) if gpu else empty((n, n), torch.float32)
    speeds = {}
    for dtype in sorted(dtypes):
        points = _placed(x[:n, :n].to(torch_dtype(dtype)).contiguous(), gpu)
        multiply = partial(ops.gram, points, out=gram, backend=gpu.backend if gpu else prepared.backend)
        speeds[dtype] = n * n * n / _best(multiply, 1.2 / len(dtypes), gpu)
        del points, multiply
    del gram
    factor = x[:_PRODUCT, :_PRODUCT].contiguous()
    if gpu and not prepared.budget.clustered_on_host:
        clustering = _clustering_rate(prepared, gpu, x)
    else:
        n, k = _CLUSTERING_PROBE
        gram = ops.gram(x[:n, :1024].contiguous(), backend=prepared.backend)
        clustering = _best(partial(cluster, gram=gram, n_clusters=k, overwrite_gram=True, backend=prepared.backend), 0.4)
        clustering /= _clustering(n, k)
    blob = bytes(1 << 25)
    read = _read_rate(prepared.checkpoint)
    return Rates(
        gram=speeds,
        products={
            dtype: 2 * _PRODUCT**3 / _best(partial(torch.matmul, same, same), 0.3 / len(products), gpu)
            for dtype in sorted(products)
            for same in [_placed(factor.to(torch_dtype(dtype)), gpu)]
        },
        clustering=clustering,
        hash=len(blob) / _best(lambda: hashlib.sha256(blob), 0.1),
        read=read,
        write=read if destination is None else _write_rate(destination),
        up=up,
        down=down,
    )


def _copy_rates(gpu: Gpu) -> tuple[float, float]:
    """Of panels as wide as fp16 ones are, to the GPU and back."""
    with Pool(0, gpu.pin, gpu.unpin) as pool:
        here = pool.empty((_COPIED_ROWS, 8 * PANEL), torch.float16)[:, :PANEL]
        there = gpu.empty((_COPIED_ROWS, PANEL), torch.float16)
        here.zero_()
        rates = [
            there.nbytes / _best(partial(_done, queue, partial(gpu.copy, *way)), 0.05)
            for queue, way in ((gpu.up, (there, here)), (gpu.down, (here, there)))
        ]
        pool.give_back(here)
    return rates[0], rates[1]


def _done(queue: Queue, action: Callable[[], object]) -> None:
    queue.put(action).synchronize()


def _clustering_rate(prepared: Prepared, gpu: Gpu, x: Tensor) -> float:
    """At the width of the widest group, or as near to it as the time allows: what is small waits for launches, not memory.

    G has room there, and so have the points, before Ward.
    """
    group, k = max(prepared.plan.groups, key=lambda planned: planned[0].width)
    points = x.view(-1, _CLUSTERED)
    most = min(group.width, len(points))
    n = min(most, _CLUSTERING_PROBE[0] // 2)
    while True:
        clusters, gram = max(1, n * k // group.width), gpu.empty((n, n), torch.float32)
        multiply = partial(ops.gram, _placed(points[:n], gpu), out=gram, backend=gpu.backend)
        gpu.kernels.put(multiply).synchronize()
        del multiply
        took = _best(partial(cluster, gram=gram, n_clusters=clusters, overwrite_gram=True, backend=gpu.backend), 0, gpu)
        del gram
        gpu.release()
        if n == most or 4 * took > _PROBE_SECONDS / 2:
            return took / _clustering(n, clusters)
        n = min(most, 2 * n)


def _clustering(n: int, k: int) -> float:
    """Seconds where they were measured."""
    joins = n - k
    return n * (_WARD_START * n + _WARD_JOIN * joins + _HARTIGAN * min(n, 2 * joins))


def _placed(values: Tensor, gpu: Gpu | None) -> Tensor:
    """Where the kernels run."""
    if gpu is None:
        return values
    there = gpu.empty(tuple(values.shape), values.dtype)
    gpu.kernels.put(partial(there.copy_, values)).synchronize()
    return there


def _best(action: Callable[[], object], seconds: float, gpu: Gpu | None = None) -> float:
    """Of as many rounds as so many seconds have room for, and two: a busy machine is not slow all the time."""
    times: list[float] = []
    if gpu:
        gpu.release()  # what is worked on is there
    while len(times) < 2 or sum(times) < seconds:
        start = time.perf_counter()
        if gpu:
            gpu.kernels.put(action).synchronize()
        else:
            action()
        times.append(time.perf_counter() - start)
    return min(times)


def _read_rate(checkpoint: Checkpoint) -> float:
    """Of pieces spread over the source's files, as they are: what is in the page cache will be there for the fold too."""
    files = sorted({info.path for info in checkpoint.tensors.values()})
    places = [(file, at) for file in files for at in range(0, file.stat().st_size, 1 << 23)]
    buffer = memoryview(bytearray(1 << 23))
    start, done = time.perf_counter(), 0
    for file, at in places[:: max(1, len(places) * len(buffer) // _DISK_BYTES)]:
        handle = os.open(file, os.O_RDONLY)
        try:
            done += os.preadv(handle, [buffer], at)
        finally:
            os.close(handle)
        if time.perf_counter() - start > _PROBE_SECONDS:
            break
    return max(done, 1) / (time.perf_counter() - start)


def _write_rate(folder: Path) -> float:
    """Of a file without a name, to fsync."""
    piece = memoryview(bytearray(1 << 23))
    start, done = time.perf_counter(), 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        while done < _DISK_BYTES and time.perf_counter() - start < _PROBE_SECONDS:
            done += file.write(piece)
        os.fsync(file.fileno())
    return done / (time.perf_counter() - start)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
