"""A disk that loses power: from the log of a run, what may be left of it.

After a prefix of the calls: everything that was synced, and any subset of the rest. A file's bytes are synced by a sync of the
file, a folder's names (each creation, renaming or removal a whole) by a sync of the folder they are in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

Names = dict[tuple[int, str], int]  # (inode of the folder, name) -> inode
Change = Callable[[Names], None]


@dataclass
class Call:
    """One record of the shim's log."""

    what: str
    paths: tuple[str, ...] = ()
    inode: int = 0
    offset: int = 0
    data: bytes = b""


def read_log(path: Path) -> list[Call]:
    blob, calls, at = path.read_bytes(), [], 0
    while at < len(blob):
        end = blob.index(b"\n", at)
        what, _, rest = blob[at:end].decode().partition(" ")
        at = end + 1
        if what == "write":
            inode, offset, length = map(int, rest.split())
            calls.append(Call(what, inode=inode, offset=offset, data=blob[at : at + length]))
            at += length
        elif what in ("truncate", "sync"):
            numbers = [int(number) for number in rest.split()]
            calls.append(Call(what, inode=numbers[0], offset=numbers[-1]))
        elif what in ("create", "mkdir"):
            inode_text, _, name = rest.partition(" ")
            calls.append(Call(what, (name,), int(inode_text)))
        else:
            calls.append(Call(what, tuple(rest.split("\t"))))
    return calls


@dataclass
class Disk:
    """What is on the disk, and what is still on its way. Paths are relative to the root, whose inode is 0."""

    root: Path
    names: dict[str, int] = field(default_factory=dict)  # path -> inode, as a running system sees it
    folders: set[int] = field(default_factory=lambda: {0})
    safe_names: Names = field(default_factory=dict)  # (folder, name) -> inode
    safe_data: dict[int, bytearray] = field(default_factory=dict)
    changes: list[tuple[set[int], Change]] = field(default_factory=list)
    writes: dict[int, list[Call]] = field(default_factory=dict)
    renumbered: dict[int, int] = field(default_factory=dict)  # inode of the log -> inode of the last ``restore``

    def adopt(self) -> None:
        """What lies below the root now is on the disk."""
        for path in sorted(self.root.rglob("*")):
            inode = path.stat().st_ino
            self.names[str(path.relative_to(self.root))] = inode
            self.safe_names[self._place(path)] = inode
            if path.is_dir():
                self.folders.add(inode)
            else:
                self.safe_data[inode] = bytearray(path.read_bytes())

    def call(self, call: Call) -> None:
        paths = [Path(path) for path in call.paths]
        if call.what in ("write", "truncate"):
            self.writes.setdefault(call.inode, []).append(call)
        elif call.what == "sync":
            inode = call.inode if call.inode in self.folders or call.inode in self.names.values() else 0
            for write in self.writes.pop(inode, []):
                _apply(self.safe_data.setdefault(inode, bytearray()), write)
            kept = []
            for places, change in self.changes:
                change(self.safe_names) if inode in places else kept.append((places, change))
            self.changes = kept
        elif call.what in ("create", "mkdir"):
            if call.what == "mkdir":
                self.folders.add(call.inode)
            self._change([paths[0]], _link(self._place(paths[0]), call.inode))
            self.names[self._name(paths[0])] = call.inode
        elif call.what == "unlink":
            self._change([paths[0]], _link(self._place(paths[0]), None))
            self.names.pop(self._name(paths[0]), None)
        else:
            old, new = (self._place(path) for path in paths)
            self._change([paths[1]], _swap(old, new) if call.what == "exchange" else _move(old, new))
            moved = {
                here: {name: inode for name, inode in self.names.items() if name == here or name.startswith(here + "/")}
                for here in map(self._name, paths)
            }
            first, second = map(self._name, paths)
            for here in moved:
                for name in moved[here]:
                    del self.names[name]
            for name, inode in moved[first].items():
                self.names[second + name.removeprefix(first)] = inode
            if call.what == "exchange":
                for name, inode in moved[second].items():
                    self.names[first + name.removeprefix(second)] = inode

    def restore(self, root: Path, chosen: Callable[[int], bool]) -> None:
        """Into an empty folder: what is safe, and of the rest, which is numbered, what is chosen."""
        names, numbers = dict(self.safe_names), count()
        for _, change in self.changes:
            if chosen(next(numbers)):
                change(names)
        data = {inode: bytearray(blob) for inode, blob in self.safe_data.items()}
        for inode, writes in self.writes.items():
            for write in writes:
                if chosen(next(numbers)):
                    _apply(data.setdefault(inode, bytearray()), write)
        self.renumbered = {}
        for path, inode in self._tree(names, 0, root):
            if inode in self.folders:
                path.mkdir()
            else:
                path.write_bytes(data.get(inode, b""))
            self.renumbered[inode] = path.stat().st_ino

    def _tree(self, names: Names, folder: int, path: Path) -> Iterator[tuple[Path, int]]:
        for (place, name), inode in names.items():
            if place == folder:
                yield path / name, inode
                yield from self._tree(names, inode, path / name)

    def _change(self, paths: list[Path], change: Change) -> None:
        self.changes.append(({self._place(path)[0] for path in paths}, change))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def _place(self, path: Path) -> tuple[int, str]:
        return (0 if path.parent == self.root else self.names[self._name(path.parent)]), path.name


def _apply(data: bytearray, write: Call) -> None:
    if write.what == "truncate":
        del data[write.offset :]
    data.extend(bytes(max(0, write.offset + len(write.data) - len(data))))
    data[write.offset : write.offset + len(write.data)] = write.data


def _link(place: tuple[int, str], inode: int | None) -> Change:
    def change(names: Names) -> None:
        names.pop(place, None)
        if inode is not None:
            names[place] = inode

    return change


def _move(old: tuple[int, str], new: tuple[int, str]) -> Change:
    def change(names: Names) -> None:
        if old in names:
            names[new] = names.pop(old)

    return change


def _swap(a: tuple[int, str], b: tuple[int, str]) -> Change:
    def change(names: Names) -> None:
        if a in names and b in names:
            names[a], names[b] = names[b], names[a]

    return change
