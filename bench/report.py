"""What a run measured -> a table on the terminal and a small JSON file: the machine, every row, losses included."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyfold
from pyfold import ops

Row = dict[str, str | float | None]
PEERS = ("scipy", "scikit-learn", "faiss-cpu", "fastkmeans", "superkmeans")
RESULTS = Path(__file__).parent / "results"


def simd_level() -> str:
    """The level of the backend that ``auto`` picks on CPU tensors: avx512, avx2, baseline, or reference."""
    return ops.resolve("auto").removeprefix("cpu:")


def machine() -> dict[str, str | int]:
    """What the numbers depend on; nothing that names the host."""
    import cpuinfo  # here: bench/device.py prints tables on machines without it

    numpy_blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    return {
        "cpu": cpuinfo.get_cpu_info()["brand_raw"],
        "cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "pyfold": f"{pyfold.__version__} {ops.resolve('auto')}",
        "torch": f"{torch.__version__} {'MKL' if torch.backends.mkl.is_available() else 'without MKL'}",
        "numpy": f"{np.__version__} {numpy_blas}",
        **{peer: found for peer in PEERS for found in [_version(peer)] if found},
    }


def _version(peer: str) -> str | None:
    """None where it is not installed: most benchmarks do without."""
    try:
        return version(peer)
    except PackageNotFoundError:
        return None


def table(rows: list[Row]) -> list[str]:
    """Lines of an aligned table; columns in order of first appearance, numbers to 4 significant digits, - where none."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = [isinstance(rows[0].get(column), str) for column in columns]
    return [
        "  ".join(c.ljust(w) if left else c.rjust(w) for c, w, left in zip(line, widths, text, strict=True)).rstrip()
        for line in cells
    ]


def write(name: str, sizes: dict[str, Any], notes: list[str], tables: dict[str, list[Row]]) -> Path:
    """``results/<name>-<level>.json``, replaced."""
    rounded = {
        title: [{key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in row.items()} for row in rows]
        for title, rows in tables.items()
    }
    path = RESULTS / f"{name}-{simd_level()}.json"
    content = {"machine": machine(), "sizes": sizes, "notes": notes, "tables": rounded}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
