"""Points x (N, D) and centroids c (K, D, fp32) -> label and squared distance of the nearest centroid.

The order of ‖x − c‖² over c is that of the score ‖c‖² − 2 x·c, so a product with a running minimum finds it, and the distance
is then taken once, directly, for the chosen centroid: no cancellation, and exactly 0 where point and centroid are equal.

fp32 points: IEEE products on the FMA units (TF32 would lose 13 bits). 16-bit points: tensor cores, in two passes.
 - *Screen*: x times ĉ, the centroid rounded to the points' type, keeps the least and the second least score. By Cauchy and
   Schwarz a score is off by at most 2 ‖x‖ ‖c − ĉ‖, so where the two are further apart the label is proven.
 - *Exact*: the other points (i.i.d. Gaussian, D = 128, K = 1024: about 1 % in fp16, 9 % in bf16) again, with the centroid as
   three bf16 parts and the point as one (bf16) or two (fp16). These hold every bit, and their products are exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfold.ops.triton import tiles
from pyfold.ops.triton.kernels.problems import DTYPE, INTERPRETED, address, aligned, size, starts, table

FIELDS = tl.constexpr(9)  # x, its row stride, N, D, centroids, K, first point, first cluster, first rounded value
FAR = tl.constexpr(3e38)  # finite: the screen writes column numbers into its lowest bits


@triton.jit
def _prepare(problems, norms, shifts, rounded, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr):
    """‖c‖² and, for 16-bit points, ĉ and ‖c − ĉ‖ (infinite, so that nothing is proven, where c is beyond the type's range)."""
    problem = problems + tl.program_id(1) * FIELDS
    k = tl.program_id(0)
    if k < tl.load(problem + 5):
        d = tl.load(problem + 3).to(tl.int32)
        centroid = tl.load(problem + 4).to(tl.pointer_type(tl.float32)) + k.to(tl.int64) * d
        rounded += tl.load(problem + 8) + k.to(tl.int64) * d
        square = tl.zeros([BLOCK_D], tl.float32)
        moved = tl.zeros([BLOCK_D], tl.float32)
        for begin in range(0, d, BLOCK_D):
            columns = begin + tl.arange(0, BLOCK_D)
            c = tl.load(centroid + columns, mask=columns < d, other=0.0)
            square += c * c
            if DTYPE != tl.float32:
                near = c.to(DTYPE)
                tl.store(rounded + columns, near, mask=columns < d)
                shift = c - near.to(tl.float32)
                moved += shift * shift
        at = tl.load(problem + 7) + k
        tl.store(norms + at, tl.sum(square))
        tl.store(shifts + at, tl.sqrt(tl.sum(moved)))


@triton.jit
def _product(x, c, acc):
    """acc + x c, every product exact or rounded once in fp32. x: points; c: fp32 or of the points' type."""
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), c.to(tl.float32), acc, input_precision="ieee")
    if x.dtype == c.dtype:
        return tl.dot(x, c, acc, input_precision="ieee")
    high = c.to(tl.bfloat16)
    rest = c - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    points = x.to(tl.bfloat16)
    if x.dtype == tl.float16:
        remainder = (x.to(tl.float32) - points.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(remainder, middle, acc)
        acc = tl.dot(remainder, high, acc)
    acc = tl.dot(points, low, acc)
    acc = tl.dot(points, middle, acc)
    return tl.dot(points, high, acc)


@triton.jit
def _two_least(a1, a2, b1, b2):
    # With NaN propagated, min(x, inf) folds to x: three instructions a score instead of four.
    NAN: tl.constexpr = tl.PropagateNan.ALL
    second = tl.minimum(tl.maximum(a1, b1, NAN), tl.minimum(a2, b2, NAN), NAN)
    return tl.minimum(a1, b1, NAN), second


@triton.jit
def _nearest(
    problems, norms, rounded, listed, counts, least, second, nearest, n_points,
    DTYPE: tl.constexpr, SCREEN: tl.constexpr, LISTED: tl.constexpr, ALIGNED: tl.constexpr, ONE_PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Least score of each point over one split of the centroids: blocks of points x splits x problems.

    LISTED: only the points in ``listed``, whose number only the device knows; the programs share them.
    """
    MULTIPLE: tl.constexpr = (128 // DTYPE.primitive_bitwidth) if ALIGNED else 1
    index = tl.program_id(2)
    problem = problems + index * FIELDS
    x = address(problem, 0, DTYPE, ALIGNED)
    stride = size(problem, 1, MULTIPLE)
    width = size(problem, 3, MULTIPLE)
    d = width.to(tl.int32)
    n_clusters = tl.load(problem + 5).to(tl.int32)
    first_point = tl.load(problem + 6)
    first_cluster = tl.load(problem + 7)
    norms += first_cluster
    if SCREEN:
        centroids = rounded + size(problem, 8, MULTIPLE)
    else:
        centroids = address(problem, 4, tl.float32, ALIGNED)
    if LISTED:
        n = tl.load(counts + index)
    else:
        n = tl.load(problem + 2).to(tl.int32)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(n_clusters, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    columns = tl.arange(0, BLOCK_K)
    features = tl.arange(0, BLOCK_D)

    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.num_programs(0)):
        points = block * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = points < n
        if LISTED:
            points = tl.load(listed + first_point + points, mask=valid, other=0)
        row = x + points.to(tl.int64)[:, None] * stride
        if ONE_PANEL:
            panel = tl.load(row + features[None, :], mask=valid[:, None] & (features < d)[None, :], other=0.0)
        best = tl.full([BLOCK_N], float("inf"), tl.float32)
        runner_up = tl.full([BLOCK_N], float("inf"), tl.float32)
        label = tl.zeros([BLOCK_N], tl.int32)
        for begin in range(split * share, tl.minimum((split + 1) * share, n_clusters), BLOCK_K):
            k = begin + columns
            column = centroids + begin * width + (columns * d)[None, :]
            acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            if ONE_PANEL:
                c = tl.load(column + features[:, None], mask=(features < d)[:, None] & (k < n_clusters)[None, :], other=0.0)
                acc = _product(panel, c, acc)
            else:
                for at in range(0, d, BLOCK_D):
                    inside = at + features < d
                    part = tl.load(row + (at + features)[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
                    c = tl.load(column + (at + features)[:, None], mask=inside[:, None] & (k < n_clusters)[None, :], other=0.0)
                    acc = _product(part, c, acc)
            norm = tl.load(norms + k, mask=k < n_clusters, other=FAR)
            if SCREEN:
                # The column goes into the lowest bits of its score, so that one minimum finds both.
                marked = ((norm[None, :] - 2.0 * acc).to(tl.int32, bitcast=True) & -BLOCK_K) | columns[None, :]
                none = tl.full(acc.shape, float("inf"), tl.float32)
                low, next_low = tl.reduce((marked.to(tl.float32, bitcast=True), none), 1, _two_least)
                where = low.to(tl.int32, bitcast=True) & (BLOCK_K - 1)
                runner_up = tl.minimum(tl.maximum(best, low), tl.minimum(runner_up, next_low))
            else:
                low, where = tl.min(norm[None, :] - 2.0 * acc, 1, return_indices=True)
            label = tl.where(low < best, begin + where, label)
            best = tl.minimum(best, low)
        at_point = split.to(tl.int64) * n_points + first_point + points
        tl.store(least + at_point, best, mask=valid)
        tl.store(nearest + at_point, label, mask=valid)
        if SCREEN:
            tl.store(second + at_point, runner_up, mask=valid)


@triton.jit
def _finish(
    problems, shifts, listed, counts, least, second, nearest, n_points, labels, distances, SPLITS: tl.constexpr,
    DTYPE: tl.constexpr, SCREEN: tl.constexpr, LISTED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The best of the splits, its label and distance. SCREEN: lists the points whose label is not proven."""
    MULTIPLE: tl.constexpr = (128 // DTYPE.primitive_bitwidth) if ALIGNED else 1
    index = tl.program_id(1)
    problem = problems + index * FIELDS
    x = address(problem, 0, DTYPE, ALIGNED)
    stride = size(problem, 1, MULTIPLE)
    d = size(problem, 3, MULTIPLE).to(tl.int32)
    centroids = address(problem, 4, tl.float32, ALIGNED)
    first_point = tl.load(problem + 6)
    if LISTED:
        n = tl.load(counts + index)
    else:
        n = tl.load(problem + 2).to(tl.int32)
    features = tl.arange(0, BLOCK_D)
    if SCREEN:
        n_clusters = tl.load(problem + 5).to(tl.int32)
        first_cluster = tl.load(problem + 7)
        worst = tl.zeros([BLOCK_K], tl.float32)
        for begin in range(0, n_clusters, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            worst = tl.maximum(worst, tl.load(shifts + first_cluster + k, mask=k < n_clusters, other=0.0))
        shift = tl.max(worst)

    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.num_programs(0)):
        points = block * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = points < n
        if LISTED:
            points = tl.load(listed + first_point + points, mask=valid, other=0)
        best = tl.full([BLOCK_N], float("inf"), tl.float32)
        runner_up = tl.full([BLOCK_N], float("inf"), tl.float32)
        label = tl.zeros([BLOCK_N], tl.int32)
        for split in tl.static_range(SPLITS):
            at_point = split * n_points + first_point + points
            low = tl.load(least + at_point, mask=valid, other=0.0)
            label = tl.where(low < best, tl.load(nearest + at_point, mask=valid, other=0), label)
            if SCREEN:
                next_low = tl.load(second + at_point, mask=valid, other=0.0)
                runner_up = tl.minimum(tl.maximum(best, low), tl.minimum(runner_up, next_low))
            best = tl.minimum(best, low)

        row = x + points.to(tl.int64)[:, None] * stride
        centroid = centroids + label.to(tl.int64)[:, None] * d
        squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        energy = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for at in range(0, d, BLOCK_D):
            inside = valid[:, None] & (at + features < d)[None, :]
            point = tl.load(row + (at + features)[None, :], mask=inside, other=0.0).to(tl.float32)
            difference = point - tl.load(centroid + (at + features)[None, :], mask=inside, other=0.0)
            squares += difference * difference
            if SCREEN:
                energy += point * point
        tl.store(labels + first_point + points, label.to(tl.int64), mask=valid)
        tl.store(distances + first_point + points, tl.sum(squares, 1), mask=valid)
        if SCREEN:
            # Both scores may be off by 2 ‖x‖ ‖c − ĉ‖ and by the bits that the column number took; 4.004: the norms are rounded.
            doubt = 4.004 * tl.sqrt(tl.sum(energy, 1)) * shift + (tl.abs(best) + tl.abs(runner_up)) * (BLOCK_K * 2.0**-23)
            unproven = valid & ~(runner_up - best > doubt)
            amount = unproven.to(tl.int32)
            begin = tl.atomic_add(counts + index, tl.sum(amount))  # the list's order varies, no result depends on it
            tl.store(listed + first_point + begin + tl.cumsum(amount) - amount, points, mask=unproven)


def assign(xs: list[Tensor], centroids: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Nearest centroid (lowest index among equals) and squared distance of each point: argmin_c ‖x − c‖²."""
    if len({x.dtype for x in xs}) > 1:
        return [assign([x], [c])[0] for x, c in zip(xs, centroids, strict=True)]
    device, dtype = xs[0].device, DTYPE[xs[0].dtype]
    n = [x.shape[0] for x in xs]
    k = [c.shape[0] for c in centroids]
    d = [x.shape[1] for x in xs]
    first_point, first_cluster = starts(n), starts(k)
    first_value = starts([rows * columns for rows, columns in zip(k, d, strict=True)])
    problems = table(
        [[x.data_ptr() for x in xs], [x.stride(0) for x in xs], n, d, [c.data_ptr() for c in centroids], k,
         first_point[:-1], first_cluster[:-1], first_value[:-1]], device,
    )  # fmt: skip
    screen = xs[0].dtype != torch.float32
    chip = tiles.chip(device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    norms, shifts = floats(2, first_cluster[-1])
    rounded = torch.empty(first_value[-1] if screen else 1, dtype=xs[0].dtype, device=device)
    _prepare[(max(k), len(xs))](problems, norms, shifts, rounded, dtype, BLOCK_D=tiles.up_to(1024, max(d)))

    n_points = first_point[-1]
    listed = torch.empty(n_points if screen else 1, dtype=torch.int32, device=device)
    counts = torch.zeros(len(xs), dtype=torch.int32, device=device)
    labels = torch.empty(n_points, dtype=torch.int64, device=device)
    distances = floats(n_points)
    common = {"DTYPE": dtype, "ALIGNED": aligned(xs + centroids)}
    for SCREEN, LISTED in ((True, False), (False, True)) if screen else ((False, False),):
        tile = tiles.assign(chip.arch, xs[0].element_size(), max(n), max(k), max(d), exact=not SCREEN)
        blocks = triton.cdiv(max(n), tile.rows)
        parts = triton.cdiv(max(k), tile.columns)
        if LISTED:  # few blocks, as a rule: always split, and no more programs than run at once
            splits = min(parts, 8)
            blocks = min(blocks, triton.cdiv(2 * chip.n_sms, splits))
        else:
            splits = tiles.splits(sum(triton.cdiv(rows, tile.rows) for rows in n), parts, chip.n_sms)
        least = floats(splits, n_points)
        second = floats(splits, n_points) if SCREEN else least
        nearest = torch.empty((splits, n_points), dtype=torch.int32, device=device)
        _nearest[(blocks, splits, len(xs))](
            problems, norms, rounded, listed, counts, least, second, nearest, n_points, **common,
            SCREEN=SCREEN, LISTED=LISTED, ONE_PANEL=max(d) <= tile.depth,
            BLOCK_N=tile.rows, BLOCK_K=tile.columns, BLOCK_D=tile.depth, **tile.options(),
        )  # fmt: skip
        rows = 32
        blocks = min(triton.cdiv(max(n), rows), 8 * chip.n_sms) if LISTED else triton.cdiv(max(n), rows)
        _finish[(blocks, len(xs))](
            problems, shifts, listed, counts, least, second, nearest, n_points, labels, distances, SPLITS=splits, **common,
            SCREEN=SCREEN, LISTED=LISTED, BLOCK_N=rows, BLOCK_D=tiles.up_to(128, max(d)), BLOCK_K=tile.columns, num_warps=8,
        )  # fmt: skip
    return list(zip(labels.split(n), distances.split(n), strict=True))
