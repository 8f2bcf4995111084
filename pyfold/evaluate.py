"""Perplexity of a causal language model on a text, by windows that slide or are spread evenly, through transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfold.deliver.huggingface import has_own_modeling_file
from pyfold.errors import PyfoldError
from pyfold.families import FAMILIES
from pyfold.progress import Progress


@dataclass(frozen=True)
class Evaluation:
    """``perplexity`` = exp of the mean negative log-likelihood over ``n_tokens`` predicted tokens.

    ``windows`` is how many were spread over the text, None where one slid over all of it.
    """

    perplexity: float
    n_tokens: int
    context: int
    windows: int | None


@contextmanager
def _loading(source: str | Path) -> Iterator[None]:
    """What transformers raises for a checkpoint that it cannot load, as one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, TypeError, IndexError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise PyfoldError(f"{source}: transformers cannot load it: {str(error).strip().splitlines()[0]}") from None


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    with _loading(source):
        return AutoTokenizer.from_pretrained(str(source))


def load_model(source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint. Custom code runs only if pyfold itself wrote it, byte for byte."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar of our own says how far an evaluation is
    tokenizer = load_tokenizer(source)
    trust = has_own_modeling_file(Path(source), FAMILIES)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust, "output_loading_info": True}
    with _loading(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(source), **options)
    model, loading = loaded
    if loading["missing_keys"]:
        raise PyfoldError(f"{source}: tensor '{min(loading['missing_keys'])}' is missing; transformers would make it up")
    return model.eval(), tokenizer


def default_text() -> str:
    """English prose that ships with Python: the topics of its documentation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def perplexity(
    source: str | Path,
    *,
    text: str | None = None,
    max_tokens: int | None = None,
    context: int = 1024,
    stride: int | None = None,
    windows: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity on a text, in fp32 on the CPU.

    Parameters
    ----------
    source : str or Path
        Checkpoint folder or Hugging Face model id.
    text : str, optional
        By default the documentation topics that ship with Python.
    max_tokens : int, optional
        Use the first ``max_tokens`` tokens of the text.
    context : int
        Tokens a window; each is scored given those before it in its window.
    stride : int, optional
        Tokens between windows, half of ``context`` by default. Every token is scored once, in the first window that holds it,
        so later windows give at least ``context - stride`` tokens of context.
    windows : int, optional
        Instead of one window that slides, so many spread evenly over the N tokens of the text: window i of W begins at token
        floor(i (N - context) / (W - 1)), so the first is at the text's begin and the last at its end. Each token but a window's
        first is scored, given those before it in its window: W (context - 1) in all. They overlap where W context > N.

    Returns
    -------
    Evaluation

    Raises
    ------
    PyfoldError
        If the text is too short, or the model cannot be loaded.
    """
    model, tokenizer = load_model(source)
    return score(
        model,
        tokenizer,
        text=text,
        max_tokens=max_tokens,
        context=context,
        stride=stride,
        windows=windows,
        progress=progress,
    )


def score(
    model: Any,
    tokenizer: Any,
    *,
    text: str | None = None,
    max_tokens: int | None = None,
    context: int = 1024,
    stride: int | None = None,
    windows: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """:func:`perplexity` of a model that is loaded already."""
    check_options(max_tokens=max_tokens, context=context, stride=stride, windows=windows)
    ids = tokenizer(default_text() if text is None else text, return_tensors="pt", verbose=False).input_ids[0][:max_tokens]
    needed = context if windows else 2
    if len(ids) < needed:
        raise PyfoldError(f"eval: the text has {len(ids)} tokens; at least {needed} are needed")
    spans = spread(len(ids), context, windows) if windows else _sliding(len(ids), context, stride or context // 2)
    n_tokens = sum(end - first for _, first, end in spans)
    total, done = 0.0, 0
    with torch.inference_mode():
        for begin, first, end in spans:
            logits = model(ids[None, begin : end - 1]).logits[0, first - begin - 1 :].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[first:end], reduction="sum"))
            done += end - first
            if progress:
                progress(done, n_tokens, "perplexity, tokens")
    mean = total / n_tokens
    return Evaluation(math.exp(mean) if mean < 700 else math.inf, n_tokens, context, windows)


def check_options(
    *, max_tokens: int | None = None, context: int = 1024, stride: int | None = None, windows: int | None = None
) -> None:
    """Refuse what :func:`score` cannot do, before a model is loaded."""
    if context < 2 or (max_tokens is not None and max_tokens < 2):
        raise PyfoldError(f"eval: expected context >= 2 and tokens >= 2, got {context} and {max_tokens}")
    if stride is not None and (windows is not None or not 1 <= stride < context):
        raise PyfoldError(f"eval: expected 1 <= stride < context and no windows, got {stride}, {context} and {windows}")
    if windows is not None and windows < 1:
        raise PyfoldError(f"eval: expected windows >= 1, got {windows}")


def _sliding(n_tokens: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first token to score, end) of each window; the text's first token has nothing before it."""
    begins = range(0, max(n_tokens - context, 0) + stride, stride)
    ends = [min(begin + context, n_tokens) for begin in begins]
    return list(zip(begins, [1, *ends[:-1]], ends, strict=True))


def spread(n_tokens: int, context: int, windows: int) -> list[tuple[int, int, int]]:
    """(begin, first token to score, end) of windows spread evenly."""
    begins = [i * (n_tokens - context) // max(windows - 1, 1) for i in range(windows)]
    return [(begin, begin + 1, begin + context) for begin in begins]
