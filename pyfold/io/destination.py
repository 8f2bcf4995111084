"""A result folder that appears only when it is complete, and whose making goes on where it was stopped.

Beside DST lies ``DST.pyfold-partial``: a lock, the journal, and the growing result, which no loader opens. ``commit`` renames
the result into place in one step (overwriting exchanges old and new). Where DST is a mount point (a container's volume) nothing
can be renamed onto it: then the partial folder lies inside, and files move out one by one, the index and config.json last.

A run that ends before its commit, by whatever cause but bad input, leaves the partial folder if its journal holds finished
work; the same command then continues. Everything is on the disk before the journal says so, and before the commit.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from pyfold.errors import PyfoldError
from pyfold.io.checkpoint import INDEX, read_json
from pyfold.io.journal import Entry, Journal

PARTIAL = ".pyfold-partial"
LOCK = ".lock"
JOURNAL = "journal"
RESULT = "result"
OLD = "replaced"
SCRATCH = "scratch"
TEMPORARY = ".tmp"
_OWN = {LOCK, JOURNAL, RESULT, OLD, SCRATCH}
_LAST = (INDEX, "config.json")


def resumable(path: Path) -> bool:
    """Whether an unfinished run on ``path`` left work that the same command would go on from."""
    return bool(Journal(_partial(path.resolve()) / JOURNAL).done)


def run_of(folder: Path) -> Entry | None:
    """The identity of the run whose result grows in ``folder`` now."""
    return Journal(folder.parent / JOURNAL).identity


class Destination:
    """``with Destination(dst, files) as stage: stage.begin(identity); ...; stage.commit()``.

    Inside the block no other run can write ``dst``; what the identity depends on may take long to find there.
    """

    def __init__(self, path: Path, sources: Iterable[Path], *, overwrite: bool = False, n_bytes: int = 0) -> None:
        """Check, before anything is written, that ``path`` can take a result of ``n_bytes`` made from the files ``sources``.

        Raises
        ------
        PyfoldError
            If ``path`` is a file, is not empty, lies in the source or around it, or holds something that is no checkpoint.
        OSError
            If there is not enough disk.
        """
        self._given, self._overwrite, self._begun = path, overwrite, False
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
        self.partial = _partial(self.path)
        self.folder = self.partial / RESULT  # where the result grows
        self._check()
        written = sum(512 * file.stat().st_blocks for file in self.folder.glob("*"))
        parent = next(folder for folder in self.partial.parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if free < n_bytes - written:
            raise OSError(errno.ENOSPC, f"the fold needs {n_bytes - written:,} bytes and {free:,} are free", str(parent))

    def _check(self) -> None:
        path = self._given
        if self.partial.is_symlink() or (self.partial.exists() and set(os.listdir(self.partial)) - _OWN):
            raise PyfoldError(f"{self.partial}: pyfold needs this name and did not make it; move it away")
        if self.path.exists() and not self.path.is_dir():
            raise PyfoldError(f"{path}: the destination is a file; choose a folder")
        moving = _commit_of(Journal(self.partial / JOURNAL)).get("files", []) if self._inside else []
        entries = sorted(self.path.iterdir()) if self.path.is_dir() else []
        entries = [entry for entry in entries if entry.name != PARTIAL and entry.name not in moving]
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

    def __enter__(self) -> Destination:
        self._lock = self._locked()
        try:
            self._settle()
            self._check()  # another run may have ended since
            self.journal = Journal(self.partial / JOURNAL)
        except BaseException:
            self._leave(keep=resumable(self.path))
            raise
        return self

    def check(self, known: Entry) -> None:
        """Refuse an unfinished run that differs in what is ``known`` already of this one's identity and options; errors as of
        :meth:`begin`."""
        found = self.journal.identity
        if self.journal.done and found:
            known = json.loads(json.dumps(known))
            self._go_on(found | known | {"options": found.get("options", {}) | known["options"]})

    def begin(self, identity: Entry) -> None:
        """Go on with the unfinished run of this identity, or start one.

        Parameters
        ----------
        identity : dict
            JSON values on which the bytes of the result depend.

        Raises
        ------
        PyfoldError
            If an unfinished run with another identity has left its work.
        """
        identity = json.loads(json.dumps(identity))
        if not self.journal.done:
            self._clear()
            self.journal = Journal(self.partial / JOURNAL)
        else:
            self._go_on(identity)
        self._begun = True
        self.folder.mkdir(exist_ok=True)
        self.journal.begin(identity)
        sync_folder(self.partial)
        sync_folder(self.partial.parent)

    def _go_on(self, identity: Entry) -> None:
        if self.journal.identity != identity:
            raise PyfoldError(
                f"{self._given}: an unfinished run with {_difference(self.journal.identity or {}, identity)}; "
                f"repeat its command to complete it, or remove {self.partial}"
            )

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.journal.close()
        committed = bool(self.journal.done and "commit" in self.journal.done[-1] and kind is None)
        refused = self._begun and kind is not None and issubclass(kind, PyfoldError)  # before, the work is another run's
        self._leave(keep=not committed and bool(self.journal.done) and not refused)

    def _locked(self) -> int:
        while True:
            self.partial.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.partial / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_ino == os.stat(self.partial / LOCK).st_ino:
                    return lock
            except BlockingIOError:
                os.close(lock)
                message = f"{self._given}: another pyfold is writing it; wait for it, or choose another destination"
                raise PyfoldError(message) from None
            except FileNotFoundError:
                pass
            os.close(lock)  # of a run that has just ended and removed its folder

    def _settle(self) -> None:
        """Finish, or undo, the commit in which a run was killed."""
        commit = _commit_of(Journal(self.partial / JOURNAL))
        if not commit:
            return
        if self._inside:
            moved = (self.path / "config.json").exists()  # the last to move
            for name in commit["files"]:
                if not moved and (self.path / name).exists():
                    os.rename(self.path / name, self.folder / name)
        else:
            moved = not self.folder.exists() or self.folder.stat().st_ino != commit["inode"]
            if not moved and (self.partial / OLD).exists() and not self.path.exists():
                os.rename(self.partial / OLD, self.path)
        if moved:
            self._clear()

    def _clear(self) -> None:
        for entry in self.partial.iterdir():
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _leave(self, *, keep: bool) -> None:
        try:
            if not keep:
                # Under another name first: from here on the partial folder may be another run's.
                trash = self.partial.with_name(f"{self.partial.name}.{os.getpid()}.trash")
                os.rename(self.partial, trash)
                shutil.rmtree(trash)
        finally:
            os.close(self._lock)

    def write_text(self, name: str, text: str) -> None:
        """Write one file of the result. What makes a loader open a folder has a temporary name until ``commit``."""
        (self.folder / (name + TEMPORARY if name in _LAST else name)).write_bytes(text.encode("utf-8"))

    def commit(self) -> None:
        """Put the result in place. The lock is held, by its open file, until the block is left."""
        last = [name for name in _LAST if (self.folder / (name + TEMPORARY)).exists()]
        names = sorted({entry.name for entry in self.folder.iterdir()} - {name + TEMPORARY for name in last})
        for name in names + [name + TEMPORARY for name in last]:
            _sync(self.folder / name)
        for name in last:
            os.rename(self.folder / (name + TEMPORARY), self.folder / name)
        sync_folder(self.folder)
        names = [name for name in names if name not in last] + last
        self.journal.append({"commit": {"inode": self.folder.stat().st_ino, "files": names}})
        if self._inside:
            for name in names:
                if name == names[-1]:
                    sync_folder(self.path)
                os.rename(self.folder / name, self.path / name)
            sync_folder(self.path)
            return
        if self._replace:
            _exchange(self.folder, self.path, self.partial / OLD)
        else:
            os.rename(self.folder, self.path)  # onto nothing, or an empty folder
        sync_folder(self.path.parent)


def _partial(path: Path) -> Path:
    return path / PARTIAL if os.path.ismount(path) else path.with_name(path.name + PARTIAL)


def _commit_of(journal: Journal) -> Entry:
    """The commit that a journal ends with."""
    commit: Entry = journal.done[-1].get("commit", {}) if journal.done else {}
    return commit


def _difference(theirs: Entry, ours: Entry) -> str:
    """What an unfinished run had otherwise, to be read by its owner."""
    for key, value in ours.items():
        other = theirs.get(key)
        if isinstance(value, dict) and isinstance(other, dict) and value != other:
            inner = next(name for name in {**value, **other} if value.get(name) != other.get(name))
            if key == "sources":
                return f"another {inner} (its size or time of change differs)"
            return f"{inner} {other.get(inner)} instead of {value.get(inner)}"
        if value != other:
            return f"{key} {other} instead of {value}"
    return "other options"


def _sync(path: Path, flags: int = 0) -> None:
    file = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_folder(path: Path) -> None:
    """The names in a folder outlive the machine once this returns."""
    _sync(path, os.O_DIRECTORY)


def _exchange(new: Path, path: Path, old: Path) -> None:
    """Put ``new`` in the place of ``path``: in one step where the kernel and file system can (Linux renameat2), else in two."""
    at_cwd, exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(path), exchange) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(path))
    os.rename(path, old)
    os.rename(new, path)
