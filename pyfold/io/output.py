"""The planned output shards: tensors in any order, whole or in pieces, each shard on the disk once it is complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pyfold.errors import PyfoldError
from pyfold.io.destination import SCRATCH, sync_folder
from pyfold.io.safetensors import Shard, TensorInfo, layout

Layout = tuple[str, tuple[int, ...]]  # safetensors dtype, shape


class Output:
    """``with Output(folder, tensors, shards) as output: ...``: one writer of a result; others may write other tensors of it."""

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Layout],
        shards: Mapping[str, list[str]],
        written: frozenset[str],
        opened: int | None = None,
    ) -> None:
        """``shards``: file -> its tensors. Those ``written`` already are on the disk. ``opened``: see :class:`Shard`."""
        self.folder, self._tensors, self._shards, self._written = folder, tensors, shards, written
        self._opened = opened
        self._shard_of = {name: shard for shard, names in shards.items() for name in names}
        self._open: dict[str, Shard] = {}
        self._places: dict[str, TensorInfo] = {}
        for shard in {self._shard_of[name] for name in written}:
            if not (folder / shard).exists():
                raise PyfoldError(f"{folder / shard}: written by a run that was stopped, and gone; remove {folder.parent}")

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *exc: object) -> None:
        for shard in self._open.values():
            shard.close()

    def write(self, name: str, block: Tensor, row: int, column: int, width: int) -> None:
        """Write a block (rows, columns) of a tensor taken for a matrix of ``width`` columns, from ``row`` and ``column`` on."""
        shard = self._shard(name)
        shard.write_block(name, block, row, column, width)
        if shard.complete:
            shard.sync()
            self._open.pop(self._shard_of[name]).close()

    def scratch(self) -> Path:
        """A folder for files without names."""
        folder = self.folder.with_name(SCRATCH)
        folder.mkdir(exist_ok=True)
        return folder

    def place(self, name: str) -> TensorInfo:
        """Where in the result a tensor is, once it has been written."""
        if name not in self._places:
            shard = self._shard_of[name]
            self._places |= layout(self.folder / shard, self._layout(shard))[1]
        return self._places[name]

    def sync(self) -> None:
        """All that has been written outlives the machine once this returns."""
        for shard in self._open.values():
            shard.sync()
        sync_folder(self.folder)

    def _shard(self, name: str) -> Shard:
        shard = self._shard_of[name]
        if shard not in self._open:
            self._open[shard] = Shard(self.folder / shard, self._layout(shard), self._written, self._opened)
        return self._open[shard]

    def _layout(self, shard: str) -> dict[str, Layout]:
        return {name: self._tensors[name] for name in self._shards[shard]}
