"""A Gram matrix in a file gives what the same matrix in memory gives, bit for bit; and a disk that fails is an OSError."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyfold
from pyfold import ops
from pyfold.clustering import labels_of
from pyfold.ops import cpu

SIZES = [1, 2, 3, 127, 129, 700]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(kind: str, n: int, d: int = 24) -> Tensor:
    x = torch.randn(n, d, generator=generator(n))
    if kind == "duplicates":  # every distance occurs many times, many are 0
        return torch.randint(-1, 2, (n, 3), generator=generator(n)).float()
    if kind == "equidistant":  # rounding alone makes a join bring others nearer, for which Ward has a rule
        return torch.eye(n) * 0.1**0.5
    if kind == "spread":
        return x * torch.logspace(-3, 3, n)[torch.randperm(n, generator=generator(1))][:, None]
    if kind == "groups":  # clusters of more than 16, for the sums that Hartigan keeps
        return x + 3 * torch.randn(5, d, generator=generator(2))[torch.randint(5, (n,), generator=generator(3))]
    return x


def weights_for(n: int) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=generator(4)) + 0.01


@contextmanager
def filed(folder: Path, gram: Tensor, height: int = 100) -> Iterator[ops.GramFile]:
    """A matrix in a file, written in strips of so many rows."""
    n = len(gram)
    with ops.GramFile(folder, n) as file:
        for begin in range(0, n, height):
            file.write(gram[begin : begin + height, begin:].contiguous())
        yield file


def whole(file: ops.GramFile) -> Tensor:
    every = torch.arange(file.n)
    return cpu.gather(file, every, every)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_same(gram: Tensor, file: ops.GramFile, k: int, weights: Tensor | None, backend: str = "cpu") -> int:
    """Everything that the two are asked for, step by step. Returns the number of moves."""
    joins = ops.ward(gram, k, weights=weights, backend=backend)
    for a, b in zip(joins, ops.ward(file, k, weights=weights, backend=backend), strict=True):
        assert torch.equal(a, b)
    cut = labels_of(joins, len(gram))
    # From a start that Ward would not leave, too: more moves, and large clusters.
    for start in (cut, (torch.arange(len(gram)) * 7919) % k):
        if len(torch.unique(start)) < k:
            continue
        refined = ops.hartigan(gram, start, k, weights=weights, backend=backend)
        for a, b in zip(refined, ops.hartigan(file, start, k, weights=weights, backend=backend), strict=True):
            assert torch.equal(a, b)
        for labels in (start, refined[0]):
            assert ops.inertia(gram, labels, k, weights) == ops.inertia(file, labels, k, weights)
    expected = pyfold.cluster(gram=gram, n_clusters=k, weights=weights, backend=backend)
    got = pyfold.cluster(gram=file, n_clusters=k, weights=weights, backend=backend)
    assert torch.equal(got.labels, expected.labels)
    assert {**vars(got), "labels": 0} == {**vars(expected), "labels": 0}
    return len(refined[1])


@pytest.mark.parametrize("n_rows", [1, 31, 32, 33, 100, 400, 401])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_some_rows_of_gram_have_the_bits_of_all(backend: str, dtype: torch.dtype, transposed: bool, n_rows: int) -> None:
    x = torch.randn(401, 1100, generator=generator(0)).to(dtype)
    first, rest = x[:, :512], x[:, 512:]
    given = [part.T.contiguous() if transposed else part for part in (first, rest)]
    expected = ops.gram(given[0], transposed=transposed, backend=backend)
    ops.gram(given[1], out=expected, accumulate=True, transposed=transposed, backend=backend)
    for begin in (0, 1, 37, 401 - n_rows):
        if begin + n_rows > 401:
            continue
        parts = [part[:, begin:] if transposed else part[begin:] for part in given]
        strip = ops.gram(parts[0], rows=n_rows, transposed=transposed, backend=backend)
        ops.gram(parts[1], rows=n_rows, out=strip, accumulate=True, transposed=transposed, backend=backend)
        assert torch.equal(strip, expected[begin : begin + n_rows, begin:])


def test_some_rows_of_reference_gram() -> None:
    x = torch.randn(70, 30, generator=generator(0))
    torch.testing.assert_close(ops.gram(x[20:], rows=7, backend="reference"), ops.gram(x)[20:27, 20:])


@pytest.mark.parametrize("count", [0, 6, True, 2.0])
def test_rows_out_of_range_are_refused(count: object) -> None:
    with pytest.raises((ValueError, TypeError), match="rows: expected"):
        ops.gram(torch.ones(5, 3), rows=count)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"out: expected shape \(2, 5\), got \(5, 5\)"):
        ops.gram(torch.ones(5, 3), rows=2, out=torch.empty(5, 5))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("height", [1, 32, 100, 700])
def test_file_holds_the_matrix(tmp_path: Path, n: int, height: int) -> None:
    x = rows("random", n)
    gram = ops.gram(x)
    with ops.GramFile(tmp_path, n) as file:
        for begin in range(0, n, height):
            file.write(ops.gram(x[begin:], rows=min(height, n - begin)))
        assert torch.equal(whole(file), gram)
        assert torch.equal(file.diagonal(), gram.diagonal())
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1023, 1024, 5000])
@pytest.mark.parametrize("nbytes", [1, 4 * 700, 1 << 20, 1 << 40])
def test_strips_cover_the_matrix_within_their_size(n: int, nbytes: int) -> None:
    found = list(ops.strips(n, nbytes))
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == n
    assert all(4 * (end - begin) * (n - begin) <= nbytes or end - begin <= 32 for begin, end in found)


@pytest.mark.parametrize("kind", ["random", "duplicates", "equidistant", "spread", "groups"])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
def test_clusters_are_those_of_the_matrix_in_memory(tmp_path: Path, backend: str, kind: str, n: int, weighted: bool) -> None:
    weights = weights_for(n) if weighted else None
    gram = ops.gram(rows(kind, n), backend=backend)
    moves = 0
    with filed(tmp_path, gram) as file:
        for k in sorted({1, 2, 5, n // 2, 4 * n // 5, n} & set(range(1, n + 1))):
            moves += check_same(gram, file, k, weights, backend)
    assert moves > 50 or n < 700 or kind == "equidistant"


@pytest.mark.parametrize("count", [1, 2])
def test_the_number_of_threads_changes_nothing(tmp_path: Path, count: int) -> None:
    gram = ops.gram(rows("groups", 600))
    with filed(tmp_path, gram) as file, threads(count):
        assert check_same(gram, file, 60, None) > 100


def test_inertia_of_a_cluster_larger_than_a_block(tmp_path: Path) -> None:
    x = rows("random", 1300)
    gram = ops.gram(x)
    labels = (torch.arange(1300) < 1200).long()
    expected = sum(float(((part - part.mean(0)) ** 2).sum()) for part in (x[:1200].double(), x[1200:].double()))
    assert ops.inertia(gram, labels, 2) == pytest.approx(expected, rel=1e-6)
    with filed(tmp_path, gram) as file:
        assert ops.inertia(file, labels, 2) == ops.inertia(gram, labels, 2)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_exact_ties_are_broken_as_in_memory(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    n, d = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    numbers = data.draw(st.lists(st.integers(-2, 2), min_size=n * d, max_size=n * d))
    gram = ops.gram(torch.tensor(numbers).view(n, d).float())
    weights = data.draw(st.none() | st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=n, max_size=n))
    k, height = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
    with filed(tmp_path_factory.getbasetemp(), gram, height) as file:
        check_same(gram, file, k, None if weights is None else torch.tensor(weights, dtype=torch.float64))


def test_other_backends_are_refused(tmp_path: Path) -> None:
    with filed(tmp_path, ops.gram(rows("random", 9))) as file:
        for call in (
            lambda: ops.ward(file, 3, backend="reference"),
            lambda: ops.hartigan(file, torch.arange(9) % 3, 3, backend="reference"),
            lambda: pyfold.cluster(gram=file, n_clusters=3, backend="reference"),
        ):
            with pytest.raises(pyfold.errors.PyfoldError, match=r"'reference' cannot run .* in a file; use auto or cpu"):
                call()


def test_unfinished_files_and_wrong_strips_are_refused(tmp_path: Path) -> None:
    gram = ops.gram(rows("random", 9))
    with ops.GramFile(tmp_path, 9) as file:
        for strip in (gram[:3, 1:].contiguous(), gram[:3].double(), gram[:0], gram[:, :3], torch.ones(10, 9), gram[0]):
            with pytest.raises(ValueError, match=r"strip: expected contiguous float32 of shape \(R, 9\)"):
                file.write(strip)
        file.write(gram[:3])
        for call in (
            lambda: ops.ward(file, 3),
            lambda: ops.hartigan(file, torch.arange(9) % 3, 3),
            lambda: pyfold.cluster(gram=file, n_clusters=3),
        ):
            with pytest.raises(ValueError, match="expected all 9 rows in the file, got 3"):
                call()
        file.write(gram[3:, 3:].contiguous())
        with pytest.raises(ValueError, match=r"n_clusters: expected 1 to 9"):
            ops.ward(file, 10)


@pytest.mark.parametrize(("at", "value"), [((2, 5), float("nan")), ((0, 8), float("inf")), ((4, 4), -1.0), ((4, 4), 1e30)])
def test_values_are_refused_as_in_memory(tmp_path: Path, at: tuple[int, int], value: float) -> None:
    gram = ops.gram(rows("random", 9))
    gram[at] = gram[at[::-1]] = value
    messages = []
    with filed(tmp_path, gram, 3) as file:
        for given in (gram, file):
            with pytest.raises(ValueError, match="gram: expected") as caught:
                pyfold.cluster(gram=given, n_clusters=3)
            messages.append(str(caught.value))
    assert messages[0] == messages[1]


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """No file may grow beyond, which write says as it would of a full disk. (Python ignores the signal that comes with it.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_oserror(tmp_path: Path) -> None:
    gram = ops.gram(rows("random", 300))
    with pytest.raises(OSError, match="cannot write: File too large") as caught, largest_file(100_000):
        ops.GramFile(tmp_path, 300)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path))
    with ops.GramFile(tmp_path, 300) as file:
        os.ftruncate(file.fileno(), 0)
        with pytest.raises(OSError, match="cannot write: File too large") as caught, largest_file(100_000):
            file.write(gram)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path))
    with filed(tmp_path, gram) as file:
        with pytest.raises(OSError, match="cannot write: File too large") as caught, largest_file(100_000):
            ops.ward(file, 10)  # its own file
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path))
        assert torch.equal(ops.ward(file, 10).lo, ops.ward(gram, 10).lo), "nothing is broken by it"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_take_it_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        ops.GramFile(tmp_path / "absent", 5)


