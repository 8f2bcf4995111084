"""A contender's name, its memory limit and files -> every tensor of them in CPU memory, once; seconds and a checksum.

``python bench/readers.py CONTENDER LIMIT RESULT FILE...`` is one process, so that the kernel's peak is the contender's own.
All tensors get the same touch, a sum of their bytes as int64, on one thread: it reads every byte, and the total, which no order
changes, must be the same for all. A contender may hold ``LIMIT`` bytes of tensors, and twice as many where it reads ahead.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyfold.budget import PANEL
from pyfold.io.safetensors import ITEM_SIZE, Reader, TensorInfo, read_header
from pyfold.memory import Pool

BUFFER = 1 << 24  # bytes of the plain readv's


class Contender(NamedTuple):
    """How a library is used: ``read(files, limit)`` yields tensors, each valid until the next; its module, to be imported."""

    module: str
    how: str
    read: Callable[[list[Path], int], Iterator[Tensor]]


def readv(files: list[Path], limit: int) -> Iterator[Tensor]:
    buffer = memoryview(bytearray(min(BUFFER, limit)))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while os.readv(file.fileno(), [buffer]):
                pass
    yield from ()


def pyfold_read(files: list[Path], limit: int) -> Iterator[Tensor]:
    with Pool(limit) as pool, Reader(pool) as reader:
        for info in _tensors(files):
            tensor = _whole(reader, info)
            yield tensor
            pool.give_back(tensor)


def pyfold_ahead(files: list[Path], limit: int) -> Iterator[Tensor]:
    with Pool(2 * limit) as pool, Reader(pool) as reader, ThreadPoolExecutor(1) as thread:
        following = None
        for info in [*_tensors(files), None]:
            ready, following = following, info and thread.submit(_whole, reader, info)
            if ready:
                tensor = ready.result()
                yield tensor
                pool.give_back(tensor)


def _whole(reader: Reader, info: TensorInfo) -> Tensor:
    width = info.shape[-1]
    return reader.block(info, range(info.n_parameters // width), range(width), width)


def pyfold_chunks(files: list[Path], limit: int) -> Iterator[Tensor]:
    with Reader() as reader:
        for info in _tensors(files):
            for _, piece in reader.chunks(info):
                yield piece


def pyfold_columns(files: list[Path], limit: int) -> Iterator[Tensor]:
    with Reader() as reader:
        for info, begin, end in _panels(files):
            yield reader.block(info, range(info.shape[0]), range(begin, end), info.shape[1])


def safe_open(files: list[Path], limit: int) -> Iterator[Tensor]:
    import safetensors

    for path in files:
        with safetensors.safe_open(path, "pt") as file:
            for name in file.offset_keys():
                yield file.get_tensor(name)


def safe_open_columns(files: list[Path], limit: int) -> Iterator[Tensor]:
    import safetensors

    opened = {path: safetensors.safe_open(path, "pt") for path in files}
    for info, begin, end in _panels(files):
        yield opened[info.path].get_slice(info.name)[:, begin:end]


def fastsafetensors(queue_size: int, direct: bool) -> Callable[[list[Path], int], Iterator[Tensor]]:
    """``queue_size`` -1 reads a batch when the one before is done with, 0 while it is in use."""

    def read(files: list[Path], limit: int) -> Iterator[Tensor]:
        from fastsafetensors import ParallelLoader

        os.environ["FASTSAFETENSORS_ODIRECT"] = str(int(direct))
        loader = ParallelLoader(
            None,
            [str(path) for path in files],
            device="cpu",
            nogds=True,
            queue_size=queue_size,
            max_batch_bytes=limit,
            accumulate_resident=False,
            borrowed_tensors=True,
            use_tqdm_on_load=False,
        )
        with closing(loader), closing(loader.iterate_weights()) as weights:
            for _, tensor in weights:
                yield tensor

    return read


def runai(buffers: int, strategy: str | None = None) -> Callable[[list[Path], int], Iterator[Tensor]]:
    def read(files: list[Path], limit: int) -> Iterator[Tensor]:
        from runai_model_streamer import SafetensorsStreamer

        _limit_runai(buffers * limit, strategy)
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in files], owned=False)
            for _, tensor in streamer.get_tensors():
                yield tensor

    return read


def runai_columns(files: list[Path], limit: int) -> Iterator[Tensor]:
    from runai_model_streamer.file_streamer import FileChunks, FileStreamer

    _limit_runai(limit, None)
    with FileStreamer() as streamer:
        for info, begin, end in _panels(files):
            rows, width = info.shape
            item = ITEM_SIZE[info.dtype]
            offsets = [info.begin + (row * width + begin) * item for row in range(rows)]
            part = torch.empty((rows, (end - begin) * item), dtype=torch.uint8)
            streamer.stream_files([FileChunks(0, str(info.path), offsets, [part.shape[1]] * rows)], owned=False)
            for _, row, data in streamer.get_chunks():
                part[row] = data
            yield part


def _limit_runai(limit: int, strategy: str | None) -> None:
    os.environ["RUNAI_STREAMER_MEMORY_LIMIT"] = str(limit)
    if strategy:
        os.environ["RUNAI_STREAMER_FS_STRATEGY"] = strategy


def _tensors(files: list[Path]) -> Iterator[TensorInfo]:
    for path in files:
        yield from read_header(path).values()


def _panels(files: list[Path]) -> Iterator[tuple[TensorInfo, int, int]]:
    """Two gate_proj in panels as narrow as the tightest budget cuts them."""
    for info in islice((info for info in _tensors(files) if info.name.endswith("gate_proj.weight")), 2):
        for begin in range(0, info.shape[1], PANEL):
            yield info, begin, min(info.shape[1], begin + PANEL)


ROOF = "readv"
TENSORS = {
    ROOF: Contender("os", "into one buffer of 16 MiB, not touched", readv),
    "pyfold": Contender("pyfold", "Reader.block, each tensor into memory that is used again, as folding does", pyfold_read),
    "pyfold, ahead": Contender("pyfold", "the same, the next tensor in a thread", pyfold_ahead),
    "pyfold, pieces": Contender("pyfold", "Reader.chunks, pieces of 16 MiB in one buffer", pyfold_chunks),
    "safetensors": Contender("safetensors", "safe_open, get_tensor: mapped, no limit", safe_open),
    "fastsafetensors": Contender(
        "fastsafetensors", "ParallelLoader, nogds, max_batch_bytes, queue_size -1, borrowed tensors", fastsafetensors(-1, True)
    ),
    "fastsafetensors, ahead": Contender("fastsafetensors", "the same, queue_size 0", fastsafetensors(0, True)),
    "fastsafetensors, ahead, cached": Contender(
        "fastsafetensors", "the same, FASTSAFETENSORS_ODIRECT=0", fastsafetensors(0, False)
    ),
    "runai": Contender("runai_model_streamer", "SafetensorsStreamer, a memory limit for one buffer, not owned", runai(1)),
    "runai, ahead": Contender("runai_model_streamer", "the same, a limit for two", runai(2)),
    "runai, ahead, cached": Contender(
        "runai_model_streamer", "the same, RUNAI_STREAMER_FS_STRATEGY=io_uring_buffered", runai(2, "io_uring_buffered")
    ),
}
COLUMNS = {
    "pyfold, columns": Contender("pyfold", "Reader.block", pyfold_columns),
    "safetensors, columns": Contender("safetensors", "safe_open, get_slice", safe_open_columns),
    "runai, columns": Contender("runai_model_streamer", "FileStreamer, a range for each row of a panel", runai_columns),
}


def main() -> None:
    name, limit, result, *files = sys.argv[1:]
    contender = (TENSORS | COLUMNS)[name]
    torch.set_num_threads(1)
    try:
        import_module(contender.module)
        imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        total = n_bytes = 0
        started, cpu = time.perf_counter(), time.process_time()
        for tensor in contender.read([Path(file) for file in files], int(limit)):
            total += int(tensor.reshape(-1).view(torch.int64).sum())
            n_bytes += tensor.nbytes
            del tensor  # or it lives while the next is read
        found = {
            "seconds": time.perf_counter() - started,
            "cpu": time.process_time() - cpu,
            "imports": imports,
            "n_bytes": n_bytes,
            "checksum": total % 2**64,
        }
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
