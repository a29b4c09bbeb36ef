import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from umtrain.errors import RunError
from umtrain.evaluation.probability_map import (
    ProbabilityMap,
    empty_map,
    read_map,
    write_map,
)
from umtrain.evaluation.slide_model import (
    FEATURES,
    fit_slide_model,
    map_features,
    read_slide_model,
    write_slide_model,
)


def make_map(cancer, tissue=None):
    cancer = np.asarray(cancer, np.float32)
    tissue = np.ones(cancer.shape, bool) if tissue is None else np.asarray(tissue, bool)
    probs = np.stack([np.zeros_like(cancer), 1 - cancer, cancer])
    return ProbabilityMap(probs, tissue, 0.0, 0.0, 256.0)


def toy(n, seed):
    """Maps with a few high patches in any case, that touch each other in positive slides alone."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    maps = []
    for label in labels:
        cancer = rng.beta(1, 12, (8, 8))
        places = [(2, 2), (2, 3), (3, 3)] if label else [(0, 0), (3, 5), (6, 2)]
        for place in places:
            cancer[place] = rng.uniform(0.6, 0.99)
        maps.append(make_map(cancer))
    return np.array([map_features(values) for values in maps]), labels


def test_features_are_what_their_names_say():
    cancer = np.zeros((4, 5))
    cancer[0, 0], cancer[1, 1], cancer[3, 3] = 0.95, 0.75, 0.6  # the first two touch
    tissue = np.ones((4, 5), bool)
    tissue[:, 4] = False
    named = dict(zip(FEATURES, map_features(make_map(cancer, tissue)), strict=True))
    assert named["max_log_odds"] == pytest.approx(np.log(0.95 / 0.05), rel=1e-5)
    odds = [np.log(p / (1 - p)) for p in (0.95, 0.75, 0.6, 1e-4, 1e-4)]
    assert named["top_log_odds"] == pytest.approx(np.mean(odds), rel=1e-5)
    assert named["share_above_0.5"] == pytest.approx(3 / 16)
    assert named["share_above_0.9"] == pytest.approx(1 / 16)
    assert named["largest_share"] == pytest.approx(2 / 16)
    assert named["largest_mean"] == pytest.approx(0.85)


def test_a_slide_without_tissue_has_the_least_of_every_feature():
    empty = map_features(empty_map(3, 4, 256.0))
    assert np.isfinite(empty).all()
    assert (empty <= map_features(make_map(np.full((3, 4), 0.3)))).all()


def test_the_model_learns_what_tells_slides_apart_and_gives_probabilities():
    features, labels = toy(80, 0)
    model = fit_slide_model(features, labels)
    new, truth = toy(60, 1)
    probs = model.probability(new)
    assert ((probs > 0) & (probs < 1)).all()
    assert roc_auc_score(truth, probs) > 0.95
    assert probs[truth == 1].mean() > 0.6 > 0.4 > probs[truth == 0].mean()


def test_a_stored_model_predicts_the_same_bits(tmp_path):
    model = fit_slide_model(*toy(20, 0))
    path = tmp_path / "checkpoints" / "slide_model.json"
    write_slide_model(path, model)
    assert read_slide_model(path) == model
    new, _ = toy(10, 1)
    assert np.array_equal(read_slide_model(path).probability(new), model.probability(new))


def test_a_feature_that_never_varies_does_no_harm():
    features, labels = toy(20, 0)
    features[:, FEATURES.index("share_above_0.9")] = 0
    assert np.isfinite(fit_slide_model(features, labels).probability(features)).all()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"features": 3}', '{"features": ["a"], "mean": "x"}']
)
def test_a_damaged_model_is_named(tmp_path, content):
    path = tmp_path / "slide_model.json"
    path.write_text(content)
    with pytest.raises(RunError, match=r"slide_model.json: not readable as a slide model"):
        read_slide_model(path)


def test_a_model_of_other_features_is_refused(tmp_path):
    path = tmp_path / "slide_model.json"
    model = dataclasses.asdict(fit_slide_model(*toy(20, 0)))
    path.write_text(json.dumps({**model, "features": ["a", *FEATURES[1:]]}))
    with pytest.raises(RunError, match="train again with this version"):
        read_slide_model(path)
    with pytest.raises(RunError, match="the run ended before it was fitted"):
        read_slide_model(tmp_path / "gone.json")


@settings(max_examples=50)
@given(
    st.floats(0, 500), st.floats(0, 500), st.floats(-5e4, 5e4), st.floats(-5e4, 5e4),
    st.floats(1, 4000),
)  # fmt: skip
def test_a_place_in_the_map_leads_to_level_0_and_back(column, row, l0_x, l0_y, l0_side):
    values = dataclasses.replace(empty_map(1, 1, l0_side), l0_x=l0_x, l0_y=l0_y)
    x, y = values.to_l0(column, row)
    assert values.to_map(x, y) == (pytest.approx(column, abs=1e-6), pytest.approx(row, abs=1e-6))
    assert values.to_l0(column + 1, row)[0] - x == pytest.approx(l0_side, abs=1e-6)


def test_a_map_survives_its_file_and_a_damaged_one_is_named(tmp_path):
    values = make_map(np.random.default_rng(0).random((3, 5)), np.eye(3, 5))
    write_map(tmp_path / "s.npz", values)
    back = read_map(tmp_path / "s.npz")
    assert back.probs.dtype == np.float32
    assert np.array_equal(back.probs, values.probs)
    assert np.array_equal(back.tissue, values.tissue)
    assert (back.l0_x, back.l0_y, back.l0_side) == (0.0, 0.0, 256.0)
    (tmp_path / "s.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:100])
    with pytest.raises(RunError, match=r"s.npz: not readable as a probability map"):
        read_map(tmp_path / "s.npz")
