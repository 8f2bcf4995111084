"""The CUDA kernels of ``pyfold._C``: validated tensors on a device to addresses, on torch's current stream.

Problems of a call are solved together: they share every launch. Their points and clusters are numbered through, and a table
of 64-bit words on the device says where each problem's begin. All memory is torch's. Only ``hartigan`` waits for the device,
which knows how many moves it made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate as running_sums

import torch
from torch import Tensor

from pyfold.ops import reference

try:
    from pyfold import _C

    _import_error: str | None = None
except ImportError as error:
    _import_error = f"the extension pyfold._C is not built ({error}); run pip install ."

_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_LARGEST = 2**31 - 1  # points and clusters of one call are int32 on the device
PANEL = 1024  # rows of G made by one product: it computes (1 + PANEL / N) / 2 of the full one
_LOOKED = 2**20  # numbers looked at together for the first that is not finite
_GAINS = 65536  # that one launch of hartigan has room for: far more moves than any fold has needed (hundreds)


def unavailable() -> str | None:
    """Why this backend cannot run, or None."""
    if _import_error is not None:
        return _import_error
    if not hasattr(_C, "cuda_lloyd"):
        return "this build has no CUDA kernels; install it with nvcc on PATH"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def gram(xs: list[Tensor], outs: list[Tensor], accumulate: bool, transposed: bool) -> None:
    """Half the product, in panels of rows through cuBLAS, then the other triangle.

    Rows of ``x[i:]`` are the same products as in the whole of G where both are cut into the same panels; whether cuBLAS then
    picks the same kernel, though rows of ``out`` lie nearer to one another, is its own.
    Beside G it needs cuBLAS's workspace; to accumulate low precision, one panel of fp32 (4 N x 1024 bytes); for a list of
    problems of one shape, which become one batched product, a copy of them.
    """
    rows = [x.T if transposed else x for x in xs]
    with _stream_of(outs[0]) as stream, full_precision():
        alike = len({(x.shape, x.dtype, out.shape) for x, out in zip(rows, outs, strict=True)}) == 1
        if len(rows) > 1 and alike and len(rows[0]) == len(outs[0]) <= PANEL:
            products = _matmul(torch.bmm, torch.stack(rows), torch.stack(rows).mT).unbind()
            (torch._foreach_add_ if accumulate else torch._foreach_copy_)(outs, products)
        else:
            for x, out in zip(rows, outs, strict=True):
                for first in range(0, len(out), PANEL):
                    last = min(first + PANEL, len(out))
                    _add_product(x[first:last], x[first:].T, out[first:last, first:], accumulate)
        table = _table([(out.data_ptr(), *out.shape) for out in outs], outs[0])
        _C.cuda_mirror(table.data_ptr(), len(outs), max(len(out) for out in outs), stream)


def gram_bytes(n: int, dtype: torch.dtype) -> int:
    """Memory that ``gram`` takes beside G, for one problem of N points and no more than a panel of features."""
    if dtype == torch.float32:
        return 0
    return 4 * PANEL * n + (0 if _mixed() else 4 * PANEL * (n + PANEL))


def clustering_bytes(n: int, n_clusters: int) -> int:
    """Memory that ``pyfold.cluster`` takes beside G: half of it once more for Ward, and what is small.

    Per point the kernels take up to 66 bytes, per cluster 24, and labels, weights, and what sorts them less than 300.
    """
    return 2 * n * (n - 1) + 366 * n + 24 * n_clusters + 8 * _GAINS


def copy_rows(to: Tensor, source: Tensor) -> None:
    """Rows of numbers from host to device or back, on the current stream; torch would gather rows that lie apart first."""
    rows, columns = source.shape
    width = columns * source.element_size()
    to_pitch, source_pitch = (t.stride(0) * t.element_size() if rows > 1 else width for t in (to, source))
    with _stream_of(to if to.is_cuda else source) as stream:
        _C.cuda_copy_2d(to.data_ptr(), to_pitch, source.data_ptr(), source_pitch, width, rows, stream)


def ward(grams: list[Tensor], n_clusters: list[int], weights: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    problems, joins = [], []
    for g, k, w in zip(grams, n_clusters, weights, strict=True):
        lo = torch.empty(len(g) - k, dtype=torch.int64, device=g.device)
        joins.append((lo, torch.empty_like(lo), torch.empty_like(lo, dtype=torch.float64)))
        problems.append((g.data_ptr(), w.data_ptr(), len(g), k, *(t.data_ptr() for t in joins[-1])))
    with _stream_of(grams[0]) as stream:
        workspace = _bytes(_C.cuda_ward_workspace(problems), grams[0])
        _C.cuda_ward(problems, workspace.data_ptr(), stream)
    return joins


def lloyd(
    grams: list[Tensor], labels: list[Tensor], n_clusters: list[int], weights: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    sizes = [len(g) for g in grams]
    offsets, members = _partition(labels, n_clusters)
    nearest = torch.empty(sum(sizes), dtype=torch.int64, device=grams[0].device).split(sizes)
    distances = torch.empty(sum(sizes), dtype=torch.float32, device=grams[0].device).split(sizes)
    needed = [_C.cuda_lloyd_workspace(n, k) for n, k in zip(sizes, n_clusters, strict=True)]
    workspaces = _bytes(sum(needed), grams[0]).split(needed)
    shares = torch.empty(sum(sizes), dtype=torch.float64, device=grams[0].device)
    given = [label.contiguous() for label in labels]
    tensors = zip(grams, weights, given, nearest, distances, workspaces, strict=True)
    numbers = zip(sizes, n_clusters, _starts(sizes), _starts(n_clusters), strict=True)
    table = _table([(*(t.data_ptr() for t in ts), *ns) for ts, ns in zip(tensors, numbers, strict=True)], grams[0])
    with _stream_of(grams[0]) as stream:
        _C.cuda_lloyd(
            table.data_ptr(),
            len(grams),
            sum(sizes),
            sum(n_clusters),
            max(sizes),
            members.data_ptr(),
            offsets.data_ptr(),
            shares.data_ptr(),
            *_limits(grams[0].device),
            stream,
        )
    return list(zip(nearest, distances, strict=True))


def hartigan(
    grams: list[Tensor], labels: list[Tensor], n_clusters: list[int], weights: list[Tensor], max_moves: int
) -> list[tuple[Tensor, Tensor]]:
    refined = [given.clone() for given in labels]
    gains: list[list[Tensor]] = [[] for _ in grams]
    left = dict.fromkeys(range(len(grams)), max_moves)
    # A launch makes as many moves as it has room to report; a problem that used up its room goes on in the next.
    while left := {p: limit for p, limit in left.items() if limit > 0}:
        room = {p: min(limit, _GAINS) for p, limit in left.items()}
        made = torch.empty(len(left), dtype=torch.int64, device=grams[0].device)
        new = [torch.empty(room[p], dtype=torch.float64, device=made.device) for p in left]
        problems: list[tuple[int, ...]] = [
            (
                *(grams[p].data_ptr(), weights[p].data_ptr(), len(grams[p]), n_clusters[p], room[p]),
                *(refined[p].data_ptr(), gained.data_ptr(), made[at].data_ptr()),
            )
            for at, (p, gained) in enumerate(zip(left, new, strict=True))
        ]
        with _stream_of(made) as stream:
            workspace = _bytes(_C.cuda_hartigan_workspace(problems), made)
            _C.cuda_hartigan(problems, workspace.data_ptr(), stream)
        counts = made.tolist()
        for p, gained, count in zip(left, new, counts, strict=True):
            gains[p].append(gained[:count])
        left = {p: left[p] - count for p, count in zip(left, counts, strict=True) if count == room[p]}
    empty = torch.empty(0, dtype=torch.float64, device=grams[0].device)
    return [(moved, torch.cat(gain) if gain else empty) for moved, gain in zip(refined, gains, strict=True)]


def update(xs: list[Tensor], labels: list[Tensor], n_clusters: list[int], weights: list[Tensor | None]) -> list[Tensor]:
    offsets, members = _partition(labels, n_clusters)
    piece = int(_C.CUDA_PIECE)
    pieces = torch.zeros_like(offsets)
    torch.cumsum((offsets.diff() + (piece - 1)) // piece, 0, out=pieces[1:])
    # At most: the device knows how many there are.
    n_pieces = [k + len(x) // piece for x, k in zip(xs, n_clusters, strict=True)]
    mass = torch.empty(sum(n_pieces), dtype=torch.float64, device=xs[0].device)
    means = [torch.empty((k, x.shape[1]), dtype=torch.float32, device=x.device) for x, k in zip(xs, n_clusters, strict=True)]
    sums = [torch.empty((n, x.shape[1]), dtype=torch.float32, device=x.device) for x, n in zip(xs, n_pieces, strict=True)]
    points, clusters = _starts([len(x) for x in xs]), _starts(n_clusters)
    for dtype in dict.fromkeys(x.dtype for x in xs):
        group = [p for p, x in enumerate(xs) if x.dtype == dtype]
        table = _table(
            [
                (
                    *(xs[p].data_ptr(), _address(weights[p]), means[p].data_ptr(), sums[p].data_ptr()),
                    *(xs[p].shape[1], xs[p].stride(0), n_clusters[p], points[p], clusters[p]),
                )
                for p in group
            ],
            xs[0],
        )
        with _stream_of(xs[0]) as stream:
            _C.cuda_update(
                table.data_ptr(),
                len(group),
                _DTYPE[dtype],
                all(_in_packs(xs[p]) for p in group),
                max(xs[p].shape[1] for p in group),
                max(n_pieces[p] for p in group),
                max(n_clusters[p] for p in group),
                sum(n_clusters),
                offsets.data_ptr(),
                members.data_ptr(),
                pieces.data_ptr(),
                mass.data_ptr(),
                stream,
            )
    return means


def merge_rows(x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None, out: Tensor) -> None:
    offsets, members = _partition([labels], [n_clusters])
    with _stream_of(x) as stream:
        _C.cuda_merge_rows(
            x.data_ptr(),
            _DTYPE[x.dtype],
            x.shape[1],
            x.stride(0),
            n_clusters,
            offsets.data_ptr(),
            members.data_ptr(),
            _address(weights),
            out.data_ptr(),
            _DTYPE[out.dtype],
            stream,
        )


def merge_columns(x: Tensor, labels: Tensor, n_clusters: int, scale: Tensor | None, out: Tensor) -> None:
    offsets, members = _partition([labels], [n_clusters])
    scale = None if scale is None else scale.contiguous()
    h, n = x.shape
    with _stream_of(x) as stream:
        _C.cuda_merge_columns(
            x.data_ptr(),
            _DTYPE[x.dtype],
            h,
            n,
            x.stride(0),
            n_clusters,
            offsets.data_ptr(),
            members.data_ptr(),
            _address(scale),
            out.data_ptr(),
            _DTYPE[out.dtype],
            _limits(x.device)[0],
            stream,
        )


def first_nonfinite(x: Tensor) -> int | None:
    # One read of x; looking for where it is takes ten times the memory traffic, and as much memory as is looked at.
    if not x.numel() or bool(torch.stack(torch.aminmax(x)).isfinite().all()):
        return None
    found = ((at, reference.first_nonfinite(part)) for at, part in enumerate(x.flatten().split(_LOOKED)))
    return next(at * _LOOKED + place for at, place in found if place is not None)


def _partition(labels: Sequence[Tensor], n_clusters: Sequence[int]) -> tuple[Tensor, Tensor]:
    """All problems' clusters as one list: offsets (ΣK + 1,), and members (ΣN,), ascending within each cluster; int32."""
    n_points, total = sum(len(label) for label in labels), sum(n_clusters)
    if n_points > _LARGEST:
        raise ValueError(f"labels: expected at most {_LARGEST} points in a call on cuda, got {n_points}")
    keys = torch.cat(list(labels)).int()
    if len(labels) > 1:
        starts = torch.tensor(_starts(n_clusters), dtype=torch.int32).to(keys.device, non_blocking=True)
        sizes = torch.tensor([len(label) for label in labels]).to(keys.device, non_blocking=True)
        keys += torch.repeat_interleave(starts, sizes, output_size=n_points)
    keys, members = torch.sort(keys, stable=True)
    clusters = torch.arange(total + 1, dtype=torch.int32, device=keys.device)
    return torch.searchsorted(keys, clusters, out_int32=True), members.int()


