"""Reading ahead and writing behind: order, bounds, failures, overlap with computing; and past the page cache."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import run_cli, tree, write_synthetic

import pyfold
from pyfold.errors import PyfoldError
from pyfold.io.flow import Ahead, Behind
from pyfold.io.safetensors import Reader, Shard, read_header
from pyfold.memory import LARGE, Pool

CAPACITIES = [0, 1, 10, 25, 1000]


class Held:
    """Bytes in existence, and the most there were."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def add(self, n_bytes: int) -> None:
        with self._lock:
            self.now += n_bytes
            self.most = max(self.most, self.now)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_ahead_keeps_order_and_bounds(capacity: int) -> None:
    held, sizes = Held(), [10, 3, 10, 1, 7, 25, 10]

    def read(i: int) -> int:
        held.add(sizes[i])
        return i

    with Ahead(((size, partial(read, i)) for i, size in enumerate(sizes)), capacity) as ahead:
        for i, size in enumerate(sizes):
            time.sleep(0.01)  # the reader gets as far as it may
            assert held.now <= max(capacity, 0)
            assert ahead.take() == i
            held.add(-size)
    assert held.most <= max(capacity, max(sizes)), "what is waited for is admitted alone"
    assert held.most >= min(capacity, sum(sizes[:3])) - max(sizes), "and room is used"


@pytest.mark.parametrize("room", CAPACITIES)
def test_behind_keeps_order_and_bounds(room: int) -> None:
    held, done = Held(), []

    def write(i: int, n_bytes: int) -> None:
        time.sleep(0.002)
        done.append(i)
        held.add(-n_bytes)

    with Behind() as behind:
        for i in range(20):
            held.add(7)
            behind.put(7, partial(write, i, 7))
            behind.wait(room)
            assert held.now <= room
        behind.put(0, partial(done.append, 20))
    assert done == list(range(21))
    assert held.most <= room + 7


def test_a_failed_read_is_raised_where_it_would_have_been_taken() -> None:
    def read(i: int) -> int:
        if i == 2:
            raise OSError("broken")
        return i

    with Ahead(((1, partial(read, i)) for i in range(5)), 100) as ahead:
        assert [ahead.take(), ahead.take()] == [0, 1]
        for _ in range(2):
            with pytest.raises(OSError, match="broken"):
                ahead.take()


def test_a_failed_write_is_raised_and_nothing_is_done_after_it() -> None:
    done = []

    def write(i: int) -> None:
        if i == 1:
            raise OSError("full")
        done.append(i)

    def put_all(behind: Behind, n: int, room: int = 100) -> None:
        for i in range(n):
            behind.put(1, partial(write, i))
            behind.wait(room)

    with pytest.raises(OSError, match="full"), Behind() as behind:
        put_all(behind, 3)
    assert done == [0]

    def lockstep() -> None:
        with Behind() as behind:
            put_all(behind, 2, room=0)
            done.append("the put of what failed raises")

    with pytest.raises(OSError, match="full"):
        lockstep()
    assert done == [0, 0]


def test_a_failure_outside_drops_what_was_not_done() -> None:
    started, go_on = threading.Event(), threading.Event()
    done = []

    def first() -> None:
        started.set()
        go_on.wait()
        done.append(0)

    def fail() -> None:
        with Behind() as behind:
            behind.put(1, first)
            behind.put(1, partial(done.append, 1))
            started.wait()
            threading.Timer(0.05, go_on.set).start()
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert done == [0]
    with pytest.raises(ValueError, match="enough"), Ahead(((1, int) for _ in range(10)), 3):
        raise ValueError("enough")
    time.sleep(0.1)
    assert threading.active_count() == before


