"""The jobs of a fold as tasks on Ray: same plan, same journal, same bytes. The data goes over a file system all nodes share.

The driver keeps lock and journal; a task does one job with a reader and a writer of its own, has it on the disk, and returns
what the journal will say of it. Where a worker or its node dies, Ray runs the job again elsewhere: it writes the same bytes to
the same places. What a job raises is raised here, as it is.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from errno import ENOENT, ESTALE
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyfold import __version__, jobs, ops
from pyfold.budget import Budget, return_memory_at_once
from pyfold.errors import PyfoldError
from pyfold.io.destination import run_of
from pyfold.io.journal import Entry
from pyfold.io.output import Output
from pyfold.jobs import Finished, Job
from pyfold.plan import Plan
from pyfold.stages import Advance
from pyfold.trace import Trace

WORKER = 24 << 20  # bytes that a worker holds beside what its driver holds once Ray is imported (measured: 17 to 24 MiB)
_QUEUED = 2  # tasks for each that can run: the next is at a worker before the last is done
_RETRIES = 3  # of a job whose worker died
_LOOK = 10.0  # seconds without a result after which to see whether any node is left; and for which to wait after a failure


class _Fold(NamedTuple):
    """What all tasks of a fold have in common."""

    run: Entry | None  # its identity, as the journal says
    folder: Path  # where the result grows
    plan: Plan
    budget: Budget
    backend: str
    n_threads: int


def require_ray() -> Any:
    """The package, quiet. Raises PyfoldError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # or it prints on stdout which workers died; read when imported
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise PyfoldError(f"ray: cannot be imported ({error}); run pip install 'pyfold[ray]'") from None


def run_jobs(
    address: str | None,
    todo: list[Job],
    output: Output,
    plan: Plan,
    budget: Budget,
    backend: str,
    *,
    record: Callable[[Finished], None],
    advance: Advance,
    trace: Trace,
) -> None:
    """Do the jobs on the cluster at ``address``, in any order; otherwise as :func:`pyfold.jobs.run_jobs`.

    Raises
    ------
    MemoryError
        If no node offers what a task takes.
    OSError
        If there is no such cluster, or it is lost; and, like PyfoldError, if a job raised it.
    """
    if not todo:
        return
    ray = require_ray()
    with _connected(ray, address):
        n_cpus, n_slots = _share(ray.nodes(), len(todo), budget.peak)
        fold = ray.put(_Fold(run_of(output.folder), output.folder, plan, budget, backend, n_cpus))
        task = ray.remote(_work).options(num_cpus=n_cpus, memory=budget.peak, max_retries=_RETRIES)
        waiting, running = deque(todo), dict[Any, Job]()
        try:
            while waiting or running:
                while waiting and len(running) < _QUEUED * n_slots:
                    job = waiting.popleft()
                    running[task.remote(_absolute(job), fold)] = job
                ready, _ = ray.wait(list(running), timeout=_LOOK)
                if not ready and not _n_slots(ray.nodes(), n_cpus, budget.peak):
                    raise OSError(f"Ray: no node is left that offers a task {n_cpus} CPUs and {budget.peak >> 20} MiB")
                for done in ready:
                    job = running.pop(done)
                    entry, seconds, worker = ray.get(done)
                    record(Finished.from_dict(entry))
                    name = job.group.name if job.group else "other weights"
                    trace.ended("task", seconds, worker, group=name)
                    advance(sum(info.nbytes for info in job.tensors), name)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (PyfoldError, OSError, MemoryError)):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise OSError(f"Ray: {_first_line(error)}") from None
        except KeyboardInterrupt:
            running.clear()
            raise
        finally:
            # Not ray.cancel: where that meets a task just done, Ray 2.60 aborts this process. What is left ends with the
            # connection; but a folder that may be removed now had better not grow meanwhile.
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_LOOK)


