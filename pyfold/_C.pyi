# The extension of csrc/bindings.cpp. Addresses are tensor.data_ptr(); dtypes are 0 (f32), 1 (f16), 2 (bf16). Ops on the Gram
# matrix take a list of problems, or one in a file; bindings.cpp names the entries of each tuple.

from collections.abc import Sequence

_Problems = Sequence[tuple[int, ...]]
_GramFile = tuple[int, int, str, int, int]

def simd_levels() -> list[str]: ...
def gram(simd: str, problems: _Problems, accumulate: bool, transposed: bool, threads: int, /) -> None: ...
def assign(simd: str, problems: _Problems, threads: int, /) -> None: ...
def ward(simd: str, problems: _Problems, threads: int, /) -> None: ...
def lloyd(simd: str, problems: _Problems, threads: int, /) -> None: ...
def hartigan(simd: str, problems: _Problems, max_moves: int, threads: int, /) -> list[list[float]]: ...
def ward_file(
    simd: str, gram: _GramFile, scratch: int, n_clusters: int, weights: int, lo: int, hi: int, height: int,
    threads: int, /,
) -> None: ...  # fmt: skip
def hartigan_file(
    simd: str, gram: _GramFile, n_clusters: int, labels: int, weights: int, max_moves: int, threads: int, /,
) -> list[float]: ...  # fmt: skip
def gather_file(gram: _GramFile, i: int, n_i: int, j: int, n_j: int, out: int, /) -> None: ...
def merge_rows(
    simd: str, x: int, dtype: int, n: int, d: int, ld: int, labels: int, n_clusters: int, weights: int, out: int, to: int,
    threads: int, /,
) -> None: ...  # fmt: skip
def merge_columns(
    simd: str, x: int, dtype: int, h: int, n: int, ld: int, labels: int, n_clusters: int, scale: int, out: int, to: int,
    threads: int, /,
) -> None: ...  # fmt: skip
def first_nonfinite(simd: str, x: int, dtype: int, count: int, threads: int, /) -> int: ...

# csrc/cuda/bindings.cpp, in builds with CUDA. `limits`: bytes of shared memory a block may have, bytes and threads of an SM.
CUDA_PIECE: int

def cuda_limits(device: int, /) -> tuple[tuple[int, int, int], int]: ...
def cuda_lloyd_tile(n: int, limits: tuple[int, int, int], /) -> tuple[int, int, int, int]: ...
def cuda_columns_tile(n: int, item: int, limits: tuple[int, int, int], /) -> tuple[int, int, int, int]: ...
def cuda_lloyd_workspace(n: int, n_clusters: int, /) -> int: ...
def cuda_lloyd(
    problems: int, n_problems: int, n_points: int, n_clusters: int, max_n: int, members: int, offsets: int, shares: int,
    limits: tuple[int, int, int], multiprocessors: int, stream: int, /,
) -> None: ...  # fmt: skip
def cuda_merge_rows(
    x: int, dtype: int, d: int, ld: int, n_clusters: int, offsets: int, members: int, weights: int, out: int, to: int,
    stream: int, /,
) -> None: ...  # fmt: skip
def cuda_merge_columns(
    x: int, dtype: int, h: int, n: int, ld: int, n_clusters: int, offsets: int, members: int, scale: int, out: int, to: int,
    limits: tuple[int, int, int], stream: int, /,
) -> None: ...  # fmt: skip
def cuda_update(
    problems: int, n_problems: int, dtype: int, vector: bool, max_d: int, max_pieces: int, max_clusters: int, n_clusters: int,
    offsets: int, members: int, pieces: int, mass: int, stream: int, /,
) -> None: ...  # fmt: skip
def cuda_mirror(problems: int, n_problems: int, max_n: int, stream: int, /) -> None: ...
def cuda_copy_2d(
    to: int, to_pitch: int, source: int, source_pitch: int, row_bytes: int, rows: int, stream: int, /
) -> None: ...  # fmt: skip
def cuda_ward_workspace(problems: list[tuple[int, ...]], /) -> int: ...
def cuda_ward(problems: list[tuple[int, ...]], workspace: int, stream: int, /) -> None: ...
def cuda_hartigan_workspace(problems: list[tuple[int, ...]], /) -> int: ...
def cuda_hartigan(problems: list[tuple[int, ...]], workspace: int, stream: int, /) -> None: ...
