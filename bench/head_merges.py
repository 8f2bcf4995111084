"""What folding of KV groups is compared with: other merges, each with the same ridge regression of o_proj on the same text.

A function here takes what ``fold_heads`` does. Of pairs that could be merged it takes the one whose output is lost least on
tokens held out: more than folding, which chooses before it tries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations, permutations
from typing import NamedTuple

import torch
from torch import Tensor

from pyfold.families.attention import Attention
from pyfold.families.kv_groups import KVGroup, freedom_of, groups_of, weights_of
from pyfold.function_metric import compensate, moments
from pyfold.head_folding import Say, as_said, read_moments
from pyfold.heads import alignment, balanced


class Tried(NamedTuple):
    """The layer's tensors, and the share of its output's energy that is lost on tokens held out."""

    tensors: dict[str, Tensor]
    error: float


Merged = tuple[list[int], KVGroup]  # the groups that a group is made of; what o_proj shrinks to beside it
Merge = Callable[[list[KVGroup], list[KVGroup], Attention, Mapping[str, Tensor]], Iterator[Merged]]


def drop(groups: list[KVGroup], *_: object) -> Iterator[Merged]:
    """One of two goes."""
    for a, b in permutations(range(len(groups)), 2):
        if b == (a + 1) % len(groups):  # each goes once
            yield [a, b], groups[a]


def plain(groups: list[KVGroup], *_: object) -> Iterator[Merged]:
    """The mean of two as they are, head by head."""
    for a, b in combinations(range(len(groups)), 2):
        yield [a, b], _mean(groups[a], groups[b], 0.5)


def aligned(
    groups: list[KVGroup], compared: list[KVGroup], attention: Attention, tensors: Mapping[str, Tensor]
) -> Iterator[Merged]:
    """The mean of two that have been aligned."""
    for pair, first, second, _ in _aligned(groups, compared, attention, tensors):
        yield pair, _mean(first, second, 0.5)


def by_energy(
    groups: list[KVGroup], compared: list[KVGroup], attention: Attention, tensors: Mapping[str, Tensor]
) -> Iterator[Merged]:
    """The mean of two that have been aligned, each by the energy of its output."""
    for pair, first, second, share in _aligned(groups, compared, attention, tensors):
        yield pair, _mean(first, second, share)


def strongest(
    groups: list[KVGroup], compared: list[KVGroup], attention: Attention, tensors: Mapping[str, Tensor]
) -> Iterator[Merged]:
    """Of two that have been aligned the one with the output of more energy stands."""
    for pair, first, second, share in _aligned(groups, compared, attention, tensors):
        yield pair, (first if share > 0.5 else second)._replace(output=first.output + second.output)


def folded(
    merge: Merge,
    attention: Attention,
    tensors: Mapping[str, Tensor],
    read: Callable[[], Iterable[Tensor]],
    say: Say,
    n_groups: int,
    *,
    backend: str,
) -> Tried:
    """The layer with one group less, by the best of what ``merge`` makes."""
    assert n_groups == attention.n_groups - 1
    groups = groups_of(attention, tensors)
    compared = as_said(groups, read_moments(read(), backend))
    consumer = tensors[attention.output].float()
    tried = []
    for pair, merged in merge(groups, compared, attention, tensors):
        others = [group for g, group in enumerate(groups) if g not in pair]
        changed = weights_of(attention, [merged, *others])
        seen = moments((torch.cat([say(x, tensors), say(x, changed)], 2) for x in read()), backend)
        n = consumer.shape[1]
        both = torch.nn.functional.pad(consumer, (0, len(seen.fitted) - n))
        output, _, error = compensate(both, seen, torch.arange(n, len(seen.fitted)), changed[attention.output])
        tried.append(Tried(changed | {attention.output: output}, error))
    return min(tried, key=lambda made: made.error)


def _aligned(
    groups: list[KVGroup], compared: list[KVGroup], attention: Attention, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[list[int], KVGroup, KVGroup, float]]:
    """Pairs, balanced, the second aligned to the first, and the first one's share of their outputs' energy."""
    freedom = freedom_of(attention, tensors)
    words = [balanced(group, freedom) for group in compared]
    compared = [word.applied(group) for word, group in zip(words, compared, strict=True)]
    groups = [word.applied(group) for word, group in zip(words, groups, strict=True)]
    for a, b in combinations(range(len(groups)), 2):
        nearest = alignment(compared[a], compared[b], freedom)
        energies = [float(compared[g].value.square().sum()) for g in (a, b)]  # balanced: what it says is how it is heard
        yield [a, b], groups[a], nearest.applied(groups[b]), energies[0] / sum(energies)


def _mean(first: KVGroup, second: KVGroup, share: float) -> KVGroup:
    """Rows by their shares, columns in sum."""
    query, key, value = (share * x + (1 - share) * y for x, y in zip(first[:3], second[:3], strict=True))
    return KVGroup(query, key, value, first.output + second.output)
