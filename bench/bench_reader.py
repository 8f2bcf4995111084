"""pyfold's reader against the libraries that load checkpoints: seconds from a cold and a warm page cache, and peak memory.

Run by hand: ``pytest bench/bench_reader.py [--scale small] [--layers N] [--cache DIR]``. Each contender of ``readers.py`` is a
process of its own; its seconds are those from opening the files to the end of the last tensor, without imports, and its CPU
seconds those of all its threads; its peak is the kernel's figure (``child.py``), imports included. Disks are shared and answer
in bursts: every round runs all contenders in an order drawn for it, and the best of the rounds counts, with the median beside
it. A library that is not installed is left out.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import child
from conftest import Report, evict
from readers import COLUMNS, ROOF, TENSORS, Contender
from report import Row

READERS = Path(__file__).with_name("readers.py")
LIBRARIES = {
    "safetensors": "safetensors",
    "fastsafetensors": "fastsafetensors",
    "runai_model_streamer": "runai-model-streamer",
}


@dataclass(frozen=True)
class Sizes:
    """make_checkpoint.py's preset and layers; bytes of tensors that a contender may hold; rounds, of which the best counts."""

    preset: str
    layers: int
    limit: int
    rounds: int


SIZES = {
    "full": Sizes("llama-7b", layers=8, limit=300_000_000, rounds=5),
    "small": Sizes("small", layers=8, limit=20_000_000, rounds=2),
}


def test_reader(report: Report, source: Path, tmp_path: Path) -> None:
    files = sorted(source.glob("*.safetensors"))
    contenders = TENSORS | COLUMNS
    for module in LIBRARIES:
        if find_spec(module) is None:
            report.notes.append(f"{LIBRARIES[module]} is not installed: left out.")
            contenders = {name: contender for name, contender in contenders.items() if contender.module != module}
        else:
            report.notes.append(f"{LIBRARIES[module]} {version(LIBRARIES[module])}.")
    runs = _measure(report, list(contenders), files, tmp_path / "result.json")
    report.tables["every tensor, once"] = _rows(runs, TENSORS)
    report.tables["two gate_proj, in panels of 512 columns"] = _rows(runs, COLUMNS)
    report.notes += [f"{name}: {contender.how}." for name, contender in contenders.items()]
    report.notes.append(
        f"{sum(file.stat().st_size for file in files):,} bytes in {len(files)} files; imports take "
        f"{max(run['imports MiB'] for each in runs.values() for run in each):.0f} MiB of each peak."
    )
    for table in (TENSORS, COLUMNS):
        read = {(run["n_bytes"], run["checksum"]) for name in table if name != ROOF for run in runs.get(name, [])}
        assert len(read) == 1, f"not the same bytes: {read}"


Run = dict[str, float]


def _measure(report: Report, names: list[str], files: list[Path], result: Path) -> dict[str, list[Run]]:
    """What each contender took in each round. One that fails is out, and its error becomes a note."""
    runs: dict[str, list[Run]] = defaultdict(list)
    failed = set()
    for turn in range(report.sizes.rounds):
        for name in random.Random(turn).sample(names, len(names)):
            if name in failed:
                continue
            run: Run = {}
            for cache in ("cold", "warm"):
                (evict if cache == "cold" else _fill)(files)
                used = child.run([sys.executable, READERS, name, report.sizes.limit, result, *files])
                found = json.loads(result.read_text()) if used.returncode == 0 else {"error": f"exit code {used.returncode}"}
                if "error" in found:
                    report.notes.append(f"{name} failed: {found['error']}.")
                    failed.add(name)
                    break
                run[cache] = found["seconds"]
                run[f"{cache} cpu"] = found["cpu"]
                run[f"{cache} disk GB"] = used.read / 1e9
                run["peak MiB"] = max(run.get("peak MiB", 0.0), used.peak_rss / 2**20)
                run |= {"imports MiB": found["imports"] / 2**20, "n_bytes": found["n_bytes"], "checksum": found["checksum"]}
            else:
                runs[name].append(run)
    return runs


def _fill(files: list[Path]) -> None:
    """Into the page cache, where a reader with O_DIRECT left nothing."""
    buffer = memoryview(bytearray(1 << 24))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _rows(runs: dict[str, list[Run]], contenders: dict[str, Contender]) -> list[Row]:
    measured = {name: runs[name] for name in contenders if runs.get(name)}
    rows = []
    for name, each in measured.items():
        row: Row = {"contender": name}
        for cache in ("cold", "warm"):
            best = min(run[cache] for run in each)
            n_bytes = max(run["n_bytes"] for others in measured.values() for run in others)  # readv yields no tensors
            row |= {
                f"{cache} s": best,
                f"{cache} median s": statistics.median(run[cache] for run in each),
                f"{cache} cpu s": min(run[f"{cache} cpu"] for run in each),
                f"{cache} GB/s": n_bytes / best / 1e9,
            }
            if ROOF in measured:
                row[f"{cache} x readv"] = min(run[cache] for run in measured[ROOF]) / best
        row["GB from disk, warm"] = statistics.median(run["warm disk GB"] for run in each)
        row["peak MiB"] = max(run["peak MiB"] for run in each)
        rows.append(row)
    return rows
