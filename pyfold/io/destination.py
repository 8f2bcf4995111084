"""A result folder that appears only when it is complete.

Files are written to ``DST.pyfold-partial`` beside DST, which no loader opens; ``commit`` renames the folder into place in one
step (overwriting exchanges old and new). Where DST is a mount point (a container's volume) nothing can be renamed onto it: then
the partial folder lies inside, and files move out one by one, config.json and the index last.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from pyfold.errors import PyfoldError
from pyfold.io.checkpoint import INDEX, read_json

PARTIAL = ".pyfold-partial"
LOCK = ".lock"
TEMPORARY = ".tmp"
_LAST = ("config.json", INDEX)


class Destination:
    """``with Destination(dst, files) as stage: ...; stage.commit()``. Leaving without a commit removes what was written."""

    def __init__(self, path: Path, sources: Iterable[Path], *, overwrite: bool = False, n_bytes: int = 0) -> None:
        """Check, before anything is written, that ``path`` can take a result of ``n_bytes`` made from the files ``sources``.

        Raises
        ------
        PyfoldError
            If ``path`` is a file, is not empty, lies in the source or around it, or holds something that is no checkpoint.
        OSError
            If there is not enough disk.
        """
        self._given, self._overwrite = path, overwrite
        try:
            self.path = path.resolve()
        except RuntimeError:
            raise PyfoldError(f"{path}: a loop of symbolic links; choose another destination") from None
        if self.path == Path.cwd():
            raise PyfoldError(f"{self.path}: the destination is the current folder; name another")
        for file in sources:
            for source in (file.absolute(), file.resolve()):
                if self.path in source.parents or source.parent in (self.path, *self.path.parents):
                    raise PyfoldError(
                        f"{path}: the destination and the source {file.parent} lie in one another; choose another"
                    )
        self._inside = os.path.ismount(self.path)
        self.partial = self.path / PARTIAL if self._inside else self.path.with_name(self.path.name + PARTIAL)
        self._check()
        parent = next(folder for folder in self.partial.parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if free < n_bytes:
            raise OSError(errno.ENOSPC, f"the result needs {n_bytes:,} bytes and {free:,} are free", str(parent))

    def _check(self) -> None:
        path = self._given
        if self.path.exists() and not self.path.is_dir():
            raise PyfoldError(f"{path}: the destination is a file; choose a folder")
        entries = sorted(self.path.iterdir()) if self.path.is_dir() else []
        entries = [entry for entry in entries if entry.name != PARTIAL]
        self._replace = bool(entries)
        if self._replace:
            if not self._overwrite:
                raise PyfoldError(
                    f"{path}: the destination is not empty (it holds {entries[0].name}); use --overwrite to replace it"
                )
            if not (self.path / "config.json").is_file() or "model_type" not in read_json(self.path / "config.json"):
                raise PyfoldError(
                    f"{path}: will not overwrite a folder that holds no checkpoint (no config.json with a model_type)"
                )
            folders = [entry.name for entry in entries if entry.is_dir()]
            if folders:
                raise PyfoldError(f"{path}: will not overwrite a folder with folders in it ({folders[0]}); remove it yourself")
            if self._inside:
                raise PyfoldError(
                    f"{path}: a mount point cannot be exchanged with its replacement; overwrite a folder inside it"
                )
        if self.partial.is_symlink() or (self.partial.exists() and not (self.partial / LOCK).is_file()):
            raise PyfoldError(f"{self.partial}: pyfold needs this name and did not make it; move it away")

    def __enter__(self) -> Destination:
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.partial / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check()  # another run may have ended since
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, BlockingIOError):
                message = f"{self._given}: another pyfold is writing it; wait for it, or choose another destination"
                raise PyfoldError(message) from None
            raise
        for entry in self.partial.iterdir():  # a killed run's
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        old = _old(self.partial)
        if old.exists():  # killed between the renames of an exchange
            shutil.rmtree(old) if self._replace else os.rename(old, self.path)
            self._check()
        return self

    def __exit__(self, *exc: object) -> None:
        # Under another name first: from here on the partial folder may be another run's.
        trash = self.partial.with_name(f"{self.partial.name}.{os.getpid()}.trash")
        try:
            os.rename(self.partial, trash)
            shutil.rmtree(trash)
        except FileNotFoundError:
            pass  # committed
        finally:
            os.close(self._lock)

    def write_text(self, name: str, text: str) -> None:
        """Write one file of the result. What makes a loader open a folder has a temporary name until ``commit``."""
        with (self.partial / (name + TEMPORARY if name in _LAST else name)).open("wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Put the result in place. The lock is held, by its open file, until the block is left."""
        names = {entry.name for entry in self.partial.iterdir()} - {LOCK}
        last = [name for name in _LAST if name + TEMPORARY in names]
        if self._inside:
            for name in sorted(names - {name + TEMPORARY for name in last}):
                os.rename(self.partial / name, self.path / name)
        for name in last:
            os.rename(self.partial / (name + TEMPORARY), (self.path if self._inside else self.partial) / name)
        _sync_folder(self.partial)
        if self._inside:
            _sync_folder(self.path)
        elif self._replace:
            _exchange(self.partial, self.path)
        else:
            os.rename(self.partial, self.path)  # onto nothing, or an empty folder
        (self.path / LOCK).unlink(missing_ok=True)
        _sync_folder(self.path.parent)


def _old(partial: Path) -> Path:
    return partial.with_name(partial.name + ".old")


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _exchange(partial: Path, path: Path) -> None:
    """Swap two folders: in one step where the kernel and file system can (Linux renameat2), else in three renames."""
    at_cwd, exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(at_cwd, os.fsencode(partial), at_cwd, os.fsencode(path), exchange) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(path))
    os.rename(path, _old(partial))
    os.rename(partial, path)
    os.rename(_old(partial), partial)
