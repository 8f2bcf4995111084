"""Safetensors files by position: headers without data, one tensor at a time in, tensors in any order out.

The ``safetensors`` package maps files (mapped pages count in the peak memory) and writes only from memory, a shard at a time;
this module reads and writes at offsets, so neither end holds more than the tensors in hand. Needs no torch for headers.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyfold.errors import PyfoldError
from pyfold.io.strict_json import parse

if TYPE_CHECKING:
    from torch import Tensor

    from pyfold.memory import Pool

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_TORCH_NAME = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
# The safetensors package refuses larger headers.
MAX_HEADER = 100_000_000
# The most dimensions that torch and numpy share.
MAX_DIM = 32
# Linux transfers at most 2 GiB - 4 KiB a call.
_MAX_TRANSFER = 1 << 30
# What reading past the page cache goes by: a multiple of any disk's logical block.
_DISK_BLOCK = 4096
_READS = 4  # of parts of a tensor at once: many disks are faster then
# Bytes written past it at a time.
_BOUNCE = 1 << 23
# How a file system says that it cannot, or how the system says that a rest is no whole block.
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
_of_thread = threading.local()


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place: file, dtype (safetensors' name), shape, and absolute byte range."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def n_parameters(self) -> int:
        return prod(self.shape)


def torch_dtype(name: str) -> Any:
    """torch's dtype of a safetensors dtype name."""
    import torch

    return getattr(torch, _TORCH_NAME[name])


def dtype_name(dtype: Any) -> str:
    """The safetensors name of a torch dtype."""
    return next(name for name, torch_name in _TORCH_NAME.items() if str(dtype) == f"torch.{torch_name}")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a file, in file order; no data is read.

    Raises
    ------
    PyfoldError
        If the file is no whole, well-formed safetensors file; names the file and, where there is one, the tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER
        if length > min(MAX_HEADER, size - 8):
            raise PyfoldError(f"{path}: not a safetensors file, or cut short in its header; download it again")
        blob = file.read(length)
    tensors = {}
    try:
        header = parse(blob)
        if not isinstance(header, dict):
            raise ValueError(f"expected an object, got {type(header).__name__}")
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not (isinstance(metadata, dict) and all(type(value) is str for value in metadata.values())):
            raise ValueError("__metadata__ is no object of strings")
        for name, entry in header.items():
            tensors[name] = _place(name, entry, path, 8 + length)
    except PyfoldError:
        raise
    except ValueError as error:
        raise PyfoldError(f"{path}: corrupt safetensors header: {error}; download it again") from None
    for info in tensors.values():
        if info.end > size:
            raise PyfoldError(f"{path}: cut short: tensor '{info.name}' ends at byte {info.end} of {size}; download it again")
    end = 8 + length
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != end:
            raise PyfoldError(
                f"{path}: corrupt safetensors header: tensor '{info.name}' starts at byte {info.begin}, not {end}"
            )
        end = info.end
    if end != size:
        raise PyfoldError(f"{path}: corrupt: {size - end} bytes after the last tensor; download it again")
    return tensors


