"""A fold as tasks on Ray, on real clusters of this machine: the same bytes, whoever dies in the middle."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import ROOT, UP, check_refused, heed_interrupts, rewrite, run_cli, tiny_checkpoint, tree, write_synthetic

from pyfold import __version__, cli, distributed, fold_checkpoint
from pyfold.io.destination import JOURNAL, PARTIAL, RESULT
from pyfold.io.journal import Journal
from pyfold.io.output import Output

if sys.version_info >= (3, 15):
    pytest.skip("Ray has no wheel for this Python", allow_module_level=True)
from ray.cluster_utils import Cluster

N_LAYERS = 6
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of it takes some tenths of a second."""
    return write_synthetic(tmp_path_factory.mktemp("ray") / "src", N_LAYERS, 1500, 1500)


@pytest.fixture(scope="module")
def expected(weights: Path) -> dict[str, str]:
    """What one process makes of it."""
    fold_checkpoint(weights, weights.parent / "dst", ratio=0.25)
    return tree(weights.parent / "dst")


def partial(dst: Path) -> Path:
    return dst.with_name(dst.name + PARTIAL)


def holds(worker: psutil.Process, result: Path) -> bool:
    """Whether a process has a shard open."""
    try:
        return any(file.path.startswith(str(result)) for file in worker.open_files())
    except psutil.Error:
        return False


def workers(node: Any) -> list[psutil.Process]:
    return psutil.Process(node.all_processes["raylet"][0].process.pid).children()


