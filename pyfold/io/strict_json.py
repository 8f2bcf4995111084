"""JSON as a stranger's file may hold it: bytes -> value, or a ValueError where two readers could understand different things.

Refused beyond what Python's json refuses: a key given twice; NaN and infinities (also as 1e999); halves of surrogate pairs,
which no UTF-8 file can hold; nesting deeper than any checkpoint's, on which a later writer could run out of stack.
"""

from __future__ import annotations

import json
from collections import Counter
from math import isfinite
from typing import Any

_DEEPEST = 64


def parse(blob: bytes) -> Any:
    """The value of a JSON text.

    Raises
    ------
    ValueError
        If it is not JSON in UTF-8, or is so only to some readers.
    """
    try:
        value = json.loads(blob.decode("utf-8"), object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check(value, _DEEPEST)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"the key '{Counter(key for key, _ in pairs).most_common(1)[0][0]}' is there twice")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _check(value: Any, room: int) -> None:
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, (dict, list)):
        if not room:
            raise ValueError("nested too deeply")
        for item in value:
            _check(item, room - 1)
        if isinstance(value, dict):
            for item in value.values():
                _check(item, room - 1)
