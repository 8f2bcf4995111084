"""A preset's name -> a LLaMA checkpoint of exact shapes (config.json, safetensors shards of 5 GB, index) of random weights.

    python bench/make_checkpoint.py --preset llama-7b|llama-13b|llama-70b-1layer|llama-405b-1layer|small|tiny DIR

The features of a feed-forward unit (its gate row, up row and down column) are rows of ``rows.py``: by default with the norms
and the spectrum of SmolLM2's, i.i.d. Gaussian or planted near-duplicates on request. No row is used twice. A block of units is
one call of ``make_rows`` with a seed of its own: fitted rows are independent of one another, and the directions of their signal
are the same coordinate axes in every call, so blocks are distributed as one draw of the whole layer is. (Planted
near-duplicates lie in one block.) Feature j goes to tensor j mod 3, so that each of the three has its share of the signal.
All other weights are N(0, 0.02²), norms are ones.

The bytes depend on the options (and on torch's generator), not on the number of cores. Peak memory below 1 GiB: blocks ahead of
the writer are bounded, and the columns of down_proj are gathered in strips so that the file is written in long pieces. Exit
codes as pyfold's.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from rows import KINDS, make_rows
from torch import Tensor
from tqdm import tqdm

from pyfold.deliver.huggingface import index
from pyfold.io.checkpoint import INDEX
from pyfold.io.safetensors import Shard, dtype_name
from pyfold.plan import DTYPES, Plan, split_shards

BLOCK = 1 << 22  # numbers a block: 16 MiB in fp32, 341 units of LLaMA-7B
STRIP = 1 << 28  # bytes of down_proj gathered before they are written: all of a LLaMA-7B layer, half of a LLaMA-70B one
WORKERS = 4  # at most, for each holds some 60 MiB; one makes 0.13 GB/s of fp16 (Xeon, 2.6 GHz)
SHARD = 5 * 10**9  # bytes a file
KEPT = 0.8  # planted: clusters / units

# Tensor, first element of it, values.
Piece = tuple[str, int, Tensor]


@dataclass(frozen=True)
class Preset:
    """Shapes of a LLaMA, as config.json names them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000

    def config(self, dtype: str) -> dict[str, object]:
        """config.json, with the values of LLaMA-2 for what shapes do not say."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **vars(self),
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 4096,
            "mlp_bias": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, in the order of the model."""
        hidden, width = self.hidden_size, self.intermediate_size
        shared = hidden // self.num_attention_heads * self.num_key_value_heads
        layer = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (shared, hidden),
            "self_attn.v_proj": (shared, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (width, hidden),
            "mlp.up_proj": (width, hidden),
            "mlp.down_proj": (hidden, width),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        return {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            **{
                f"model.layers.{i}.{name}.weight": shape for i in range(self.num_hidden_layers) for name, shape in layer.items()
            },
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocab_size, hidden),
        }


PRESETS = {
    "llama-7b": Preset(4096, 11008, 32, 32, 32),
    "llama-13b": Preset(5120, 13824, 40, 40, 40),
    "llama-70b-1layer": Preset(8192, 28672, 1, 64, 8),
    "llama-405b-1layer": Preset(16384, 53248, 1, 128, 8, vocab_size=8000),  # of its 128,256 tokens
    "small": Preset(1024, 2752, 8, 8, 8, vocab_size=8000),  # a quarter of llama-7b each way
    "tiny": Preset(64, 172, 2, 4, 2, vocab_size=256),
}


def make(folder: Path, preset: Preset, rows: str, dtype: str, seed: int) -> Plan:
    """Write the checkpoint to ``folder``, complete or not at all; returns its tensors and shards."""
    tensors = {name: (dtype_name(getattr(torch, dtype)), shape) for name, shape in preset.tensors().items()}
    plan = Plan([], {}, tensors, split_shards(tensors, SHARD), [])
    _check_room(folder, plan.nbytes)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    unfinished.mkdir(parents=True)
    try:
        _write_weights(unfinished, plan, _pieces(preset, rows, getattr(torch, dtype), seed))
        if len(plan.shards) > 1:
            (unfinished / INDEX).write_text(json.dumps(index(plan), indent=2) + "\n")
        (unfinished / "config.json").write_text(json.dumps(preset.config(dtype), indent=2) + "\n")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return plan


def _check_room(folder: Path, n_bytes: int) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: not an empty folder; choose another")
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing}: a file, where {folder} needs a folder")
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise OSError(errno.ENOSPC, f"the checkpoint needs {n_bytes:,} bytes and {free:,} are free", str(existing))


