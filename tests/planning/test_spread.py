"""Rows of one image over several devices: what each takes, and what they exchange."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from umtrain.memory.options import Options
from umtrain.planning.profile import load_profile
from umtrain.planning.spread import halo_bytes, spread_rows
from umtrain.planning.step import Convolution, Operation, StepTrace
from umtrain.planning.subject import Subject

NODE = load_profile("v100_node")
OPTIONS = Options(device="cuda")
N_ROWS, N_COLUMNS = 2**16, 2**13


def subject_of_rows(n_rows):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ).to(memory_format=torch.channels_last)
    image = torch.empty((1, 3, n_rows, N_COLUMNS), device="meta", memory_format=torch.channels_last)
    return Subject(model, image, "fp32")


@pytest.fixture(scope="module")
def spreads():
    """Of an image that is too large for one of the devices."""
    return spread_rows(subject_of_rows, N_ROWS, NODE, OPTIONS)


def test_devices_double_until_all_maps_are_on_them(spreads):
    assert [s.n_devices for s in spreads] == [2**i for i in range(len(spreads))]
    assert len(spreads) > 1
    assert spreads[-1].fits
    assert not spreads[-1].host_peak_bytes
    assert all(s.host_peak_bytes or not s.fits for s in spreads[:-1])


def test_more_devices_take_less_time_each_step(spreads):
    assert all(more.step_s < fewer.step_s for fewer, more in pairwise(spreads))


def test_one_device_exchanges_nothing_and_more_do(spreads):
    assert spreads[0].exchanged_bytes == 0
    assert all(s.exchanged_bytes > 0 for s in spreads[1:])


def test_a_halo_is_half_of_what_a_window_reaches_beyond_a_row_on_either_side():
    shape = Convolution(8, 4, (5, 3), (2, 2), 1, (2, 10, 20))
    operation = Operation("convolution", "", "forward", "bf16", 0.0, 0, 0, shape)
    row_bytes = 2 * 8 * 40 * 2  # images, channels, columns of the input, bytes of bf16
    assert halo_bytes(StepTrace([operation])) == 2 * 2 * row_bytes


def test_a_window_of_one_row_needs_no_neighbour():
    shape = Convolution(8, 4, (1, 1), (1, 1), 1, (1, 10, 20))
    operation = Operation("convolution", "", "forward", "bf16", 0.0, 0, 0, shape)
    assert halo_bytes(StepTrace([operation])) == 0


def test_the_rows_of_a_volume_are_its_slices():
    shape = Convolution(8, 4, (5, 3, 1), (2, 2, 1), 1, (2, 7, 10, 20))
    operation = Operation("convolution", "", "forward", "bf16", 0.0, 0, 0, shape)
    slice_bytes = 2 * 8 * (2 * 10) * 20 * 2  # images, channels, rows, columns, bytes of bf16
    assert halo_bytes(StepTrace([operation])) == 2 * 2 * slice_bytes


def test_no_more_devices_than_rows_and_none_whose_band_cannot_be_normalised():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1))

    def few_rows(n_rows):
        return Subject(model, torch.empty((1, 3, n_rows, 64), device="meta"), "fp32")

    tight = Options(device="cuda", device_budget_bytes=2**20)
    assert [s.n_devices for s in spread_rows(few_rows, 6, NODE, tight)] == [1, 2, 4]

    def of_one_row(n_rows):
        normed = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        return Subject(normed, torch.empty((1, 3, n_rows, 1), device="meta"), "fp32")

    assert [s.n_devices for s in spread_rows(of_one_row, 4, NODE, tight)] == [1, 2]
