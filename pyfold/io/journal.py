"""What a run has finished, one line each, so that the same command can go on after the process or the machine has died.

A line is a checksum and a JSON object. The first says which run it is; each further one is appended, and synced, after what it
speaks of is on the disk. A line that was being written at the end does not match its checksum and counts as not there.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Journal:
    """``entries`` are what earlier runs finished and this one has appended."""

    def __init__(self, path: Path) -> None:
        """Read what is there; nothing is written before ``begin``."""
        self.path = path
        self.entries: list[Entry] = []
        self._whole = 0  # bytes of whole lines
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            entry = _parse(line)
            if entry is None:
                break
            self.entries.append(entry)
            self._whole += len(line)
        self._file: int | None = None

    @property
    def identity(self) -> Entry | None:
        """The run that the journal is of."""
        return self.entries[0] if self.entries else None

    @property
    def done(self) -> list[Entry]:
        """What it has finished."""
        return self.entries[1:]

    def begin(self, identity: Entry) -> None:
        """Go on with this run's journal, or start one."""
        assert self.identity in (None, identity)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        os.ftruncate(self._file, self._whole)
        if self.identity is None:
            self._write(identity)

    def append(self, entry: Entry) -> None:
        """Add a line; it, and all before it, outlive the machine once this returns."""
        self._write(entry)
        assert self._file is not None
        os.fsync(self._file)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, entry: Entry) -> None:
        assert self._file is not None
        blob = json.dumps(entry, separators=(",", ":")).encode()
        line = memoryview(b"%08x %s\n" % (zlib.crc32(blob), blob))
        try:
            at = self._whole
            while at < self._whole + len(line):
                at += os.pwrite(self._file, line[at - self._whole :], at)
        except OSError as error:
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(self.path)) from None
        self._whole = at
        self.entries.append(json.loads(blob))


def _parse(line: bytes) -> Entry | None:
    checksum, _, blob = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(blob):
        return None
    entry: Entry = json.loads(blob)
    return entry
