"""A command -> what the kernel counted of it: seconds, peak resident memory, bytes read from and written to the disk.

``python -I -S bench/child.py COMMAND ...`` is the small process between. The kernel counts in a process's peak what it held
before it became the command, which is its parent's memory: of a test runner with torch, more than of many a command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import NamedTuple


class Usage(NamedTuple):
    """Of one process that has ended. ``peak_rss`` is its VmHWM; blocks already in the page cache are not read."""

    returncode: int
    seconds: float
    peak_rss: int
    read: int
    written: int


def run(command: list[object]) -> Usage:
    """Run a command to its end; what it prints goes to stderr."""
    between = subprocess.run(
        [sys.executable, "-I", "-S", __file__, *map(str, command)], stdout=subprocess.PIPE, text=True, check=True
    )
    return Usage(*json.loads(between.stdout))


def main() -> None:
    started = time.perf_counter()
    command = sys.argv[1:]
    child = os.posix_spawnp(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - started
    blocks = 512  # bytes, whatever the file system's are
    counted = (usage.ru_maxrss * 1024, usage.ru_inblock * blocks, usage.ru_oublock * blocks)
    print(json.dumps([os.waitstatus_to_exitcode(status), seconds, *counted]))


if __name__ == "__main__":
    main()
