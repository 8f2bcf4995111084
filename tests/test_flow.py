"""Reading ahead and writing behind: order, bounds, failures; and that a fold really overlaps them with computing."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import run_cli, tree, write_synthetic

import pyfold
from pyfold.io.flow import Ahead, Behind

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
