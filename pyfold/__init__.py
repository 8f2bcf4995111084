"""pyfold: model folding, streamed. Cluster similar units, merge them, write a smaller checkpoint that loads everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pyfold.clustering import Clustering as Clustering
    from pyfold.clustering import cluster as cluster
    from pyfold.clustering.estimator import KMeans as KMeans
    from pyfold.clustering.kmeans import KMeansResult as KMeansResult
    from pyfold.clustering.kmeans import kmeans as kmeans
    from pyfold.clustering.regime import Explanation as Explanation
    from pyfold.clustering.regime import explain as explain
    from pyfold.evaluate import perplexity as perplexity
    from pyfold.export import ExportReport as ExportReport
    from pyfold.export import export_checkpoint as export_checkpoint
    from pyfold.modules.fold import fold_model as fold_model
    from pyfold.modules.saving import load_model as load_model
    from pyfold.modules.saving import save_model as save_model
    from pyfold.ops import merge_columns as merge_columns
    from pyfold.ops import merge_rows as merge_rows
    from pyfold.pipeline import fold_checkpoint as fold_checkpoint
    from pyfold.report import FoldReport as FoldReport
    from pyfold.verify import verify_checkpoint as verify_checkpoint

_HOME = {
    "Clustering": "clustering",
    "Explanation": "clustering.regime",
    "ExportReport": "export",
    "FoldReport": "report",
    "KMeans": "clustering.estimator",
    "KMeansResult": "clustering.kmeans",
    "cluster": "clustering",
    "explain": "clustering.regime",
    "export_checkpoint": "export",
    "fold_checkpoint": "pipeline",
    "fold_model": "modules.fold",
    "kmeans": "clustering.kmeans",
    "load_model": "modules.saving",
    "merge_columns": "ops",
    "merge_rows": "ops",
    "perplexity": "evaluate",
    "save_model": "modules.saving",
    "verify_checkpoint": "verify",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `pyfold --help` and `pyfold inspect` do not need it.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"pyfold.{_HOME[name]}"), name)
    raise AttributeError(f"module 'pyfold' has no attribute '{name}'")