def _add_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out (+)= a b``, fp32 sums of exact products."""
    if accumulate:
        # torch < 2.10 refuses an fp32 addend to a product of low precision.
        out.addmm_(a, b) if a.dtype == torch.float32 else out.add_(_matmul(torch.mm, a, b))
    elif a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif _mixed():
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def _matmul(product: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    """``torch.mm`` or ``torch.bmm`` with fp32 output."""
    if a.dtype == torch.float32:
        return product(a, b)
    return product(a, b, out_dtype=torch.float32) if _mixed() else product(a.float(), b.float())


@cache
def _mixed() -> bool:
    """Whether this torch multiplies low precision with fp32 output (2.8); copies to fp32 give the same products."""
    return "dtype" in torch.ops.aten.mm.overloads()


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 in products of the block, process-wide; the caller's setting afterwards."""
    matmul = torch.backends.cuda.matmul
    # torch 2.9 has two switches, and the older refuses to be read while they disagree.
    newer = getattr(matmul, "fp32_precision", None)
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        if newer is not None:
            matmul.fp32_precision = newer


@contextmanager
def _stream_of(tensor: Tensor) -> Iterator[int]:
    """The tensor's device is current; yields its current stream's address."""
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


@cache
def _limits(device: torch.device) -> tuple[tuple[int, int, int], int]:
    """Bytes of shared memory that a block may have, bytes and threads of a multiprocessor; how many multiprocessors."""
    return _C.cuda_limits(device.index)


def _table(rows: list[tuple[int, ...]], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(like.device, non_blocking=True)


def _bytes(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *running_sums(sizes[:-1])]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _in_packs(x: Tensor) -> bool:
    """Every row begins on 16 bytes and is whole packs of 16 bytes long."""
    per_pack = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and x.stride(0) % per_pack == 0 and x.shape[1] % per_pack == 0
