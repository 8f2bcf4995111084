"""pytorch_model.bin, single and sharded: the same fold as from safetensors; nothing of a pickle is run; no link leads out."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    UP,
    check_refused,
    link_as_the_hub_does,
    load,
    logits,
    patch_json,
    prompt,
    shard_of,
    tensors_of,
    tiny_checkpoint,
    tiny_model,
    tree,
)

import pyfold
from pyfold import cli
from pyfold.errors import PyfoldError
from pyfold.io import pytorch
from pyfold.io.checkpoint import INDEX, open_checkpoint
from pyfold.io.safetensors import Reader

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BIN = "pytorch_model.bin"


def save_bin(folder: Path, model: Any, n_files: int = 1) -> Path:
    """A model as transformers before safetensors saved it, tied names and all."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if n_files == 1:
        torch.save(state, folder / BIN)
        return folder
    names = list(state)
    weight_map = {}
    for i in range(n_files):
        file = f"pytorch_model-{i + 1:05d}-of-{n_files:05d}.bin"
        torch.save({name: state[name] for name in names[i::n_files]}, folder / file)
        weight_map |= dict.fromkeys(names[i::n_files], file)
    (folder / f"{BIN}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_all(folder: Path, model: Any) -> Path:
    """A model as safetensors with every name of its state dict, tied ones too."""
    from safetensors.torch import save_file

    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize("n_files", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_same_fold_as_from_safetensors(tmp_path: Path, n_files: int, dtype: torch.dtype, tied: bool) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=tied).to(dtype)
    sources = [save_bin(tmp_path / "bin", model, n_files), save_all(tmp_path / "safetensors", model)]
    results = [tmp_path / f"{source.name}-folded" for source in sources]
    for source, result in zip(sources, results, strict=True):
        pyfold.fold_checkpoint(source, result, ratio=0.25)
    assert tree(results[0]) == tree(results[1])
    if tied:
        folded = tensors_of(results[0])
        assert torch.equal(folded["lm_head.weight"], folded["model.embed_tokens.weight"])
    assert torch.isfinite(logits(load(results[0]), prompt())).all()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_places_are_those_of_torch(tmp_path: Path, tied: bool) -> None:
    """Read by position, every tensor is what torch.load gives; tied names are one place."""
    source = save_bin(tmp_path / "src", tiny_model("llama", tie_word_embeddings=tied))
    expected = torch.load(source / BIN, weights_only=True)
    checkpoint = open_checkpoint(source)
    assert checkpoint.tensors.keys() == expected.keys()
    with Reader() as reader:
        for name, info in checkpoint.tensors.items():
            assert torch.equal(reader.read(info), expected[name])
    head, embedding = checkpoint.tensors["lm_head.weight"], checkpoint.tensors["model.embed_tokens.weight"]
    assert (head.begin == embedding.begin) == tied


def test_slices_of_one_storage_and_every_dtype(tmp_path: Path) -> None:
    whole = torch.randn(10, 4)
    state = {str(dtype): torch.ones(3, 2, dtype=dtype) for dtype in (torch.float64, torch.int64, torch.int8, torch.bool)}
    state |= {
        "rows": whole[2:5],
        "column of one": whole[:1, :2],
        "empty": torch.zeros(0, 7),
        "scalar": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(whole[5:]),
    }
    torch.save(state, tmp_path / BIN)
    places = pytorch.read_header(tmp_path / BIN)
    with Reader() as reader:
        for name, tensor in state.items():
            assert torch.equal(reader.read(places[name]), tensor), name
            assert reader.read(places[name]).dtype == tensor.dtype


def test_no_data_is_read_to_learn_the_places(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 24)}, tmp_path / BIN)
    pytorch.read_header(tmp_path / BIN)
    tracemalloc.start()
    pytorch.read_header(tmp_path / BIN)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 18


def test_safetensors_come_first(tmp_path: Path, model: Any) -> None:
    source = tiny_checkpoint(tmp_path / "src")
    torch.save({"rubbish": torch.zeros(1)}, source / BIN)
    assert all(info.path.suffix == ".safetensors" for info in open_checkpoint(source).tensors.values())
    both = save_bin(tmp_path / "both", model)
    shutil.copy(save_bin(tmp_path / "sharded", model, 2) / f"{BIN}.index.json", both)
    assert {info.path.name for info in open_checkpoint(both).tensors.values()} == {BIN}


