"""bench/make_checkpoint.py: real names and shapes, rows that fold as ``bench/rows.py``'s do, the same bytes, bounded memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, load, logits, run_cli, tensors_of, tree

import pyfold

MAKE = ROOT / "bench" / "make_checkpoint.py"


@pytest.fixture
def make_checkpoint(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(MAKE.parent)
    import make_checkpoint

    return make_checkpoint


def run(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, MAKE, *map(str, args)], capture_output=True, text=True, cwd=ROOT, **options)


def test_folds_and_loads(tmp_path: Path) -> None:
    made = run("--preset", "tiny", tmp_path / "src")
    assert (made.returncode, made.stderr) == (0, "")
    assert "123,712 parameters, 247,424 bytes in 1 files" in made.stdout
    assert run_cli("fold", tmp_path / "src", tmp_path / "dst", "--ratio", "0.2", "--quiet").returncode == 0
    for folder, width in ((tmp_path / "src", 172), (tmp_path / "dst", 137)):
        model = load(folder)
        assert model.config.intermediate_size == width
        assert logits(model, torch.arange(12)[None]).isfinite().all()


@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "llama-70b-1layer", "llama-405b-1layer", "small", "tiny"])
def test_names_and_shapes_are_those_of_transformers(make_checkpoint: ModuleType, name: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    preset = make_checkpoint.PRESETS[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**preset.config("float16")))
    assert preset.tensors() == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_parameters_are_as_many_as_published(make_checkpoint: ModuleType) -> None:
    layers = {"llama-7b": 32, "llama-13b": 40, "llama-70b-1layer": 80}
    counts = {
        name: sum(torch.Size(shape).numel() for shape in replace(preset, num_hidden_layers=layers[name]).tensors().values())
        for name, preset in make_checkpoint.PRESETS.items()
        if name in layers
    }
    assert counts == {"llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-70b-1layer": 68_976_648_192}


def test_bytes_depend_on_the_options_alone(
    make_checkpoint: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_checkpoint, "BLOCK", 1 << 12)  # many blocks for many cores
    tiny = make_checkpoint.PRESETS["tiny"]
    for cores in (1, 2, 5):
        monkeypatch.setattr(make_checkpoint.os, "cpu_count", lambda cores=cores: cores)
        make_checkpoint.make(tmp_path / f"{cores}", tiny, "fitted", "float16", seed=0)
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "5")
    for other in (("fitted", "float16", 1), ("planted", "float16", 0), ("gaussian", "float16", 0), ("fitted", "bfloat16", 0)):
        make_checkpoint.make(tmp_path / str(other), tiny, *other)
        assert tree(tmp_path / str(other))["model.safetensors"] != tree(tmp_path / "1")["model.safetensors"]


def test_shards_and_index(make_checkpoint: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "SHARD", 100_000)
    make_checkpoint.make(tmp_path / "src", make_checkpoint.PRESETS["tiny"], "fitted", "float16", seed=0)
    files = sorted(tmp_path.glob("src/*.safetensors"))
    assert len(files) == 3
    assert all(file.stat().st_size < 110_000 for file in files)
    index = json.loads((tmp_path / "src" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert load(tmp_path / "src").num_parameters() == index["metadata"]["total_parameters"]


@pytest.mark.parametrize("strip", [1 << 28, 5000])  # units of one strip; strips that end inside blocks
def test_layer_folds_as_one_draw_of_its_rows(
    make_checkpoint: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strip: int
) -> None:
    monkeypatch.setattr(make_checkpoint, "BLOCK", 100 * 3 * 64)
    monkeypatch.setattr(make_checkpoint, "STRIP", strip)
    n, hidden = 512, 64
    preset = replace(make_checkpoint.PRESETS["tiny"], intermediate_size=n, num_hidden_layers=1)
    make_checkpoint.make(tmp_path / "src", preset, "fitted", "float32", seed=0)
    tensors = tensors_of(tmp_path / "src")
    gate, up, down = (tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    x = torch.stack([gate, up, down.T], 2).reshape(n, 3 * hidden)
    whole = make_checkpoint.make_rows("fitted", n, 3 * hidden, n)
    # The second block, number by number; all blocks together, by what folding sees of them.
    seed = make_checkpoint._seed(0, "model.layers.0.mlp.", 100)
    assert torch.equal(x[100:200], make_checkpoint.make_rows("fitted", 100, 3 * hidden, 80, seed))
    made, drawn = (pyfold.cluster(rows, n_clusters=256) for rows in (x, whole))
    assert made.total_inertia == pytest.approx(drawn.total_inertia, rel=0.03)
    assert made.inertia / made.total_inertia == pytest.approx(drawn.inertia / drawn.total_inertia, rel=0.03)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--preset", "llama-8b", "new"), "invalid choice: 'llama-8b'"),
        (("new",), "--preset"),
        (("--preset", "tiny"), "DIR"),
        (("--preset", "tiny", "--layers", "0", "new"), "--layers: expected a positive number, got 0"),
        (("--preset", "tiny", "--rows", "real", "new"), "invalid choice: 'real'"),
        (("--preset", "tiny", "--dtype", "int8", "new"), "invalid choice: 'int8'"),
        (("--preset", "tiny", "full"), "full: not an empty folder"),
        (("--preset", "tiny", "full/file"), "file: not an empty folder"),
        (("--preset", "tiny", "full/file/new"), "file: a file, where"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(tmp_path: Path, args: tuple[str, ...], says: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = tree(tmp_path)
    done = run(*(tmp_path / arg if arg.startswith(("new", "full")) else arg for arg in args))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("make_checkpoint.py: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr
    assert tree(tmp_path) == before


def test_free_disk_is_looked_at_first(tmp_path: Path) -> None:
    done = run("--preset", "llama-70b-1layer", "--layers", "100000", tmp_path / "new")
    assert done.returncode == 1
    assert "bytes and " in done.stderr
    assert done.stderr.endswith("are free\n")
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run("--preset", "tiny", tmp_path / "new", preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.endswith("cannot write: File too large\n")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded(make_checkpoint: ModuleType, tmp_path: Path) -> None:
    import child

    little, much = (
        child.run([sys.executable, MAKE, "--preset", preset, "--dtype", "float32", tmp_path / preset])
        for preset in ("tiny", "small")
    )
    assert (little.returncode, much.returncode) == (0, 0)
    size = sum(file.stat().st_size for file in (tmp_path / "small").iterdir())
    assert much.peak_rss - little.peak_rss < size / 2, f"{(much.peak_rss - little.peak_rss) >> 20} MiB for {size >> 20} MiB"
