"""A GPU as the fold sees it: memory, copies, and three queues of work that run beside one another, ordered by events.

What is put into a queue is done in order, later than ``put`` returns. All that knows torch's streams is here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from pyfold import ops
from pyfold.clustering import cluster
from pyfold.errors import PyfoldError
from pyfold.gpu_budget import PANEL
from pyfold.ops import cuda

Event = torch.cuda.Event


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """What torch raises where a device has no more memory, as Python does, in one line."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(f"{device}: {str(error).partition('. ')[0]}") from None


def device_failed(error: RuntimeError) -> str | None:
    """What torch, cuBLAS or a kernel says in one line where a device failed; None of any other error."""
    line = str(error).partition("\n")[0]
    on_device = isinstance(error, getattr(torch, "AcceleratorError", ())) or re.match(
        r"CUDA |cuda \w+: |CUBLAS_|cusolver error: |cuDNN ", line
    )
    return line if on_device else None


class Queue:
    """One stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def current(self) -> AbstractContextManager[Any]:
        """Within, torch puts its work here."""
        context: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return context

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
    libraries : str
        Those whose choice of kernels the last bits of a product depend on.
    held : int
        Bytes that context and libraries, other processes, and tensors of this one hold on it before the first of a fold.
    backend : str
        Of the ops on its tensors.
    """

    backend = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = torch.cuda.get_device_name(device)
        workspace_config = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "default")
        self.libraries = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuBLAS workspace {workspace_config}"
        self.up, self.kernels, self.down = _queues(device)
        workspace = _workspace(device)
        self.kernels.put(partial(_load, device, self.backend))  # again: another thread has a workspace of its own
        self.release()
        free, total = torch.cuda.mem_get_info(device)
        self.held = total - free - workspace
        self._others = torch.cuda.memory_reserved(device) - workspace
        torch.cuda.reset_peak_memory_stats(device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory on the device; to be dropped only before :meth:`release`, for all queues may be using it until then."""
        with torch.cuda.device(self.device), memory_errors(self.device):
            return torch.empty(shape, dtype=dtype, device=self.device)

    def release(self) -> None:
        """Once all queues are done, give back what no tensor holds."""
        _release(self.device)

    @contextmanager
    def limited(self, n_bytes: int) -> Iterator[None]:
        """Within, torch reserves no more than so many bytes beside what was there before: it first gives back what lies idle,
        then raises."""
        _, total = torch.cuda.mem_get_info(self.device)
        # An older torch cannot say, and begins with all of it.
        get = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
        before = get(self.device)
        ours = (n_bytes + self._others + 1) / total  # torch rounds down
        torch.cuda.set_per_process_memory_fraction(min(ours, before), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self.device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within, torch computes in the queue of kernels, whose workspace is there already, and no product in TF32."""
        with torch.cuda.device(self.device), self.kernels.current(), memory_errors(self.device), cuda.full_precision():
            yield

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
        """Bytes at most that tensors, what torch keeps of them, and cuBLAS have taken, beside what was there before."""
        return torch.cuda.max_memory_reserved(self.device) - self._others


@cache
def _queues(device: torch.device) -> tuple[Queue, Queue, Queue]:
    """For the life of the process: torch keeps a workspace of cuBLAS for every stream that has had a product, for good."""
    return Queue(device), Queue(device), Queue(device)


@cache
def _workspace(device: torch.device) -> int:
    """Bytes of that workspace, measured before the first fold."""
    _release(device)
    before = torch.cuda.memory_reserved(device)
    _queues(device)[1].put(partial(_load, device, Gpu.backend))
    _release(device)
    return torch.cuda.memory_reserved(device) - before


def _load(device: torch.device, backend: str) -> None:
    """Have cuBLAS, and kernels that are loaded when first used, hold now what they will hold, here and on the host.

    Which kernel that is depends on the shape: a product of panels, and labels too many for torch's sort of few numbers.
    """
    n, many = 2 * cuda.PANEL, 8 * cuda.PANEL
    gram = torch.zeros(n, n, device=device)
    labels = torch.arange(many, device=device) // 2
    for dtype in ops.FLOATS:
        x = torch.eye(n, PANEL, dtype=dtype, device=device)
        for points, transposed in ((x, False), (x.T.contiguous(), True)):
            for accumulate in (False, True):
                ops.gram(points, out=gram, accumulate=accumulate, transposed=transposed, backend=backend)
        ops.merge_rows(x.view(many, -1), labels, many // 2, backend=backend)
        ops.merge_columns(x.view(-1, many), labels, many // 2, backend=backend)
    cluster(gram=gram, n_clusters=n // 2, overwrite_gram=True, backend=backend)


def _release(device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


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