def test_inspect(tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(save_bin(tmp_path / "src", model, 2)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 2


class Touch:
    """What a hostile pickle holds: a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def set_pickle(file: Path, blob: bytes) -> None:
    """Exchange the pickle in a file of torch.save."""
    with zipfile.ZipFile(file) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, data in entries.items():
            new.writestr(name, blob if name.endswith("/data.pkl") else data)


def save(file: Path, value: object) -> None:
    torch.save(value, file)


def hostile(file: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Touch(file.parent / "trace")}, file)


def memo_without_end(file: Path) -> None:
    """Python's unpickler would allocate 32 GiB for this index."""
    set_pickle(file, b"\x80\x02}r\xff\xff\xff\xffX\x01\0\0\0aNs.")


def hash_without_end(file: Path) -> None:
    """A key of 2^60 leaves in 200 bytes: hashed by Python's unpickler, which takes years."""
    set_pickle(file, b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"Ns.")


def print_without_end(file: Path) -> None:
    """The same as the shape of a tensor, which a message might want to show."""
    shape = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x00tQ"
    file.unlink()
    torch.save({"a": torch.zeros(0)}, file)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + b")\x89}tR"
    set_pickle(file, b"\x80\x02}X\x01\0\0\0a" + tensor + b"s.")


def compress(file: Path) -> None:
    with zipfile.ZipFile(file) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in entries.items():
            new.writestr(name, data)


REFUSED: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("hostile", hostile, ["posix.mkdir", "not run", "safetensors"]),
    ("memo without end", memo_without_end, ["'a' is a NoneType"]),
    ("hash without end", hash_without_end, ["key that is a tuple"]),
    ("print without end", print_without_end, ["shape or stride"]),
    ("transposed", lambda file: save(file, {UP: torch.ones(3, 2).T}), [UP, "not contiguous", "[2, 3]", "[1, 2]"]),
    ("legacy", lambda file: torch.save({}, file, _use_new_zipfile_serialization=False), ["before 1.6"]),
    ("compressed", compress, ["data.pkl", "compressed"]),
    ("a tensor", lambda file: save(file, torch.ones(3)), ["no dict of tensors but a Tensor"]),
    ("nested", lambda file: save(file, {"state_dict": {UP: torch.ones(1)}}), ["'state_dict' is a dict"]),
    ("other objects", lambda file: save(file, {"args": torch.Size([1])}), ["torch.Size"]),
    ("a step counter", lambda file: save(file, {"step": 3}), ["'step' is a int"]),
    ("numbered", lambda file: save(file, {0: torch.ones(1)}), ["0 is a Tensor"]),
    ("complex", lambda file: save(file, {"a": torch.ones(1, dtype=torch.complex64)}), ["ComplexFloatStorage"]),
    ("TorchScript", lambda file: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file), ["compressed"]),
    ("plain pickle", lambda file: file.write_bytes(pickle.dumps({"a": 1})), ["not a file of torch.save"]),
    ("empty", lambda file: file.write_bytes(b""), ["not a file of torch.save"]),
    ("cut", lambda file: os.truncate(file, file.stat().st_size - 1000), ["cut short"]),
    ("other zip", lambda file: zipfile.ZipFile(file, "w").writestr("a.txt", ""), ["not of a state dict"]),
    ("two keys", lambda file: set_pickle(file, b"\x80\x02}(X\x01\0\0\0aNX\x01\0\0\0aNu."), ["'a' is there twice"]),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("spoil", "names"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused(
    tmp_path: Path, model: Any, spoil: Callable[[Path], None], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_bin(tmp_path / "src", model)
    spoil(source / BIN)
    before = tree(tmp_path)
    code = cli.main(["fold", str(source), str(tmp_path / "dst"), "--ratio", "0.25"])
    check_refused(code, capsys.readouterr().err, [BIN, *names])
    assert tree(tmp_path) == before
    assert not (source / "trace").exists()


def test_the_hostile_pickle_would_run(tmp_path: Path) -> None:
    """Or the test above would show nothing."""
    hostile(tmp_path / BIN)
    torch.load(tmp_path / BIN, weights_only=False)
    assert (tmp_path / "trace").exists()


def test_modules_versions_are_passed_over(tmp_path: Path) -> None:
    state = OrderedDict(a=torch.ones(2))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    torch.save(state, tmp_path / BIN)
    assert pytorch.read_header(tmp_path / BIN).keys() == {"a"}


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "sub/x.safetensors", "{absolute}", "..", ".", "", "a\0b", "x" * 5000, "\\x", 3, None]
)
def test_index_names_files_beside_it(source: Path, tmp_path: Path, shard: Any) -> None:
    bad = tmp_path / "src"
    shutil.copytree(source, bad)
    (bad / "sub").mkdir()
    for target in (tmp_path / "secret.safetensors", bad / "sub" / "x.safetensors"):
        shutil.copy(shard_of(source, UP), target)
    if shard == "{absolute}":
        shard = str(tmp_path / "secret.safetensors")
    weight_map = json.loads((bad / INDEX).read_text())["weight_map"]
    patch_json(bad / INDEX, weight_map=weight_map | {UP: shard})
    with pytest.raises(PyfoldError, match=r"is not the name of a shard beside it|missing, though"):
        open_checkpoint(bad)


@pytest.mark.parametrize("name", ["shard", INDEX, "config.json", "tokenizer.json", "README.md", "modeling_x.py"])
def test_links_out_of_the_source_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    bad = tmp_path / "src"
    shutil.copytree(source, bad)
    file = shard_of(bad, UP) if name == "shard" else bad / name
    if not file.exists():
        file.write_text("{}")
    file.rename(tmp_path / "secret")
    file.symlink_to("../secret")
    with pytest.raises(PyfoldError, match=rf"{file.name}: a symbolic link out of the checkpoint, to {tmp_path / 'secret'}"):
        open_checkpoint(bad)


def test_links_of_the_hub_cache_and_within_the_source_work(source: Path, tmp_path: Path) -> None:
    """Also where the cache itself is behind a link. Links from a snapshot to anywhere but its own blobs are refused."""
    _, snapshot = link_as_the_hub_does(source, tmp_path / "real" / "models--acme--tiny")
    (tmp_path / "cache").symlink_to(tmp_path / "real")
    seen = tmp_path / "cache" / snapshot.relative_to(tmp_path / "real")
    pyfold.fold_checkpoint(seen, tmp_path / "dst", ratio=0.25)
    pyfold.fold_checkpoint(source, tmp_path / "expected", ratio=0.25)
    assert tree(tmp_path / "dst") == tree(tmp_path / "expected")

    inner = tmp_path / "src"
    shutil.copytree(source, inner)
    (inner / "config.json").rename(inner / "config-v2.json")
    (inner / "config.json").symlink_to("config-v2.json")
    open_checkpoint(inner)

    _, other = link_as_the_hub_does(source, tmp_path / "models--acme--other")
    (snapshot / "tokenizer.json").symlink_to(other / "config.json")
    with pytest.raises(PyfoldError, match="symbolic link out of the checkpoint"):
        open_checkpoint(seen)


def test_a_pipe_does_not_keep_it_waiting(source: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        bad = tmp_path / name
        shutil.copytree(source, bad)
        (bad / name).unlink(missing_ok=True)
        os.mkfifo(bad / name)
        if name == "config.json":
            with pytest.raises(PyfoldError, match="no such file"):
                open_checkpoint(bad)
        else:  # neither weights nor companion: passed over
            assert len(open_checkpoint(bad).companions()) == len(open_checkpoint(source).companions())


@pytest.mark.parametrize("target", ["/etc/x.Class", "../x.Class", "sub/x.Class", "x", 3, [None, "../x.Class"]])
def test_custom_code_lies_beside_the_config(source: Path, tmp_path: Path, target: Any) -> None:
    bad = tmp_path / "src"
    shutil.copytree(source, bad)
    patch_json(bad / "config.json", auto_map={"AutoModel": target})
    with pytest.raises(PyfoldError, match=r"config.json: expected MODULE.CLASS in auto_map"):
        open_checkpoint(bad)


def test_a_model_card_of_aliases_or_brackets(source: Path, tmp_path: Path) -> None:
    """2^40 words once its aliases are written out, and YAML nested beyond Python's stack."""
    bad = tmp_path / "src"
    shutil.copytree(source, bad)
    lines = [f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]" for i in range(40)]
    (bad / "README.md").write_text("\n".join(["---", "a0: &a0 [x, x]", *lines, "license: *a40", "---", ""]))
    pyfold.fold_checkpoint(bad, tmp_path / "dst", ratio=0.25)
    assert "license" not in (tmp_path / "dst" / "README.md").read_text()
    (bad / "README.md").write_text(f"---\nlicense: {'[' * 5000}\n---\n")
    with pytest.raises(PyfoldError, match="front matter"):
        pyfold.fold_checkpoint(bad, tmp_path / "dst2", ratio=0.25)


def test_the_hub_is_asked_for_bin_only_without_safetensors(
    source: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[list[str]] = []

    def download(repo: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        asked.append(allow_patterns)
        if repo == "acme/safe":
            return str(source)
        if "pytorch_model*.bin" not in allow_patterns:
            return str(tmp_path)  # the hub has nothing that fits
        return str(old)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    old = save_bin(tmp_path / "old", model)
    assert open_checkpoint("acme/safe").path == source
    assert len(asked) == 1
    assert "pytorch_model*.bin" not in asked[0]
    assert open_checkpoint("acme/old").path == old
    assert "*.safetensors" not in asked[2]
