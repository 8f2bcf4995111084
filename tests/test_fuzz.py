"""Mutated checkpoints: one line of refusal or a correct result; never another exception, a hang, or memory without bound.

Correct: the format's own package reads the mutated files to some tensors, and they fold to the same bytes when written afresh.
``PYFOLD_FUZZ_CASES=10000`` sets the number of cases. A case that fails is kept in .cache/fuzz; once mended, it goes to
tests/corpus/WHAT/FILE, and is replayed from then on.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickletools
import resource
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, load, tensors_of, tiny_model
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

import pyfold
from pyfold.errors import PyfoldError
from pyfold.io.checkpoint import INDEX

CASES = int(os.environ.get("PYFOLD_FUZZ_CASES", "300"))
CORPUS = ROOT / "tests" / "corpus"
SECONDS, MEMORY = 10, 96 << 20
BIN = "pytorch_model.bin"
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 16}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny LLaMA in every layout, by the file that is mutated."""
    model = tiny_model("llama", n_layers=2, width=6, **SIZES)
    root = tmp_path_factory.mktemp("fuzz")
    single, sharded, old = root / "single", root / "sharded", root / "old"
    model.save_pretrained(single)
    model.save_pretrained(sharded, max_shard_size="3KB")
    old.mkdir()
    torch.save(model.state_dict(), old / BIN)
    for folder in (single, sharded, old):
        (folder / "generation_config.json").unlink(missing_ok=True)
        shutil.copy(single / "config.json", folder / "config.json") if folder is old else None
    pyfold.fold_checkpoint(single, root / "warm", ratio=0.5)  # imports and threads, before memory is limited
    return {"model.safetensors": single, "config.json": single, INDEX: sharded, BIN: old}


# What a header, an index or a config would not say: JSON texts, some of which are none.
NASTY = [
    *("null", "true", "false", "0", "-1", "1", "2", "1.0", "1.5", "1e999", "-0", "NaN", "-Infinity", "1e400", "[]", "{}", '""'),
    *(str(2**63 - 1), str(2**63), str(2**64), str(2**62), "1" * 4000, "1" * 5000),
    *('"F32"', '"F64"', '"BF16"', '"F8_E5M2"', '"F4"', '"llama"', '"qwen2"', '"\\ud800"', '"\\u0000"', '"\\n"', '"²"', '"1"'),
    *(
        '".."',
        '"../x"',
        '"/etc/passwd"',
        '"model.safetensors"',
        f'"{"x" * 300}"',
        '["a"]',
        "[[1]]",
        '{"a":1}',
        '{"0":{}}',
        "[0,4]",
    ),
    *("[1,1]", "[0,0]", f"[0,{2**62},{2**62}]", f"[{2**32},{2**32}]", "[" * 70 + "]" * 70, "[" * 990 + "]" * 990),
    *("[" * 100_000 + "]" * 100_000, '{"a":1,"a":2}', "{", "]", ""),
]
NASTY_KEYS = [
    *("", "__metadata__", "²", "1" * 5000, "\n", "\x1b[31m", "\x00", "..", "a" * 3000, "layers.01.x", "layers.1.x"),
    *("model.layers.0.mlp.gate_proj.bias", "intermediate_size", "per_layer_config", "auto_map", "quantization_config"),
    *("architectures", "torch_dtype"),
]


