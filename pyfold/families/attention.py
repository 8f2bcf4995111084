"""The heads of a decoder's attention: which tensors hold them, and what may be done to them that no output notices.

q_proj, k_proj and v_proj have head_dim rows a head, o_proj as many columns a query head; the query heads that share a KV head
follow one another. RoPE takes rows i and i + head_dim / 2 of a query or key for one complex number, and turns it by an angle
that depends on the position alone: whatever commutes with that, done to queries and keys, leaves their products as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

QUERY_HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"  # of config.json


class KVGroup(NamedTuple):
    """A KV head with its m query heads, d rows each.

    The last column of what reads the hidden states is its bias (0 where there is none): ``query`` (m, d, H + 1), ``key`` and
    ``value`` (d, H + 1). ``output``: (m, d, H), o_proj's columns as rows.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


class Freedom(NamedTuple):
    """What q_norm and k_norm leave: whether a pair of a key may grow as those of the queries shrink, and, (d / 2,) bool, which
    pairs may turn by any angle. The others may turn by half a circle."""

    scales: bool
    turns: Tensor


class Symmetry(NamedTuple):
    """Of a KV group: its query heads in another order (m,), pairs of keys times complex numbers (d / 2,), those of queries by
    the inverse, values times an invertible matrix (d, d), output by its inverse."""

    order: Tensor
    turn: Tensor
    mix: Tensor

    def applied(self, group: KVGroup) -> KVGroup:
        """The group, which says the same in other words."""
        return KVGroup(
            turned(group.query[self.order], 1 / self.turn.conj()),
            turned(group.key, self.turn),
            self.mix @ group.value,
            torch.linalg.inv(self.mix).T @ group.output[self.order],
        )


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

    def groups(self, tensors: Mapping[str, Tensor]) -> list[KVGroup]:
        """The KV groups, fp32."""
        d, m = self.head_dim, self.n_queries
        query, key, value = (
            _with_bias(tensors[name], tensors[bias] if bias else None).unflatten(0, (self.n_groups, -1, d))
            for name, bias in self._producers
        )
        output = tensors[self.output].float().T.unflatten(0, (self.n_groups, m, d))
        return [KVGroup(query[g], key[g, 0], value[g, 0], output[g]) for g in range(self.n_groups)]

    def tensors(self, groups: list[KVGroup]) -> dict[str, Tensor]:
        """The other way round, of any number of groups."""
        made = {self.output: torch.cat([group.output.flatten(0, 1) for group in groups]).T.contiguous()}
        for at, (name, bias) in enumerate(self._producers):
            rows = torch.cat([group[at].reshape(-1, group[at].shape[-1]) for group in groups])
            made[name] = rows[:, :-1].contiguous()
            if bias:
                made[bias] = rows[:, -1].contiguous()
        return made

    def freedom(self, tensors: Mapping[str, Tensor]) -> Freedom:
        """A norm of queries or keys undoes scales, and its gains are those of rows: turned rows would have others."""
        norms = [tensors[name] for name in (self.query_norm, self.key_norm) if name]
        turns = torch.ones(self.head_dim // 2, dtype=torch.bool)
        for gains in norms:
            first, second = gains.chunk(2)
            turns &= first == second
        return Freedom(not norms, turns)

    @property
    def _producers(self) -> tuple[tuple[str, str | None], ...]:
        return (self.query, self.query_bias), (self.key, self.key_bias), (self.value, self.value_bias)


def pairs(rows: Tensor) -> Tensor:
    """What RoPE takes for complex numbers: (..., d, D) -> (..., d / 2, D)."""
    return torch.complex(*rows.chunk(2, -2))


def turned(rows: Tensor, by: Tensor) -> Tensor:
    """Rows (..., d, D) whose pairs are multiplied by complex numbers (d / 2,)."""
    multiplied = pairs(rows) * by[:, None]
    return torch.cat([multiplied.real, multiplied.imag], -2)


def _with_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    column = torch.zeros(len(rows)) if bias is None else bias.float()
    return torch.cat([rows.float(), column[:, None]], 1)
