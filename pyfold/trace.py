"""What a fold did when, by thread: a file in Chrome's trace event format, which Perfetto (ui.perfetto.dev) shows."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Trace:
    """``with trace("merge", tensor=name): ...`` from any thread. Its own ``with`` block writes the file, if there is one."""

    def __init__(self, path: str | Path | None = None) -> None:
        self._file = None if path is None else Path(path).open("w")  # noqa: SIM115  a bad name is to fail now
        self._events: list[dict[str, Any]] = []
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, what: str, **about: Any) -> Iterator[None]:
        begin, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            about["cpu_seconds"] = time.thread_time() - cpu  # of this thread, not of those that kernels start
            self.ended(what, time.perf_counter() - begin, threading.current_thread().name, **about)

    def ended(self, what: str, seconds: float, thread: str, **about: Any) -> None:
        """Something that took so long ends now; ``thread`` need not be one of this process."""
        if self._file:
            self._events.append(
                {
                    "name": what,
                    "ph": "X",  # a complete event: begin and duration, in microseconds
                    "ts": 1e6 * (time.perf_counter() - seconds - self._started),
                    "dur": 1e6 * seconds,
                    "pid": 1,
                    "tid": thread,
                    "args": about,
                }
            )

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is None:
            return
        numbers: dict[str, int] = {}  # of threads, which the format names apart
        events = [{**event, "tid": numbers.setdefault(event["tid"], len(numbers))} for event in self._events]
        names = [
            {
                "name": "thread_name",
                "ph": "M",
                "pid": 1,
                "tid": number,
                "args": {"name": thread.replace("MainThread", "compute")},
            }
            for thread, number in numbers.items()
        ]
        with self._file:
            json.dump({"traceEvents": names + events, "displayTimeUnit": "ms"}, self._file)
