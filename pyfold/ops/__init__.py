"""The numeric kernels: one schema per op, checked once at this edge; backends in ``registry``.

Shapes: B batch, N points, D features, K clusters, H hidden. Tensors in, tensors out; ``backend`` is ``"auto"`` or a name
from :func:`pyfold.ops.backends`. The same inputs give bitwise the same outputs on every run of one backend.
"""

from pyfold.ops.checks import FLOATS, LARGEST_SQUARED_NORM
from pyfold.ops.direct import assign, update
from pyfold.ops.gram_file import LEAST_ROWS, GramFile, clustering_bytes, disk_bytes, strips
from pyfold.ops.gram_space import Joins, gram, hartigan, inertia, lloyd, ward
from pyfold.ops.merging import first_nonfinite, merge_columns, merge_rows
from pyfold.ops.registry import backends, product_dtype, resolve

__all__ = [
    "FLOATS",
    "LARGEST_SQUARED_NORM",
    "LEAST_ROWS",
    "GramFile",
    "Joins",
    "assign",
    "backends",
    "clustering_bytes",
    "disk_bytes",
    "first_nonfinite",
    "gram",
    "hartigan",
    "inertia",
    "lloyd",
    "merge_columns",
    "merge_rows",
    "product_dtype",
    "resolve",
    "strips",
    "update",
    "ward",
]
