"""Checkpoints -> their sizes, perplexities and accuracies, one loaded at a time; the first is what ratios refer to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyfold.errors import PyfoldError
from pyfold.evaluate import Evaluation, check_options, load_model, load_tokenizer, score
from pyfold.io.checkpoint import open_checkpoint
from pyfold.progress import Progress
from pyfold.tasks import Scores, Tasks


@dataclass(frozen=True)
class Measured:
    """One checkpoint of a comparison.

    Attributes
    ----------
    source : str
    parameters, bytes : int
        Of the weights, as they are stored.
    perplexity : float
    ratio : float
        Perplexity over that of the first checkpoint.
    n_tokens, context : int
    windows : int or None
        See :class:`pyfold.evaluate.Evaluation`.
    tasks : dict of str to dict of str to float
        Metrics of each task.
    """

    source: str
    parameters: int
    bytes: int
    perplexity: float
    ratio: float
    n_tokens: int
    context: int
    windows: int | None
    tasks: Scores


def compare(
    sources: Sequence[str | Path],
    *,
    text: str | None = None,
    max_tokens: int | None = None,
    context: int = 1024,
    windows: int | None = None,
    tasks: Sequence[str] = (),
    tasks_folder: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Measured]:
    """Perplexity as by :func:`pyfold.perplexity`, and accuracies, of each checkpoint.

    Raises
    ------
    PyfoldError
        Of any checkpoint, option or task before a model is loaded; if a model cannot be loaded; if tokenizers differ, for
        perplexity is per token.
    OSError
        If the data of a task cannot be had.
    """
    check_options(max_tokens=max_tokens, context=context, windows=windows)
    checkpoints = [open_checkpoint(source) for source in sources]
    vocabularies = [load_tokenizer(source).get_vocab() for source in sources]
    for source, vocabulary in zip(sources, vocabularies, strict=True):
        if vocabulary != vocabularies[0]:
            raise PyfoldError(
                f"{source}: its tokenizer is not that of {sources[0]}, and perplexity is per token; evaluate it alone"
            )
    harness = Tasks(tasks, tasks_folder) if tasks else None

    def evaluate(source: str | Path, number: int) -> tuple[Evaluation, Scores]:
        def show(done: int, total: int, what: str) -> None:
            if progress:
                progress(done, total, what if len(sources) == 1 else f"{number} of {len(sources)}: {what}")

        model, tokenizer = load_model(source)
        found = score(model, tokenizer, text=text, max_tokens=max_tokens, context=context, windows=windows, progress=show)
        return found, harness.scores(model, tokenizer, show) if harness else {}

    rows: list[Measured] = []
    for number, (source, checkpoint) in enumerate(zip(sources, checkpoints, strict=True), 1):
        found, scores = evaluate(source, number)
        first = rows[0].perplexity if rows else found.perplexity
        rows.append(
            Measured(
                source=str(source),
                parameters=checkpoint.n_parameters,
                bytes=checkpoint.nbytes,
                ratio=found.perplexity / first,
                tasks=scores,
                **vars(found),
            )
        )
    return rows