def test_no_number_of_interrupts_leaves_a_thread_at_work() -> None:
    done: list[bool] = []

    def slow() -> None:
        for _ in range(20):
            time.sleep(0.01)
        done.append(True)

    def run() -> None:
        with Behind() as behind:
            behind.put(1, slow)
            time.sleep(0.02)  # it has begun
            for delay in (0.02, 0.06):
                threading.Timer(delay, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
        assert done == [True]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_trace_shows_that_stages_overlap(tmp_path: Path) -> None:
    source = write_synthetic(tmp_path / "src", 3, 600, 5000)
    done = run_cli("fold", source, tmp_path / "dst", "--ratio", "0.25", "--trace", tmp_path / "trace.json")
    assert done.returncode == 0, done.stderr
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {(names[event["tid"]], event["name"]) for event in events} >= {
        ("reader", "read"), ("reader", "hash"), ("compute", "gram"), ("compute", "cluster"), ("compute", "merge"),
        ("writer", "hash"), ("writer", "write"), ("writer", "sync"),
    }  # fmt: skip

    def one(name: str, layer: int) -> dict[str, float]:
        return next(event for event in events if event["name"] == name and f"layers.{layer}." in str(event["args"]))

    for layer in (0, 1):
        assert one("read", layer + 1)["ts"] < one("cluster", layer)["ts"] + one("cluster", layer)["dur"]
    pyfold.fold_checkpoint(source, tmp_path / "plain", ratio=0.25)
    assert tree(tmp_path / "plain") == tree(tmp_path / "dst")
    refused = run_cli("fold", source, tmp_path / "other", "--ratio", "0.25", "--trace", tmp_path / "no" / "trace.json")
    assert refused.returncode == 1
    assert "no/trace.json: No such file" in refused.stderr
    assert not (tmp_path / "other").exists(), "before the work, not after it"
    shard = next(source.glob("*.safetensors"))
    before = shard.read_bytes()
    refused = run_cli("fold", source, tmp_path / "other", "--ratio", "0.25", "--trace", shard)
    assert (refused.returncode, shard.read_bytes()) == (2, before)


def test_whole_tensors_go_past_the_page_cache_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any offset, any length, among tensors that share blocks of the disk with their neighbours."""
    generator = torch.Generator().manual_seed(0)
    sizes = [3, LARGE + 1, LARGE // 2, 2 * LARGE - 4097, LARGE, 5, 3 * LARGE + 4095]
    tensors = {
        f"t{i}": torch.randint(0, 256, (size, 1), generator=generator, dtype=torch.uint8) for i, size in enumerate(sizes)
    }
    shard = Shard(tmp_path / "file", {name: ("U8", tuple(tensor.shape)) for name, tensor in tensors.items()})
    direct = shard._direct
    for name in reversed(tensors):
        shard.write_block(name, tensors[name], 0, 0, 1)
    assert shard.complete
    shard.sync()
    shard.close()
    past: list[int] = []
    read = Reader._direct
    monkeypatch.setattr(
        Reader, "_direct", lambda self, path, begin, *rest: past.append(begin) or read(self, path, begin, *rest)
    )
    # Whatever the page cache holds: what it takes for missing is up to the system.
    monkeypatch.setattr(Reader, "_uncached", lambda self, path, place: self._open_direct(path) is not None)
    places = read_header(tmp_path / "file")
    pool = Pool(1 << 30)
    for make in (Reader, partial(Reader, pool)):
        with make() as reader:
            for name, tensor in tensors.items():
                values = reader.block(places[name], range(len(tensor)), range(1), 1)
                assert torch.equal(values, tensor), name
                pool.give_back(values)
    if direct is None:
        pytest.skip("this file system cannot do without the page cache")
    large = [name for name, tensor in tensors.items() if len(tensor) >= LARGE]
    assert len(past) == 2 * len(large), "every large tensor, by both readers"


def test_a_file_cut_short_under_the_reader_is_noticed(tmp_path: Path) -> None:
    shard = Shard(tmp_path / "file", {"t": ("U8", (3 * LARGE, 1))})
    shard.write_block("t", torch.zeros(3 * LARGE, 1, dtype=torch.uint8), 0, 0, 1)
    shard.sync()
    shard.close()
    place = read_header(tmp_path / "file")["t"]
    for length in (2 * LARGE, 2 * LARGE + 4096, 2 * LARGE + 5):
        os.truncate(tmp_path / "file", length)
        with (tmp_path / "file").open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with Reader() as reader, pytest.raises(PyfoldError, match="cut short while it was being read"):
            reader.block(place, range(3 * LARGE), range(1), 1)


def test_numbers_at_odd_offsets_are_read(tmp_path: Path) -> None:
    """The format does not align them."""
    values = torch.arange(LARGE, dtype=torch.float32)
    header = json.dumps(
        {
            "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "t": {"dtype": "F32", "shape": [LARGE], "data_offsets": [3, 3 + 4 * LARGE]},
        }
    ).encode()
    with (tmp_path / "file").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + b"abc" + values.numpy().tobytes())
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with Reader() as reader:
        block = reader.block(read_header(tmp_path / "file")["t"], range(LARGE), range(1), 1)
    assert torch.equal(block.flatten(), values)


def test_a_file_system_that_refuses_late_is_read_and_written_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randint(0, 256, (3 * LARGE + 77, 1), dtype=torch.uint8)
    refused: set[int] = set()

    def refuse(call: Callable[..., int]) -> Callable[..., int]:
        def refusing(file: int, *arguments: object) -> int:
            if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                refused.add(file)
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(file, *arguments)

        return refusing

    monkeypatch.setattr(os, "pwrite", refuse(os.pwrite))
    monkeypatch.setattr(os, "preadv", refuse(os.preadv))
    monkeypatch.setattr(Reader, "_uncached", lambda self, path, place: self._open_direct(path) is not None)
    shard = Shard(tmp_path / "file", {"t": ("U8", tuple(values.shape))})
    shard.write_block("t", values, 0, 0, 1)
    assert shard.complete
    shard.close()
    for pool in (None, Pool(1 << 30)):
        with Reader(pool) as reader:
            assert torch.equal(reader.block(read_header(tmp_path / "file")["t"], range(len(values)), range(1), 1), values)
    assert refused or shard._direct is None