@st.composite
def json_texts(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON value with up to three of its parts exchanged, removed, renamed, repeated or doubled."""
    value = json.loads(json.dumps(value))
    raw: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if isinstance(value, dict) and draw(st.booleans()):
            places = [(value, key) for key in value]
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        other, other_key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["nasty", "nasty", "nasty", "remove", "copy", "rename", "number", "twice"])):
            case "nasty":
                raw.append(draw(st.sampled_from(NASTY)))
                container[key] = f"@{len(raw) - 1}@"
            case "remove":
                del container[key]
            case "copy":
                container[key] = json.loads(json.dumps(other[other_key]))
            case "rename" if isinstance(container, dict):
                container[draw(st.sampled_from(NASTY_KEYS))] = container.pop(key)
            case "number" if isinstance(container[key], int):
                container[key] += draw(st.sampled_from([-1, 1, 8, -64, 2**32, 2**63]))
            case "twice" if isinstance(container, dict):
                raw.append(f'{json.dumps(container[key])},"{key}":{json.dumps(other[other_key])}')
                container[key] = f"@{len(raw) - 1}@"
    text = json.dumps(value)
    for i, token in enumerate(raw):
        text = text.replace(f'"@{i}@"', token)
    return text.encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from _places(item)


@st.composite
def byte_strings(draw: st.DrawFn, data: bytes, hot: list[int]) -> bytes:
    """Bytes with up to four places changed, most of them near the ``hot`` offsets."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.sampled_from(hot)) + draw(st.integers(-8, 60)) if draw(st.booleans()) else draw(st.integers(0, len(data)))
        at = min(max(at, 0), len(out))
        match draw(st.sampled_from(["flip", "set", "number", "insert", "delete", "cut", "copy", "append"])):
            case "flip" if at < len(out):
                out[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if at < len(out):
                out[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x2E, 0x28]))
            case "number":
                form = draw(st.sampled_from(["<H", "<I", "<Q"]))
                limit = (1 << 8 * struct.calcsize(form)) - 1
                number = struct.pack(form, draw(st.sampled_from([0, 1, limit, limit >> 1, limit - 1, len(data) & limit])))
                out[at : at + len(number)] = number
            case "insert":
                out[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del out[at : at + draw(st.integers(1, 40))]
            case "cut":
                del out[at:]
            case "copy":
                start = draw(st.integers(0, len(data)))
                out[at:at] = data[start : start + draw(st.integers(1, 200))]
            case "append":
                out += draw(st.binary(max_size=30))
    return bytes(out)


@st.composite
def headers(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file with another header, or with other bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    if draw(st.integers(0, 4)) == 0:
        return draw(byte_strings(data, [0, 8, 8 + length, len(data)]))
    blob = draw(json_texts(json.loads(data[8 : 8 + length])))
    claimed = draw(st.sampled_from([len(blob)] * 12 + [len(blob) - 1, len(blob) + 1, 2**63, 2**64 - 1, 100_000_001, 0]))
    return struct.pack("<Q", claimed) + blob + data[8 + length :]


@st.composite
def texts(draw: st.DrawFn, data: bytes) -> bytes:
    """A JSON file with another value, or with other bytes."""
    if draw(st.integers(0, 4)) == 0:
        return draw(byte_strings(data, [0, len(data)]))
    return draw(json_texts(json.loads(data)))


# Pieces of pickles that a state dict does not hold, or not there.
NASTY_OPCODES = [
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"ccollections\nOrderedDict\n", b"ctorch\nHalfStorage\n"),
    *(b"X\x02\0\0\0ls\x85R", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"\x80\x05", b"\x94"),
    *(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x95\xff\xff\xff\xff\xff\xff\xff\xff", b"G\x7f\xf8\0\0\0\0\0\0"),
    *(b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8a\xff" + b"\x7f" * 255),
    *(b"X\x03\0\0\0\xed\xa0\x80", b"X\x0c\0\0\0__metadata__", b"X\x02\0\0\0\xc2\xb2", b"X\x01\0\0\0\n"),
    *(bytes([opcode]) for opcode in b"N\x88(t)]}aesuRbQ02.\x85\x86\x87"),
    *(b"K\x00", b"K\x01", b"K\xff"),
]


@st.composite
def pickles(draw: st.DrawFn, data: bytes) -> bytes:
    """A file of torch.save, its zip whole, with some opcodes of its pickle exchanged, removed, repeated or moved."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    starts = [at for _, _, at in pickletools.genops(entries[name])]
    opcodes = [entries[name][a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    for _ in range(draw(st.integers(1, 3))):
        at, other = (draw(st.integers(0, len(opcodes) - 1)) for _ in range(2))
        match draw(st.sampled_from(["nasty", "insert", "remove", "repeat", "exchange", "number"])):
            case "nasty":
                opcodes[at] = draw(st.sampled_from(NASTY_OPCODES))
            case "insert":
                opcodes.insert(at, draw(st.sampled_from(NASTY_OPCODES)))
            case "remove" if len(opcodes) > 1:
                del opcodes[at]
            case "repeat":
                opcodes.insert(at, opcodes[other])
            case "exchange":
                opcodes[at], opcodes[other] = opcodes[other], opcodes[at]
            case "number":
                numbers = [i for i, opcode in enumerate(opcodes) if opcode[:1] == b"K"]
                opcodes[draw(st.sampled_from(numbers or [at]))] = b"K%c" % draw(st.integers(0, 255))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for entry, content in entries.items():
            new.writestr(entry, b"".join(opcodes) if entry == name else content)
    return out.getvalue()


@st.composite
def zips(draw: st.DrawFn, data: bytes) -> bytes:
    """A file of torch.save with bytes changed, most of them in the zip's own structures."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        hot = [member.header_offset for member in archive.infolist()]
        hot += [archive.start_dir + 46 * i for i in range(2 * len(hot))]
    return draw(byte_strings(data, [*hot, len(data) - 22, len(data) - 42, len(data) - 98]))


TARGETS: list[tuple[str, str, Callable[[bytes], st.SearchStrategy[bytes]]]] = [
    ("header", "model.safetensors", headers),
    ("index", INDEX, texts),
    ("config", "config.json", texts),
    ("zip", BIN, zips),
    ("pickle", BIN, pickles),
]


@pytest.mark.parametrize(("file", "mutate"), [target[1:] for target in TARGETS], ids=[target[0] for target in TARGETS])
def test_mutations(layouts: dict[str, Path], tmp_path: Path, file: str, mutate: Callable[..., Any]) -> None:
    original = (layouts[file] / file).read_bytes()
    source = tmp_path / "src"
    shutil.copytree(layouts[file], source)

    @settings(
        max_examples=-(-CASES // len(TARGETS)),
        derandomize="PYFOLD_FUZZ_CASES" not in os.environ,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutate(original))
    def check(data: bytes) -> None:
        try:
            check_case(source, file, data, tmp_path)
        except BaseException:
            kept = ROOT / ".cache" / "fuzz" / hashlib.sha256(data).hexdigest()[:12] / file
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
            note(f"kept as {kept}")
            raise

    check()


@pytest.mark.parametrize("case", sorted(CORPUS.glob("*/*")), ids=lambda case: case.parent.name)
def test_corpus(layouts: dict[str, Path], tmp_path: Path, case: Path) -> None:
    """Inputs that once were a traceback, a hang or a wrong result."""
    shutil.copytree(layouts[case.name], tmp_path / "src")
    check_case(tmp_path / "src", case.name, case.read_bytes(), tmp_path)


def check_case(source: Path, file: str, data: bytes, scratch: Path) -> None:
    """The property, for the checkpoint ``source`` with ``data`` as its ``file``."""
    (source / file).write_bytes(data)
    for name in ("dst", "afresh", "expected"):
        shutil.rmtree(scratch / name, ignore_errors=True)
    with limits():
        try:
            report = pyfold.fold_checkpoint(source, scratch / "dst", ratio=0.5)
        except PyfoldError as error:
            refusal = str(error)
        else:
            refusal = ""
    if refusal:
        assert refusal.isprintable()  # one line, then, and none that a terminal obeys
        assert len(refusal) < 1100
        assert str(source) in refusal
        assert not (scratch / "dst").exists()
        return
    tensors = read_by_others(source, file, data)
    shutil.copytree(source, scratch / "afresh", ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json"))
    from safetensors.torch import save_file

    save_file({name: tensor.clone() for name, tensor in tensors.items()}, scratch / "afresh" / "model.safetensors")
    pyfold.fold_checkpoint(scratch / "afresh", scratch / "expected", ratio=0.5)
    folded, expected = tensors_of(scratch / "dst"), tensors_of(scratch / "expected")
    assert folded.keys() == expected.keys() == tensors.keys()
    for name, tensor in folded.items():
        assert tensor.dtype == expected[name].dtype
        assert (
            torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
            if tensor.dim()
            else tensor == expected[name]
        )
    config = json.loads((scratch / "dst" / "config.json").read_text())
    for group in report.groups:
        width = config.get("per_layer_config", {}).get(str(group.layer), config)["intermediate_size"]
        name = next(name for name in tensors if name.endswith(f"layers.{group.layer}.mlp.up_proj.weight"))
        assert folded[name].shape == (width, config["hidden_size"])
        assert tensors[name].shape == (group.width, config["hidden_size"])
    if file == "config.json" and loads(source):
        assert loads(scratch / "dst")


def read_by_others(source: Path, file: str, data: bytes) -> dict[str, torch.Tensor]:
    """The tensors as the format's own package reads them."""
    from safetensors.torch import load_file

    if file == BIN:
        try:
            return torch.load(source / BIN, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError):  # torch also wants numbers of disks, alignments and the like right
            return torch.load(rezipped(data), map_location="cpu", weights_only=True)
    if file == INDEX:
        shards = set(json.loads(data)["weight_map"].values())
        return {name: tensor for shard in shards for name, tensor in load_file(source / shard).items()}
    return load_file(source / "model.safetensors")


def rezipped(data: bytes) -> io.BytesIO:
    """A file of torch.save without anything that says nothing of tensors: the entries that hold them, zipped anew."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            name, extra = struct.unpack_from("<HH", data, member.header_offset + 26)
            begin = member.header_offset + 30 + name + extra
            if member.filename.rpartition("/")[2] not in (".format_version", ".storage_alignment", "serialization_id"):
                new.writestr(member.filename, data[begin : begin + member.file_size])
    out.seek(0)
    return out


def loads(folder: Path) -> bool:
    """Whether transformers loads a checkpoint, whatever it raises where it does not."""
    try:
        load(folder)
    except Exception:
        return False
    return True


@contextmanager
def limits() -> Iterator[None]:
    """``SECONDS`` of time and ``MEMORY`` more bytes of private memory than the process has now."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    data = next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_DATA, (data * 1024 + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGALRM, handler)


def test_the_limits_are_real() -> None:
    """Or the tests above would show nothing."""
    with pytest.raises(MemoryError), limits():
        bytearray(2 * MEMORY)
