"""Widths, layers, sizes and shards: pure functions of options and headers."""

from __future__ import annotations

import pytest

from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.io.checkpoint import natural
from pyfold.plan import parse_layers, parse_size, round_to_multiple, split_shards, target_width


def group(width: int) -> FoldGroup:
    return FoldGroup("layers.0.mlp", 0, width, "intermediate_size", (), (), (), "gain", "silu")


@pytest.mark.parametrize(
    ("ratio", "width", "k"),
    [(0.2, 11008, 8806), (0.5, 11008, 5504), (0.1, 10, 9), (0.9, 10, 1), (0.0, 1536, 1536), (0.2, 1536, 1228), (0.7, 10, 3)],
)
def test_ratio_is_taken_as_written(ratio: float, width: int, k: int) -> None:
    """K = floor((1 - r) N) with r the decimal fraction typed: (1 - 0.9) * 10 is 0.9999... in floating point."""
    assert target_width(group(width), ratio, None) == k


@pytest.mark.parametrize(
    ("ratio", "width"), [(1.0, None), (-0.1, None), (float("nan"), None), (0.95, None), (None, 0), (None, 11)]
)
def test_impossible_widths(ratio: float | None, width: int | None) -> None:
    with pytest.raises(PyfoldError, match=r"ratio|width"):
        target_width(group(10), ratio, width)


@pytest.mark.parametrize(
    ("k", "multiple", "rounded"), [(8806, 256, 8704), (8832, 256, 8960), (1, 256, 256), (11008, 4096, 8192), (7, 7, 7)]
)
def test_rounding_to_a_multiple(k: int, multiple: int, rounded: int) -> None:
    assert round_to_multiple(k, multiple, group(11008)) == rounded
    with pytest.raises(PyfoldError, match="20000 is more than the 11008 units"):
        round_to_multiple(k, 20000, group(11008))


def test_layers() -> None:
    assert parse_layers(None, 3) == [0, 1, 2]
    assert parse_layers("0, 2,5-7", 8) == [0, 2, 5, 6, 7]
    assert parse_layers([3, 1, 3], 4) == [1, 3]
    for bad in ("", "a", "1-", "-1", "3-1", "1,,2", "1.5"):
        with pytest.raises(PyfoldError, match="layers: expected numbers and ranges"):
            parse_layers(bad, 4)
    with pytest.raises(PyfoldError, match="there is no layer 4; this model has layers 0 to 3"):
        parse_layers("2-5", 4)
    with pytest.raises(PyfoldError, match="none were given"):
        parse_layers([], 4)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "500MB", "2GiB", "1.5kb", "17", 9)] == [
        5 * 10**9,
        5 * 10**8,
        2**31,
        1500,
        17,
        9,
    ]
    for bad in ("", "5XB", "GB", "-1GB", "0", 0):
        with pytest.raises(PyfoldError, match="max_shard_size"):
            parse_size(bad)


def test_shards_hold_every_tensor_once_within_the_limit() -> None:
    tensors = {f"t{i}": ("F16", (i + 1, 10)) for i in range(20)}
    shards = split_shards(tensors, 1000)
    assert [name for names in shards.values() for name in names] == list(tensors)
    assert list(shards) == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for names in shards.values():
        assert sum(tensors[name][1][0] * 20 for name in names) <= 1000 or len(names) == 1
    assert list(split_shards(tensors, 10**6)) == ["model.safetensors"]


def test_natural_order() -> None:
    assert sorted(["layers.10.a", "layers.2.b", "layers.2.a", "embed"], key=natural) == [
        "embed",
        "layers.2.a",
        "layers.2.b",
        "layers.10.a",
    ]
    names = ["a1", "a01", "a001", "a²", "a" + "9" * 5000, "a", ""]
    assert sorted(names, key=natural) == sorted(reversed(names), key=natural) == ["", "a", "a001", "a01", "a1", names[4], "a²"]
