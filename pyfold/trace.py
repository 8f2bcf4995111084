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
    """``with trace("merge", tensor=name): ...`` from any thread; ``save`` at the end. Without a path nothing is kept."""

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._events: list[dict[str, Any]] = []
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, what: str, **about: Any) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self._path is not None:
                self._events.append(
                    {
                        "name": what,
                        "ph": "X",  # a complete event: begin and duration, in microseconds
                        "ts": 1e6 * (begin - self._started),
                        "dur": 1e6 * (time.perf_counter() - begin),
                        "pid": 1,
                        "tid": threading.current_thread().name,
                        "args": about,
                    }
                )

    def save(self) -> None:
        """Write the file. Threads are numbered, since the format names them apart."""
        if self._path is None:
            return
        numbers: dict[str, int] = {}
        events = [{**event, "tid": numbers.setdefault(event["tid"], len(numbers))} for event in self._events]
        names = [
            {
                "name": "thread_name",
                "ph": "M",
                "pid": 1,
                "tid": number,
                "args": {"name": {"MainThread": "compute"}.get(name, name)},
            }
            for name, number in numbers.items()
        ]
        self._path.write_text(json.dumps({"traceEvents": names + events, "displayTimeUnit": "ms"}) + "\n")
