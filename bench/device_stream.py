"""Folds through 1 GiB of a GPU's memory, beside a copy of as many bytes on the same way: read, up, down, write, fsync.

A stage of ``bench/device.py``. Both are processes that open the device themselves, from a cold page cache, timed to their end;
the copy computes nothing, hashes included, and the faster of two counts, one before and one after the fold. Checkpoints are
made in the folder for temporary files, up to 8 GB at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import torch
from device_stages import ROOT, Row, row
from device_stages import partial as partial_file

GPU_MEMORY = "1GiB"
CHECKPOINTS = {"llama-7b, 8 layers": ["llama-7b", "--layers", "8"], "llama-70b, 1 layer": ["llama-70b-1layer"]}
ASKED = 1.3  # times the copy


def stream(out: Path) -> list[Row]:
    from conftest import evict

    from pyfold.plan import parse_size

    rows: list[Row] = []
    for case, preset in CHECKPOINTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            source, folded, copied = (Path(scratch, name) for name in ("source", "folded", "copied"))
            run(ROOT / "bench" / "make_checkpoint.py", source, "--preset", *preset)
            files = sorted(source.glob("*.safetensors"))
            options = ["--ratio", 0.2, "--device", "cuda", "--gpu-memory", GPU_MEMORY, "--json"]
            n_bytes = json.loads(run("-m", "pyfold", "plan", source, *options)[0])["bytes_written"]
            copying, folding = (__file__, source, copied, n_bytes), ("-m", "pyfold", "fold", source, folded, *options)
            times: dict[tuple[Any, ...], float] = {}
            printed: dict[tuple[Any, ...], str] = {}
            for command in (copying, folding, copying):
                copied.unlink(missing_ok=True)
                evict(files)
                printed[command], took = run(*command)
                times[command] = min(took, times.get(command, took))
            seconds, fastest = times[folding], times[copying]
        fold = json.loads(printed[folding])
        gpu, mib = fold["gpu"], 2**20
        if gpu["peak"] > parse_size(GPU_MEMORY):
            raise RuntimeError(f"{case}: {gpu['peak']:,} bytes on the GPU, asked {GPU_MEMORY}")
        note = (
            f"{seconds / fastest:.2f} x the copy, asked {ASKED}; GPU {gpu['peak'] / mib:.0f} MiB, "
            f"{gpu['planned'] / mib:.0f} planned, beside {gpu['held'] / mib:.0f}; host {fold['peak_rss_bytes'] / mib:.0f} MiB"
        )
        moved = fold["bytes_before"] + fold["bytes_after"]
        rows.append(row(case, seconds, moved=moved, contender="copy", contender_s=fastest, note=note))
        partial_file(out, "stream").write_text(json.dumps(rows))
    return rows


def run(*command: Any) -> tuple[str, float]:
    """What a process prints, and the seconds to its end."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout, time.perf_counter() - started


def copy(source: Path, target: Path, n_bytes: int) -> None:
    """Every tensor of a checkpoint to the GPU, and so many bytes of them, evenly spread, back and into a file."""
    from pyfold.io.checkpoint import open_checkpoint
    from pyfold.io.flow import Ahead, Behind
    from pyfold.io.safetensors import Reader, Shard
    from pyfold.memory import Pool
    from pyfold.reads import PIECE, copy_reads
    from pyfold.streams import Event, open_device

    checkpoint, gpu = open_checkpoint(source), open_device("cuda")
    assert gpu
    shard = Shard(target, {"all": ("U8", (n_bytes,))})
    buffers: deque[tuple[torch.Tensor, tuple[Event, ...]]] = deque((gpu.empty((PIECE,), torch.uint8), ()) for _ in range(4))
    going_up: deque[tuple[torch.Tensor, Event]] = deque()
    # Four pieces are read ahead, three go up, four wait to be written, and one is in hand at each end of that.
    with Pool(16 * PIECE, gpu.pin, gpu.unpin) as pool, Reader(pool) as reader, Behind() as behind:

        def write(block: torch.Tensor, ready: Event, at: int) -> None:
            ready.synchronize()
            shard.write("all", block, at)
            pool.give_back(block)

        pieces = [read for info in checkpoint.tensors.values() for read in copy_reads(info)]
        reads = ((p.nbytes, partial(reader.block, p.info, p.rows, p.columns, p.width)) for p in pieces)
        with Ahead(reads, 4 * PIECE) as ahead:
            read = written = 0
            for _ in pieces:
                values = ahead.take().view(torch.uint8).view(1, -1)
                read += values.nbytes
                due = n_bytes * read // checkpoint.nbytes - written
                buffer, free = buffers.popleft()
                there = buffer[: values.nbytes].view(1, -1)
                up = gpu.up.put(partial(gpu.copy, there, values), *free)
                block = pool.empty((1, PIECE), torch.uint8)[:, :due]  # all of a size, so that any is used again
                down = gpu.down.put(partial(gpu.copy, block, there[:, :due]), up)
                buffers.append((buffer, (down,)))
                behind.put(due, partial(write, block, down, written))
                written += due
                going_up.append((values, up))
                if len(going_up) > 2:
                    values, up = going_up.popleft()
                    up.synchronize()
                    pool.give_back(values)
                behind.wait(4 * PIECE)
        behind.wait(0)
        for values, _ in going_up:
            pool.give_back(values)
    shard.sync()
    shard.close()


if __name__ == "__main__":
    copy(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
