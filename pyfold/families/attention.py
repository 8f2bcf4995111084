"""The heads of a decoder's attention: which tensors hold them.

q_proj, k_proj and v_proj have head_dim rows a head, o_proj as many columns a query head; the query heads that share a KV head
follow one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

QUERY_HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"  # of config.json


@dataclass(frozen=True)
class Attention:
    """The attention of one layer: G KV heads, m query heads each, of ``head_dim`` rows; its tensors by their full names.

    A bias or norm that there is not is None. Units: KV groups, and all that belongs to each.
    """

    layer: int
    n_groups: int
    n_queries: int
    head_dim: int
    query: str
    key: str
    value: str
    output: str
    query_bias: str | None = None
    key_bias: str | None = None
    value_bias: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None

    @property
    def name(self) -> str:
        """What people call it: ``layers.5.attn``."""
        return f"layers.{self.layer}.attn"

    @property
    def names(self) -> tuple[str, ...]:
        """All its tensors, norms too."""
        names = (self.query, self.key, self.value, self.output, self.query_bias, self.key_bias, self.value_bias)
        return tuple(name for name in (*names, self.query_norm, self.key_norm) if name)

    def shape_at(self, n_groups: int, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one of its tensors once there are ``n_groups`` KV heads."""
        if name in (self.query_norm, self.key_norm):
            return shape
        axis = 1 if name == self.output else 0
        return tuple(size // self.n_groups * n_groups if i == axis else size for i, size in enumerate(shape))

    def config(self, n_groups: int) -> dict[str, int]:
        """What config.json says of ``n_groups`` KV heads."""
        return {QUERY_HEADS: n_groups * self.n_queries, KV_HEADS: n_groups}

    @property
    def producers(self) -> tuple[tuple[str, str | None], ...]:
        """Weight and bias of queries, keys and values."""
        return (self.query, self.query_bias), (self.key, self.key_bias), (self.value, self.value_bias)


def differ(config: dict[str, Any]) -> bool:
    """Whether config.json says heads of single layers."""
    return any(not {QUERY_HEADS, KV_HEADS}.isdisjoint(values) for values in config.get("per_layer_config", {}).values())
