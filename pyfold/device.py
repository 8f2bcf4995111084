"""What a group is folded with: host tensors in, host tensors out, wherever the arithmetic runs.

On the host that is the ops. On a GPU every tensor goes up in panels of its features, once for the Gram matrix and once to be
merged, and what is merged comes down; no weight stays there. Copies up, kernels and copies down run beside one another:

    up       | panel 2 | panel 3 | ...   into one of two buffers, once the kernel that read it last is done
    kernels  | panel 1 | panel 2 | ...   once the panel is there; to one of two buffers, once what was made there is down
    down     | panel 0 | panel 1 | ...   once it is made; who reads it on the host waits for that
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyfold import ops
from pyfold.clustering import Clustering, cluster
from pyfold.gpu_budget import PANEL, Buffers
from pyfold.memory import Pool
from pyfold.ops import registry
from pyfold.streams import Event, Gpu

Check = Callable[[Tensor], None]


class Merged(NamedTuple):
    """A block, and what to call before it is read."""

    values: Tensor
    settle: Callable[[], None]


class Device(Protocol):
    """Folds a group at a time. The values it is given are from a pool, into which it gives them back when told to."""

    def group(self, name: str) -> AbstractContextManager[None]:
        """What follows, within, is for this group."""

    def strip(self, rows: int, units: int) -> None:
        """Begin with so many rows of the Gram matrix of so many units."""

    def gram(self, values: Tensor, *, transposed: bool) -> None:
        """Add features of the units to it: (units, features), or, ``transposed``, (features, units)."""

    def spill(self, file: ops.GramFile) -> None:
        """Write it; it is complete."""

    def cluster(self, n_clusters: int, file: ops.GramFile | None) -> Clustering:
        """By the matrix in the file, or by the strip, which is all of it. Raises ValueError."""

    def merge(
        self, values: Tensor, clusters: Clustering, dtype: torch.dtype, check: Check, *, consumer: bool, scale: float = 1.0
    ) -> Merged:
        """Values with their clusters merged: rows, or columns of a consumer, which are scaled. ``check`` is called with them
        before they are read."""

    def give_back(self, values: Tensor) -> None:
        """Those that the last call was given are no more needed."""


class OnHost:
    """The ops on host tensors."""

    def __init__(self, backend: str, pool: Pool) -> None:
        self._backend, self._pool = backend, pool
        self._strip = torch.empty(0)
        self._begun = False

    def group(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def strip(self, rows: int, units: int) -> None:
        self._strip, self._begun = self._pool.empty((rows, units), torch.float32), False

    def gram(self, values: Tensor, *, transposed: bool) -> None:
        strip = self._strip
        ops.gram(values, rows=len(strip), out=strip, accumulate=self._begun, transposed=transposed, backend=self._backend)
        self._begun = True

    def spill(self, file: ops.GramFile) -> None:
        file.write(self._strip)
        self._drop()

    def cluster(self, n_clusters: int, file: ops.GramFile | None) -> Clustering:
        gram = self._strip if file is None else file
        clusters = cluster(gram=gram, n_clusters=n_clusters, overwrite_gram=True, backend=self._backend)
        self._drop()
        return clusters

    def merge(
        self, values: Tensor, clusters: Clustering, dtype: torch.dtype, check: Check, *, consumer: bool, scale: float = 1.0
    ) -> Merged:
        k = clusters.n_clusters
        out = self._pool.empty((len(values), k) if consumer else (k, values.shape[1]), dtype)
        if consumer:
            scales = None if scale == 1 else torch.full(clusters.labels.shape, scale)
            block = ops.merge_columns(values, clusters.labels, k, scale=scales, out=out, backend=self._backend)
        else:
            block = ops.merge_rows(values, clusters.labels, k, out=out, backend=self._backend)
        check(block)
        return Merged(block, lambda: None)

    def give_back(self, values: Tensor) -> None:
        self._pool.give_back(values)

    def _drop(self) -> None:
        self._pool.give_back(self._strip)
        self._strip = torch.empty(0)


class _Slot:
    """A buffer on the device, and what has to pass before it is written again."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self.free: tuple[Event, ...] = ()

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return _matrix(self._memory, rows, columns, dtype)


class _Panel(NamedTuple):
    """Some features of a tensor, on the device once it is ``ready``."""

    features: slice
    values: Tensor
    ready: Event
    slot: _Slot


