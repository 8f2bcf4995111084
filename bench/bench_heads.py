"""Perplexity of SmolLM2-135M with one of three KV groups folded in its six least sensitive layers, merge by merge.

Run by hand: ``pytest bench/bench_heads.py --text wikitext2_raw_test.txt [--scale small] [--cache DIR]``. How sensitive a layer
is is measured by the KL divergence of what the model says from what it said, on text of its own, with that layer's heads alone
folded. What folding is compared with is in ``head_merges.py``. Every method folds layer after layer, on the tokens as the
layers folded before let them through. Models compute in bf16, as they are stored. Takes ten minutes, and the first time three
more, in which the model writes its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import head_merges
import pytest
import torch
from conftest import Report
from smollm2 import make
from torch import Tensor
from torch.nn.functional import kl_div

from pyfold import ops
from pyfold.calibration import CACHE, Cache, calibrate
from pyfold.evaluate import load_model, score
from pyfold.families import family_of
from pyfold.families.activations import Activations, put
from pyfold.function_metric import HELD_OUT
from pyfold.head_folding import FoldedHeads, fold_heads
from pyfold.io.checkpoint import open_checkpoint
from pyfold.io.safetensors import Reader
from pyfold.processor import Processor
from pyfold.report import rss_bytes

_ROOM = 2 << 30  # for writing text


@dataclass(frozen=True)
class Sizes:
    """Windows and their tokens; sequences of calibration; layers that are tried, and how many of them are folded."""

    windows: int
    context: int
    sequences: int
    layers: tuple[int, ...]
    folded: int


SIZES = {
    "full": Sizes(32, 1024, 64, tuple(range(30)), 6),
    "small": Sizes(2, 256, 16, (14, 15), 1),
}
Folded = FoldedHeads | head_merges.Tried
Fold = Callable[..., Folded]
METHODS: dict[str, Fold] = {
    "drop + ridge": partial(head_merges.folded, head_merges.drop),
    "plain mean + ridge": partial(head_merges.folded, head_merges.plain),
    "aligned, mean + ridge": partial(head_merges.folded, head_merges.aligned),
    "aligned, mean by energy + ridge": partial(head_merges.folded, head_merges.by_energy),
    "aligned, strongest + ridge": partial(head_merges.folded, head_merges.strongest),
    "pyfold: aligned, the one that stands with the other's columns + ridge": fold_heads,
}


class Bench:
    """The model, its text, and the layers that are folded."""

    def __init__(self, report: Report, cache: Path, text: str) -> None:
        self.report, self.sizes, self.text = report, report.sizes, text
        self.source = make(cache / "smollm2")
        self.checkpoint = open_checkpoint(self.source)
        self.backend = ops.resolve("auto")
        processor = Processor(self.backend, rss_bytes() + _ROOM)
        written = calibrate(self.checkpoint, "self", Cache(cache / f"heads{CACHE}"), {}, processor)
        self.tokens = written.tokens[: self.sizes.sequences]
        self.model, self.tokenizer = load_model(self.source, torch.bfloat16)
        self.dense = self.perplexity({})
        self.divergences = self._divergences()
        order = sorted(self.divergences, key=lambda layer: self.divergences[layer])
        self.layers = sorted(order[: self.sizes.folded])

    def folds(self, fold: Fold, layers: Iterable[int], *, alone: bool) -> dict[int, Folded]:
        """Layers with one KV group less, each ``alone`` or behind those folded before it."""
        found = {}
        attentions = family_of(self.checkpoint).attention(self.checkpoint)
        place, dtype = self.checkpoint.tensors.__getitem__, ops.product_dtype(self.backend)
        with Reader() as reader, closing(Activations(self.checkpoint, self.tokens, place, dtype)) as activations:
            for layer in layers:
                attention = attentions[layer]
                names = (attention.query, attention.key, attention.value, attention.output)
                tensors = {name: reader.read(place(name)).float() for name in names}
                read, say = partial(activations.before_attention, layer), partial(activations.said, layer)
                found[layer] = fold(attention, tensors, read, say, attention.n_groups - 1, backend=self.backend)
                if not alone:
                    activations.attend(layer, found[layer].tensors)
        return found

    def perplexity(self, folds: Mapping[int, Folded]) -> float:
        """Of the model with these layers."""
        sizes = self.sizes
        with self._replaced(folds):
            return score(self.model, self.tokenizer, text=self.text, context=sizes.context, windows=sizes.windows).perplexity

    def _divergences(self) -> dict[int, float]:
        """In nats a token, on sequences held out, with one layer folded."""
        probes = self.tokens[HELD_OUT - 1 :: HELD_OUT]
        expected = self._said(probes)
        found = {}
        for layer, folded in self.folds(fold_heads, self.sizes.layers, alone=True).items():
            with self._replaced({layer: folded}):
                nats = kl_div(self._said(probes), expected, reduction="sum", log_target=True)
            found[layer] = float(nats) / probes.numel()
        return found

    def _said(self, tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([self.model(part).logits.float().log_softmax(-1) for part in tokens.split(1)])

    @contextmanager
    def _replaced(self, folds: Mapping[int, Folded]) -> Iterator[None]:
        changed = {name: values for folded in folds.values() for name, values in folded.tensors.items()}
        own = {name: self.model.get_parameter(name).data for name in changed}
        for name, values in changed.items():
            put(self.model, name, values.bfloat16())
        yield
        for name, values in own.items():
            put(self.model, name, values)


@pytest.fixture(scope="module")
def bench(report: Report, request: pytest.FixtureRequest) -> Bench:
    text = request.config.getoption("--text")
    if text is None:
        pytest.skip("--text FILE: WikiText-2's raw test file")
    cache = Path(request.config.getoption("--cache"))
    cache.mkdir(parents=True, exist_ok=True)
    made = Bench(report, cache, Path(text).read_text(encoding="utf-8"))
    report.notes.append(f"Dense perplexity {made.dense:.3f}, {made.sizes.windows} windows of {made.sizes.context}, in bf16.")
    report.tables["KL divergence with one layer's heads folded, nats a token"] = [
        {"layer": str(layer), "nats": nats, "folded below": "yes" if layer in made.layers else "no"}
        for layer, nats in made.divergences.items()
    ]
    return made


@pytest.mark.parametrize("method", METHODS)
def test_heads(bench: Bench, method: str) -> None:
    rows = bench.report.tables.setdefault(f"One of three KV groups folded in layers {', '.join(map(str, bench.layers))}", [])
    folds = bench.folds(METHODS[method], bench.layers, alone=False)
    lost = [folded.error for folded in folds.values()]
    rows.append(
        {
            "method": method,
            "x dense": bench.perplexity(folds) / bench.dense,
            "output lost, mean": sum(lost) / len(lost),
            "asked": "ahead of drop and plain mean" if method.startswith("pyfold") else None,
        }
    )
