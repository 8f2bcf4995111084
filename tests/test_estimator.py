"""``pyfold.KMeans``: scikit-learn's own checks, and what the attributes and methods promise of each other."""

from __future__ import annotations

import numpy as np
import pytest
from test_kmeans import blobs

import pyfold


def test_estimator_contract() -> None:
    from sklearn.utils.estimator_checks import check_estimator

    reasons = {
        "check_sample_weight_equivalence_on_dense_data": "it shuffles the points; clusters are numbered by their first member "
        "(the partition is the same: test_weights_count_points_and_zero_is_no_point)",
    }
    for options in ({}, {"init": None}):
        outcomes = check_estimator(pyfold.KMeans(**options), expected_failed_checks=reasons, on_skip=None)
        assert {one["check_name"] for one in outcomes if one["status"] == "xfail"} == set(reasons)


def test_estimator() -> None:
    from sklearn.base import clone

    x = blobs(300, 5, 8, spread=0.2)[0].numpy()
    for options in ({}, {"init": None}, {"init": "random", "tol": 0.1}, {"n_init": "auto"}):
        model = pyfold.KMeans(8, **options).fit(x)
        assert np.array_equal(model.predict(x), model.labels_)
        assert np.array_equal(clone(model).fit_predict(x), model.labels_)
        assert model.score(x) == -model.inertia_
        distances = model.transform(x)
        assert distances.shape == (300, 8)
        assert np.array_equal(distances.argmin(1), model.labels_)
        assert np.square(distances.min(1)).sum() == pytest.approx(model.inertia_, rel=1e-4)
        assert list(model.get_feature_names_out()) == [f"kmeans{c}" for c in range(8)]
    far = pyfold.KMeans(8).fit(x.astype(np.float64) + 1e7)
    assert np.array_equal(far.predict(x.astype(np.float64) + 1e7), far.labels_)
    with pytest.raises(ValueError, match="n_samples=3"):
        pyfold.KMeans(8).fit(x[:3])
    with pytest.raises(TypeError, match="n_clusters: expected an integer, got 'a'"):
        pyfold.KMeans("a").fit(x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_far_query_changes_no_other_label(dtype: type) -> None:
    x = np.random.default_rng(0).standard_normal((100, 3)).astype(dtype)
    model = pyfold.KMeans(5).fit(x)
    queries = np.concatenate([x, [[1e30, 0, 0]], [[0, 0, -1e20]]]).astype(dtype)
    assert np.array_equal(model.predict(queries)[:100], model.labels_)
