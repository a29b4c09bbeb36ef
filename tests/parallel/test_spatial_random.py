"""Networks drawn at random are exact over several ranks, whatever their layers and sizes."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

_PATH = Path(__file__).parents[1] / "streaming" / "test_random_networks.py"
_SPEC = importlib.util.spec_from_file_location("random_networks", _PATH)
drawing = importlib.util.module_from_spec(_SPEC)
sys.modules["random_networks"] = drawing
_SPEC.loader.exec_module(drawing)


@pytest.mark.parametrize("n_ranks", [2, 3])
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    drawing.networks(),
    st.integers(1, 2),
    st.integers(9, 31),
    st.integers(5, 17),
    st.sampled_from([1, 2000, 10**8]),
    st.sampled_from([None, 0.5]),
    st.integers(0, 10**6),
)
def test_any_network_is_exact(
    crew, tmp_path, n_ranks, model, n_images, rows, columns, strip_bytes, kept_share, seed
):
    torch.manual_seed(seed)
    x = torch.randn(n_images, 2, rows, columns)
    assume(drawing._runs(model, x))
    path = tmp_path / "drawn.pt"
    torch.save((model, x), path)
    answers = crew(n_ranks).run(
        "drawn", path=str(path), strip_bytes=strip_bytes, kept_share=kept_share
    )
    for answer in answers:
        # A norm over a handful of pixels multiplies rounding errors.
        assert answer["error"] <= 1e-9, answer
        refused = answer.get("refused")
        assert refused is None or "too few for" in refused
