"""A GPU as the fold sees it: memory, copies, and three queues of work that run beside one another, ordered by events.

What is put into a queue is done in order, later than ``put`` returns. All that knows torch's streams is here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from pyfold import ops
from pyfold.clustering import cluster
from pyfold.errors import PyfoldError
from pyfold.ops import cuda

Event = torch.cuda.Event


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """What torch raises where a device has no more memory, as Python does, in one line."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(f"{device}: {str(error).partition('. ')[0]}") from None


class Queue:
    """One stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def put(self, action: Callable[[], object], *after: Event) -> Event:
        """Have ``action`` done once every event of ``after`` has passed; the event that it has been done."""
        with torch.cuda.stream(self._stream), memory_errors(self._device):
            for event in after:
                self._stream.wait_event(event)
            action()
            done = Event(blocking=True)  # one who waits leaves the core to the kernels of the host
            done.record(self._stream)
        return done


class Gpu:
    """A device, its queues, and host memory that it copies from and to.

    Attributes
    ----------
    up, kernels, down : Queue
        Copies to the device, what computes on it, copies from it.
    name : str
    held : int
        Bytes that context and libraries, and other processes, hold on it before the first tensor.
    backend : str
        Of the ops on its tensors.
    """

    backend = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = torch.cuda.get_device_name(device)
        self.up, self.kernels, self.down = (Queue(device) for _ in range(3))
        for dtype in ops.FLOATS:
            self.kernels.put(partial(self._load, dtype))
        self.release()
        free, total = torch.cuda.mem_get_info(device)
        self.held = total - free - torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)

    def _load(self, dtype: torch.dtype) -> None:
        """Have cuBLAS, and kernels that are loaded when first used, hold now what they will hold, here and on the host."""
        cluster(torch.eye(3, dtype=dtype, device=self.device), n_clusters=2, backend=self.backend)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory on the device; to be dropped only before :meth:`release`, for all queues may be using it until then."""
        with torch.cuda.device(self.device), memory_errors(self.device):
            return torch.empty(shape, dtype=dtype, device=self.device)

    def release(self) -> None:
        """Once all queues are done, give back what no tensor holds."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Rows from host to device or back; to be put into a queue."""
        cuda.copy_rows(to, source)

    def pin(self, block: Tensor) -> None:
        """Host memory that copies then go from and to without the CPU."""
        with torch.cuda.device(self.device):  # any thread may call this
            code = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0)
        if int(code):
            raise MemoryError(f"{block.nbytes:,} bytes of host memory cannot be pinned for the GPU (CUDA error {int(code)})")

    def unpin(self, block: Tensor) -> None:
        """Before its memory goes."""
        with torch.cuda.device(self.device):
            torch.cuda.cudart().cudaHostUnregister(block.data_ptr())

    def free(self) -> int:
        """Bytes that can be allocated."""
        return torch.cuda.mem_get_info(self.device)[0]

    def peak(self) -> int:
        """Bytes at most that tensors, and what torch keeps of them, have taken."""
        return torch.cuda.max_memory_reserved(self.device)


def open_device(name: str) -> Gpu | None:
    """``cpu``, ``cuda`` or ``cuda:N``; None for the CPU.

    Raises
    ------
    PyfoldError
        If there is no such device, or it cannot be used; says why.
    """
    if name == "cpu":
        return None
    if not re.fullmatch(r"cuda(:\d{1,4})?", name):
        raise PyfoldError(f"device: expected cpu, cuda or cuda:N, got '{name}'")
    reason = cuda.unavailable()
    if reason is not None:
        raise PyfoldError(f"device: {name} cannot be used: {reason}")
    index, count = int(name.partition(":")[2] or torch.cuda.current_device()), torch.cuda.device_count()
    if index >= count:
        raise PyfoldError(f"device: there is no {name}; this machine has cuda:0 to cuda:{count - 1}")
    return Gpu(torch.device("cuda", index))
