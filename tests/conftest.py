"""Shared parts: the backends under test, SmolLM2-135M, tiny checkpoints of every family, the command line in a process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyfold.calibration import LENGTH, SEQUENCES
from pyfold.function_fold import HeadsFold, UnitsFold
from pyfold.io.checkpoint import INDEX
from pyfold.io.safetensors import read_bytes
from pyfold.ops import cpu
from pyfold.report import GroupReport
from pyfold.weight_fold import WeightFold

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / ".cache" / "smollm2"
UP = "model.layers.1.mlp.up_proj.weight"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BACKENDS = [f"cpu:{level}" for level in cpu.simd_levels()]

Fold = WeightFold | UnitsFold | HeadsFold

if not torch.cuda.is_available():  # Triton's kernels then run in its interpreter, which must be known before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every SIMD level of the C++ backend that this machine runs."""
    return request.param


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real language model as a sharded checkpoint; made once and kept in .cache."""
    subprocess.run([sys.executable, ROOT / "bench" / "smollm2.py", SMOLLM2], check=True, capture_output=True)
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2_features(smollm2: Path) -> dict[int, torch.Tensor]:
    """Feed-forward features of six real layers: (1536, 1728) rows [gate | up | down column], bf16."""
    from pyfold.io.checkpoint import open_checkpoint
    from pyfold.io.safetensors import Reader

    tensors = open_checkpoint(smollm2).tensors
    features = {}
    with Reader() as reader:
        for layer in (0, 7, 14, 20, 25, 29):
            gate, up, down = (
                reader.read(tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"]) for name in ("gate", "up", "down")
            )
            features[layer] = torch.cat([gate, up, down.T], 1)
    return features


def tiny_model(family: str, *, n_layers: int = 3, width: int = 48, seed: int = 0, **options: Any) -> Any:
    """A random model of a family: hidden 32, grouped-query attention, norms and biases away from their defaults."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    prefix = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 128,
    }
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, **tokens, **options})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


@pytest.fixture(scope="module")
def whole_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many words as calibration takes."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    words = torch.randint(3, 64, (SEQUENCES * LENGTH,), generator=torch.Generator().manual_seed(0))
    file.write_text(" ".join(f"w{word}" for word in words.tolist()))
    return file


def count_reads(source: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each read of a source's files, from now on."""
    sizes: list[int] = []

    def counted(file: int, path: Path, offset: int, buffer: memoryview) -> None:
        if path.parent == source:
            sizes.append(len(buffer))
        read_bytes(file, path, offset, buffer)

    monkeypatch.setattr("pyfold.io.safetensors.read_bytes", counted)
    return sizes


def stop_before(kind: type[Fold], n: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ctrl-C in the place of the n-th fold of a kind, once; what came before is on the disk. Gives the names of all that
    begin."""
    whole, begun = kind.run, list[str]()

    def run(fold: Fold) -> GroupReport:
        part = fold.attention if isinstance(fold, HeadsFold) else fold.group
        begun.append(part.name)
        if len(begun) == n + 1:
            raise KeyboardInterrupt
        report = whole(fold)
        fold.stages.behind.wait(0)
        return report

    monkeypatch.setattr(kind, "run", run)
    return begun


def tiny_checkpoint(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """``tiny_model`` saved in several shards."""
    tiny_model(family, **options).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


def with_tokenizer(folder: Path) -> Path:
    """Words w3 to w63, and a beginning and an end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    words = torch.randint(3, 64, (16 * 255 + 7,), generator=torch.Generator().manual_seed(0))
    file.write_text(" ".join(f"w{word}" for word in words.tolist()))
    return file


def heed_interrupts() -> None:
    """For a process to be: SIGINT stops it, also where a shell in the background has had it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def prompt(length: int = 24) -> torch.Tensor:
    return torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read by the safetensors package."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash; pyfold-run.json is outside a result's identity."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "pyfold-run.json"
    }


def write_synthetic(folder: Path, n_layers: int, width: int, hidden: int, dtype: str = "F32") -> Path:
    """A LLaMA-shaped checkpoint of any size, written a tensor at a time."""
    from pyfold.io.safetensors import Shard, torch_dtype

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for layer in range(n_layers):
        mlp = f"model.layers.{layer}.mlp."
        layout = {
            f"{mlp}gate_proj.weight": (dtype, (width, hidden)),
            f"{mlp}up_proj.weight": (dtype, (width, hidden)),
            f"{mlp}down_proj.weight": (dtype, (hidden, width)),
            f"model.layers.{layer}.post_attention_layernorm.weight": (dtype, (hidden,)),
        }
        name = f"model-{layer + 1:05d}-of-{n_layers:05d}.safetensors"
        shard = Shard(folder / name, layout)
        for tensor, (_, shape) in layout.items():
            shard.write(tensor, torch.randn(shape, generator=generator).to(torch_dtype(dtype)))
            weight_map[tensor] = name
        shard.close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": n_layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_cli(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """``python -m pyfold`` in a process of its own."""
    command = [sys.executable, "-m", "pyfold", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, **options)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA checkpoint in several shards."""
    return tiny_checkpoint(tmp_path_factory.mktemp("cli") / "src")


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def patch_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def link_as_the_hub_does(source: Path, repo: Path) -> tuple[Path, Path]:
    """A checkpoint as the Hugging Face cache keeps it: (blobs, a snapshot of relative links to them)."""
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0123abcd"
    shutil.copytree(source, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return blobs, snapshot


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    from safetensors.torch import load_file, save_file

    shard = shard_of(folder, UP)
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)
    return shard


def check_refused(code: int, error: str, names: list[str]) -> None:
    assert code == 2, error
    assert error.startswith("pyfold: ")
    assert error.count("\n") == 1, error
    for name in names:
        assert name in error, error
