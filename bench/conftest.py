"""Options, the rows to fold, and the end of every ``pytest bench/bench_<name>.py``: tables, JSON after a whole full run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import child
import pytest
from report import Row, machine, table, write
from rows import KINDS, make_rows
from torch import Tensor


@dataclass
class Report:
    """What one bench module measured; it fills this in, ``pytest_terminal_summary`` prints it.

    ``complete``: to be written though only some of the module's tests were selected."""

    name: str
    sizes: Any
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    complete: bool = False


@dataclass(frozen=True)
class Problem:
    """Rows to fold into K clusters."""

    kind: str
    n_clusters: int
    x: Tensor


MAKE = Path(__file__).with_name("make_checkpoint.py")
REPORTS = pytest.StashKey[list[Report]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--scale", choices=("small", "full"), default="full", help="small: seconds, to see that it works")
    group.addoption("--cache", default=".cache", metavar="DIR", help="where checkpoints are made and kept")
    group.addoption("--text", metavar="FILE", help="quality, heads: WikiText-2's raw test file")
    group.addoption("--data", metavar="DIR", help="cnn: CIFAR-10 checkpoints and images")
    group.addoption("--layers", type=int, metavar="N", help="stream, reader: a checkpoint of N layers; its JSON is not written")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # pyproject.toml switches benchmarks off for the test suite; the tables below replace the plugin's own.
    config.option.benchmark_enable = True
    config.option.benchmark_quiet = True
    config.stash[REPORTS] = []


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Report:
    """The module's report, for its ``SIZES`` at the scale asked for."""
    name = request.module.__name__.removeprefix("bench_")
    made = Report(name, request.module.SIZES[request.config.getoption("--scale")])
    request.config.stash[REPORTS].append(made)
    return made


FOLDS = [(kind, kept) for kind in KINDS for kept in (0, 1)]


@pytest.fixture(scope="module", params=FOLDS, ids=[f"{kind}-{('fold50', 'fold20')[kept]}" for kind, kept in FOLDS])
def problem(request: pytest.FixtureRequest, report: Report) -> Problem:
    """Each kind of rows with each K of a module's sizes; module scope, so one is in memory at a time."""
    kind, kept = request.param
    n_clusters = report.sizes.n_clusters[kept]
    return Problem(kind, n_clusters, make_rows(kind, report.sizes.n, report.sizes.d, n_clusters))


@pytest.fixture(scope="module")
def source(report: Report, request: pytest.FixtureRequest) -> Path:
    """The checkpoint, made once and kept; where it is made, what that took becomes a note."""
    if layers := request.config.getoption("--layers"):
        report.sizes = replace(report.sizes, layers=layers)
    sizes = report.sizes
    folder = Path(request.config.getoption("--cache")) / f"{sizes.preset}-{sizes.layers}-layers"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = child.run([sys.executable, MAKE, "--preset", sizes.preset, "--layers", sizes.layers, folder])
        assert made.returncode == 0
        report.notes.append(f"Checkpoint made in {made.seconds:.0f} s, peak memory {made.peak_rss / 2**20:.0f} MiB.")
    return folder


def evict(files: Iterable[Path]) -> None:
    """Out of the page cache: dirty pages would stay."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    selected = config.option.keyword or config.option.layers or any("::" in arg for arg in config.args)
    whole = exitstatus == pytest.ExitCode.OK and not selected
    for report in config.stash[REPORTS]:
        terminalreporter.section(f"{report.name}, {config.getoption('--scale')} scale")
        sizes = asdict(report.sizes)
        for facts in (machine(), sizes):
            terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in facts.items()))
        for title, rows in report.tables.items():
            terminalreporter.write_line(f"\n{title}")
            for line in table(rows):
                terminalreporter.write_line(f"  {line}")
        terminalreporter.write_line("")
        for note in report.notes:
            terminalreporter.write_line(note)
        if (whole or report.complete) and report.tables and config.getoption("--scale") == "full":
            terminalreporter.write_line(f"written: {write(report.name, sizes, report.notes, report.tables).name}")
