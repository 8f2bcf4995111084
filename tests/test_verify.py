"""`pyfold verify`: silent where a result is as it was folded, and one line that names file and tensor where it is not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FAMILIES, UP, check_refused, patch_json, rewrite, shard_of, tiny_checkpoint

import pyfold
from pyfold import cli
from pyfold.io.checkpoint import INDEX


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    pyfold.fold_checkpoint(tiny_checkpoint(folder / "src"), folder / "dst", ratio=0.25, max_shard_size="20KB")
    return folder / "dst"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"layers": "1"}, {"dtype": "bfloat16"}], ids=["stock", "per-layer", "narrowed"])
def test_what_was_folded_is_in_order(family: str, options: dict[str, str], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "src", family, tie_word_embeddings=family == "qwen2")
    report = pyfold.fold_checkpoint(source, tmp_path / "dst", ratio=0.25, **options)
    found = pyfold.verify_checkpoint(tmp_path / "dst")
    assert found.n_bytes == report.bytes_after
    assert found.n_tensors == len(json.loads((tmp_path / "dst" / "pyfold.json").read_text())["sha256"])


def test_it_says_so(folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(folded)]) == 0
    assert "as they were folded; it loads" in capsys.readouterr().out
    assert cli.main(["verify", str(folded), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_tensors"] > 0


def flip_a_bit(folder: Path) -> None:
    shard = shard_of(folder, UP)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def cut(folder: Path) -> None:
    shard = shard_of(folder, UP)
    os.truncate(shard, shard.stat().st_size - 4)


def lose_a_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(UP))
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    patch_json(folder / INDEX, weight_map={name: shard for name, shard in weight_map.items() if name != UP})


SPOILED: list[tuple[Callable[[Path], object], list[str]]] = [
    (flip_a_bit, ["model-0000", "SHA-256 differs"]),
    (cut, ["model-0000", "cut short"]),
    (lose_a_tensor, [UP, "is missing"]),
    (lambda folder: patch_json(folder / "config.json", intermediate_size=35), ["model-0000", "expected shape [35, 32]"]),
    (lambda folder: patch_json(folder / "config.json", num_hidden_layers=4), ["layers.3", "missing"]),
    (lambda folder: patch_json(folder / "config.json", model_type="gpt17"), ["cannot load it"]),
    (lambda folder: (folder / "pyfold.json").unlink(), ["pyfold.json", "missing"]),
    (lambda folder: patch_json(folder / "pyfold.json", sha256=None), ["pyfold.json", "no sha256"]),
    (lambda folder: shutil.rmtree(folder), ["no such folder"]),
]


@pytest.mark.parametrize(("spoil", "names"), SPOILED)
def test_what_is_not_in_order_is_named(
    folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], names: list[str]
) -> None:
    shutil.copytree(folded, tmp_path / "dst")
    spoil(tmp_path / "dst")
    check_refused(cli.main(["verify", str(tmp_path / "dst")]), capsys.readouterr().err, names)
