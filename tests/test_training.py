import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from umtrain.config import OptimConfig
from umtrain.optimization import create_optimizer, create_schedule
from umtrain.progress import Progress, Step


def rates(schedule, total_steps, warmup_fraction=0.1):
    config = OptimConfig(
        name="sgd", lr=1.0, schedule=schedule, warmup_fraction=warmup_fraction, weight_decay=0.0
    )
    optimizer = create_optimizer(nn.Linear(2, 1), config)
    scheduler = create_schedule(optimizer, config, total_steps)
    seen = []
    for _ in range(total_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@given(st.integers(1, 300), st.floats(0, 0.9))
def test_the_rate_rises_to_its_peak_then_falls_to_almost_nothing(total_steps, warmup_fraction):
    seen = rates("cosine", total_steps, warmup_fraction)
    peak = seen.index(max(seen))
    assert all(0 < rate <= 1 for rate in seen)
    assert seen[: peak + 1] == sorted(seen[: peak + 1])
    assert seen[peak:] == sorted(seen[peak:], reverse=True)
    assert peak == min(round(warmup_fraction * total_steps), total_steps - 1)


def test_a_constant_rate_stays_after_warm_up():
    assert rates("constant", 20)[2:] == [1.0] * 18


def test_vectors_are_not_decayed():
    config = OptimConfig(name="adamw", lr=1e-3, weight_decay=0.1)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    decayed, kept = create_optimizer(model, config).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 1, 3, 3)]
    assert [tuple(p.shape) for p in kept["params"]] == [(2,), (2,), (2,)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_a_frozen_parameter_is_left_to_rest():
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    groups = create_optimizer(model, OptimConfig(name="adamw", lr=1.0)).param_groups
    assert [p for group in groups for p in group["params"]] == [model.weight]


def progress(step_times_s, images=2):
    return Progress(
        [
            Step(number, 1, 1.0 / number, 0.1, images, seconds, 0.0)
            for number, seconds in enumerate(step_times_s, 1)
        ]
    )


def test_throughput_leaves_out_warm_up_steps():
    figures = progress([9, 9, 9, 0.5, 1.0]).throughput()
    assert figures["step_s"] == {
        "mean": 0.75,
        "std": pytest.approx(math.sqrt(0.125)),
        "n": 2,
    }
    assert figures["images_per_s"]["mean"] == pytest.approx((4 + 2) / 2)


def test_throughput_of_warm_up_alone_is_unknown_not_zero():
    figures = progress([1.0, 1.0]).throughput()
    assert figures["images_per_s"] == {"mean": None, "std": None, "n": 0}


def test_training_figures_begin_and_end_with_the_losses():
    figures = progress([1, 1, 1, 1]).train_figures()
    assert (figures["loss_first"], figures["loss_last"], figures["steps"]) == (1.0, 0.25, 4)


def test_fused_optimizers_step_as_plain_ones():
    torch.manual_seed(0)
    plain, ours = nn.Linear(5, 3), nn.Linear(5, 3)
    ours.load_state_dict(plain.state_dict())
    reference = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    optimizer = create_optimizer(ours, OptimConfig(name="adamw", lr=0.1))
    for _ in range(3):
        batch = torch.randn(4, 5)
        for model, stepper in ((plain, reference), (ours, optimizer)):
            stepper.zero_grad()
            model(batch).square().mean().backward()
            stepper.step()
    torch.testing.assert_close(ours.weight, plain.weight)


@pytest.mark.parametrize("score", [-0.9, 3.0], ids=["AUC", "mm"])
def test_a_plateau_lowers_the_rate_whatever_the_sign_of_the_score(score):
    config = OptimConfig(name="sgd", lr=1.0, schedule="plateau")
    optimizer = create_optimizer(nn.Linear(2, 1), config)
    schedule = create_schedule(optimizer, config, 100)
    for _ in range(5):
        schedule.step(score)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)