CALLS: dict[str, Callable[[ops.GramFile], object]] = {
    "ward": lambda file: ops.ward(file, 10),
    "hartigan": lambda file: ops.hartigan(file, torch.arange(300) % 100, 100),
    "hartigan, large clusters": lambda file: ops.hartigan(file, torch.arange(300) % 3, 3),
    "inertia": lambda file: ops.inertia(file, torch.arange(300) % 100, 100),
    "cluster": lambda file: pyfold.cluster(gram=file, n_clusters=10),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("left", [0, 1000, 4096 * 299 + 7])
def test_a_file_cut_short_is_an_oserror(tmp_path: Path, call: str, count: int, left: int) -> None:
    with filed(tmp_path, ops.gram(rows("random", 300))) as file, threads(count):
        os.ftruncate(file.fileno(), left)
        with pytest.raises(OSError, match="cannot read: Input/output error") as caught:
            CALLS[call](file)
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path))


@pytest.mark.parametrize("k", [1, 50, 240])
def test_disk_is_as_foretold(tmp_path: Path, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[int] = []
    scratch = ops.GramFile.scratch

    def recorded(self: ops.GramFile) -> object:
        files.append(os.dup((file := scratch(self)).fileno()))
        return file

    monkeypatch.setattr(ops.GramFile, "scratch", recorded)
    with filed(tmp_path, ops.gram(rows("random", 300))) as file:
        ops.ward(file, k)
    assert len(files) == 2
    taken = sum(os.fstat(file).st_blocks * 512 for file in files)
    for file in files:
        os.close(file)
    assert 300 * 4096 < taken <= ops.disk_bytes(300, k)


MEASURE = """
import ctypes, sys, torch
from pyfold import cluster, ops
from pyfold.report import peak_rss_bytes, rss_bytes

ctypes.CDLL(None).mallopt(-3, 1 << 20)  # as the command does: freed memory goes back at once
folder, n, k, strip, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
x = torch.randn(n, 600)
cluster(x[:300], n_clusters=200)  # libraries and threads are there
before = rss_bytes()
buffer = torch.empty(strip // 4)
file = ops.GramFile(folder, n)
for begin, end in ops.strips(n, strip):
    out = buffer[: (end - begin) * (n - begin)].view(end - begin, n - begin)
    file.write(ops.gram(x[begin:], rows=end - begin, out=out))
written = peak_rss_bytes() - before
del buffer, out
open('/proc/self/clear_refs', 'w').write('5')  # the peak starts anew
held = rss_bytes()
clusters = cluster(gram=file, n_clusters=k)
print(written, peak_rss_bytes() - held, clusters.n_moves)
"""


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
def test_memory_is_as_foretold(tmp_path: Path, share: float, count: int) -> None:
    """VmHWM of a process that never holds a matrix of 137 MiB."""
    n, strip = 6000, 8 << 20
    k = max(5, int(share * n))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (tmp_path, n, k, strip, count))],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    written, clustered, moves = map(int, run.stdout.split())
    print(f"written {written / 2**20:.1f} MiB, clustered {clustered / 2**20:.1f} MiB, {moves} moves")
    assert moves > 0
    assert written <= strip + (40 << 20) + (8 << 20)  # packed panels; a strip's columns turned
    assert 1 << 20 < clustered <= ops.clustering_bytes(n, k, count)
    assert max(written, clustered) < 4 * n * n // 2


def test_nothing_is_left_by_a_kill(tmp_path: Path) -> None:
    script = (
        "import sys, torch, time; from pyfold import ops; file = ops.GramFile(sys.argv[1], 2000); "
        "file.write(torch.zeros(1000, 2000)); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert list(tmp_path.iterdir()) == []
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
