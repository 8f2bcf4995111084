"""LLaMA-7B's layers folded by function in 4 GiB of a GPU's memory, on noise, which needs no tokenizer; beside the plan.

A stage of ``bench/device.py``; needs transformers. What torch keeps for later tensors is in its memory, not in the plan.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from device_stages import ROOT, Row, row
from device_stream import run

GPU_MEMORY = 4 << 30
LAYERS = 2


def function(out: Path) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        source, folded = Path(scratch, "source"), Path(scratch, "folded")
        run(ROOT / "bench" / "make_checkpoint.py", source, "--preset", "llama-7b", "--layers", LAYERS)
        options = ["--ratio", 0.2, "--metric", "function", "--calibration", "none"]
        options += ["--device", "cuda", "--gpu-memory", GPU_MEMORY, "--json"]
        planned = json.loads(run("-m", "pyfold", "plan", source, folded, *options)[0])
        fold = json.loads(run("-m", "pyfold", "fold", source, folded, *options)[0])
    gpu, mib = fold["gpu"], 2**20
    if gpu["peak"] > GPU_MEMORY:
        raise RuntimeError(f"{gpu['peak']:,} bytes on the GPU, asked {GPU_MEMORY:,}")
    note = (
        f"GPU {gpu['peak'] / mib:.0f} MiB, {planned['gpu_peak'] / mib:.0f} planned; host {fold['peak_rss_bytes'] / mib:.0f} MiB"
    )
    case = f"llama-7b, {LAYERS} layers by function"
    return [
        row(
            case, fold["seconds"], flops=planned["flops"], contender="plan's seconds", contender_s=planned["seconds"], note=note
        )
    ]