def stopped_in_a_job(nodes: list[Any], result: Path) -> psutil.Process:
    """The first worker of the nodes that is seen to hold a shard open, stopped while it does."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for worker in (worker for node in nodes for worker in workers(node) if holds(worker, result)):
            worker.suspend()
            while worker.status() != psutil.STATUS_STOPPED:
                time.sleep(0.001)
            if holds(worker, result):
                return worker
            worker.resume()
        time.sleep(0.002)
    raise AssertionError("no worker was seen in the middle of a job")


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(work)
        yield
        beside.result()


def test_a_killed_worker_is_replaced(cluster: Any, weights: Path, expected: dict[str, str], tmp_path: Path) -> None:
    dst = tmp_path / "dst"

    def kill() -> None:
        stopped_in_a_job(cluster.list_all_nodes(), partial(dst) / RESULT).kill()

    with meanwhile(kill):
        done = run_cli("fold", weights, dst, "--ratio", "0.25", "--json", f"--ray={cluster.address}")
    assert (done.returncode, done.stderr) == (0, "")
    assert [group["layer"] for group in json.loads(done.stdout)["groups"]] == list(range(N_LAYERS))
    assert tree(dst) == expected
    assert not partial(dst).exists()


def test_a_lost_node_is_done_without(cluster: Any, weights: Path, expected: dict[str, str], tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    node = cluster.add_node(**NODE)

    def lose() -> None:
        stopped_in_a_job([node], partial(dst) / RESULT)
        cluster.remove_node(node, allow_graceful=False)

    with meanwhile(lose):
        fold_checkpoint(weights, dst, ratio=0.25, ray=cluster.address)
    assert tree(dst) == expected


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_one_process_goes_on_where_the_driver_was_stopped(
    cluster: Any, weights: Path, expected: dict[str, str], tmp_path: Path, how: signal.Signals
) -> None:
    dst, trace = tmp_path / "dst", tmp_path / "trace.json"
    command = ["fold", str(weights), str(dst), "--ratio", "0.25"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "pyfold", *command, f"--ray={cluster.address}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    worker = stopped_in_a_job(cluster.list_all_nodes(), partial(dst) / RESULT)  # so that there is something left to do
    while len(Journal(partial(dst) / JOURNAL).done) < 2:  # of the second the driver may not know yet
        assert driver.poll() is None
        time.sleep(0.005)
    driver.send_signal(how)
    worker.resume()
    _, error = driver.communicate(timeout=60)
    if how == signal.SIGINT:
        assert driver.returncode == 130, error
        assert error == "pyfold: interrupted; the same command continues from here\n"
        assert not any(holds(worker, partial(dst)) for node in cluster.list_all_nodes() for worker in workers(node))
    else:
        assert driver.returncode == -how
    assert not dst.exists()
    assert cli.main([*command, "--quiet", "--trace", str(trace)]) == 0
    assert tree(dst) == expected
    folded = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "cluster"]
    assert 0 < len(folded) < N_LAYERS


def test_bad_weights_are_refused_as_by_one_process(cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_checkpoint(tmp_path / "src")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][3, 5] = float("nan")

    rewrite(source, spoil)
    command = ["fold", str(source), str(tmp_path / "dst"), "--ratio", "0.25"]
    code = cli.main(command)
    alone = capsys.readouterr().err
    check_refused(code, alone, [UP, "nan"])
    assert cli.main([*command, f"--ray={cluster.address}"]) == 2
    assert capsys.readouterr().err == alone
    assert [entry.name for entry in tmp_path.iterdir()] == ["src"]


def test_a_cluster_of_its_own_and_pure_json(source: Path, tmp_path: Path) -> None:
    command = ["fold", source, tmp_path / "dst", "--ratio", "0.25", "--layers", "1", "--max-shard-size", "9KB"]
    done = run_cli(*command, "--json", "--trace", tmp_path / "trace.json", "--ray=local")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["groups"][0]["name"] == "layers.1.mlp"
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["group"] for event in events if event["name"] == "task"} == {"layers.1.mlp", "other weights"}
    fold_checkpoint(source, tmp_path / "alone", ratio=0.25, layers="1", max_shard_size="9KB")
    assert tree(tmp_path / "dst") == tree(tmp_path / "alone")


def test_without_the_package(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code = cli.main(["fold", str(source), str(tmp_path / "dst"), "--ratio", "0.25", "--ray"])
    check_refused(code, capsys.readouterr().err, ["pip install 'pyfold[ray]'"])


def test_no_cluster(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"):
        assert cli.main(["fold", str(source), str(tmp_path / "dst"), "--ratio", "0.25", f"--ray={address}"]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"pyfold: Ray: cannot connect to {address}: ")
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_which_cluster(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert distributed._resolve(None) == "local"
    note = tmp_path / "ray" / "ray_current_cluster"
    note.parent.mkdir()
    note.write_text("127.0.0.1:1")
    assert distributed._resolve(None) == "local", "that one is dead"
    note.write_text(cluster.address)
    assert distributed._resolve(None) == cluster.address
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert distributed._resolve(None) == "local"
    assert distributed._resolve(cluster.address) == cluster.address


def test_a_task_writes_into_its_own_run_only(tmp_path: Path) -> None:
    def work(run: dict[str, Any], backend: str = "cpu") -> Any:
        return distributed._work(None, distributed._Fold(run, tmp_path / RESULT, None, None, backend, 1))  # type: ignore[arg-type]

    def begin(run: dict[str, Any]) -> None:
        (tmp_path / JOURNAL).unlink(missing_ok=True)
        journal = Journal(tmp_path / JOURNAL)
        journal.begin(run)
        journal.close()

    ours: dict[str, Any] = {"pyfold": __version__, "options": {"ratio": 0.25}}
    with pytest.raises(FileNotFoundError, match="file system that all nodes share"):
        work(ours)
    (tmp_path / RESULT).mkdir()
    with pytest.raises(OSError, match="not of the run"):
        work(ours)
    begin({**ours, "options": {"ratio": 0.5}})
    with pytest.raises(OSError, match="not of the run"):
        work(ours)
    begin(ours)
    with pytest.raises(OSError, match=f"node {platform.node()}: backend 'cpu:none'"):
        work(ours, "cpu:none")
    begin({**ours, "pyfold": "0.0.1"})
    with pytest.raises(OSError, match=f"has pyfold {__version__} instead of 0.0.1"):
        work({**ours, "pyfold": "0.0.1"})


def test_what_a_forgotten_task_writes_goes_where_its_folder_has_gone(tmp_path: Path) -> None:
    folder, shards = tmp_path / "result", {"one.safetensors": ["a"], "two.safetensors": ["b"]}
    layout: dict[str, Any] = {"a": ("F32", (2, 3)), "b": ("F32", (2, 3))}
    folder.mkdir()
    opened = os.open(folder, os.O_RDONLY)
    with Output(folder, layout, shards, frozenset(), opened) as output:
        output.write("a", torch.ones(2, 3), 0, 0, 3)
        folder.rename(tmp_path / "committed")
        folder.mkdir()  # another run's
        output.write("b", torch.ones(2, 3), 0, 0, 3)
        shutil.rmtree(tmp_path / "committed")
    assert not list(folder.iterdir())
    with Output(folder, layout, shards, frozenset(), opened) as output, pytest.raises(FileNotFoundError):
        output.write("a", torch.ones(2, 3), 0, 0, 3)
    os.close(opened)
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


def test_a_task_gets_the_cpus_that_memory_leaves_idle() -> None:
    def nodes(*offers: tuple[int, int]) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(cpus), "memory": float(memory)}} for cpus, memory in offers]

    assert distributed._share(nodes((8, 100)), 100, 10) == (1, 8)
    assert distributed._share(nodes((8, 40)), 100, 10) == (2, 4), "memory for four"
    assert distributed._share(nodes((8, 100), (8, 100)), 4, 10) == (4, 4), "work for four"
    assert distributed._share(nodes((8, 100), (2, 100)), 100, 10) == (1, 10)
    assert distributed._share(nodes((16, 100), (0, 100)), 1, 10) == (16, 1)
    dead = {**nodes((64, 1000))[0], "Alive": False}
    assert distributed._share([dead, *nodes((1, 10))], 9, 10) == (1, 1)
    with pytest.raises(MemoryError, match="--host-memory"):
        distributed._share(nodes((8, 9), (0, 100)), 1, 10)
