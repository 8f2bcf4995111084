"""A LLaMA-7B-shaped checkpoint written for engines: seconds, against a plain copy of its files, and peak memory.

Run by hand: ``pytest bench/bench_export.py [--scale small] [--layers N] [--cache DIR]``. Each export is a process of its own
(``child.py``); memory does not depend on the number of layers. Files are in the page cache as far as they fit.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import child
from conftest import Report
from report import Row

EXPORTS = {
    "hf-stock, a multiple of 1024": ["--to", "hf-stock", "--multiple-of", "1024"],
    "gguf, as it is": ["--to", "gguf"],
    "gguf, q8_0": ["--to", "gguf", "--dtype", "q8_0"],
    "gguf, float32": ["--to", "gguf", "--dtype", "float32"],
}


@dataclass(frozen=True)
class Sizes:
    """make_checkpoint.py's preset and layers; the most that a peak may be, MiB."""

    preset: str
    layers: int
    most: int


SIZES = {"full": Sizes("llama-7b", layers=8, most=2048), "small": Sizes("small", layers=8, most=2048)}


def test_export(report: Report, source: Path, tmp_path: Path) -> None:
    if not (source / "tokenizer.json").exists():
        _bytes_tokenizer().save(str(source / "tokenizer.json"))
    n_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    rows = report.tables.setdefault("one process each", [])
    out = tmp_path / "out"
    commands = {"cp": ["cp", "-r", source, out]}
    for name, options in EXPORTS.items():
        commands[name] = [sys.executable, "-m", "pyfold", "export", source, out, *options, "--quiet"]
    for name, command in commands.items():
        used = child.run(command)
        assert used.returncode == 0, name
        written = sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir()))
        copied = float(rows[0]["seconds"]) if rows else used.seconds
        row: Row = {"written": name, "GB": written / 1e9, "seconds": used.seconds, "x cp": used.seconds / copied}
        rows.append(row | {"peak MiB": used.peak_rss / 2**20, "asked": None if name == "cp" else f"< {report.sizes.most}"})
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    report.notes.append(f"{n_bytes:,} bytes of weights in {report.sizes.layers} layers.")
    assert max(float(row["peak MiB"]) for row in rows) < report.sizes.most


def _bytes_tokenizer():
    """All that llama.cpp needs of one: bytes, each a token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
