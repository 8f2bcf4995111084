"""What a fold is asked for, as a YAML file: read with a schema, errors with line numbers; written from options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pyfold.errors import PyfoldError

WIDTHS = ("ratio", "width", "target_params", "target_bytes")
_MOST = 1 << 20  # bytes of a file
_Check = tuple[str, Callable[[Any], bool]]


def _is_int(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _is_ratio(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(key, (int, str)) and _is_share(each) for key, each in value.items())
    return _is_share(value)


def _one_of(*names: str) -> _Check:
    return f"one of {', '.join(names)}", lambda value: value in names


_COUNT: _Check = ("a positive integer", lambda value: _is_int(value, 1))
_SIZE: _Check = ("a number, or a size as in 110M or 5GB", lambda value: _is_int(value, 1) or isinstance(value, str))
# Keyword of fold_checkpoint -> what its value may be; of those that say what the result is, not what it is made with.
_SCHEMA: dict[str, _Check] = {
    "ratio": ("a number from 0 to less than 1, or such numbers by layers, as in {0-9: 0.1, 10-29: 0.3}", _is_ratio),
    "width": _COUNT,
    "target_params": _SIZE,
    "target_bytes": _SIZE,
    "layers": ("layers, as in 5-27 or 0,2,5-9", lambda value: _is_int(value) or isinstance(value, str)),
    "heads_ratio": ("a number from 0 to less than 1", _is_share),
    "multiple_of": _COUNT,
    "metric": _one_of("weight", "function"),
    "calibration": ("self, none or a file", lambda value: isinstance(value, str)),
    "repair": _one_of("none", "ridge", "variance"),
    "allocate": _one_of("uniform", "auto"),
    "profile": _one_of("per-layer", "stock"),
    "seed": ("an integer from 0", _is_int),
    "dtype": _one_of("keep", "float32", "float16", "bfloat16"),
    "max_shard_size": _SIZE,
}


def read_recipe(file: str | Path) -> dict[str, Any]:
    """The options in a YAML file, as keywords of :func:`pyfold.fold_checkpoint`.

    Raises
    ------
    PyfoldError
        For what is no YAML mapping, or an option that there is not, is there twice, or has a value out of range; with its line.
    """
    path = Path(file)
    try:
        if path.stat().st_size > _MOST:
            raise PyfoldError(f"{path}: more than {_MOST:,} bytes, which no recipe has")
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except OSError as error:
        raise PyfoldError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PyfoldError(f"{path}: not UTF-8 text ({error})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise PyfoldError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise PyfoldError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(node, yaml.MappingNode):
        raise PyfoldError(f"{path}:1: expected options, as in 'ratio: 0.2'")
    found: dict[str, Any] = {}
    for key, value in node.value:
        at, name = f"{path}:{key.start_mark.line + 1}", str(key.value)
        if name not in _SCHEMA:
            raise PyfoldError(f"{at}: no such option '{name}'; a recipe may have {', '.join(_SCHEMA)}")
        if name in found:
            raise PyfoldError(f"{at}: {name} is there twice")
        if isinstance(value, yaml.MappingNode):
            _check_keys(path, value)
        try:
            found[name] = loader.construct_object(value, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            raise PyfoldError(f"{at}: {name}: not YAML: {str(error).splitlines()[0]}") from None
        what, fits = _SCHEMA[name]
        if not fits(found[name]):
            raise PyfoldError(f"{at}: {name}: expected {what}, got {str(found[name])!r:.60}")
    widths = [name for name in WIDTHS if name in found]
    if len(widths) > 1:
        raise PyfoldError(f"{path}: give one of {', '.join(widths)}")
    if isinstance(found.get("ratio"), Mapping):
        found["ratio"] = {str(layers): float(ratio) for layers, ratio in found["ratio"].items()}
    if "layers" in found:
        found["layers"] = str(found["layers"])
    return found


def _check_keys(path: Path, node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if str(key.value) in seen:
            raise PyfoldError(f"{path}:{key.start_mark.line + 1}: {key.value} is there twice")
        seen.add(str(key.value))


def recipe_text(options: Mapping[str, Any]) -> str:
    """YAML of what ``options`` say; those that are None, and those that a recipe does not have, are left out."""
    said = {name: options[name] for name in _SCHEMA if options.get(name) is not None}
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)
