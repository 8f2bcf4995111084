"""Decoder-only language models with a gated feed-forward network: LLaMA and those that share its tensor names.

``down_proj(act(gate_proj(x)) * up_proj(x))``: the rows of gate_proj and up_proj produce the intermediate units (their biases
ride along), the columns of down_proj consume them. x comes from an RMSNorm. Of attention: the layout of its heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyfold.errors import PyfoldError
from pyfold.families.attention import KV_HEADS, QUERY_HEADS, Attention
from pyfold.families.base import FoldGroup, prefix_of
from pyfold.io.checkpoint import Checkpoint

_WIDTH = "intermediate_size"


@dataclass(frozen=True)
class DecoderFamily:
    """See :class:`pyfold.families.base.Family`."""

    model_type: str
    class_prefix: str
    gguf: str
    any_heads: str = ""

    def fold_groups(self, checkpoint: Checkpoint) -> list[FoldGroup]:
        config_path = checkpoint.path / "config.json"
        hidden = _positive(checkpoint.config, "hidden_size", config_path)
        prefix, act = prefix_of(checkpoint), str(checkpoint.config.get("hidden_act", "silu"))
        groups = []
        for layer, config in enumerate(_layer_configs(checkpoint)):
            width = _positive(config, _WIDTH, config_path)
            at = f"{prefix}layers.{layer}."
            mlp, gain = f"{at}mlp.", f"{at}post_attention_layernorm.weight"
            producers = (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
            consumers = (f"{mlp}down_proj.weight",)
            riders = tuple(name for name in (f"{mlp}gate_proj.bias", f"{mlp}up_proj.bias") if name in checkpoint.tensors)
            expected = {
                **dict.fromkeys(producers, (width, hidden)),
                **dict.fromkeys(consumers, (hidden, width)),
                **dict.fromkeys(riders, (width,)),
                gain: (hidden,),
            }
            for name, shape in expected.items():
                _check_tensor(checkpoint, name, shape)
            groups.append(FoldGroup(f"layers.{layer}.mlp", layer, width, _WIDTH, producers, consumers, riders, gain, act))
        return groups

    def attention(self, checkpoint: Checkpoint) -> list[Attention]:
        config_path = checkpoint.path / "config.json"
        hidden = _positive(checkpoint.config, "hidden_size", config_path)
        prefix = prefix_of(checkpoint)
        found = []
        for layer, config in enumerate(_layer_configs(checkpoint)):
            heads = _positive(config, QUERY_HEADS, config_path)
            groups = heads if config.get(KV_HEADS) is None else _positive(config, KV_HEADS, config_path)
            d = hidden // heads if config.get("head_dim") is None else _positive(config, "head_dim", config_path)
            if heads % groups or d % 2:
                raise PyfoldError(f"{config_path}: {heads} query heads of {d} rows do not share {groups} KV heads evenly")
            at = f"{prefix}layers.{layer}.self_attn."
            weights = [f"{at}{part}_proj.weight" for part in "qkvo"]
            others = (f"{at}{part}" for part in ("q_proj.bias", "k_proj.bias", "v_proj.bias", "q_norm.weight", "k_norm.weight"))
            given = [name if name in checkpoint.tensors else None for name in others]
            rows = (heads * d, groups * d, groups * d)
            shapes = [*((n, hidden) for n in rows), (hidden, heads * d), *((n,) for n in rows), (d,), (d,)]
            for name, shape in zip((*weights, *given), shapes, strict=True):
                if name:
                    _check_tensor(checkpoint, name, shape)
            query, key, value, output = weights
            found.append(Attention(layer, groups, heads // groups, d, query, key, value, output, *given))
        return found


def _layer_configs(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """What config.json says of every layer, one at a time: it may say that there are any number."""
    path = checkpoint.path / "config.json"
    n_layers = _positive(checkpoint.config, "num_hidden_layers", path)
    overrides = {}
    for layer, values in checkpoint.config.get("per_layer_config", {}).items():
        if (
            not re.fullmatch("0|[1-9][0-9]{0,8}", layer)
            or int(layer) >= n_layers
            or not isinstance(values, dict)
            or not values.keys() <= {_WIDTH, QUERY_HEADS, KV_HEADS}
        ):
            raise PyfoldError(
                f"{path}: per_layer_config may say {_WIDTH}, {QUERY_HEADS} and {KV_HEADS} of a layer, got {layer!r}: "
                f"{values!r:.60}"
            )
        overrides[int(layer)] = values
    for i in range(n_layers):
        yield {**checkpoint.config, **overrides.get(i, {})}


def _positive(config: dict[str, Any], key: str, path: object) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PyfoldError(f"{path}: expected a positive integer for {key}, got {value!r}")
    return value


def _check_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise PyfoldError(f"{checkpoint.path}: tensor '{name}' is in no shard or index, though config.json asks for it")
    if info.shape != shape:
        raise PyfoldError(
            f"{info.path}: tensor '{name}' has shape {list(info.shape)}, but config.json says {list(shape)}; one of them is "
            "from another model"
        )
    if info.dtype not in ("F32", "F16", "BF16"):
        raise PyfoldError(f"{info.path}: tensor '{name}' is {info.dtype}; pyfold folds F32, F16 and BF16 weights")
