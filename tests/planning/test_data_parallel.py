"""Images divided among devices: what each sends, and what backward hides of it."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn

from umtrain.memory.options import Options
from umtrain.planning.data_parallel import DEVICE_COUNTS, scale_out
from umtrain.planning.predict import predict
from umtrain.planning.profile import load_profile
from umtrain.planning.subject import Subject

NODE = load_profile("h100_node")
OPTIONS = Options(device="cuda")
MIB = 2**20


@pytest.fixture(scope="module")
def subject():
    widths = (3, 64, 512, 512)
    layers = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    image = torch.empty((1, 3, 256, 256), device="meta", memory_format=torch.channels_last)
    return Subject(model, image, "fp32")


def scaled(subject, profile, bucket_bytes=MIB, n_images=2, strategy="vanilla", options=OPTIONS):
    def predicted(profile, options):
        return predict(subject, strategy, profile, options)

    rows = scale_out(predicted, subject, n_images, profile, options, bucket_bytes)
    return predicted(profile, options), rows


def test_one_device_is_the_prediction_itself(subject):
    prediction, (one, *_) = scaled(subject, NODE)
    assert (one.exchanged_bytes, one.waits_s, one.efficiency) == (0, 0, 1)
    assert one.step_s == prediction.step_s
    assert one.images_per_s == pytest.approx(2 / prediction.step_s)


def test_a_ring_sends_the_gradients_almost_twice(subject):
    learned_bytes = sum(p.nbytes for p in subject.model.parameters())
    for each in scaled(subject, NODE)[1]:
        n = each.n_devices
        assert each.exchanged_bytes == pytest.approx(2 * (n - 1) / n * learned_bytes)


def test_more_devices_do_more_and_each_of_them_less(subject):
    rows = scaled(subject, NODE)[1]
    assert tuple(each.n_devices for each in rows) == DEVICE_COUNTS
    for fewer, more in pairwise(rows):
        assert more.images_per_s > fewer.images_per_s
        assert more.efficiency <= fewer.efficiency


def test_the_least_wait_is_for_the_last_bucket_and_the_most_for_all(subject):
    slow = dataclasses.replace(NODE, peer_bytes_per_s=1e6, network_bytes_per_s=1e6)
    rows = scaled(subject, slow)[1]
    for each in rows[1:]:
        all_s = each.exchanged_bytes / 1e6
        assert all_s - each.step_s < each.waits_s <= all_s
    in_one = scaled(subject, slow, bucket_bytes=2**40)[1]
    for each in in_one[1:]:
        assert each.waits_s == pytest.approx(each.exchanged_bytes / 1e6)


def test_nothing_is_said_where_no_link_is_known(subject):
    unknown = dataclasses.replace(NODE, network_bytes_per_s=None)
    assert scaled(subject, unknown)[1] == []


def test_devices_of_a_node_share_its_host_memory(subject):
    tight = Options(device="cuda", device_budget_bytes=400 * MIB)
    prediction, _ = scaled(subject, NODE, strategy="lms", options=tight)
    assert prediction.host_peak_bytes > 0
    poor = dataclasses.replace(NODE, host_bytes=int(2.5 * prediction.host_peak_bytes))
    rows = {each.n_devices: each for each in scaled(subject, poor, strategy="lms")[1]}
    assert {n: each.fits for n, each in rows.items()} == {n: n <= 2 for n in DEVICE_COUNTS}
    for n, each in rows.items():
        assert each.host_peak_bytes == min(n, NODE.n_devices) * prediction.host_peak_bytes


def test_a_host_budget_of_each_does_not_make_a_node_larger(subject):
    needed_bytes = scaled(subject, NODE, strategy="lms")[0].host_peak_bytes
    poor = dataclasses.replace(NODE, host_bytes=2 * needed_bytes)
    options = Options(device="cuda", host_budget_bytes=2 * needed_bytes)
    rows = scaled(subject, poor, strategy="lms", options=options)[1]
    assert [each.fits for each in rows[:3]] == [True, True, False]
