"""KV groups: what the heads of a layer are, and what may be done to them that no output notices.

RoPE takes rows i and i + head_dim / 2 of a query or key for one complex number, and turns it by an angle that depends on the
position alone: whatever commutes with that, done to queries and keys, leaves their products as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyfold.families.attention import Attention


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


def groups_of(attention: Attention, tensors: Mapping[str, Tensor]) -> list[KVGroup]:
    """The KV groups, fp32."""
    d, m = attention.head_dim, attention.n_queries
    query, key, value = (
        _with_bias(tensors[name], tensors[bias] if bias else None).unflatten(0, (attention.n_groups, -1, d))
        for name, bias in attention.producers
    )
    output = tensors[attention.output].float().T.unflatten(0, (attention.n_groups, m, d))
    return [KVGroup(query[g], key[g, 0], value[g, 0], output[g]) for g in range(attention.n_groups)]


def weights_of(attention: Attention, groups: list[KVGroup]) -> dict[str, Tensor]:
    """The other way round, of any number of groups."""
    made = {attention.output: torch.cat([group.output.flatten(0, 1) for group in groups]).T.contiguous()}
    for at, (name, bias) in enumerate(attention.producers):
        rows = torch.cat([group[at].reshape(-1, group[at].shape[-1]) for group in groups])
        made[name] = rows[:, :-1].contiguous()
        if bias:
            made[bias] = rows[:, -1].contiguous()
    return made


def freedom_of(attention: Attention, tensors: Mapping[str, Tensor]) -> Freedom:
    """A norm of queries or keys undoes scales, and its gains are those of rows: turned rows would have others."""
    norms = [tensors[name] for name in (attention.query_norm, attention.key_norm) if name]
    turns = torch.ones(attention.head_dim // 2, dtype=torch.bool)
    for gains in norms:
        first, second = gains.chunk(2)
        turns &= first == second
    return Freedom(not norms, turns)


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
