"""A fold within a memory budget: the same bytes whatever the budget, and no more memory than it says."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, check_refused, count_reads, run_cli, tiny_checkpoint, tree, write_synthetic

from pyfold import fold_checkpoint
from pyfold.budget import PANEL, group_bytes, make_budget
from pyfold.errors import PyfoldError
from pyfold.families import family_of
from pyfold.forecast import forecast
from pyfold.io.checkpoint import open_checkpoint
from pyfold.pipeline import prepare
from pyfold.plan import make_plan

MIB = 2**20
OPTIONS = {"width": None, "layers": None, "multiple_of": None, "dtype": "keep", "max_shard_size": "5GB", "backend": "auto"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 3 x 600 x 5000 numbers: ten panels of features."""
    return write_synthetic(tmp_path_factory.mktemp("budget") / "src", 2, 600, 5000)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 3 x 2500 x 600 numbers: two panels of features, 24 MiB of G."""
    return write_synthetic(tmp_path_factory.mktemp("wide") / "src", 2, 2500, 600)


def group_bytes_of(source: Path, features: int) -> int:
    checkpoint = open_checkpoint(source)
    return group_bytes(family_of(checkpoint).fold_groups(checkpoint)[0], 450, checkpoint, features)


def least(message: str) -> int:
    return int(re.search(r"\(([\d,]+) bytes\)", message)[1].replace(",", ""))


def test_the_result_does_not_depend_on_the_budget(
    source: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyfold.pipeline.rss_bytes", lambda: 0)
    ways = set()
    for folder, steps in ((source, (0, 16)), (wide, (0, 4, 12, 20))):
        whole, name = tmp_path / f"{folder.parent.name}-whole", folder.parent.name
        fold_checkpoint(folder, whole, ratio=0.25)
        with pytest.raises(PyfoldError) as refused:
            fold_checkpoint(folder, tmp_path / "none", ratio=0.25, host_memory="1MiB")
        assert "layers.0.mlp needs at least" in str(refused.value)
        assert not (tmp_path / "none").exists()
        for more in steps:
            memory = least(str(refused.value)) + more * MIB
            cut = prepare(folder, ratio=0.25, host_memory=memory, **OPTIONS).budget.groups["layers.0.mlp"]
            ways.add((cut.strip, cut.features))
            fold_checkpoint(folder, tmp_path / f"{name}-{more}", ratio=0.25, host_memory=memory)
            assert tree(tmp_path / f"{name}-{more}") == tree(whole)
    print(sorted(ways, key=str))
    assert len({strip for strip, _ in ways if strip}) >= 2, "G in a file, in strips of several heights"
    assert len({features for strip, features in ways if not strip and features}) >= 2, "G in memory, weights in pieces"


def test_groups_are_cut_no_finer_than_needed(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    options = {"layers": None, "multiple_of": None, "dtype": "keep", "max_shard_size": "5GB", "width": None}
    plan = make_plan(checkpoint, family_of(checkpoint).fold_groups(checkpoint), ratio=0.25, **options)
    group, k = plan.groups[0]
    whole = make_budget(checkpoint, plan, 1 << 40, 0)
    assert whole.groups[group.name].features is None
    assert make_budget(checkpoint, plan, whole.peak, 0).groups[group.name].features is None
    for panels in (1, 2, 7):
        limit = group_bytes(group, k, checkpoint, panels * PANEL)
        cut = make_budget(checkpoint, plan, limit, 0)
        assert cut.groups[group.name].features == panels * PANEL
        assert cut.peak == limit
    with pytest.raises(PyfoldError, match="needs at least"):
        make_budget(checkpoint, plan, make_budget(checkpoint, plan, limit, 0).peak // 4, 0)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer has 86 MiB of weights, 34 of G."""
    return write_synthetic(tmp_path_factory.mktemp("large") / "src", 2, 3000, 2500)


@pytest.mark.parametrize("repair", ["none", "variance"])
def test_a_run_keeps_to_its_budget(large: Path, tmp_path: Path, repair: str) -> None:
    """VmHWM of the process, interpreter and imports included; and the kernel gives it no more data than that."""
    how = ["--ratio", "0.2", "--repair", repair]
    refused = run_cli("fold", large, tmp_path / "dst", *how, "--host-memory", "10MiB")
    check_refused(refused.returncode, refused.stderr, ["host_memory", "layers.0.mlp needs at least"])
    limit = least(refused.stderr) + 4 * MIB
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    peaks = {}
    for name, options in {"whole": [], "least": ["--host-memory", str(limit)]}.items():

        def limited(limit: int = limit if options else resource.RLIM_INFINITY) -> None:
            resource.setrlimit(resource.RLIMIT_STACK, (MIB, MIB))  # of a thread: all of it counts as data, touched or not
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

        done = run_cli("fold", large, tmp_path / name, *how, "--json", *options, env=environment, preexec_fn=limited)
        assert done.returncode == 0, done.stderr
        peaks[name] = json.loads(done.stdout)["peak_rss_bytes"]
    print(f"VmHWM: {peaks['whole'] / MIB:.0f} MiB without a budget, {peaks['least'] / MIB:.0f} of {limit / MIB:.0f} with one")
    assert peaks["least"] <= limit < peaks["whole"]
    assert tree(tmp_path / "least") == tree(tmp_path / "whole")


