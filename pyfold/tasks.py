"""Names of tasks and a loaded model -> its accuracies, by lm-evaluation-harness (pip install 'pyfold[tasks]')."""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyfold.errors import PyfoldError
from pyfold.progress import Progress

Scores = dict[str, dict[str, float]]
# What the harness itself would draw with, so that figures are those of its own command line.
_SEED = 1234
# Requests at a time: on 2 cores SmolLM2-135M answers 180 of 40 tokens in 17 to 25 s of CPU time, one by one in 56, by 32 in 17.
_BATCH = 8


class Tasks:
    """Tasks of lm-evaluation-harness, found and their data at hand before a model is.

    Parameters
    ----------
    names : sequence of str
        Tasks, groups or tags.
    folder : str or Path, optional
        Where to look for task files (YAML) besides the harness's own.

    Raises
    ------
    PyfoldError
        If the harness is not installed, there is no such task, or it cannot be used.
    OSError
        If the data of a task cannot be had.
    """

    def __init__(self, names: Sequence[str], folder: str | Path | None = None) -> None:
        try:
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise PyfoldError(f"--tasks: lm_eval cannot be imported ({error}); run pip install 'pyfold[tasks]'") from None
        if folder is not None and not Path(folder).is_dir():
            raise PyfoldError(f"{folder}: no such folder of tasks")
        self._names, self._wrap = list(names), HFLM
        with self._harness():
            self._manager = TaskManager(include_path=folder)
        unknown = [name for name in names if name not in self._manager.task_index]
        if unknown:
            raise PyfoldError(f"eval: lm-evaluation-harness has no task {', '.join(map(repr, unknown))}")
        with self._harness():
            tasks = self._load()["tasks"]
        if not tasks:
            raise PyfoldError(f"eval: the group {', '.join(names)} has no task")
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise PyfoldError(
                    f"eval: task {name} runs code that the model writes, or shows it images; neither is done here"
                )

    def scores(self, model: Any, tokenizer: Any, progress: Progress | None = None) -> Scores:
        """Metrics of each task, with ``METRIC_stderr`` where the harness gives one; a group stands for its tasks."""
        from lm_eval.evaluator import evaluate

        with self._harness():
            loaded = self._load()
            for task in loaded["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", 0)
                task.set_fewshot_seed(_SEED)
            harness = self._wrap(model, tokenizer=tokenizer, batch_size=_BATCH)
            if progress:
                harness.set_cache_hook(_Requests(list(loaded["tasks"].values()), progress))
            found = evaluate(harness, loaded, bootstrap_iters=1000, log_samples=False)
        metrics = {name: _metrics(values) for name, values in found["results"].items()}
        inside = {child for group, children in loaded["group_map"].items() if metrics.get(group) for child in children}
        return {name: values for name, values in metrics.items() if values and name not in inside}

    def _load(self) -> Any:
        # Anew for each model: tasks draw from the global state, and then each is asked the same.
        random.seed(0)
        np.random.seed(_SEED)  # noqa: NPY002 (tasks that shuffle use the global state)
        torch.manual_seed(_SEED)
        return self._manager.load(self._names)

    @contextmanager
    def _harness(self) -> Iterator[None]:
        """The harness at work: without the logs and bars that it writes to both streams, and its errors in one line."""
        from datasets.exceptions import DatasetsError
        from jinja2 import TemplateError

        wrong = (ValueError, LookupError, TypeError, AttributeError, AssertionError, ImportError, TemplateError, DatasetsError)
        names, disabled = ", ".join(self._names), logging.root.manager.disable
        logging.disable()
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                yield
        except OSError as error:
            raise OSError(f"eval: the data of {names} cannot be had: {_first_line(error)}") from None
        except wrong as error:  # what a task's file, data or code may cause
            raise PyfoldError(f"eval: lm-evaluation-harness fails on {names}: {_first_line(error)}") from None
        finally:
            logging.disable(disabled)


class _Requests:
    """Counts what the harness has answered: it tells its cache of each request."""

    def __init__(self, tasks: list[Any], progress: Progress) -> None:
        self._tasks, self._progress, self._done = tasks, progress, 0

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        self._done += 1
        self._progress(self._done, sum(len(task.instances) for task in self._tasks), "tasks, requests")


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """What the harness calls METRIC,FILTER, the filter being none for most; it has names and counts beside them, and N/A."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, float | int)
    }


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
