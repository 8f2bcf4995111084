"""Bad sources, options and destinations: one line that names file and tensor, exit code 2, everything as it was."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import UP, check_refused, link_as_the_hub_does, patch_json, rewrite, shard_of, tiny_checkpoint, tree

from pyfold import cli
from pyfold.io.checkpoint import INDEX


# Each: what is done to a good source, the options, what the one line must name.
def remove_shard(folder: Path) -> None:
    shard_of(folder, UP).unlink()


def truncate_header(folder: Path) -> None:
    os.truncate(shard_of(folder, UP), 20)


def empty_shard(folder: Path) -> None:
    os.truncate(shard_of(folder, UP), 0)


def corrupt_header(folder: Path) -> None:
    shard = shard_of(folder, UP)
    data = bytearray(shard.read_bytes())
    data[8:12] = b"oops"
    shard.write_bytes(data)


def cut_data(folder: Path) -> None:
    shard = shard_of(folder, UP)
    os.truncate(shard, shard.stat().st_size - 10)


def wrong_byte_range(folder: Path) -> None:
    shard = shard_of(folder, UP)
    shard.write_bytes(shard.read_bytes().replace(b'"shape":[48,32]', b'"shape":[48,31]'))


def drop_from_index(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    patch_json(folder / INDEX, weight_map={name: shard for name, shard in weight_map.items() if name != UP})


def drop_from_shard(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(UP))


def drop_everywhere(folder: Path) -> None:
    drop_from_shard(folder)
    drop_from_index(folder)


def wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({UP: torch.zeros(47, 32)}))


def integer_weight(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({UP: torch.zeros(48, 32, dtype=torch.int8)}))


def nan_weight(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[UP].__setitem__((3, 5), float("nan")))


def inf_elsewhere(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    shard = shard_of(folder, "model.norm.weight")
    tensors = load_file(shard)
    tensors["model.norm.weight"][7] = float("inf")
    save_file(tensors, shard)


def unknown_architecture(folder: Path) -> None:
    patch_json(folder / "config.json", model_type="gpt2")


def quantised(folder: Path) -> None:
    patch_json(folder / "config.json", quantization_config={"quant_method": "gptq"})


def no_width(folder: Path) -> None:
    patch_json(folder / "config.json", intermediate_size=None)


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / INDEX).unlink()


def overlapping(folder: Path) -> None:
    shard = shard_of(folder, UP)
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name not in ("__metadata__", UP) and header[name]["shape"] == header[UP]["shape"])
    header[UP]["data_offsets"] = header[name]["data_offsets"]
    blob = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(blob)) + blob + data[8 + length :])


def trailing(folder: Path) -> None:
    shard = shard_of(folder, UP)
    shard.write_bytes(shard.read_bytes() + b"extra")


def endless_numbers(folder: Path) -> None:
    shard = shard_of(folder, UP)
    blob = b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'
    shard.write_bytes(struct.pack("<Q", len(blob)) + blob)


def per_layer_nonsense(folder: Path) -> None:
    patch_json(folder / "config.json", per_layer_config={"a": {}})


def per_layer_list(folder: Path) -> None:
    patch_json(folder / "config.json", per_layer_config=[1])


def per_layer_heads(folder: Path) -> None:
    patch_json(folder / "config.json", per_layer_config={"0": {"num_key_value_heads": 3}})


def quantised_oddly(folder: Path) -> None:
    patch_json(folder / "config.json", quantization_config="gptq")


def model_type_list(folder: Path) -> None:
    patch_json(folder / "config.json", model_type=[1])


def auto_map_text(folder: Path) -> None:
    patch_json(folder / "config.json", auto_map="x")


def architectures_number(folder: Path) -> None:
    patch_json(folder / "config.json", architectures=3)


def per_layer_digits(folder: Path) -> None:
    patch_json(folder / "config.json", per_layer_config={"9" * 5000: {"intermediate_size": 48}})


def two_widths(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"intermediate_size": 24,', 1))


def odd_weight_map(folder: Path) -> None:
    patch_json(folder / INDEX, weight_map={"a": [1], "b": 3, "c": "x"})


BAD_SOURCES = [
    (remove_shard, ["model-0000", "missing"]),
    (truncate_header, ["model-0000", "cut short in its header"]),
    (empty_shard, ["model-0000", "not a safetensors file"]),
    (corrupt_header, ["model-0000", "corrupt safetensors header"]),
    (cut_data, ["model-0000", "cut short: tensor"]),
    (wrong_byte_range, ["model-0000", "corrupt safetensors header: tensor"]),
    (drop_from_index, ["model-0000", UP, "absent from model.safetensors.index.json"]),
    (drop_from_shard, ["model-0000", UP, "is not in it"]),
    (drop_everywhere, ["src", UP, "no shard or index"]),
    (wrong_shape, ["model-0000", UP, "[47, 32]", "[48, 32]"]),
    (integer_weight, ["model-0000", UP, "I8"]),
    (nan_weight, ["model-0000", UP, "nan", f"element {3 * 32 + 5}"]),
    (inf_elsewhere, ["model-0000", "model.norm.weight", "inf", "element 7"]),
    (unknown_architecture, ["config.json", "'gpt2'", "llama, mistral, qwen2, qwen3"]),
    (quantised, ["config.json", "quantised", "gptq"]),
    (no_width, ["config.json", "intermediate_size"]),
    (bad_config, ["config.json", "not valid JSON"]),
    (no_config, ["config.json", "no such file"]),
    (overlapping, ["model-0000", "corrupt safetensors header"]),
    (trailing, ["model-0000", "5 bytes after the last tensor"]),
    (per_layer_nonsense, ["config.json", "per_layer_config"]),
    (per_layer_list, ["config.json", "per_layer_config", "[1]"]),
    (per_layer_heads, ["config.json", "do not share 3 KV heads evenly"]),
    (quantised_oddly, ["config.json", "quantization_config", "'gptq'"]),
    (model_type_list, ["config.json", "model_type", "[1]"]),
    (auto_map_text, ["config.json", "auto_map", "'x'"]),
    (architectures_number, ["config.json", "architectures", "3"]),
    (per_layer_digits, ["config.json", "per_layer_config"]),
    (two_widths, ["config.json", "'intermediate_size' is there twice"]),
    (odd_weight_map, ["src"]),
    (endless_numbers, ["model-0000", "corrupt safetensors header"]),
    (no_weights, ["src", "no model.safetensors.index.json and no model.safetensors"]),
]
BAD_OPTIONS = [
    (["--ratio", "1"], ["ratio", "[0, 1)"]),
    (["--ratio", "-0.1"], ["ratio", "[0, 1)"]),
    (["--ratio", "nan"], ["ratio", "[0, 1)"]),
    (["--ratio", "0.99"], ["ratio", "leaves no unit of the 48 of layers.0.mlp"]),
    (["--width", "0"], ["width", "1 to 48", "layers.0.mlp"]),
    (["--width", "49"], ["width", "1 to 48"]),
    (["--ratio", "0.2", "--layers", "2-3"], ["no layer 3", "layers 0 to 2"]),
    (["--ratio", "0.2", "--layers", "x"], ["layers", "'x'"]),
    (["--ratio", "0.2", "--layers", "0-999999999"], ["no layer 3"]),
    (["--ratio", "0.2", "--layers", "9" * 5000], ["layers"]),
    (["--ratio", "0.2", "--multiple-of", "64"], ["multiple_of", "64"]),
    (["--ratio", "0.2", "--multiple-of", "0"], ["multiple_of"]),
    (["--ratio", "0.2", "--dtype", "int4"], ["dtype", "int4", "bfloat16"]),
    (["--ratio", "0.2", "--max-shard-size", "big"], ["max_shard_size", "'big'"]),
    (["--ratio", "0.2", "--backend", "tpu"], ["backend", "'tpu'", "cpu"]),
]


@pytest.mark.parametrize(("spoil", "names"), BAD_SOURCES, ids=[case[0].__name__ for case in BAD_SOURCES])
@pytest.mark.parametrize("overwrite", [False, True], ids=["absent", "overwrite"])
def test_bad_sources(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    names: list[str],
    overwrite: bool,
) -> None:
    bad, dst = tmp_path / "src", tmp_path / "dst"
    shutil.copytree(source, bad)
    spoil(bad)
    if overwrite:
        tiny_checkpoint(dst, "qwen2")
    before = tree(tmp_path)
    capsys.readouterr()
    code = cli.main(["fold", str(bad), str(dst), "--ratio", "0.25", *(["--overwrite"] if overwrite else [])])
    check_refused(code, capsys.readouterr().err, names)
    assert tree(tmp_path) == before
    assert dst.exists() == overwrite
    assert sorted(entry.name for entry in tmp_path.iterdir()) == (["dst", "src"] if overwrite else ["src"])


@pytest.mark.parametrize(("options", "names"), BAD_OPTIONS, ids=[" ".join(case[0]) for case in BAD_OPTIONS])
def test_bad_options(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], names: list[str]
) -> None:
    code = cli.main(["fold", str(source), str(tmp_path / "dst"), *options])
    check_refused(code, capsys.readouterr().err, names)
    assert not list(tmp_path.iterdir())


def entry(shape: str = "[4]", offsets: str = "[0,16]", dtype: str = '"F32"') -> str:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


BIG = 2**62
# A header's text, and what the one line must say.
BAD_HEADERS = [
    (entry(f"[{BIG},{BIG}]"), "too large for any file"),
    (entry(f"[0,{BIG},{BIG}]", "[0,0]"), "too large for any file"),
    (entry(f"[{'9' * 4000}]"), "'a' has the shape"),
    (entry(f"[{'9' * 5000}]"), "4300 digits"),
    (entry(f"[{'1,' * 5000}1]"), "'a' has the shape"),
    (entry("[-2,-2]"), "shape [-2, -2]"),
    (entry("[true,4]"), "shape [True, 4]"),
    (entry("[4.0]"), "shape [4.0]"),
    (entry('["4"]'), "shape ['4']"),
    (entry('{"4":1}'), "shape {'4': 1}"),
    (entry(offsets="[-16,0]"), "data_offsets [-16, 0]"),
    (entry(offsets="[0,16,32]"), "data_offsets [0, 16, 32]"),
    (entry(offsets=f"[{BIG},{BIG + 16}]"), "cut short"),
    (entry(dtype='["F32"]'), "dtype ['F32']"),
    (entry(dtype='"F4"'), "which pyfold does not know"),
    (entry(shape='[4],"shape":[4]'), "'shape' is there twice"),
    ('{"a":{"shape":[4],"data_offsets":[0,16]}}', "'a' has no dtype, shape, data_offsets"),
    ('{"a":null,"a":null}', "'a' is there twice"),
    ('{"a":NaN}', "not a finite number"),
    ('{"a":1e999}', "not a finite number"),
    ('{"\\ud800":1}', "surrogates not allowed"),
    (f'{{"a":{"[" * 80 + "]" * 80}}}', "nested too deeply"),
    (f'{{"a":{"[" * 100_000 + "]" * 100_000}}}', "nested too deeply"),
    ('{"__metadata__":"pt"}', "__metadata__"),
    ("[1]", "expected an object, got list"),
    ('{"\\u001b[31m\\n":1}', "'\\x1b[31m\\n'"),
]


@pytest.mark.parametrize(("header", "says"), BAD_HEADERS, ids=[f"{header:.60}" for header, _ in BAD_HEADERS])
def test_bad_headers(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], header: str, says: str) -> None:
    bad = tmp_path / "src"
    shutil.copytree(source, bad)
    (bad / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(16))
    code = cli.main(["inspect", str(bad)])
    check_refused(code, capsys.readouterr().err, ["model.safetensors", says])


def test_bad_destinations(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = tmp_path / "src"
    shutil.copytree(source, inside)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text('{"port": 80}')
    shutil.copytree(source, tmp_path / "repository")
    (tmp_path / "repository" / ".git").mkdir()
    blobs, snapshot = link_as_the_hub_does(source, tmp_path / "models--acme--tiny")
    (tmp_path / "dst5.pyfold-partial").symlink_to(tmp_path / "full")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = tree(tmp_path)
    for src, dst, extra, names in (
        (inside, inside / "out", [], ["in one another"]),
        (inside, inside, ["--overwrite"], ["in one another"]),
        (inside, tmp_path, ["--overwrite"], ["in one another"]),
        (inside, tmp_path / "full", [], ["not empty", "thesis.tex", "--overwrite"]),
        (inside, tmp_path / "full", ["--overwrite"], ["holds no checkpoint"]),
        (inside, tmp_path / "project", ["--overwrite"], ["holds no checkpoint", "model_type"]),
        (inside, tmp_path / "repository", ["--overwrite"], ["folders in it (.git)"]),
        (snapshot, blobs, ["--overwrite"], ["in one another"]),
        (inside, tmp_path / "dst5", [], ["dst5.pyfold-partial", "did not make it"]),
        (inside, tmp_path / "loop", [], ["loop"]),
        (inside, Path(""), ["--overwrite"], ["the current folder"]),
        (inside, tmp_path / "file", [], ["is a file"]),
        (tmp_path / "nowhere", tmp_path / "dst", [], ["nowhere", "no such folder"]),
        (inside / "config.json", tmp_path / "dst", [], ["expected a checkpoint folder, got a file"]),
    ):
        code = cli.main(["fold", str(src), str(dst), "--ratio", "0.25", *extra])
        check_refused(code, capsys.readouterr().err, names)
        assert tree(tmp_path) == before
    assert not (tmp_path / "dst").exists()