def _write_weights(folder: Path, plan: Plan, pieces: Iterator[Piece]) -> None:
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc=folder.name, disable=None))
        shards = {}
        for file, names in plan.shards.items():
            shard = Shard(folder / file, {name: plan.tensors[name] for name in names})
            stack.callback(shard.close)
            shards |= dict.fromkeys(names, shard)
        for name, at, values in pieces:
            shards[name].write(name, values, at * values.element_size())
            bar.update(values.nbytes)
        for names in plan.shards.values():
            shards[names[0]].sync()


def _pieces(preset: Preset, rows: str, dtype: torch.dtype, seed: int) -> Iterator[Piece]:
    """Every tensor, piece by piece, in the order of the file as far as the blocks allow."""
    jobs = _jobs(preset, rows, dtype, seed)
    hidden, width = preset.hidden_size, preset.intermediate_size
    strip = min(width, max(1, STRIP // (hidden * dtype.itemsize)))
    columns = torch.empty((hidden, strip), dtype=dtype)
    for name, at, values in _ahead(jobs):
        if not name.endswith("down_proj.weight"):
            yield name, at, values
            continue
        # ``at`` is the block's first unit, its columns are ``values``; a strip may end inside of a block.
        while values.shape[1]:
            inside = at % strip
            part = values[:, : strip - inside]
            columns[:, inside : inside + part.shape[1]] = part
            at, values = at + part.shape[1], values[:, part.shape[1] :]
            if at % strip == 0 or at == width:
                first = (at - 1) // strip * strip
                for row in range(hidden):
                    yield name, row * width + first, columns[row, : at - first]


def _jobs(preset: Preset, rows: str, dtype: torch.dtype, seed: int) -> Iterator[Callable[[], list[Piece]]]:
    """What makes the pieces, none of which depends on another."""
    for name, shape in preset.tensors().items():
        size = prod(shape)
        if name.endswith("gate_proj.weight"):
            block = max(1, BLOCK // (3 * preset.hidden_size))
            for first in range(0, preset.intermediate_size, block):
                n = min(block, preset.intermediate_size - first)
                yield partial(_units, name.removesuffix("gate_proj.weight"), first, n, preset.hidden_size, rows, dtype, seed)
        elif "mlp" not in name:
            for at in range(0, size, BLOCK):
                yield partial(_others, name, at, min(BLOCK, size - at), len(shape) == 1, dtype, seed)


def _units(mlp: str, first: int, n: int, hidden: int, rows: str, dtype: torch.dtype, seed: int) -> list[Piece]:
    """Units ``first`` to ``first + n`` of a feed-forward layer; of down_proj their columns, at their first unit."""
    x = make_rows(rows, n, 3 * hidden, max(1, round(KEPT * n)), _seed(seed, mlp, first))
    gate, up, down = x.to(dtype).view(n, hidden, 3).unbind(2)
    return [
        (f"{mlp}gate_proj.weight", first * hidden, gate.contiguous()),
        (f"{mlp}up_proj.weight", first * hidden, up.contiguous()),
        (f"{mlp}down_proj.weight", first, down.T.contiguous()),
    ]


def _others(name: str, at: int, n: int, norm: bool, dtype: torch.dtype, seed: int) -> list[Piece]:
    if norm:
        return [(name, at, torch.ones(n, dtype=dtype))]
    generator = torch.Generator().manual_seed(_seed(seed, name, at))
    return [(name, at, torch.randn(n, generator=generator).mul_(0.02).to(dtype))]


def _seed(seed: int, name: str, at: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name} {at}".encode()).digest()[:7], "little")


def _ahead(jobs: Iterator[Callable[[], list[Piece]]]) -> Iterator[Piece]:
    """The results of ``jobs`` in order, made while the caller writes; one more than the workers in memory."""
    workers = min(os.cpu_count() or 1, WORKERS)
    waiting: deque[Future[list[Piece]]] = deque()
    # One thread of torch in each: with more, the last bits of a norm would depend on how many.
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def main() -> None:
    parser = _Parser(description="write a LLaMA checkpoint of random weights that folds as a trained one does")
    parser.add_argument("folder", metavar="DIR", type=Path, help="absent or empty")
    parser.add_argument("--preset", required=True, choices=PRESETS)
    parser.add_argument("--layers", type=int, metavar="N", help="instead of the preset's")
    parser.add_argument("--rows", default="fitted", choices=KINDS, help="features of the feed-forward units (default fitted)")
    parser.add_argument("--dtype", default="float16", choices=[name for name in DTYPES if name != "keep"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    if options.layers is not None:
        if options.layers < 1:
            parser.error(f"--layers: expected a positive number, got {options.layers}")
        preset = Preset(**{**vars(preset), "num_hidden_layers": options.layers})
    started = time.perf_counter()
    try:
        plan = make(options.folder, preset, options.rows, options.dtype, options.seed)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error.filename}: {error.strerror}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    size = f"{plan.n_parameters:,} parameters, {plan.nbytes:,} bytes in {len(plan.shards)} files"
    print(f"{options.folder}: {size}, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
