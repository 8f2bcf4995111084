"""A GPU without a GPU, for tests of what streams through one: memory, copies and queues, on threads.

Every queue is a thread that does what was put into it late: one of them, the slow one, much later than the others, so that
whoever does not wait for it reads what is not there yet, or overwrites what is still being read. Memory is full of NaN when it
is new, and counted until it is released, with what the kernels take beside their arguments.
"""

from __future__ import annotations

import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import pytest
import torch

from pyfold.memory import LARGE, Pool
from pyfold.ops import cpu, cuda, registry

SLOW = 0.008  # seconds, of everything in the slow queue


class Event:
    """Passed once its action is done, or has failed."""

    def __init__(self) -> None:
        self.passed = threading.Event()
        self.failure: Exception | None = None

    def synchronize(self) -> None:
        assert self.passed.wait(60), "nothing can wait so long but for itself"
        if self.failure:
            raise self.failure


class Queue:
    """A thread. Order and events as a stream has them."""

    def __init__(self, name: str, slow: bool, log: list[str]) -> None:
        self._name, self._slow, self._log, self._random = name, slow, log, random.Random(0)
        self._actions: queue.SimpleQueue[tuple[Callable[[], object], tuple[Event, ...], Event]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def put(self, action: Callable[[], object], *after: Event) -> Event:
        done = Event()
        self._log.append(self._name)
        self._actions.put((action, after, done))
        return done

    def _work(self) -> None:
        while True:
            action, after, done = self._actions.get()
            for event in after:
                event.passed.wait()
            time.sleep(SLOW if self._slow else self._random.choice((0, 1e-4)))
            try:
                action()
            except Exception as failure:
                done.failure = failure
            del action, after  # or the memory in them would live on
            done.passed.set()


class EmulatedGpu:
    """As :class:`pyfold.streams.Gpu`. ``slow``: up, kernels or down; ``ops``: its backend, the cpu's by default."""

    name, held, backend, device = "emulated", 0, "reference", torch.device("cpu")
    libraries = "torch 1, CUDA 2"

    memory = 1 << 40

    def __init__(self, slow: str, monkeypatch: pytest.MonkeyPatch, ops: Any = None) -> None:
        self.log: list[str] = []  # queues in the order in which something was put into them
        self.up, self.kernels, self.down = (Queue(name, slow == name, self.log) for name in ("up", "kernels", "down"))
        self._ops = ops or cpu.CpuBackend(cpu.simd_levels()[0])
        self.taken, self.kept, self.most = 0, 0, 0
        self._limit = self.memory
        self.limits: list[int] = []  # that were set
        self.pinned: dict[int, int] = {}
        self._lock = threading.Lock()
        monkeypatch.setitem(registry._BACKENDS, "reference", self)  # the one that takes tensors of any device
        monkeypatch.setattr("pyfold.pipeline.open_device", lambda name: None if name == "cpu" else self)
        monkeypatch.setattr(Pool, "give_back", _poisoned(Pool.give_back))
        monkeypatch.setattr(Pool, "__exit__", _empty(Pool.__exit__))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        n_bytes = prod(shape) * dtype.itemsize
        self._take(n_bytes)
        memory = np.full(n_bytes, 0xFF, np.uint8)  # NaN in every dtype
        weakref.finalize(memory, self._keep, n_bytes)  # once no tensor refers to it
        return torch.from_numpy(memory).view(dtype).view(shape)

    def release(self) -> None:
        for one in (self.up, self.kernels, self.down):
            one.put(lambda: None).synchronize()
        with self._lock:
            self.taken, self.kept = self.taken - self.kept, 0

    @contextmanager
    def limited(self, n_bytes: int) -> Iterator[None]:
        before, self._limit = self._limit, n_bytes
        self.limits.append(n_bytes)
        try:
            yield
        finally:
            self._limit = before

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        assert (to.shape, to.dtype) == (source.shape, source.dtype)
        assert to.stride(1) == source.stride(1) == 1 or to.shape[1] == 1
        host = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in (to, source)}
        assert any(n_bytes < LARGE or self.pinned.get(at) == n_bytes for at, n_bytes in host.items()), "large and not pinned"
        to.copy_(source)

    def pin(self, block: torch.Tensor) -> None:
        assert block.data_ptr() not in self.pinned
        self.pinned[block.data_ptr()] = block.nbytes

    def unpin(self, block: torch.Tensor) -> None:
        del self.pinned[block.data_ptr()]

    def free(self) -> int:
        return self.memory

    def peak(self) -> int:
        return self.most

    # The backend, with the memory that cuda's takes.

    def unavailable(self) -> None:
        """Runs everywhere."""

    def gram(self, xs: list[torch.Tensor], outs: list[torch.Tensor], accumulate: bool, transposed: bool) -> None:
        assert threading.current_thread() is self.kernels.thread, "another stream would get a workspace too"
        n = max(out.shape[1] for out in outs)
        # cuBLAS adds to fp32, but products of low precision are made beside it, a panel of rows at a time.
        with self._taking(4 * cuda.PANEL * n if accumulate and xs[0].dtype != torch.float32 else 0):
            self._ops.gram(xs, outs, accumulate, transposed)

    def ward(self, grams: list[torch.Tensor], n_clusters: list[int], weights: list[torch.Tensor]) -> object:
        with self._taking(sum(2 * len(g) * (len(g) - 1) for g in grams)):
            return self._ops.ward(grams, n_clusters, weights)

    def __getattr__(self, op: str) -> object:
        return getattr(self._ops, op)

    @contextmanager
    def _taking(self, n_bytes: int) -> Iterator[None]:
        self._take(n_bytes)
        yield
        self._take(-n_bytes)

    def _keep(self, n_bytes: int) -> None:
        """As torch's allocator keeps what is freed, for what may not fit into it."""
        with self._lock:
            self.kept += n_bytes

    def _take(self, n_bytes: int) -> None:
        with self._lock:
            if self.taken + n_bytes > self._limit:
                raise MemoryError("emulated: out of memory")
            self.taken += n_bytes
            self.most = max(self.most, self.taken)


def _poisoned(give_back: Callable[[Pool, torch.Tensor], None]) -> Callable[[Pool, torch.Tensor], None]:
    """What is given back may be written at once."""

    def poison(pool: Pool, tensor: torch.Tensor) -> None:
        block = pool._lent.get(tensor.untyped_storage().data_ptr())
        if block is not None:
            block.fill_(0xFF)
        give_back(pool, tensor)

    return poison


def _empty(leave: Callable[..., None]) -> Callable[..., None]:
    """In the end all has been given back."""

    def look(pool: Pool, kind: object, *exc: object) -> None:
        assert kind or not pool._lent
        leave(pool, kind, *exc)

    return look
