"""Decoder-only language models with a gated feed-forward network: LLaMA and those that share its tensor names.

``down_proj(act(gate_proj(x)) * up_proj(x))``: the rows of gate_proj and up_proj produce the intermediate units (their biases
ride along), the columns of down_proj consume them. x comes from an RMSNorm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pyfold.errors import PyfoldError
from pyfold.families.base import FoldGroup, prefix_of
from pyfold.io.checkpoint import Checkpoint

_WIDTH = "intermediate_size"


@dataclass(frozen=True)
class DecoderFamily:
    """See :class:`pyfold.families.base.Family`."""

    model_type: str
    class_prefix: str

    def fold_groups(self, checkpoint: Checkpoint) -> list[FoldGroup]:
        config_path = checkpoint.path / "config.json"
        hidden = _positive(checkpoint.config, "hidden_size", config_path)
        n_layers = _positive(checkpoint.config, "num_hidden_layers", config_path)
        overrides = {}
        for layer, values in checkpoint.config.get("per_layer_config", {}).items():
            if (
                not re.fullmatch("0|[1-9][0-9]{0,8}", layer)
                or int(layer) >= n_layers
                or not isinstance(values, dict)
                or not values.keys() <= {_WIDTH}
            ):
                raise PyfoldError(f"{config_path}: per_layer_config may say {_WIDTH} of a layer, got {layer!r}: {values!r:.60}")
            overrides[int(layer)] = values
        prefix, act = prefix_of(checkpoint), str(checkpoint.config.get("hidden_act", "silu"))
        groups = []
        for layer in range(n_layers):
            width = _positive({**checkpoint.config, **overrides.get(layer, {})}, _WIDTH, config_path)
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
