"""Files of ``torch.save`` by position: a zip whose stored entries are the storages, and a pickle that says what lies where.

The pickle is not run. It is read by an interpreter of the two dozen opcodes that ``torch.save`` writes for a state dict, which
can build dicts, lists, tuples and places, and nothing else: Python's unpickler, even restricted in what it may import, can be
made to allocate or hash without end. No tensor's data is read, and torch is not needed.
"""

from __future__ import annotations

import errno
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pyfold.errors import PyfoldError
from pyfold.io.safetensors import ITEM_SIZE, TensorInfo, count, is_sizes

_STORAGES = {
    "torch DoubleStorage": "F64", "torch FloatStorage": "F32", "torch HalfStorage": "F16", "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64", "torch IntStorage": "I32", "torch ShortStorage": "I16", "torch CharStorage": "I8",
    "torch ByteStorage": "U8", "torch BoolStorage": "BOOL",
}  # fmt: skip
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
# A state dict of 100,000 tensors takes 12 MB.
_MAX_PICKLE = 1 << 25
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_NEWEST = 10  # the newest format of torch 2.13, which writes 3
_FOLDER = 0x10  # torch leaves the tensors of such an entry uninitialised
_OPAQUE = 0x2061  # encrypted, a patch, strongly encrypted, headers masked
_ENTRY = b"PK\3\4"
_CONVERT = "load it with torch and save its tensors as safetensors"


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    begin: int
    n_elements: int


@dataclass(frozen=True)
class _Tensor:
    """What a call of _rebuild_tensor_v2 describes, before it has a name."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a file, in file order; no data is read. Tensors that share a storage share a place.

    Raises
    ------
    PyfoldError
        If the file is no whole zip of ``torch.save`` with uncompressed entries, or holds anything but a dict of contiguous
        tensors; names the file and, where there is one, the tensor.
    """
    entries, pickle = _entries(path)
    tensors = {}
    try:
        state = _Interpreter(entries).run(pickle)
        if not isinstance(state, dict):
            raise _Unsupported(f"it holds no dict of tensors but a {type(state).__name__.lstrip('_')}")
        for name, tensor in state.items():
            if not isinstance(name, str) or name == "__metadata__" or not isinstance(tensor, _Tensor):
                kind = type(tensor).__name__.lstrip("_")
                raise _Unsupported(f"its entry {name!r:.200} is a {kind}, and not a tensor that safetensors can name")
            name.encode("utf-8")  # half a surrogate pair is a ValueError
            tensors[name] = _place(name, tensor, path)
    except _Unsupported as error:
        raise PyfoldError(f"{path}: {error}; {_CONVERT}") from None
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise PyfoldError(f"{path}: corrupt pickle ({type(error).__name__}: {error}); download it again") from None
    return tensors


class _Unsupported(Exception):
    """A file that torch may read and pyfold does not."""


def _entries(path: Path) -> tuple[dict[str, tuple[int, int]], bytes]:
    """(begin, end) of every storage, by its key, and the pickle."""
    with path.open("rb") as file:
        places = _zip_places(file, path)

        def read(name: str, limit: int) -> bytes:
            begin, end = places[name]
            if end - begin > limit:
                raise PyfoldError(f"{path}: its {name} has {end - begin} bytes; at most {limit} are read; {_CONVERT}")
            file.seek(begin)
            return file.read(end - begin)

        roots = [name.removesuffix("data.pkl") for name in places if name.endswith("/data.pkl")]
        root = roots[0] if len(roots) == 1 else ""
        if not root or root + "version" not in places or not all(name.startswith(root) for name in places):
            raise PyfoldError(f"{path}: a zip, but not of a state dict saved by torch.save; {_CONVERT}")
        version = read(root + "version", 16).strip()
        if not version.isdigit() or not 1 <= int(version) <= _NEWEST:
            raise PyfoldError(f"{path}: expected a format version from 1 to {_NEWEST}, got {version!r}; {_CONVERT}")
        pickle = read(root + "data.pkl", _MAX_PICKLE)
        if root + "byteorder" in places and read(root + "byteorder", 16) != b"little":
            raise PyfoldError(f"{path}: its numbers are not little-endian; {_CONVERT}")
    data = root + "data/"
    return {name.removeprefix(data): place for name, place in places.items() if name.startswith(data)}, pickle


def _zip_places(file: BinaryIO, path: Path) -> dict[str, tuple[int, int]]:
    """(begin, end) of every entry of a zip, all of them stored as they are."""
    size = path.stat().st_size
    start = file.read(len(_LEGACY))
    if start == _LEGACY:
        raise PyfoldError(f"{path}: saved in the format of torch before 1.6; {_CONVERT}")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        # zipfile passes over what stands before the first entry, and moves all places by as much.
        if start[:4] != _ENTRY or min((member.header_offset for member in members), default=0) != 0:
            raise zipfile.BadZipFile
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError, struct.error, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a seek to before the file gives
            raise
        raise PyfoldError(f"{path}: not a file of torch.save, or cut short; download it again") from None
    places: dict[str, tuple[int, int]] = {}
    for member in members:
        name = member.filename
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _OPAQUE:
            raise PyfoldError(f"{path}: its entry {name} is compressed or encrypted; {_CONVERT}")
        if member.external_attr & _FOLDER:
            raise PyfoldError(f"{path}: corrupt zip: its entry {name} is marked as a folder; download it again")
        file.seek(min(member.header_offset, size))
        local = file.read(30)
        if len(local) < 30 or local[:4] != _ENTRY or member.compress_size != member.file_size or name in places:
            raise PyfoldError(f"{path}: corrupt zip: no place for its entry {name}; download it again")
        begin = member.header_offset + 30 + sum(struct.unpack("<HH", local[26:]))
        end = begin + member.file_size
        if end > size:
            raise PyfoldError(f"{path}: cut short: {name} ends at byte {end} of {size}; download it again")
        places[name] = (begin, end)
    return places


