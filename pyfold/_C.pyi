# The extension of csrc/bindings.cpp. Addresses are tensor.data_ptr(); dtypes are 0 (f32), 1 (f16), 2 (bf16). Ops on the Gram
# matrix take a list of problems; bindings.cpp names the entries of each tuple.

from collections.abc import Sequence

_Problems = Sequence[tuple[int, ...]]

def simd_levels() -> list[str]: ...
def gram(simd: str, problems: _Problems, accumulate: bool, transposed: bool, threads: int, /) -> None: ...
def ward(simd: str, problems: _Problems, threads: int, /) -> None: ...
def lloyd(simd: str, problems: _Problems, threads: int, /) -> None: ...
def hartigan(simd: str, problems: _Problems, max_moves: int, threads: int, /) -> list[list[float]]: ...
def merge_rows(
    simd: str, x: int, dtype: int, d: int, ld: int, n_clusters: int, offsets: int, members: int, weights: int, out: int,
    to: int, threads: int, /,
) -> None: ...  # fmt: skip
def merge_columns(
    simd: str, x: int, dtype: int, h: int, n: int, ld: int, n_clusters: int, offsets: int, members: int, scale: int,
    out: int, to: int, threads: int, /,
) -> None: ...  # fmt: skip
def first_nonfinite(simd: str, x: int, dtype: int, count: int, threads: int, /) -> int: ...
