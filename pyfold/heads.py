"""KV groups brought as close to one another as they can be without a change of what they say.

Rows are compared by what they say on some tokens: once hidden states have second moments L Lᵀ, rows times L have for inner
products the mean products of what they say, and all below is about such rows. A group is first *balanced*: each pair of its key
has the energy that it has in the queries, and what the value says has the moments with which the output hears it. What is free
then, up to scales, are turns of pairs, one orthogonal matrix, and the order of the queries; these are what aligns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfold.families.kv_groups import Freedom, KVGroup, Symmetry, pairs

_FLOOR = 1e-6  # of the largest eigenvalue: below it a direction is not heard
_GAIN = 1e-6  # of all energies: below it another order is only rounding


def balanced(group: KVGroup, freedom: Freedom) -> Symmetry:
    """What balances a group.

    With moments P of the value and Q of the output, T P T = Q for the geometric mean T of P⁻¹ and Q, and mixing by T^½ gives
    both the same (balanced coordinates: Moore, "Principal component analysis in linear systems", 1981).
    """
    ones = torch.ones(len(group.key) // 2, dtype=torch.complex64)
    said = pairs(group.key).abs().square().sum(-1)
    asked = pairs(group.query).abs().square().sum((0, -1))
    turn = ones * (asked / said).pow(0.25).nan_to_num(1, 1, 1) if freedom.scales else ones
    root, inverse = _roots(group.value @ group.value.T)
    heard = torch.einsum("jdh,jeh->de", group.output, group.output)
    mix = _roots(inverse @ _roots(root @ heard.double() @ root)[0] @ inverse)[0]
    return Symmetry(torch.arange(len(group.query)), turn, mix.float())


def alignment(to: KVGroup, group: KVGroup, freedom: Freedom) -> Symmetry:
    """What brings a balanced group closest to another.

    Turns and the matrix are the best for an order, the order is the best for these, in turn to a fixed point, from the turns
    that suit the keys and the matrix that suits the values.
    """
    keys, queries = _turning(to.key, group.key), _turning(to.query[:, None], group.query)
    values, outputs = to.value @ group.value.T, torch.einsum("jdh,leh->jlde", to.output, group.output)
    scales = [
        (_energy(to.key) + _energy(to.query)) * (_energy(group.key) + _energy(group.query)),
        (_energy(to.value) + _energy(to.output)) * (_energy(group.value) + _energy(group.output)),
    ]
    attended, heard = (scale.sqrt().clamp(min=torch.finfo(scale.dtype).tiny) for scale in scales)
    turn, mix = _nearest_turn(keys, freedom), _nearest_orthogonal(values)
    each, order = torch.arange(len(to.query)), None
    while True:
        gains = (queries.conj() * turn).real.sum(-1) / attended + (outputs * mix).sum((-2, -1)) / heard
        best = assignment(gains)
        if order is not None and gains[each, best].sum() <= gains[each, order].sum() + _GAIN:
            return Symmetry(order, turn, mix)
        order = best
        turn = _nearest_turn(keys + queries[each, order].sum(0), freedom)
        mix = _nearest_orthogonal(values + outputs[each, order].sum(0))


def distance(a: KVGroup, b: KVGroup, freedom: Freedom) -> float:
    """Between queries and keys of two balanced groups, once aligned: 0 where they attend alike, 1 where nothing is alike."""
    there = alignment(a, b, freedom).applied(b)
    energy = _energy(a.query) + _energy(a.key) + _energy(b.query) + _energy(b.key)
    return float((_energy(a.query - there.query) + _energy(a.key - there.key)) / energy)


def assignment(gains: Tensor) -> Tensor:
    """For each row (m, m) a column of its own, so that the gains are largest in sum, (m,), int64.

    By dynamic programming over the sets of columns that the first rows take: 2^m m steps, for the few queries of a KV head.
    """
    m = len(gains)
    sets = torch.arange(1 << m)
    taken = (sets[:, None] >> torch.arange(m)) & 1
    best = torch.full((1 << m,), -torch.inf, dtype=torch.float64)
    best[0] = 0
    last = torch.zeros(1 << m, dtype=torch.int64)
    sizes = taken.sum(1)
    for row in range(m):
        these = sets[sizes == row + 1]
        without = best[these[:, None] ^ (1 << torch.arange(m))].masked_fill(taken[these] == 0, -torch.inf)
        best[these], last[these] = (without + gains[row].double()).max(1)
    columns = []
    left = (1 << m) - 1
    for _ in range(m):
        columns.append(int(last[left]))
        left ^= 1 << columns[-1]
    return torch.tensor(columns[::-1])


def _turning(to: Tensor, rows: Tensor) -> Tensor:
    """Pairs' products (..., d / 2): turning by their directions brings rows (..., d, D) closest to others."""
    return (pairs(to) * pairs(rows).conj()).sum(-1)


def _nearest_turn(products: Tensor, freedom: Freedom) -> Tensor:
    half = torch.where(products.real < 0, -1.0, 1.0).to(products.dtype)
    any_angle = torch.where(products.abs() > 0, products / products.abs(), half)
    return torch.where(freedom.turns, any_angle, half)


def _nearest_orthogonal(products: Tensor) -> Tensor:
    """Procrustes: the orthogonal matrix R of the largest <R, products>."""
    u, _, v = torch.linalg.svd(products)
    return u @ v


def _energy(rows: Tensor) -> Tensor:
    return rows.square().sum()


def _roots(square: Tensor) -> tuple[Tensor, Tensor]:
    """Of a positive semidefinite matrix its square root and the inverse of that, fp64."""
    values, vectors = torch.linalg.eigh(square.double())
    values = values.clamp(min=max(_FLOOR * float(values[-1]), torch.finfo(torch.float32).tiny)).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
