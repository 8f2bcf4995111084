"""Between what is read for a job and what is written: the tensors go through here, with the hashes of both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfold import ops
from pyfold.device import Device
from pyfold.errors import PyfoldError
from pyfold.io.flow import Ahead, Behind
from pyfold.io.output import Output
from pyfold.io.safetensors import Reader, as_bytes, torch_dtype
from pyfold.memory import Pool
from pyfold.plan import Plan
from pyfold.reads import Piece, Read, sha256_of
from pyfold.trace import Trace

# Bytes of source weights that are done since the last call, and what is at work.
Advance = Callable[[int, str], None]


class Block(NamedTuple):
    """What is written (rows, columns), and from which row and column on; what to call before it is read."""

    values: Tensor
    row: int
    column: int
    settle: Callable[[], None]


@dataclass(frozen=True)
class Stages:
    """What a job reads from and writes to."""

    ahead: Ahead[Piece]
    behind: Behind
    output: Output
    plan: Plan
    backend: str
    advance: Advance
    trace: Trace
    pool: Pool
    device: Device
    source: dict[str, str] = field(default_factory=dict)
    result: dict[str, str] = field(default_factory=dict)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor of the result."""
        dtype: torch.dtype = torch_dtype(self.plan.tensors[name][0])
        return dtype

    def take(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Tensor]]:
        """What the reader makes of ``reads``, finite. A tensor read again must be what it was."""
        for read in reads:
            with self.trace("wait for the reader"):
                values, sha256 = self.ahead.take()
            if sha256 and self.source.setdefault(read.info.name, sha256) != sha256:
                raise PyfoldError(f"{read.info.path}: changed while it was being folded; fold it again")
            if read.rows is not None:
                self.check_finite(read, values, "in the source")
                yield read, values
            del values

    def write(self, name: str, blocks: Iterable[Block], width: int, room: Callable[[], int], *, same: bool = False) -> None:
        """Have a tensor of so many columns written behind, block by block, while what waits to be written has ``room``.

        Its hash is that of the ``same`` tensor in the source, or is taken as it is written, or, out of order, read back.
        """
        digest, in_order = None if same else hashlib.sha256(), True
        for block in blocks:
            in_order = in_order and block.values.shape[1] == width
            self.behind.put(block.values.nbytes, partial(self._write, name, block, width, digest if in_order else None))
            del block
            self.wait(room())
        if same:
            self.result[name] = self.source[name]
        else:
            self.behind.put(0, partial(self._note, name, digest if in_order else None))

    def wait(self, n_bytes: int) -> None:
        """Until no more than so many bytes are left to be written."""
        with self.trace("wait for the writer"):
            self.behind.wait(max(0, n_bytes))

    def _write(self, name: str, block: Block, width: int, digest: Any) -> None:
        block.settle()
        if digest:
            with self.trace("hash", tensor=name):
                digest.update(as_bytes(block.values))
        with self.trace("write", tensor=name):
            self.output.write(name, block.values, block.row, block.column, width)
        self.pool.give_back(block.values)

    def _note(self, name: str, digest: Any) -> None:
        if digest:
            self.result[name] = digest.hexdigest()
        else:
            with self.trace("hash", tensor=name), Reader() as reader:
                self.result[name] = sha256_of(reader, self.output.place(name))

    def check_finite(self, read: Read, values: Tensor, what: str) -> None:
        if values.dtype not in ops.FLOATS:
            return
        bad = ops.first_nonfinite(values, backend=self.backend)
        if bad is not None:
            row, column = divmod(bad, values.shape[1])
            at, value = read.begin + row * read.width + column, values.flatten()[bad].item()
            raise PyfoldError(f"{read.info.path}: tensor '{read.info.name}' holds {value} {what} at element {at}")
