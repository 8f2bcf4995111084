"""Everything that needs a GPU, in one run of at most 8 minutes: build from source, test, measure, one table, one JSON file.

    python bench/device.py [--out DIR] [--stages lloyd,merge]

Needs CUDA with nvcc, torch, triton, pybind11, cmake, ninja and pytest; no network. Exit code 2 where there is no device, 1
where a stage failed. Each stage is a process with a time limit, so one that hangs loses only itself. The result is
``DIR/device-<name>.json``, by default in bench/results. Peers that are not installed are said to be absent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import device_stages
import torch
from device_function import function
from device_stages import ROOT, Row, partial, version_of
from device_stream import stream

STAGES = {**device_stages.STAGES, "stream": (200, stream), "function": (100, function)}
LIMIT = 480  # seconds for all of it


def main() -> int:
    parser = argparse.ArgumentParser(description="build, test and measure pyfold on this machine's GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the JSON file")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"some of {', '.join(STAGES)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/device.py: torch sees no CUDA device", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        rows = STAGES[options.one][1](options.out)
        partial(options.out, options.one).write_text(json.dumps(rows))
        return 0

    started, tables, failed = time.monotonic(), {}, []
    for stage in options.stages.split(","):
        partial(options.out, stage).unlink(missing_ok=True)
        left = LIMIT - (time.monotonic() - started)
        outcome = _run_stage(stage, options.out, min(STAGES[stage][0], left)) if left > 5 else "no time left"
        print(f"--- {stage}: {outcome} ({time.monotonic() - started:.0f} s)", flush=True)
        if outcome != "done":
            failed.append(f"{stage}: {outcome}")
        if partial(options.out, stage).exists():
            tables[stage] = json.loads(partial(options.out, stage).read_text())
            partial(options.out, stage).unlink()
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    content = {"machine": machine(), "failed": failed, "seconds": round(time.monotonic() - started), "tables": tables}
    path = options.out / f"device-{name}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(lines_of(tables)))
    for failure in failed:
        print(f"FAILED {failure}")
    print(path)
    return 1 if failed else 0


def machine() -> Row:
    """What the figures depend on; nothing that names the host."""
    chip = torch.cuda.get_device_properties(0)
    return {
        "device": chip.name,
        "multiprocessors": chip.multi_processor_count,
        "memory_gib": round(chip.total_memory / 2**30, 1),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{
            package: version_of(package) for package in ("torch", "triton", "flash-kmeans", "flashlib", "scipy", "scikit-learn")
        },
        "cuda": torch.version.cuda,
    }


def lines_of(tables: dict[str, list[Row]]) -> list[str]:
    """One table of all stages, numbers to 4 significant digits."""
    from report import table

    columns = ["case", "ms", "contender", "contender ms", "ratio", "TFLOP/s", "GB/s", "share of ceiling", "note"]
    rows = [{"stage": stage, **{c: row.get(c) for c in columns}} for stage, rows in tables.items() for row in rows]
    return table(rows) if rows else []


def _run_stage(stage: str, out: Path, limit: float) -> str:
    paths = [str(ROOT), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]  # the caller's may hold the peers
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, __file__, "--one", stage, "--out", str(out.resolve())]
    # A session of its own, so that what the stage started ends with it.
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {limit:.0f} s"
    return "done" if code == 0 else f"exit code {code}"


if __name__ == "__main__":
    raise SystemExit(main())