def _place(name: str, tensor: _Tensor, path: Path) -> TensorInfo:
    n_elements = count(name, tensor.shape)
    contiguous, step = [], 1
    for extent in reversed(tensor.shape):
        contiguous.append(step)
        step *= max(extent, 1)
    if len(tensor.stride) != len(tensor.shape):
        raise ValueError(f"tensor '{name}' has the shape {list(tensor.shape)} and stride {list(tensor.stride)}")
    if n_elements and any(
        extent > 1 and stride != expected
        for extent, stride, expected in zip(tensor.shape, tensor.stride, reversed(contiguous), strict=True)
    ):
        raise _Unsupported(f"tensor '{name}' is not contiguous: shape {list(tensor.shape)}, stride {list(tensor.stride)}")
    if tensor.offset + n_elements > tensor.storage.n_elements:
        raise ValueError(f"tensor '{name}' goes beyond its storage of {tensor.storage.n_elements} elements")
    item = ITEM_SIZE[tensor.storage.dtype]
    begin = tensor.storage.begin + tensor.offset * item
    return TensorInfo(name, path, tensor.storage.dtype, tuple(tensor.shape), begin, begin + n_elements * item)


class _Interpreter:
    """The pickle machine, as far as ``torch.save`` of a state dict uses it. A step's time is in proportion to its bytes."""

    def __init__(self, entries: dict[str, tuple[int, int]]) -> None:
        self._entries = entries
        self._stack: list[Any] = []  # above the last mark
        self._below: list[list[Any]] = []  # under each mark: what a step after it cannot reach
        self._memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        arg: Any
        for opcode, arg, _ in pickletools.genops(pickle):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, arg)
        raise ValueError("it has no end")

    def _step(self, opcode: str, arg: Any) -> None:
        push, pop = self._stack.append, self._stack.pop
        match opcode:
            case "PROTO":
                pass
            case "GLOBAL":
                push(self._global(arg))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[arg] = self._stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self._memo[arg])
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                push(arg)
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(opcode == "NEWTRUE")
            case "MARK":
                self._below.append(self._stack)
                self._stack = []
            case "EMPTY_TUPLE":
                push(())
            case "TUPLE":
                items = self._above_mark()
                self._stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(reversed([pop() for _ in range(int(opcode[-1]))])))
            case "EMPTY_LIST":
                push([])
            case "APPEND":
                item = pop()
                _expect(self._stack[-1], list).append(item)
            case "APPENDS":
                items = self._above_mark()
                _expect(self._stack[-1], list).extend(items)
            case "EMPTY_DICT":
                push({})
            case "SETITEM":
                value, key = pop(), pop()
                self._set([key, value])
            case "SETITEMS":
                items = self._above_mark()
                self._set(items)
            case "BINPERSID":
                push(self._storage(pop()))
            case "REDUCE":
                args, function = pop(), pop()
                push(self._call(function, args))
            case "BUILD":  # attributes of an OrderedDict: the modules' versions
                pop()
                _expect(self._stack[-1], dict)
            case _:
                raise _Unsupported(f"its pickle has the opcode {opcode}, which no state dict needs")

    def _above_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _set(self, pairs: list[Any]) -> None:
        target = _expect(self._stack[-1], dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise _Unsupported(f"its pickle has a key that is a {type(key).__name__}")
            if key in target:
                raise ValueError(f"the key {key!r:.200} is there twice")
            target[key] = value

    def _global(self, name: str) -> _Global:
        if name not in (*_STORAGES, _DICT, _TENSOR, _PARAMETER):
            raise _Unsupported(f"its pickle asks for {name.replace(' ', '.')}, which is not run")
        return _Global(name)

    def _call(self, function: Any, args: Any) -> Any:
        name, args = _expect(function, _Global).name, _expect(args, tuple)
        if name == _DICT and not args:
            return {}
        if name == _PARAMETER and len(args) == 3:
            return _expect(args[0], _Tensor)
        if name == _TENSOR and len(args) == 6:
            storage, offset, shape, stride, requires_grad, _ = args
            # Before any message shows them: tuples of shared tuples can be small here and endless in print.
            if not (is_sizes((offset,)) and is_sizes(shape) and is_sizes(stride) and isinstance(requires_grad, bool)):
                raise TypeError("offset, shape or stride of a tensor is not of integers, or requires_grad no bool")
            return _Tensor(_expect(storage, _Storage), offset, tuple(shape), tuple(stride))
        raise _Unsupported(f"its pickle calls {name.replace(' ', '.')} with {len(args)} arguments")

    def _storage(self, reference: Any) -> _Storage:
        """('storage', type, key, device, number of elements) -> its place."""
        kind, storage, key, _, n_elements = _expect(reference, tuple)
        dtype = _STORAGES[_expect(storage, _Global).name]
        begin, end = self._entries[_expect(key, str)]
        if kind != "storage" or not is_sizes((n_elements,)) or n_elements * ITEM_SIZE[dtype] != end - begin:
            raise ValueError(f"storage {key} has {end - begin} bytes for {n_elements} elements of {dtype}")
        return _Storage(dtype, begin, n_elements)


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__.lstrip('_')} where a {kind.__name__.lstrip('_')} belongs")
    return value
