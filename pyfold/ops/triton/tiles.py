"""Tile choice as pure functions of chip and shape: what each launcher compiles, and what tests compile without a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A block of the result and how it is computed."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """Launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}


class Chip(NamedTuple):
    """What tile choice needs to know of a device."""

    arch: int
    n_sms: int


def chip(device: torch.device) -> Chip:
    """The chip that runs kernels on ``device``; the interpreter takes the tiles of an H100."""
    if device.type != "cuda":
        return Chip(90, 132)
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.major * 10 + properties.minor, properties.multi_processor_count)


def up_to(limit: int, size: int, least: int = 16) -> int:
    """The smallest power of two that holds ``size``, within [least, limit]."""
    return max(least, min(limit, 1 << (size - 1).bit_length()))


def assign(arch: int, itemsize: int, n: int, k: int, d: int, *, exact: bool) -> Tile:
    """Points x centroids x features of one step of the nearest-centroid product.

    The minimum over a row costs as much as a product of depth 128, so the screen wants two blocks on a multiprocessor, one in
    its product while the other is in its minimum: at most 128 registers a thread. 256 points a block halve what the blocks
    together read of the centroids from L2 (1 GiB at N = 1M, D = 128, K = 1024).
    """
    if exact and itemsize == 4:  # FMA units: 8 x 8 results a thread, 1024 FFMA to 88 shared loads a step
        tile = Tile(128, 128, 16, 8, 3)
    elif exact:  # the centroids' parts are made in registers
        tile = Tile(128, 64, 32, 8, 2)
    elif arch == 90:
        tile = Tile(256, 64, 128, 8, 3, 128) if d <= 128 else Tile(128, 128, 64, 8, 3)
    elif arch == 100:
        tile = Tile(128, 64, 128, 8, 3) if d <= 128 else Tile(128, 128, 64, 8, 3)
    else:
        tile = Tile(128, 64, 128, 8, 2, 128) if d <= 128 else Tile(128, 64, 64, 8, 3)
    return tile._replace(rows=up_to(tile.rows, n, least=64), columns=up_to(tile.columns, k), depth=up_to(tile.depth, d))


def splits(blocks: int, parts: int, n_sms: int) -> int:
    """Into how many parts to split the inner loop, so that four blocks a multiprocessor are there to balance."""
    return max(1, min(parts, 4 * n_sms // blocks))


def segment_rows(members: int, d: int, *, ascending: bool) -> Tile:
    """Members x columns of one step of the sum of a cluster of ``members`` on average; ``ascending`` takes them one by one."""
    columns = up_to(1024, d)
    rows = 1 if ascending else min(up_to(64, members, least=1), 4096 // columns)
    return Tile(rows, columns, 1, 4, 2)


def segment_columns(k: int) -> Tile:
    """Rows x clusters of one step of a column merge: few rows, so that they stay in L1 while every cluster is gathered."""
    return Tile(1, up_to(1024, k), 1, 8, 2)


def lloyd(n: int) -> Tile:
    """Points of a block, four a thread, and rows of G in flight at once."""
    return Tile(1, up_to(512, n, least=128), 16, 4, 1)


def lloyd_splits(blocks: int, n: int, n_sms: int) -> int:
    """Splits of the rows of G: the five blocks of 96 registers that a multiprocessor holds, and 64 rows a split at least."""
    return max(1, min(-(-n // 64), 5 * n_sms // blocks))
