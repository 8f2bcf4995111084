"""bench/device.py as far as it goes without a GPU: it says that there is none, and its table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, write_synthetic
from emulated_gpu import EmulatedGpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_says_in_one_line_that_there_is_no_device(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "device.py", "--out", tmp_path / "results"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["bench/device.py: torch sees no CUDA device"]
    assert not (tmp_path / "results").exists()


def test_rates_shares_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import device
    import device_stages

    product = device_stages.row("gram", 0.002, flops=1e12, ceiling=1e15, contender="torch.mm", contender_s=0.003)
    copy = device_stages.row("merge", 0.001, moved=2e9, ceiling=4e12)
    assert product["TFLOP/s"] == pytest.approx(500)
    assert product["share of ceiling"] == pytest.approx(0.5)
    assert product["ratio"] == pytest.approx(1.5)
    assert copy["GB/s"] == pytest.approx(2000)
    assert copy["share of ceiling"] == pytest.approx(0.5)
    tables = json.loads(json.dumps({"gram": [product], "merge": [copy]}))
    header, *lines = device.lines_of(tables)
    assert header.split()[:3] == ["stage", "case", "ms"]
    assert [line.split()[0] for line in lines] == ["gram", "merge"]
    assert "torch.mm" in lines[0]
    assert "torch.mm" not in lines[1]


@pytest.mark.parametrize("slow", ["up", "down"])
def test_the_copy_that_folds_are_measured_against(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import device_stream

    from pyfold.io.checkpoint import open_checkpoint
    from pyfold.io.safetensors import Reader, Shard, as_bytes

    checkpoint = open_checkpoint(write_synthetic(tmp_path / "src", 1, 3000, 5500))
    gpu = EmulatedGpu(slow, monkeypatch)
    monkeypatch.setattr("pyfold.streams.open_device", lambda name: gpu)
    pinned: list[int] = []
    pin, write = gpu.pin, Shard.write
    monkeypatch.setattr(gpu, "pin", lambda block: (pinned.append(block.nbytes), pin(block)))

    def write_late(*args: Any) -> None:
        time.sleep(0.02)
        write(*args)

    monkeypatch.setattr(Shard, "write", write_late)
    with Reader() as reader:
        expected = b"".join(as_bytes(reader.read(info)) for info in checkpoint.tensors.values())
    device_stream.copy(tmp_path / "src", tmp_path / "all", len(expected))
    assert (tmp_path / "all").read_bytes()[-len(expected) :] == expected
    print(f"{slow}: {len(pinned)} blocks of {sum(pinned):,} bytes pinned")
    assert len(pinned) <= 16, "what is pinned is used again, also where writing is what takes longest"
    device_stream.copy(tmp_path / "src", tmp_path / "part", len(expected) // 3)
    assert 0 < (tmp_path / "part").stat().st_size - len(expected) // 3 < 4096, "and a header"
