"""Host memory for large tensors: in huge pages where the system has them, and used again.

Fresh memory is dear: on a system whose page cache is full, touching it first costs up to 2 CPU seconds a GB (Linux 6, 24 GiB).
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

LARGE = 1 << 22  # bytes; less comes from the allocator
_FIT = 1.5  # times what is asked for: a block larger than that is kept for others


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU; given back to the system when the tensor is gone. Raises MemoryError.

    With huge pages the Gram kernel and Ward on an 11008 x 11008 matrix take 0.9 of the time (AMX, 2 cores).
    """
    n_bytes = prod(shape) * dtype.itemsize
    return _pages(n_bytes).view(dtype).view(shape) if n_bytes >= LARGE else torch.empty(shape, dtype=dtype)


def _pages(n_bytes: int) -> Tensor:
    """(n_bytes,) uint8, from the start of a page on."""
    try:
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{n_bytes:,} bytes: {error.strerror}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _no(block: Tensor) -> None:
    """Nothing is to be done."""


class Pool:
    """Large tensors from memory that is used again once it is given back; any thread may do either.

    A block does not lie idle where with it more than ``limit`` bytes would be in existence. ``pin`` is called with each that is
    new, ``unpin`` before it goes, at the latest when a ``with`` block ends; both take long, so no thread waits for another's.
    """

    def __init__(self, limit: int, pin: Callable[[Tensor], None] = _no, unpin: Callable[[Tensor], None] = _no) -> None:
        self._limit = limit
        self._pin, self._unpin = pin, unpin
        self._exist = 0  # bytes, lent or idle
        self._lent: dict[int, Tensor] = {}  # address -> block
        self._idle: list[Tensor] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shrink()
        lent, self._lent = list(self._lent.values()), {}
        self._drop(lent)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """``torch.empty`` on the CPU, to be given back."""
        n_bytes = prod(shape) * dtype.itemsize
        return self.block(n_bytes)[:n_bytes].view(dtype).view(shape) if n_bytes >= LARGE else torch.empty(shape, dtype=dtype)

    def block(self, n_bytes: int) -> Tensor:
        """At least so many bytes, from the start of a page on: (bytes,) uint8."""
        with self._lock:
            fitting = [block for block in self._idle if n_bytes <= len(block) <= _FIT * n_bytes]
            if fitting:
                block = min(fitting, key=len)
                self._idle = [other for other in self._idle if other is not block]
                self._lent[block.data_ptr()] = block
                return block
            self._exist += n_bytes
            gone: list[Tensor] = []
            while self._idle and self._exist - sum(map(len, gone)) > self._limit:
                gone.append(self._idle.pop(0))
        self._drop(gone)
        try:
            block = _pages(n_bytes)
            self._pin(block)
        except BaseException:
            with self._lock:
                self._exist -= n_bytes
            raise
        with self._lock:
            self._lent[block.data_ptr()] = block
        return block

    def give_back(self, tensor: Tensor) -> None:
        """Nothing reads or writes ``tensor`` any more; one that is not from here is left to its owner."""
        with self._lock:
            block = self._lent.pop(tensor.untyped_storage().data_ptr(), None)
            if block is None:
                return
            if self._exist <= self._limit:
                self._idle.append(block)
                return
        self._drop([block])

    def shrink(self) -> None:
        """No block lies idle."""
        with self._lock:
            gone, self._idle = self._idle, []
        self._drop(gone)

    def _drop(self, gone: list[Tensor]) -> None:
        """Blocks that no other list holds; they exist until they are gone."""
        while gone:
            n_bytes = len(gone[-1])
            self._unpin(gone[-1])
            gone.pop()
            with self._lock:
                self._exist -= n_bytes
