"""KV groups folded by what they do on some tokens: some stand, the others lend them their output columns, o_proj is regressed.

A group's queries, keys and values stay as they are or go: mixed ones attend to nothing well, however they are aligned. The
group goes whose output the others make up for best. The one whose queries and keys are most like its own takes its columns of
o_proj in, once aligned, as far as its values say the same; and all of o_proj shrinks to that by ridge regression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyfold.families.activations import BATCH
from pyfold.families.attention import Attention
from pyfold.families.kv_groups import Freedom, KVGroup, freedom_of, groups_of, weights_of
from pyfold.function_metric import compensate, moments
from pyfold.heads import alignment, balanced, distance

_SHRINK = 0.03  # λ where groups are chosen: with more of it those of least energy would go
_JITTER = 1e-6  # of a mean diagonal: more than rounding

Say = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


class FoldedHeads(NamedTuple):
    """The layer's tensors, fp32; of which groups each is made, the one that stands first; how far those that go attend from
    where these do, in sum; λ; the share of the output's energy that is lost, on tokens held out."""

    tensors: dict[str, Tensor]
    clusters: list[list[int]]
    distance: float
    ridge: float
    error: float


def fold_heads(
    attention: Attention,
    tensors: Mapping[str, Tensor],
    read: Callable[[], Iterable[Tensor]],
    say: Say,
    n_groups: int,
    *,
    backend: str,
) -> FoldedHeads:
    """Fold the KV groups of a layer into ``n_groups``, fewer than there are.

    ``read()``: what attention reads, batches (sequences, length, H). ``say(x, tensors)``: what heads of such tensors say of it,
    (sequences, length, heads x head_dim).

    Raises ValueError where they say nothing.
    """
    groups, freedom = groups_of(attention, tensors), freedom_of(attention, tensors)
    consumer = tensors[attention.output].float()
    seen = moments((say(x, tensors) for x in read()), backend)
    energy = float((seen.fitted + seen.held_out).diagonal().max())
    if not 0 < energy < float("inf"):
        raise ValueError(f"the heads' outputs have energies up to {energy:g}")
    compared = as_said(groups, read_moments(read(), backend))
    words = [balanced(group, freedom) for group in compared]
    compared = [word.applied(group) for word, group in zip(words, compared, strict=True)]
    clusters = choose(consumer, seen.fitted + seen.held_out, compared, freedom, n_groups)
    made, apart = [], 0.0
    for stands, *others in clusters:
        output = groups[stands].output
        for other in others:
            here = compared[stands]
            there = alignment(here, compared[other], freedom).applied(compared[other])
            share = (here.value * there.value).sum() / here.value.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
            output = output + share * (words[stands].mix.T @ there.output)  # which hears values as they are balanced
            apart += distance(here, compared[other], freedom)
        made.append(groups[stands]._replace(output=output))
    folded = weights_of(attention, made)
    size = attention.n_queries * attention.head_dim
    kept = torch.cat([torch.arange(stands * size, (stands + 1) * size) for stands, *_ in clusters])
    folded[attention.output], ridge, error = compensate(consumer, seen, kept, folded[attention.output])
    return FoldedHeads(folded, clusters, apart, ridge, error)


def nbytes(attention: Attention, hidden: int) -> int:
    """Memory that folding takes at most: the layer's tensors thrice in fp32, what hidden states and heads say of a batch; and
    moments, of hidden states in fp64, and of units, with what choosing among these makes of them."""
    m, d = attention.n_queries, attention.head_dim
    rows, units = attention.n_groups * (2 * m + 2) * d, attention.n_groups * m * d
    moments = 3 * 8 * (hidden + 1) ** 2 + 6 * 4 * units * units
    return 3 * 4 * rows * hidden + 2 * 4 * BATCH * (rows + hidden) + moments


def read_moments(read: Iterable[Tensor], backend: str) -> Tensor:
    """``Σ x xᵀ``, (H + 1, H + 1), of what attention reads and a one."""
    seen = moments((torch.nn.functional.pad(x.float(), (0, 1), value=1.0) for x in read), backend)
    return seen.fitted + seen.held_out


def as_said(groups: list[KVGroup], read: Tensor) -> list[KVGroup]:
    """The groups with rows as :mod:`pyfold.heads` compares them; ``read``: of what they read."""
    mean = read.double() / float(read[-1, -1])
    factor = _factor(mean, _JITTER * float(mean.diagonal().mean())).float()
    return [KVGroup(group.query @ factor, group.key @ factor, group.value @ factor, group.output) for group in groups]


def _factor(square: Tensor, ridge: float) -> Tensor:
    """Cholesky's, with the least of ridge, 10 ridge ... on the diagonal that outweighs how products were rounded."""
    for _ in range(5):
        factor, failed = torch.linalg.cholesky_ex(square + ridge * torch.eye(len(square), dtype=square.dtype))
        if not failed:
            return factor
        ridge *= 10
    return torch.linalg.cholesky(square + ridge * torch.eye(len(square), dtype=square.dtype))


def choose(consumer: Tensor, c: Tensor, compared: list[KVGroup], freedom: Freedom, n_groups: int) -> list[list[int]]:
    """Clusters of groups, the one that stands first. ``c``: Σ h hᵀ (N, N) of what their heads say.

    Where columns V are regressed with A = C + λ diag(C), V_b ((A⁻¹)_bb)⁻¹ V_bᵀ is lost with a group b (Hassibi and Stork,
    "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992, for blocks).
    """
    size = len(c) // len(compared)
    scale = c.diagonal().clamp(min=torch.finfo(c.dtype).tiny).sqrt()
    inverse = torch.cholesky_inverse(_factor(c / scale / scale[:, None], _SHRINK))
    heard = consumer * scale
    clusters = {g: [g] for g in range(len(compared))}

    def units(g: int) -> slice:
        return slice(g * size, (g + 1) * size)

    def lost(g: int) -> float:
        at = units(g)
        return float((torch.linalg.solve(inverse[at, at], heard[:, at].T) * heard[:, at].T).sum())

    while len(clusters) > n_groups:
        goes = min(clusters, key=lost)
        at, members = units(goes), clusters.pop(goes)
        step = torch.linalg.solve(inverse[at, at], inverse[at])
        heard = heard - heard[:, at] @ step
        inverse = inverse - inverse[:, at] @ step
        nearest = min(clusters, key=lambda g: distance(compared[g], compared[goes], freedom))
        clusters[nearest] += members
    return list(clusters.values())