@pytest.mark.parametrize("host_memory", [None, "400MiB"])
def test_a_plan_says_what_the_fold_takes(large: Path, tmp_path: Path, host_memory: str | None) -> None:
    options = ["--ratio", "0.2", "--json"] + (["--host-memory", host_memory] if host_memory else [])
    plan = run_cli("plan", large, tmp_path / "dst", *options)
    assert plan.returncode == 0, plan.stderr
    assert not (tmp_path / "dst").exists()
    planned = json.loads(plan.stdout)
    fold = run_cli("fold", large, tmp_path / "dst", *options)
    assert fold.returncode == 0, fold.stderr
    took = json.loads(fold.stdout)
    print(f"peak {took['peak_rss_bytes'] / MIB:.0f} MiB of {planned['peak'] / MIB:.0f} planned; seconds "
          f"{took['seconds']:.2f} of {planned['seconds']:.2f}")  # fmt: skip
    assert 0.85 * planned["peak"] <= took["peak_rss_bytes"] <= planned["peak"]
    assert planned["bytes_written"] == took["bytes_after"]
    assert planned["flops"] == 2 * 3 * 3000**2 * 2500
    assert [(group["name"], group["folded_width"]) for group in planned["groups"]] == [
        (group["name"], group["folded_width"]) for group in took["groups"]
    ]


def test_a_plan_counts_every_byte_that_is_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = count_reads(source, monkeypatch)
    monkeypatch.setattr("pyfold.pipeline.rss_bytes", lambda: 0)
    for memory in (None, group_bytes_of(source, 3 * PANEL)):
        prepared = prepare(source, ratio=0.25, host_memory=memory, **OPTIONS)
        planned = forecast(prepared)
        read.clear()
        fold_checkpoint(source, tmp_path / str(memory), ratio=0.25, host_memory=memory)
        assert sum(read) == planned.bytes_read
    assert planned.bytes_read > 2 * prepared.checkpoint.nbytes, "cut weights are read more than once"


def test_a_plan_is_read_by_people(source: Path, tmp_path: Path) -> None:
    done = run_cli("plan", source, "--ratio", "0.25")
    assert done.returncode == 0, done.stderr
    assert re.search(r"layers\.0\.mlp to layers\.1\.mlp +600 +450 +whole +whole", done.stdout)
    assert re.search(r"seconds +\d+\.\d, limited by (computing|reading and writing|hashing)", done.stdout)
    assert re.search(r"disk +[\d,]+ bytes needed, [\d,]+ free", done.stdout)
    refused = run_cli("plan", source, "--ratio", "0.25", "--host-memory", "1MiB")
    check_refused(refused.returncode, refused.stderr, ["host_memory", "needs at least"])
    refused = run_cli("plan", tmp_path / "absent")
    check_refused(refused.returncode, refused.stderr, ["absent", "no such folder"])


def test_bad_sizes(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "src")
    for size in ("lots", "0", "-1GiB"):
        with pytest.raises(PyfoldError, match="host_memory: expected"):
            fold_checkpoint(source, tmp_path / "dst", ratio=0.25, host_memory=size)


def test_a_run_killed_beside_its_gram_file_leaves_none_and_goes_on(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path / "src", 3, 6000, 600)
    refused = run_cli("fold", folder, tmp_path / "dst", "--ratio", "0.25", "--host-memory", "10MiB")
    options = ["--ratio", "0.25", "--host-memory", str(least(refused.stderr) + 8 * MIB)]
    command = [sys.executable, "-m", "pyfold", "fold", str(folder), str(tmp_path / "dst"), *options]
    process = subprocess.Popen(command, cwd=ROOT)
    partial = tmp_path / "dst.pyfold-partial"
    while not (partial / "journal").exists() or (partial / "journal").read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert list((partial / "scratch").iterdir()) == []
    assert run_cli(*command[3:]).returncode == 0
    assert run_cli("fold", folder, tmp_path / "whole", "--ratio", "0.25").returncode == 0
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dst", "src", "whole"]


def test_a_gram_matrix_beyond_the_disk_is_refused(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyfold.pipeline.rss_bytes", lambda: 0)
    with pytest.raises(PyfoldError) as refused:
        fold_checkpoint(wide, tmp_path / "dst", ratio=0.25, host_memory="1MiB")
    budget = prepare(wide, ratio=0.25, host_memory=least(str(refused.value)), **OPTIONS).budget
    assert budget.spilled == 4 * 3072 * (2 * 2500 - 1875), "rows of whole pages: G, and one for each join"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=budget.spilled))
    with pytest.raises(OSError, match=r"the fold needs [\d,]+ bytes and [\d,]+ are free"):
        fold_checkpoint(wide, tmp_path / "dst", ratio=0.25, host_memory=least(str(refused.value)))
    assert not list(tmp_path.iterdir())


def test_the_reference_needs_its_gram_matrix_in_memory(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyfold.pipeline.rss_bytes", lambda: 0)
    needs = {}
    for backend in ("auto", "reference"):
        with pytest.raises(PyfoldError) as refused:
            fold_checkpoint(wide, tmp_path / "dst", ratio=0.25, host_memory="1MiB", backend=backend)
        needs[backend] = least(str(refused.value))
    assert needs["auto"] < needs["reference"]
