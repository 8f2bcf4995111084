"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

# done, total, what: "writing text, tokens" is of tokens; with nothing behind a comma, of bytes of source weights.
Progress = Callable[[int, int, str], None]