def _work(job: Job, fold: _Fold) -> tuple[dict[str, Any], float, str]:
    """In a worker: a job's line of the journal, once it is on the disk; seconds; who did it.

    Cut off from its driver, a task may go on long after that has had the job done elsewhere, committed, or given up. It writes
    the bytes that belong there, into files of its own run: it holds that run's folder open and opens shards in it, under
    whatever name the folder goes by now, even none. It never finds a file by the path, where another run's result may grow.
    The folder is opened first and then seen to be of this run, so that it cannot be another's.
    """
    started, here = time.perf_counter(), platform.node()
    try:
        opened = os.open(fold.folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        reason = f"is not to be seen from node {here}; source and destination must lie on a file system that all nodes share"
        raise OSError(ENOENT, reason, str(fold.folder)) from None
    try:
        run = run_of(fold.folder)
        if run is None or run != fold.run:
            raise OSError(ESTALE, f"on node {here} this is not of the run that asked for it", str(fold.folder))
        if run["pyfold"] != __version__:
            raise OSError(f"Ray: node {here} has pyfold {__version__} instead of {run['pyfold']}")
        try:
            ops.resolve(fold.backend)
        except PyfoldError as error:
            raise OSError(f"Ray: node {here}: {error}") from None  # no fault of the input: what is finished stays
        return_memory_at_once()
        torch.set_num_threads(fold.n_threads)
        finished: list[Finished] = []
        with Output(fold.folder, fold.plan.tensors, fold.plan.shards, frozenset(), opened) as output:
            jobs.run_jobs(
                [job],
                output,
                fold.plan,
                fold.budget,
                fold.backend,
                record=finished.append,
                advance=lambda n_bytes, what: None,
                trace=Trace(),
            )
    finally:
        os.close(opened)
    return finished[0].to_dict(), time.perf_counter() - started, f"{here} {os.getpid()}"


def _absolute(job: Job) -> Job:
    """A worker has a working folder of its own."""
    tensors = tuple(replace(info, path=info.path.absolute()) for info in job.tensors)
    return replace(job, tensors=tensors, gain=job.gain and replace(job.gain, path=job.gain.path.absolute()))


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """A connection of this process to Ray, which the caller's own is, where there is one."""
    if ray.is_initialized():
        yield
        return
    try:
        try:
            ray.init(_resolve(address), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            where = address or os.environ.get("RAY_ADDRESS") or "this machine"
            raise ConnectionError(f"Ray: cannot connect to {where}: {_first_line(error)}") from None
        yield
    finally:
        ray.shutdown()


def _resolve(address: str | None) -> str:
    """The cluster at an address, else of RAY_ADDRESS, else that ``ray start`` noted, if it runs; else one of our own."""
    named = address or os.environ.get("RAY_ADDRESS")
    if named:
        _reach(named)
        return named
    try:
        noted = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text().strip()
        _reach(noted)
        return noted
    except OSError:
        return "local"


def _reach(address: str) -> None:
    """Raises OSError where no one listens: Ray itself would try for minutes."""
    if at := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address):
        socket.create_connection((at[1], int(at[2])), _LOOK).close()


def _share(nodes: list[dict[str, Any]], n_jobs: int, memory: int) -> tuple[int, int]:
    """CPUs of a task, and how many run at once: as many CPUs as leave no fewer tasks, for memory may be what limits these."""
    most = _n_slots(nodes, 1, memory)
    if not most:
        raise MemoryError(f"Ray: no node offers a task a CPU and {memory >> 20} MiB; --host-memory lowers that")
    n_cpus = 1
    while _n_slots(nodes, n_cpus + 1, memory) >= min(n_jobs, most):
        n_cpus += 1
    return n_cpus, _n_slots(nodes, n_cpus, memory)


def _n_slots(nodes: list[dict[str, Any]], n_cpus: int, memory: int) -> int:
    """Tasks of so many CPUs and bytes that can run at once."""
    offers = [node["Resources"] for node in nodes if node["Alive"]]
    return sum(min(int(offer.get("CPU", 0)) // n_cpus, int(offer.get("memory", 0)) // memory) for offer in offers)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
