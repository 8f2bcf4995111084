# The extension of csrc/bindings.cpp. Addresses are tensor.data_ptr(); dtypes are 0 (f32), 1 (f16), 2 (bf16).

def simd_levels() -> list[str]: ...
def gram(simd: str, x: int, dtype: int, n: int, d: int, ld: int, transposed: bool, out: int, threads: int, /) -> None: ...
def mirror(simd: str, gram: int, n: int, threads: int, /) -> None: ...
def ward(
    simd: str, gram: int, n: int, n_clusters: int, weights: int, lo: int, hi: int, height: int, threads: int, /
) -> None: ...
def hartigan(
    simd: str, gram: int, n: int, n_clusters: int, labels: int, weights: int, max_moves: int, threads: int, /
) -> list[float]: ...
def merge_rows(
    simd: str, x: int, dtype: int, d: int, ld: int, n_clusters: int, offsets: int, members: int, weights: int, out: int,
    to: int, threads: int, /,
) -> None: ...  # fmt: skip
def merge_columns(
    simd: str, x: int, dtype: int, h: int, n: int, ld: int, n_clusters: int, offsets: int, members: int, scale: int,
    out: int, to: int, threads: int, /,
) -> None: ...  # fmt: skip
def first_nonfinite(simd: str, x: int, dtype: int, count: int, threads: int, /) -> int: ...
