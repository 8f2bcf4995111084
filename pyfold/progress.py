"""How long work says how far it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# done, total, what: "writing text, tokens" is of tokens; with nothing behind a comma, of bytes of source weights.
Progress = Callable[[int, int, str], None]


@contextmanager
def bar(unit: str) -> Iterator[Progress]:
    """A bar on stderr with rate and ETA. ``unit``: of work that names none."""
    from tqdm import tqdm

    columns, lines = 0, 0
    with suppress(OSError, ValueError):  # no terminal
        columns, lines = os.get_terminal_size(sys.stderr.fileno())
    # A terminal that does not know its size says 0 x 0, and tqdm would then print nothing.
    with tqdm(unit=unit, unit_scale=True, ncols=columns or 80, nrows=lines or 24, leave=False) as shown:

        def show(done: int, total: int, what: str) -> None:
            what, _, of = what.partition(", ")
            if what != shown.desc.removesuffix(": ") and total != shown.total:  # another kind of work
                shown.reset(total)
            shown.total, shown.unit = total, f" {of}" if of else unit
            shown.set_description(what, refresh=False)
            shown.update(done - shown.n)
            shown.refresh()

        yield show