class OnGpu:
    """The ops on a GPU, behind copies.

    Parameters
    ----------
    gpu : Gpu
    groups : mapping of str to Buffers
        What each group takes there.
    backend : str
        Of the host, which clusters what is in a file.
    pool : Pool
    """

    def __init__(self, gpu: Gpu, groups: Mapping[str, Buffers], backend: str, pool: Pool) -> None:
        self._gpu, self._groups, self._backend, self._pool = gpu, groups, backend, pool
        self._going_up: deque[tuple[Tensor, Event]] = deque()  # values to be given back, and the last copy of them
        self._gram = self._strip = self._labels = self._scales = torch.empty(0)
        self._up: Iterator[_Slot] = iter(())
        self._down: Iterator[_Slot] = iter(())
        self._computed: Event | None = None  # the strip, as far as it has been asked for

    @contextmanager
    def group(self, name: str) -> Iterator[None]:
        self._size = self._groups[name]
        try:
            self._gram = self._gpu.empty((self._size.gram,), torch.uint8)
            self._up = self._slots(self._size.up)
            yield
        except BaseException:
            with suppress(RuntimeError, MemoryError):  # a device that failed fails again; what it failed with first counts
                self._drop()
            raise
        self._drop()
        self._reap(0)

    def strip(self, rows: int, units: int) -> None:
        self._strip, self._computed = _matrix(self._gram, rows, units, torch.float32), None

    def gram(self, values: Tensor, *, transposed: bool) -> None:
        strip = self._strip
        for panel in self._panels(values, transposed):
            more = {"accumulate": self._computed is not None, "transposed": transposed, "backend": self._gpu.backend}
            add = partial(ops.gram, panel.values, rows=len(strip), out=strip, **more)
            self._computed = self._gpu.kernels.put(add, panel.ready)
            panel.slot.free = (self._computed,)

    def spill(self, file: ops.GramFile) -> None:
        assert self._computed
        strip = self._pool.empty(tuple(self._strip.shape), torch.float32)
        self._gpu.down.put(partial(self._gpu.copy, strip, self._strip), self._computed).synchronize()
        self._reap(0)  # all of it went up before; clustering on the host counts on its room
        file.write(strip)
        self._pool.give_back(strip)

    def cluster(self, n_clusters: int, file: ops.GramFile | None) -> Clustering:
        if file is None:
            found = self._cluster_here(n_clusters)
        else:
            self._pool.shrink()
            found = cluster(gram=file, n_clusters=n_clusters, backend=self._backend)
        self._drop()
        self._up, self._down = self._slots(self._size.up), self._slots(self._size.down)
        labels = found.labels.cpu()
        self._labels = self._gpu.empty(tuple(labels.shape), torch.int64)
        self._gpu.up.put(partial(self._gpu.copy, self._labels[None], labels[None]))  # whoever waits for a panel waits for it
        return replace(found, labels=labels)

    def merge(
        self, values: Tensor, clusters: Clustering, dtype: torch.dtype, check: Check, *, consumer: bool, scale: float = 1.0
    ) -> Merged:
        k, gpu = clusters.n_clusters, self._gpu
        block = self._pool.empty((len(values), k) if consumer else (k, values.shape[1]), dtype)
        # The public op would look at the labels again and wait for the device, panel by panel.
        merge = registry.call("merge_columns" if consumer else "merge_rows", gpu.backend, gpu.device)
        scales: Tensor | None = None
        if consumer and scale != 1:
            if self._scales.numel() == 0:
                self._scales = gpu.empty((1, len(self._labels)), torch.float32)
                gpu.up.put(partial(gpu.copy, self._scales, torch.full((1, len(self._labels)), scale)))
            scales = self._scales[0]
        down: Event | None = None
        for panel in self._panels(values, consumer):
            part = _features(block, panel.features, consumer)
            slot = next(self._down)
            made = slot.matrix(len(part), part.shape[1], dtype)
            merged = gpu.kernels.put(partial(merge, panel.values, self._labels, k, scales, made), panel.ready, *slot.free)
            panel.slot.free = (merged,)
            down = gpu.down.put(partial(gpu.copy, part, made), merged)
            slot.free = (down,)

        def settle() -> None:
            assert down
            down.synchronize()  # the last of a queue's copies is done after the others
            check(block)

        return Merged(block, settle)

    def give_back(self, values: Tensor) -> None:
        self._going_up.append((values, self._copied))
        self._reap(1)

    def _panels(self, values: Tensor, by_rows: bool) -> Iterator[_Panel]:
        """Have the values copied up; the next panel is asked for before one is given out, so that kernels hide its copy."""
        issued: deque[_Panel] = deque()
        extent = len(values) if by_rows else values.shape[1]
        for first in range(0, extent, PANEL):
            features = slice(first, min(first + PANEL, extent))
            part, slot = _features(values, features, by_rows), next(self._up)
            # Rows of a consumer lie as far apart for a strip as for the whole, so that cuBLAS sees the same.
            width = self._size.width if by_rows else part.shape[1]
            there = slot.matrix(len(part), width, values.dtype)[:, width - part.shape[1] :]
            self._copied = self._gpu.up.put(partial(self._gpu.copy, there, part), *slot.free)
            issued.append(_Panel(features, there, self._copied, slot))
            if len(issued) > 1:
                yield issued.popleft()
        yield from issued

    def _cluster_here(self, n_clusters: int) -> Clustering:
        """By the strip, which is all of G; what it was computed from makes room for Ward."""
        self._up = iter(())
        self._gpu.release()
        found: list[Clustering] = []

        def run() -> None:
            found.append(cluster(gram=self._strip, n_clusters=n_clusters, overwrite_gram=True, backend=self._gpu.backend))

        self._gpu.kernels.put(run).synchronize()
        return found[0]

    def _slots(self, n_bytes: int) -> Iterator[_Slot]:
        """Two, in turn: one is filled while the other is read."""
        return cycle([_Slot(self._gpu.empty((n_bytes,), torch.uint8)) for _ in range(2)])

    def _drop(self) -> None:
        """All memory on the device."""
        self._gram = self._strip = self._labels = self._scales = torch.empty(0)
        self._up, self._down = iter(()), iter(())
        self._gpu.release()

    def _reap(self, keep: int) -> None:
        """Give back to the pool all values but so many; what still goes up is waited for."""
        while len(self._going_up) > keep:
            values, copied = self._going_up.popleft()
            copied.synchronize()
            self._pool.give_back(values)


def _matrix(memory: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The first bytes of memory as a matrix."""
    return memory[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns)


def _features(values: Tensor, features: slice, by_rows: bool) -> Tensor:
    return values[features] if by_rows else values[:, features]
