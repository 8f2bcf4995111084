"""Perplexity of a causal language model by sliding window, through transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfold.deliver.huggingface import has_own_modeling_file
from pyfold.errors import PyfoldError
from pyfold.families import FAMILIES


@dataclass(frozen=True)
class Evaluation:
    """``perplexity`` = exp of the mean negative log-likelihood over ``n_tokens`` predicted tokens."""

    perplexity: float
    n_tokens: int
    context: int


def load_model(source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint. Custom code runs only if pyfold itself wrote it, byte for byte."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar of our own says how far an evaluation is
    trust = has_own_modeling_file(Path(source), FAMILIES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source))
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(source), **options)
    except (OSError, ValueError, TypeError, IndexError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise PyfoldError(f"{source}: transformers cannot load it: {str(error).strip().splitlines()[0]}") from None
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
    progress: Callable[[int, int, str], None] | None = None,
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

    Returns
    -------
    Evaluation

    Raises
    ------
    PyfoldError
        If the text is too short, or the model cannot be loaded.
    """
    return score(*load_model(source), text=text, max_tokens=max_tokens, context=context, stride=stride, progress=progress)


def score(
    model: Any,
    tokenizer: Any,
    *,
    text: str | None = None,
    max_tokens: int | None = None,
    context: int = 1024,
    stride: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """:func:`perplexity` of a model that is loaded already."""
    stride = context // 2 if stride is None else stride
    if context < 2 or not 1 <= stride <= context - 1 or (max_tokens is not None and max_tokens < 2):
        raise PyfoldError(
            f"eval: expected context >= 2, 1 <= stride < context and tokens >= 2, got {context}, {stride}, {max_tokens}"
        )
    ids = tokenizer(default_text() if text is None else text, return_tensors="pt", verbose=False).input_ids[0][:max_tokens]
    if len(ids) < 2:
        raise PyfoldError(f"eval: the text has {len(ids)} tokens; at least 2 are needed")
    total, scored = 0.0, 1  # the first token has nothing before it
    with torch.inference_mode():
        for begin in range(0, len(ids), stride):
            window = ids[begin : begin + context]
            first = scored - begin  # position in the window of the first token to score
            logits = model(window[None, :-1]).logits[0, first - 1 :].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[first:], reduction="sum"))
            scored = begin + len(window)
            if progress:
                progress(scored, len(ids), "perplexity")
            if scored == len(ids):
                break
    mean = total / (len(ids) - 1)
    return Evaluation(math.exp(mean) if mean < 700 else math.inf, len(ids) - 1, context)
