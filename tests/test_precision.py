"""What precision=auto becomes, and where bf16 is refused."""

import pytest

from umtrain.config import load_config
from umtrain.errors import ConfigError
from umtrain.precision import choose_precision

NARROW = ("dataset=spine", "res=128")  # 64 columns
WIDE = ("dataset=spine", "res=256")
VOLUMES = ("dataset=ct",)


@pytest.mark.parametrize(
    ("words", "kind", "has_bf16", "expected"),
    [
        (WIDE, "cpu", True, "bf16"),
        (WIDE, "cpu", False, "fp32"),
        (NARROW, "cpu", True, "fp32"),
        (NARROW, "cuda", True, "bf16"),
        (VOLUMES, "cpu", True, "fp32"),
        (VOLUMES, "cuda", True, "bf16"),
        (("dataset=wsi", "res=64"), "cpu", True, "bf16"),
    ],
)
def test_auto_takes_bf16_where_it_is_native_and_right(words, kind, has_bf16, expected):
    config = load_config([*words, "precision=auto"])
    assert choose_precision(config, kind, has_bf16=has_bf16) == expected


@pytest.mark.parametrize(
    ("words", "reason"),
    [(NARROW, "more than 64 are needed"), (VOLUMES, "3D convolutions in bf16 are wrong")],
)
@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_is_refused_on_processors_that_compute_it_wrongly(words, reason, has_bf16):
    config = load_config([*words, "precision=bf16"])
    with pytest.raises(ConfigError, match=reason):
        choose_precision(config, "cpu", has_bf16=has_bf16)
    assert choose_precision(config, "cuda", has_bf16=has_bf16) == "bf16"


def test_what_is_asked_for_is_kept():
    for precision in ("fp32", "bf16"):
        config = load_config([*WIDE, f"precision={precision}"])
        assert choose_precision(config, "cpu", has_bf16=False) == precision
