"""KV groups folded by what they do on some tokens: some stand, the others lend them their values, o_proj is regressed.

A group's queries and keys stay as they are or go: mixed ones attend to nothing well, however they are aligned. The group goes
whose output the others make up for best. The one whose queries and keys are most like its own, once aligned, takes its values
in: of all values that it now attends to, as many directions stay as a head has rows, those of which most is heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyfold.families.activations import BATCH
from pyfold.families.attention import Attention
from pyfold.families.kv_groups import Freedom, KVGroup, freedom_of, groups_of, weights_of
from pyfold.function_metric import Moments, compensate, moments
from pyfold.heads import alignment, balanced, distance, roots

_SHRINK = 0.03  # λ where groups are chosen: with more of it those of least energy would go
_TINY = torch.finfo(torch.float32).tiny
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
    said = _sum(moments((say(x, tensors) for x in read()), backend))
    energy = float(said.diagonal().max())
    if not 0 < energy < float("inf"):
        raise ValueError(f"the heads' outputs have energies up to {energy:g}")
    compared = [balanced(group, freedom).applied(group) for group in as_said(groups, read_moments(read(), backend))]
    clusters = choose(consumer, said, compared, freedom, n_groups)
    del said
    orders, apart, lent = {}, 0.0, []
    for stands, *others in clusters:
        for other in others:
            orders[other] = alignment(compared[stands], compared[other], freedom).order
            apart += distance(compared[stands], compared[other], freedom)
            lent.append(groups[stands]._replace(value=groups[other].value))
    seen = moments((say(x, weights_of(attention, [*groups, *lent])) for x in read()), backend)
    made, ridge, error = _Fold(attention, groups, consumer, seen, clusters, orders).run()
    return FoldedHeads(weights_of(attention, made), clusters, apart, ridge, error)


def nbytes(attention: Attention, n_groups: int, hidden: int) -> int:
    """Memory that folding takes at most: the layer's tensors thrice in fp32, what hidden states and heads say of a batch, and
    moments: of hidden states in fp64, of units with what is lent, and of those cut."""
    m, d = attention.n_queries, attention.head_dim
    going = attention.n_groups - n_groups
    rows = (attention.n_groups + going) * (2 * m + 2) * d
    lent, cut = (attention.n_groups + going) * m * d, (attention.n_groups + n_groups) * m * d
    moments = 3 * 4 * (lent * lent + 2 * cut * cut)
    return 3 * 4 * rows * hidden + 2 * 4 * BATCH * (rows + hidden) + 3 * 8 * (hidden + 1) ** 2 + moments


def read_moments(read: Iterable[Tensor], backend: str) -> Tensor:
    """``Σ x xᵀ``, (H + 1, H + 1), of what attention reads and a one."""
    return _sum(moments((torch.nn.functional.pad(x.float(), (0, 1), value=1.0) for x in read), backend))


def as_said(groups: list[KVGroup], read: Tensor) -> list[KVGroup]:
    """The groups with rows as :mod:`pyfold.heads` compares them; ``read``: of what they read."""
    mean = read.double() / float(read[-1, -1])
    mean += _JITTER * float(mean.diagonal().mean()) * torch.eye(len(mean))
    factor = torch.linalg.cholesky(mean).float()
    return [KVGroup(group.query @ factor, group.key @ factor, group.value @ factor, group.output) for group in groups]


def choose(consumer: Tensor, c: Tensor, compared: list[KVGroup], freedom: Freedom, n_groups: int) -> list[list[int]]:
    """Clusters of groups, the one that stands first. ``c``: Σ h hᵀ (N, N) of what their heads say.

    Where columns V are regressed with A = C + λ diag(C), V_b ((A⁻¹)_bb)⁻¹ V_bᵀ is lost with a group b (Hassibi and Stork,
    "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992, for blocks).
    """
    size = len(c) // len(compared)
    scale = c.diagonal().clamp(min=torch.finfo(c.dtype).tiny).sqrt()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(c / scale / scale[:, None] + _SHRINK * torch.eye(len(c))))
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


class _Fold(NamedTuple):
    """Groups with their clusters: o_proj regressed on those that stand and on what they say with lent values; these values cut
    to as many directions as a head has rows; o_proj regressed on that.

    ``seen``: of the units of all groups, and of those that say what is lent, cluster by cluster. ``orders``: of the queries of
    a group that goes, to suit those of the one that stands.
    """

    attention: Attention
    groups: list[KVGroup]
    consumer: Tensor
    seen: Moments
    clusters: list[list[int]]
    orders: dict[int, Tensor]

    def run(self) -> tuple[list[KVGroup], float, float]:
        """The groups made, λ, and the share of the output's energy that is lost."""
        slots, toward = self._lent()
        kept = torch.cat([units for heads in slots for units in heads])
        consumer = _widened(self.consumer, toward.shape[1])
        fit, _, _ = compensate(consumer, self.seen, kept, toward[:, kept], refit=False)  # what is held out is still to judge
        regressed = torch.zeros_like(consumer).index_copy(1, kept, fit)
        return self._cut(slots, regressed)

    def _lent(self) -> tuple[list[list[Tensor]], Tensor]:
        """Of each cluster and query head the units that say its values, its own and those lent, d each; and columns that hear
        what is lent as what it stands for was heard, as far as it tells the same."""
        m, d = self.attention.n_queries, self.attention.head_dim
        c = self.seen.fitted
        toward = _widened(self.consumer, len(c))
        slots, at = [], len(self.groups) * m
        for stands, *others in self.clusters:
            heads = [[_units(stands * m + j, d)] for j in range(m)]
            for other in others:
                for slot, theirs in zip(heads, self.orders[other].tolist(), strict=True):
                    own, lent = _units(other * m + theirs, d), _units(at, d)
                    heard = toward[:, own] @ _regression(c, own, lent)
                    told = _energy(heard, c[lent][:, lent]) / max(_energy(toward[:, own], c[own][:, own]), _TINY)
                    toward[:, lent] = heard * min(1.0, told)  # all of it of the same attention, next to nothing of another
                    slot.append(lent)
                    at += 1
            slots.append([torch.cat(units) for units in heads])
        return slots, toward

    def _cut(self, slots: list[list[Tensor]], regressed: Tensor) -> tuple[list[KVGroup], float, float]:
        m, d, n = self.attention.n_queries, self.attention.head_dim, self.consumer.shape[1]
        c = self.seen.fitted
        made, toward = [], []
        cuts: list[tuple[Tensor, Tensor]] = []
        for members, heads in zip(self.clusters, slots, strict=True):
            group = self.groups[members[0]]
            into = back = torch.eye(d)
            if len(members) > 1:
                values = torch.cat([self.groups[g].value for g in members])
                said = torch.stack([c[units][:, units] for units in heads]).sum(0)
                heard = torch.stack([regressed[:, units].T @ regressed[:, units] for units in heads]).sum(0)
                into, back = directions(said, heard, d)
                size = group.value.norm() / (into @ values).norm()
                into, back = into * size, back / size
                group = group._replace(value=into @ values)
            made.append(group)
            cuts += [(units, into) for units in heads]
            toward += [regressed[:, units] @ back for units in heads]

        def through(c: Tensor) -> Tensor:
            rows = torch.cat([c[:n], *(into @ c[units] for units, into in cuts)])
            return torch.cat([rows[:, :n], *(rows[:, units] @ into.T for units, into in cuts)], 1)

        seen = Moments(*map(through, self.seen))
        kept = torch.arange(n, len(seen.fitted))
        output, ridge, error = compensate(_widened(self.consumer, len(seen.fitted)), seen, kept, torch.cat(toward, 1))
        parts = output.T.unflatten(0, (len(made), m, d))
        return [group._replace(output=part) for group, part in zip(made, parts, strict=True)], ridge, error


def directions(said: Tensor, heard: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Of values with moments ``said`` (n, n), whose output has the Gram matrix ``heard``, the d directions of which most is
    heard: what makes them of the values, (d, n), and values of them, (n, d)."""
    root, inverse = roots(said)
    strongest = torch.linalg.eigh(root @ heard.double() @ root).eigenvectors[:, -d:]
    return (strongest.T @ inverse).float(), (root @ strongest).float()


def _regression(c: Tensor, of: Tensor, on: Tensor) -> Tensor:
    """Of units on others, from their moments: (of, on)."""
    square = c[on][:, on].double()
    square += (_JITTER * float(square.diagonal().mean()) + torch.finfo(c.dtype).tiny) * torch.eye(len(on))
    return torch.linalg.solve(square, c[on][:, of].double()).T.float()


def _energy(columns: Tensor, c: Tensor) -> float:
    """``Σ ‖V h‖²``."""
    return float(((columns @ c) * columns).sum())


def _widened(consumer: Tensor, width: int) -> Tensor:
    """The consumer (H, N) of more units, which it does not hear."""
    return torch.nn.functional.pad(consumer, (0, width - consumer.shape[1]))


def _units(head: int, d: int) -> Tensor:
    return torch.arange(head * d, (head + 1) * d)


def _sum(seen: Moments) -> Tensor:
    return seen.fitted + seen.held_out