def _place(name: str, entry: Any, path: Path, start: int) -> TensorInfo:
    """One entry of a header whose data starts at byte ``start``. Raises ValueError for what cannot be a tensor."""
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or not all(key in entry for key in keys):
        raise ValueError(f"tensor '{name}' has no {', '.join(keys)}")
    dtype, shape, offsets = (entry[key] for key in keys)
    if not isinstance(dtype, str):
        raise ValueError(f"tensor '{name}' has the dtype {dtype!r:.60}")
    if dtype not in ITEM_SIZE:
        raise PyfoldError(f"{path}: tensor '{name}' has the dtype {dtype}, which pyfold does not know")
    nbytes = count(name, shape) * ITEM_SIZE[dtype]
    if not is_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"tensor '{name}' has {nbytes} bytes by shape {shape} and dtype {dtype}, but data_offsets {offsets}")
    return TensorInfo(name, path, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def is_sizes(value: Any) -> bool:
    """Whether a file's value is a sequence of integers from 0 to 2^63 - 1 (True and 1.0 are none)."""
    return isinstance(value, (list, tuple)) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def count(name: str, shape: Any) -> int:
    """The number of elements of a file's shape. Raises ValueError for a shape that no tensor can have."""
    if not is_sizes(shape) or len(shape) > MAX_DIM:
        raise ValueError(f"tensor '{name}' has the shape {shape}")
    elements = prod(max(extent, 1) for extent in shape)  # strides are products of the other extents, also where one is 0
    if elements >= 1 << 60:
        raise ValueError(f"tensor '{name}' has the shape {shape}, too large for any file")
    return 0 if 0 in shape else elements


def read_bytes(file: int, path: Path, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from ``offset`` of an open file."""
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(file, [buffer[done : done + _MAX_TRANSFER]], offset + done)
        except OSError as error:
            raise OSError(error.errno, f"cannot read: {error.strerror}", str(path)) from None
        if got == 0:
            raise PyfoldError(f"{path}: cut short while it was being read, at byte {offset + done}")
        done += got


def _read_blocks(file: int, offset: int, buffer: memoryview) -> int:
    """Fill ``buffer`` from a file that is read in blocks of the disk; how many bytes there were."""
    done = 0
    while done < len(buffer):
        got = os.preadv(file, [buffer[done : done + _MAX_TRANSFER]], offset + done)
        if got < _DISK_BLOCK:  # the file's end
            return done + got
        done += got - got % _DISK_BLOCK
    return done


def write_bytes(file: int, path: Path, offset: int, data: memoryview) -> None:
    """Write all of ``data`` at ``offset`` of an open file."""
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(file, data[done : done + _MAX_TRANSFER], offset + done)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from None


class Reader:
    """Tensors of many files by position. Files are opened on first use; close() or a ``with`` block closes them."""

    def __init__(self, pool: Pool | None = None) -> None:
        """``pool``: where blocks come from, to be given back."""
        self._pool = pool
        self._files: dict[Path, int] = {}
        self._direct_files: dict[Path, int | None] = {}
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._threads:
            self._threads.shutdown()
            self._threads = None
        for file in (*self._files.values(), *self._direct_files.values()):
            if file is not None:
                os.close(file)
        self._files.clear()
        self._direct_files.clear()

    def read(self, info: TensorInfo) -> Tensor:
        """One tensor, in memory of its own."""
        import torch

        tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        if info.nbytes:
            read_bytes(self._open(info.path), info.path, info.begin, as_bytes(tensor))
        return tensor

    def block(self, info: TensorInfo, rows: range, columns: range, width: int) -> Tensor:
        """Some rows and columns of a tensor taken for a matrix of ``width`` columns, in memory of their own."""
        from pyfold.memory import LARGE, empty

        make = self._pool.empty if self._pool else empty
        item, dtype = ITEM_SIZE[info.dtype], torch_dtype(info.dtype)
        shape, length = (len(rows), len(columns)), len(columns) * item
        begin = info.begin + (rows.start * width + columns.start) * item
        n_bytes = len(rows) * length
        if len(columns) == width and n_bytes >= LARGE and begin % item == 0 and self._uncached(info.path, begin + n_bytes // 2):
            values = self._direct(info.path, begin, n_bytes, dtype)
            if values is not None:
                return values.view(shape)
        part = make(shape, dtype)
        data, file = as_bytes(part), self._open(info.path)
        if len(columns) == width:
            read_bytes(file, info.path, begin, data)
            return part
        # The rows' other columns will be asked for too: read whole, not a page here and there, which is 5 times as slow.
        os.posix_fadvise(file, begin, len(rows) * width * item, os.POSIX_FADV_WILLNEED)
        for i in range(len(rows)):
            read_bytes(file, info.path, begin + i * width * item, data[i * length : (i + 1) * length])
        return part

    def _uncached(self, path: Path, place: int) -> bool:
        """Whether a byte would have to be read from the disk, and can be without the page cache."""
        if self._open_direct(path) is None:
            return False
        try:
            os.preadv(self._open(path), [bytearray(1)], place, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError:  # a file system that cannot say
            pass
        return False

    def _direct(self, path: Path, begin: int, n_bytes: int, dtype: Any) -> Tensor | None:
        """From the disk into memory, past the page cache, which costs a tenth of the CPU time; whole blocks of the disk.

        None where the file system opens files for that and then does not do it.
        """
        import torch

        from pyfold.memory import empty

        skew = begin % _DISK_BLOCK
        blocks = -(-(skew + n_bytes) // _DISK_BLOCK)
        memory = self._pool.block(blocks * _DISK_BLOCK) if self._pool else empty((blocks * _DISK_BLOCK,), torch.uint8)
        data, file = as_bytes(memory), self._open_direct(path)
        assert file is not None
        step = -(-blocks // _READS) * _DISK_BLOCK
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_READS, thread_name_prefix="pyfold-read")
        parts = [
            (at, self._threads.submit(_read_blocks, file, begin - skew + at, data[at : at + step]))
            for at in range(0, blocks * _DISK_BLOCK, step)
        ]
        wait([part for _, part in parts])
        for at, part in parts:
            try:
                got = part.result()
            except OSError as error:
                if error.errno in _REFUSED:
                    os.close(file)
                    self._direct_files[path] = None
                    if self._pool:
                        self._pool.give_back(memory)
                    return None
                raise OSError(error.errno, f"cannot read: {error.strerror}", str(path)) from None
            if got < min(step, skew + n_bytes - at):
                raise PyfoldError(f"{path}: cut short while it was being read, at byte {begin - skew + at + got}")
        return memory[skew : skew + n_bytes].view(dtype)

    def chunks(self, info: TensorInfo, size: int = 1 << 24) -> Iterator[tuple[int, Tensor]]:
        """(element offset, flat piece) of a tensor, reusing one buffer of at most ``size`` bytes."""
        import torch

        dtype = torch_dtype(info.dtype)
        item = ITEM_SIZE[info.dtype]
        buffer = torch.empty(min(size // item, info.n_parameters), dtype=dtype)
        for at in range(0, info.n_parameters, max(1, len(buffer))):
            piece = buffer[: min(len(buffer), info.n_parameters - at)]
            read_bytes(self._open(info.path), info.path, info.begin + at * item, as_bytes(piece))
            yield at, piece

    def _open_direct(self, path: Path) -> int | None:
        """The file without the page cache; None where the system or the file system has no such thing."""
        if path not in self._direct_files:
            self._direct_files[path] = None
            if hasattr(os, "O_DIRECT") and hasattr(os, "RWF_NOWAIT"):
                with suppress(OSError):
                    self._direct_files[path] = os.open(path, os.O_RDONLY | os.O_DIRECT)
        return self._direct_files[path]

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def layout(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, TensorInfo]]:
    """What a file of these tensors, name -> (safetensors dtype, shape), begins with, and where in it they are."""
    # Widest items first, as the safetensors package does, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: -ITEM_SIZE[tensors[name][0]])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        dtype, shape = tensors[name]
        end = at + prod(shape) * ITEM_SIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    blob = json.dumps(header, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    places = {
        name: TensorInfo(name, path, *tensors[name], *(8 + len(blob) + at for at in header[name]["data_offsets"]))
        for name in order
    }
    return struct.pack("<Q", len(blob)) + blob, places


class Shard:
    """One output file with a layout fixed in advance; tensors are written in any order, whole or in pieces."""

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        written: Container[str] = frozenset(),
        folder: int | None = None,
    ) -> None:
        """``path`` with the header for ``tensors``: name -> (safetensors dtype, shape); those ``written`` already are kept.

        ``folder``: the open folder of ``path``, in which the file is then opened wherever that folder is by now.
        """
        self.path = path
        blob, self._info = layout(path, tensors)
        self._left = {name: info.nbytes for name, info in self._info.items() if name not in written}
        where = path if folder is None else path.name
        self._file = os.open(where, os.O_WRONLY | os.O_CREAT, 0o666, dir_fd=folder)
        self._direct: int | None = None
        with suppress(OSError):  # a file system that does not do without the page cache
            self._direct = os.open(where, os.O_WRONLY | getattr(os, "O_DIRECT", 0), dir_fd=folder)
        try:
            self._write(memoryview(blob), 0)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, tensor: Tensor, offset: int = 0) -> None:
        """Write ``tensor`` as the bytes of ``name`` from byte ``offset`` of it on."""
        data = as_bytes(tensor)
        self._write(data, self._info[name].begin + offset)
        self._left[name] -= len(data)
        if not self._left[name]:
            del self._left[name]

    def write_block(self, name: str, block: Tensor, row: int, column: int, width: int) -> None:
        """Write a block (rows, columns) of ``name`` taken for a matrix of ``width`` columns, from ``row`` and ``column`` on."""
        item = block.element_size()
        if block.shape[1] == width:
            return self.write(name, block, row * width * item)
        for i, line in enumerate(block, row):
            self.write(name, line, (i * width + column) * item)

    @property
    def complete(self) -> bool:
        """Whether every tensor has been written."""
        return not self._left

    def sync(self) -> None:
        """What has been written outlives the machine once this returns."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(self.path)) from None

    def close(self) -> None:
        os.close(self._file)
        if self._direct is not None:
            os.close(self._direct)

    def _write(self, data: memoryview, offset: int) -> None:
        """Whole blocks of the disk past the page cache, whose memory costs CPU time that the kernels could use."""
        from pyfold.memory import LARGE

        end = offset + len(data)
        first, last = -(-offset // _DISK_BLOCK) * _DISK_BLOCK, end // _DISK_BLOCK * _DISK_BLOCK
        if self._direct is None or len(data) < LARGE:
            return write_bytes(self._file, self.path, offset, data)
        write_bytes(self._file, self.path, offset, data[: first - offset])
        bounce = _bounce()
        for at in range(first, last, _BOUNCE):
            piece = bounce[: min(_BOUNCE, last - at)]
            piece[:] = data[at - offset : at - offset + len(piece)]
            try:
                write_bytes(self._direct, self.path, at, piece)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                os.close(self._direct)
                self._direct = None
                return write_bytes(self._file, self.path, at, data[at - offset :])
        write_bytes(self._file, self.path, last, data[last - offset :])


def _bounce() -> memoryview:
    """Memory of this thread that starts with a page, as writing past the page cache needs it."""
    from pyfold.memory import empty

    if not hasattr(_of_thread, "bounce"):
        import torch

        _of_thread.bounce = as_bytes(empty((_BOUNCE,), torch.uint8))
    bounce: memoryview = _of_thread.bounce
    return bounce
