"""A Gram matrix in a file, for N x N numbers that memory cannot hold: written in strips of rows, then clustered row by row.

Read and written by position: pages mapped from a file would count in the process's memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from pyfold.io.safetensors import as_bytes, write_bytes
from pyfold.ops.merging import first_nonfinite

PAGE = 1024  # floats: a strip as high as some of these writes whole pages, also where it is turned
LEAST_ROWS = 32  # of a strip: what the kernels compute at a time
_TURNED = 1 << 22  # bytes of a strip in hand twice, to be turned


class GramFile:
    """A symmetric (N, N) float32 matrix in a file that has no name: it is gone when the process is, however that ends.

    Written once, from the first row to the last, by :meth:`write`; then for ``pyfold.cluster(gram=...)``, ``ops.ward``,
    ``ops.hartigan`` and ``ops.inertia``, on the ``cpu`` backend. Labels and numbers are those of the same matrix in memory, bit
    for bit.

    Parameters
    ----------
    folder : str or Path
        Where the file lies. Its whole size is taken at once; Ward takes up to N − K rows more while it runs.
    n : int
        N.

    Raises
    ------
    OSError
        If the disk is full, or reading or writing fails; here and in every use. Names the folder.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | Path, n: int) -> None:
        self.n = n
        self.folder = Path(folder)
        self.row_bytes = row_bytes(n)
        self.rows_written = 0
        self.finite = True
        self._diagonal = torch.empty(n, dtype=torch.float32)
        self._file = self.scratch()
        try:
            # Now, not after hours; and in one piece, which strips of columns would not make of it.
            os.posix_fallocate(self.fileno(), 0, n * self.row_bytes)
        except OSError as error:
            self.close()
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(folder)) from None

    def __enter__(self) -> GramFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.n

    @property
    def shape(self) -> tuple[int, int]:
        """(N, N)."""
        return self.n, self.n

    def fileno(self) -> int:
        """The open file."""
        return self._file.fileno()

    def scratch(self) -> IO[bytes]:
        """Another file without a name in the same folder."""
        return tempfile.TemporaryFile(dir=self.folder, buffering=0)

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()

    def diagonal(self) -> Tensor:
        """(N,), float32."""
        return self._diagonal

    def check_complete(self) -> None:
        """Raises ValueError unless every row has been written."""
        if self.rows_written != self.n:
            raise ValueError(f"gram: expected all {self.n} rows in the file, got {self.rows_written}")

    def write(self, strip: Tensor) -> None:
        """The next rows, from the diagonal to the right: G[i:i + R, i:], where i rows are written.

        Parameters
        ----------
        strip : Tensor, (R, N - i), float32
            As ``ops.gram(x[i:], rows=R)`` gives it: its first R columns are symmetric.
        """
        begin, width = self.rows_written, self.n - self.rows_written
        height = len(strip) if strip.dim() == 2 and strip.shape[1] == width else 0
        if strip.dtype != torch.float32 or not 1 <= height <= width or not strip.is_contiguous():
            raise ValueError(
                f"strip: expected contiguous float32 of shape (R, {width}), got {strip.dtype} of {tuple(strip.shape)}"
            )
        self._diagonal[begin : begin + height] = strip.diagonal()
        self.finite = self.finite and first_nonfinite(strip) is None
        data = as_bytes(strip)
        for row in range(height):
            self._write(data[row * width * 4 : (row + 1) * width * 4], begin + row, begin)
        turned = torch.empty((min(max(1, _TURNED // (4 * height)), width), height), dtype=torch.float32)
        data = as_bytes(turned)
        for first in range(height, width, len(turned)):
            columns = strip[:, first : first + len(turned)]
            turned[: columns.shape[1]] = columns.T
            for row in range(columns.shape[1]):
                self._write(data[row * height * 4 : (row + 1) * height * 4], begin + first + row, begin)
        self.rows_written += height

    def _write(self, data: memoryview, row: int, column: int) -> None:
        write_bytes(self.fileno(), self.folder, row * self.row_bytes + 4 * column, data)


def row_bytes(n: int) -> int:
    """From one row to the next in the file: whole pages."""
    return -(-n // PAGE) * PAGE * 4


def disk_bytes(n: int, n_clusters: int) -> int:
    """Disk that clustering by a :class:`GramFile` takes at most: the matrix, and a row for each of Ward's joins."""
    return (2 * n - n_clusters) * row_bytes(n)


def clustering_bytes(n: int, n_clusters: int, threads: int) -> int:
    """Memory that ``pyfold.cluster`` takes at most for a :class:`GramFile`."""
    kept = min(n // 16, (n - n_clusters) // 15)  # clusters of 16 or more, whose sums Hartigan keeps
    return (24 << 20) + n * (512 + 8 * kept) + threads * (4 * n + 8 * n_clusters)


def strips(n: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Rows [begin, end) of strips for :meth:`GramFile.write`, none of more than ``nbytes`` bytes unless of the fewest rows.

    They grow higher as they grow shorter, so that the features are read as few times as can be.
    """
    begin = 0
    while begin < n:
        rows = nbytes // (4 * (n - begin))
        rows = max(rows // PAGE * PAGE or rows // LEAST_ROWS * LEAST_ROWS, LEAST_ROWS)
        yield begin, min(begin + rows, n)
        begin += rows
