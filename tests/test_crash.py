"""A fold stopped anywhere: killed at any write, failing at any call, losing power. Repeating the command gives the same bytes.

The runs are real ones under a preloaded shim (crash/shim.c). Losing power is a model of the disk (crash/disk.py) fed with the
log of a real run. ``PYFOLD_CRASHES=N`` tries N points of each kind instead of a few; 0 tries all.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, load, tiny_checkpoint, tree
from crash.disk import Disk, read_log

from pyfold.io.checkpoint import INDEX

CRASH = Path(__file__).parent / "crash"
WAYS = ("new", "overwrite", "mount")
KILLED = -9
Server = Callable[..., dict[str, Any]]


def points(n_calls: int, few: int, seed: int) -> list[int]:
    """Calls of a run at which to stop it: the first, the last and some of the others."""
    n = int(os.environ.get("PYFOLD_CRASHES", few)) or n_calls
    between = range(2, n_calls)
    return sorted({1, n_calls, *random.Random(seed).sample(between, min(n, len(between)))})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "a C compiler"
    shim = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", CRASH / "shim.c", "-o", shim, "-ldl"], check=True)
    process = subprocess.Popen(
        [sys.executable, CRASH / "server.py"],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout

    def ask(**request: Any) -> dict[str, Any]:
        print(json.dumps(request), file=process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        assert "Traceback" not in answer["error"], answer["error"]
        return answer

    yield ask
    process.stdin.close()
    assert process.wait() == 0


class Case:
    """One way of folding a tiny model, what must come out, and what may be there before."""

    def __init__(self, way: str, folder: Path, server: Server) -> None:
        self.way, self.server = way, server
        self.source = tiny_checkpoint(folder / "src", n_layers=2, width=24)
        self.old = tiny_checkpoint(folder / "old", "qwen2", n_layers=1, width=16) if way == "overwrite" else None
        self.root = folder / "root"
        self.dst = self.root / "dst"
        self.start()
        answer = self.fold()
        assert answer["code"] == 0, answer
        self.expected, self.n_calls = tree(self.dst), answer["calls"]
        self.before = tree(self.old) if self.old else {}

    def start(self, root: Path | None = None) -> None:
        """The folder as it is before the first run."""
        shutil.rmtree(self.root, ignore_errors=True)
        if root:
            root.rename(self.root)
            return
        self.root.mkdir()
        if self.way == "mount":
            self.dst.mkdir()
        if self.old:
            shutil.copytree(self.old, self.dst)

    def fold(self, **orders: Any) -> dict[str, Any]:
        argv = ["fold", str(self.source), str(self.dst), "--ratio", "0.25", "--max-shard-size", "8KB"]
        argv += ["--overwrite"] if self.old else []
        mount = str(self.dst) if self.way == "mount" else None
        return self.server(argv=argv, root=str(self.root), mount=mount, **orders)

    def check_nothing_wrong_loads(self) -> None:
        """What a loader would open is the whole result, or the whole old one."""
        assert not (self.dst / "config.json").exists() or self.result() in (self.expected, self.before)

    def check_goes_on(self) -> None:
        """The same command completes the result, or finds it complete."""
        answer = self.fold()
        if answer["code"] != 0:
            assert answer["code"] == 2
            assert "not empty" in answer["error"]
        assert self.result() == self.expected

    def result(self) -> dict[str, str]:
        return {name: digest for name, digest in tree(self.dst).items() if not name.startswith(".pyfold-partial")}


@pytest.fixture(scope="module", params=WAYS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: Server) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param), server)


def test_killed_at_any_call(case: Case) -> None:
    for at in points(case.n_calls, few=12, seed=1):
        case.start()
        assert case.fold(at=at, error=-1)["code"] == KILLED
        case.check_nothing_wrong_loads()
        if at % 3 == 0:  # and the next one too
            case.fold(at=at // 2, error=-1)
            case.check_nothing_wrong_loads()
        case.check_goes_on()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_any_call_fails(case: Case, error: int) -> None:
    for at in points(case.n_calls, few=12, seed=error):
        case.start()
        answer = case.fold(at=at, error=error)
        assert answer["code"] in (0, 1), "0: a call whose failure does not matter"
        assert answer["code"] == 0 or answer["error"].count("\n") == 1
        case.check_nothing_wrong_loads()
        case.check_goes_on()


def renumber(case: Case, inodes: dict[int, int]) -> None:
    """The journal names the folder of the result by its inode, which a restored disk has another of."""
    for journal in case.root.rglob("journal"):
        lines = []
        for line in journal.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line.partition(b" ")[2])
                if "commit" in entry:
                    entry["commit"]["inode"] = inodes.get(entry["commit"]["inode"], 0)
                    blob = json.dumps(entry, separators=(",", ":")).encode()
                    line = b"%08x %s\n" % (zlib.crc32(blob), blob)
            except ValueError:
                pass
            lines.append(line)
        journal.write_bytes(b"".join(lines))


def lines_of_journal(case: Case) -> int:
    """Of the one that the next run finds."""
    folder = case.dst / ".pyfold-partial" if case.way == "mount" else case.root / "dst.pyfold-partial"
    return (folder / "journal").read_bytes().count(b"\n") if (folder / "journal").exists() else 0


def nothing(n: int) -> bool:
    return False


def everything(n: int) -> bool:
    return True


def all_but_the_first(n: int) -> bool:
    return n > 0


def some(seed: int) -> Callable[[int], bool]:
    rng = random.Random(seed)
    return lambda n: rng.random() < 0.5


def lose_power(case: Case, tmp_path: Path, few: int, skip: str = "") -> None:
    """After some prefixes of a run, with some of what was not synced: nothing wrong loads, nothing finished is lost."""
    case.start()
    disk = Disk(case.root)
    disk.adopt()
    log = tmp_path / "log"
    assert case.fold(log=str(log), skip=skip)["code"] == 0
    calls = read_log(log)
    stops = {*points(len(calls), few, seed=3), *(i for i, call in enumerate(calls, 1) if call.what in ("rename", "exchange"))}
    journal = next(call.inode for call in calls if call.paths and call.paths[0].endswith("/journal"))
    for i, call in enumerate(calls, 1):
        disk.call(call)
        if i not in stops:
            continue
        appended = sum(call.what == "write" and call.inode == journal for call in calls[: i - 1])
        for kept in (nothing, everything, all_but_the_first, some(i)):
            root = tmp_path / "restored"
            root.mkdir()
            disk.restore(root, kept)
            case.start(root)
            renumber(case, disk.renumbered)
            case.check_nothing_wrong_loads()
            all_there = appended < 2 or lines_of_journal(case) >= appended or case.result() == case.expected
            assert all_there, f"after call {i} of {len(calls)} a line of the journal is lost"
            case.check_goes_on()


def test_power_is_lost(case: Case, tmp_path: Path) -> None:
    lose_power(case, tmp_path, few=8)


def test_no_fsync_is_idle(server: Server, tmp_path: Path) -> None:
    """Without any one of them, some loss of power does harm, in one of the ways."""
    idle, needed = set(), set()
    for way in WAYS:
        case = Case(way, tmp_path / way, server)
        case.start()
        for place in set(case.fold()["places"]) - needed:
            try:
                lose_power(case, tmp_path, few=8, skip=place)
                idle.add(place)
            except AssertionError:
                needed.add(place)
    assert len(needed) >= 8
    assert not idle - needed


def test_the_result_loads(case: Case) -> None:
    case.start()
    case.fold()
    load(case.dst)
    assert (case.dst / INDEX).exists(), "several shards"
