"""``pyfold fold`` as a process, from a cold page cache to fsync, beside what ``pyfold plan`` said of it just before."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import child
from conftest import evict
from report import Row

from pyfold.io.checkpoint import open_checkpoint


class Folded(NamedTuple):
    """What the kernel counted of the fold, what the plan said, the hashes of the tensors written, the bytes of the folder."""

    usage: child.Usage
    plan: dict[str, Any]
    sha256: dict[str, str]
    n_bytes: int

    def rows(self, asked: str | None) -> list[Row]:
        """Seconds and peak, measured and planned."""
        usage, plan = self.usage, self.plan
        return [
            {"measured": "seconds", "value": usage.seconds, "asked": None},
            {"measured": "seconds planned", "value": plan["seconds"], "asked": None},
            {"measured": "seconds, planned / measured", "value": plan["seconds"] / usage.seconds, "asked": "0.7 to 1.3"},
            {"measured": "limited by", "value": plan["limited_by"], "asked": None},
            {"measured": "peak memory GiB", "value": usage.peak_rss / 2**30, "asked": asked},
            {"measured": "peak memory planned GiB", "value": plan["peak"] / 2**30, "asked": None},
            {"measured": "peak memory, planned / measured", "value": plan["peak"] / usage.peak_rss, "asked": "0.85 to 1.15"},
            {"measured": "GB read from the disk", "value": usage.read / 1e9, "asked": None},
            {"measured": "GB written", "value": usage.written / 1e9, "asked": None},
        ]


def fold(source: Path, destination: Path, ratio: float, memory: str | None) -> Folded:
    """Plan, evict, fold; the result is removed."""
    files = {info.path for info in open_checkpoint(source).tensors.values()}
    options = ["--ratio", ratio, *(["--host-memory", memory] if memory else [])]
    evict(files)
    command = [sys.executable, "-m", "pyfold", "plan", source, destination, "--json", *options]
    plan = json.loads(subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout)
    evict(files)
    usage = child.run([sys.executable, "-m", "pyfold", "fold", source, destination, "--quiet", *options])
    assert usage.returncode == 0
    hashes = json.loads((destination / "pyfold.json").read_text())["sha256"]
    n_bytes = sum(file.stat().st_size for file in destination.iterdir())
    shutil.rmtree(destination)
    return Folded(usage, plan, hashes, n_bytes)
