"""What the function metric computes on: the host, or a GPU, and what it may take of the memory there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from pyfold import ops
from pyfold.errors import PyfoldError
from pyfold.gpu_budget import FUNCTION_OVERHEAD
from pyfold.report import rss_bytes
from pyfold.streams import Gpu


@dataclass(frozen=True)
class Processor:
    """
    Attributes
    ----------
    backend : str
        Of the ops.
    limit : int
        Bytes of the whole process; of a GPU those that its tensors take, and what kernels work in.
    gpu : Gpu or None
        None for the host.
    """

    backend: str
    limit: int
    gpu: Gpu | None = None

    @property
    def device(self) -> torch.device:
        """Where tensors are."""
        return self.gpu.device if self.gpu else torch.device("cpu")

    @property
    def identity(self) -> dict[str, str]:
        """JSON values on which numbers depend beside the backend."""
        return {"device": self.gpu.name, "libraries": self.gpu.libraries} if self.gpu else {}

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return ops.product_dtype(self.backend)

    def room(self, process: int | None = None) -> int:
        """Bytes that are left: beside what the process holds, now or as it is given."""
        if self.gpu:
            return self.limit - FUNCTION_OVERHEAD
        return self.limit - (rss_bytes() if process is None else process)

    def release(self) -> None:
        """Have torch give back what it keeps of a GPU for later tensors: those will be of other sizes."""
        if self.gpu:
            self.gpu.release()

    def limited(self) -> AbstractContextManager[None]:
        """Within, no more of a GPU can be taken."""
        return self.gpu.limited(self.limit) if self.gpu else nullcontext()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The same, and torch computes where all that is counted is."""
        with self.limited(), self.gpu.computing() if self.gpu else nullcontext():
            yield
        self.release()

    def refusal(self, what: str, room: int, advice: str = "") -> PyfoldError:
        """Where ``what`` takes, in words, more than the room that is left."""
        option = "gpu_memory" if self.gpu else "host_memory"
        return PyfoldError(f"{option}: {what}, and {room / 2**20:.0f} are left{advice}")
