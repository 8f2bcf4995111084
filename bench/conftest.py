"""Options, and the end of ``pytest bench/bench_<name>.py [--scale small]``: tables, and JSON after a whole full run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
from report import Row, machine, table, write


@dataclass
class Report:
    """What one bench module measured; it fills this in, ``pytest_terminal_summary`` prints it."""

    name: str
    sizes: Any
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)


REPORTS = pytest.StashKey[list[Report]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--scale", choices=("small", "full"), default="full", help="small: seconds, to see that it works")
    group.addoption("--niter", type=int, help="faiss k-means iterations at most (2 or more)")


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


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    whole = exitstatus == pytest.ExitCode.OK and not config.option.keyword and not any("::" in arg for arg in config.args)
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
        if whole and config.getoption("--scale") == "full":
            terminalreporter.write_line(f"written: {write(report.name, sizes, report.notes, report.tables).name}")
