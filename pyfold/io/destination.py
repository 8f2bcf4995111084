"""A result folder that appears only when it is complete.

Files are written to ``DST.pyfold-partial`` beside DST, which no loader opens; ``commit`` renames the folder into place in one
step (overwriting exchanges old and new). Where DST is a mount point (a container's volume) nothing can be renamed onto it: then
the partial folder lies inside, and files move out one by one, config.json and the index last.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from pathlib import Path

from pyfold.errors import PyfoldError
from pyfold.io.checkpoint import INDEX

PARTIAL = ".pyfold-partial"
_LAST = ("config.json", INDEX)


class Destination:
    """``with Destination(dst, src) as stage: ...; stage.commit()``. Leaving without a commit removes what was written."""

    def __init__(self, path: Path, source: Path, *, overwrite: bool = False, n_bytes: int = 0) -> None:
        """Check, before anything is written, that ``path`` can take a result of ``n_bytes``.

        Raises
        ------
        PyfoldError
            If ``path`` is a file, is not empty, lies in the source or around it, or another run is writing it.
        OSError
            If there is not enough disk.
        """
        self.path = real = path.resolve()
        real_source = source.resolve()
        if real == real_source or real_source in real.parents or real in real_source.parents:
            raise PyfoldError(f"{path}: the destination and the source {source} lie in one another; choose another destination")
        if path.exists() and not path.is_dir():
            raise PyfoldError(f"{path}: the destination is a file; choose a folder")
        contents = sorted(entry.name for entry in path.iterdir() if entry.name != PARTIAL) if path.is_dir() else []
        if contents and not overwrite:
            raise PyfoldError(f"{path}: the destination is not empty (it holds {contents[0]}); use --overwrite to replace it")
        if contents and "config.json" not in contents:
            raise PyfoldError(f"{path}: will not overwrite a folder that holds no checkpoint (no config.json)")
        self._replace = bool(contents)
        self._inside = os.path.ismount(self.path)
        if self._inside and contents:
            raise PyfoldError(f"{path}: a mount point cannot be exchanged with its replacement; overwrite a folder inside it")
        self.partial = self.path / PARTIAL if self._inside else self.path.with_name(self.path.name + PARTIAL)
        parent = next(folder for folder in self.partial.parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if free < n_bytes:
            raise OSError(28, f"the result needs {n_bytes:,} bytes and {free:,} are free", str(parent))

    def __enter__(self) -> Destination:
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.partial / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise PyfoldError(
                f"{self.path}: another pyfold is writing it; wait for it, or choose another destination"
            ) from None
        for entry in self.partial.iterdir():  # a killed run's
            if entry.name != ".lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._lock)
        if self.partial.exists():
            shutil.rmtree(self.partial)

    def write_text(self, name: str, text: str) -> None:
        """Write one file of the result."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write one file of the result."""
        with (self.partial / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Put the result in place."""
        (self.partial / ".lock").unlink()
        _sync_folder(self.partial)
        if self._inside:
            names = sorted(entry.name for entry in self.partial.iterdir())
            for name in sorted(names, key=lambda name: _LAST.index(name) if name in _LAST else -1):
                os.rename(self.partial / name, self.path / name)
        elif self._replace:
            _exchange(self.partial, self.path)
        else:
            os.rename(self.partial, self.path)  # onto nothing, or an empty folder
        _sync_folder(self.path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders: in one step where the kernel and file system can (Linux renameat2), else in three renames."""
    at_cwd, exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0:
        return
    old = a.with_name(a.name + ".old")
    os.rename(b, old)
    os.rename(a, b)
    os.rename(old, a)
