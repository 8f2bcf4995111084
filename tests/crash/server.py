"""Folds in forked children, each with its own orders for the shim that is preloaded; one JSON request and answer a line.

Request: argv of the command line, root, at, error (errno, or -1: SIGKILL), log, mount (a folder to be taken for a mount point),
skip (a place in the code whose fsync is left out). Answer: code (negative: a signal), stderr, calls counted, places of fsyncs.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from pyfold import cli, pipeline

torch.set_num_threads(1)  # threads do not survive a fork
assert pipeline
shim = ctypes.CDLL(None)


def place() -> str:
    """The lines of pyfold that led here."""
    frames = [frame for frame in traceback.extract_stack() if "pyfold" in Path(frame.filename).parts[-3:-1]]
    return " < ".join(f"{frame.name}:{frame.lineno}" for frame in frames[:-4:-1])


def run(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as places:
        child = os.fork()
        if child == 0:
            code = 3
            try:
                os.dup2(said.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                if request.get("mount"):
                    os.path.ismount = lambda path: os.fspath(path) == request["mount"]  # type: ignore[assignment]
                fsync = os.fsync

                def noted(file: int) -> None:
                    print(place(), file=places, flush=True)
                    if place() != request.get("skip"):
                        fsync(file)

                os.fsync = noted
                shim.crash_arm(
                    request["root"].encode(), request.get("at", 0), request.get("error", 0), request.get("log", "").encode()
                )
                code = cli.main(request["argv"])
            except BaseException:
                traceback.print_exc()
            os.write(2, f"\n{shim.crash_count()}".encode())
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        error, _, calls = said.read().rpartition("\n")
        places.seek(0)
        synced = sorted(set(places.read().splitlines()))
    return {"code": code, "error": error, "calls": int(calls) if code >= 0 else None, "places": synced}


for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
