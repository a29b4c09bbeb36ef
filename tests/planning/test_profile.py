"""Device profiles: every file of conf/ is whole, and a wrong one is refused by name."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from umtrain.config import conf_dir
from umtrain.errors import ConfigError
from umtrain.planning.profile import (
    GROUP,
    ConvolutionSample,
    PassSample,
    load_profile,
    profile_from_dict,
    profile_names,
    profile_to_dict,
)
from umtrain.planning.step import Convolution

PATH = Path("somewhere.yaml")
ASKED_FOR = {
    "v100_32gb",
    "a100_80gb",
    "h100_80gb",
    "h200",
    "rtx_4090",
    "gh200",
    "v100_node",
    "h100_node",
}


def values_of(name):
    text = (conf_dir() / GROUP / f"{name}.yaml").read_text(encoding="utf-8")
    return {"name": name, **yaml.safe_load(text)}


def test_there_is_a_profile_of_each_machine_that_was_asked_for():
    assert set(profile_names()) >= ASKED_FOR


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads_and_is_plausible(name):
    profile = load_profile(name)
    assert 2**34 <= profile.device_bytes <= 2**38
    assert profile.host_bytes >= 2**34
    assert profile.matrix_flops_per_s["fp64"] < profile.matrix_flops_per_s["fp32"]
    assert profile.matrix_flops_per_s["fp32"] <= profile.matrix_flops_per_s["bf16"]
    # Copies between the tiers are slower than the device's own memory.
    assert max(profile.in_bytes_per_s, profile.out_bytes_per_s) < profile.memory_bytes_per_s


@pytest.mark.parametrize("name", profile_names())
def test_every_number_stands_below_a_comment_that_says_where_it_is_from(name):
    text = (conf_dir() / GROUP / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.count("#") >= 5
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize(
    ("gpu", "node", "host_bytes"),
    [("v100_32gb", "v100_node", 768 * 2**30), ("h100_80gb", "h100_node", 2**41)],
)
def test_a_node_is_eight_of_its_gpu(gpu, node, host_bytes):
    one, eight = load_profile(gpu), load_profile(node)
    assert (eight.n_devices, eight.device_bytes) == (8, one.device_bytes)
    assert eight.matrix_flops_per_s == one.matrix_flops_per_s
    assert eight.efficiency == one.efficiency
    assert eight.host_bytes == host_bytes
    assert eight.network_bytes_per_s < eight.peer_bytes_per_s


SHARES_OF_H100 = "As on the H100 (h100_80gb.yaml): not measured by us."
PASSES_OF_H100 = "As on the H100: not measured by us."


@pytest.mark.parametrize("name", profile_names())
def test_what_is_said_to_be_as_on_the_h100_is(name):
    text = (conf_dir() / GROUP / f"{name}.yaml").read_text(encoding="utf-8")
    profile, h100 = load_profile(name), load_profile("h100_80gb")
    if SHARES_OF_H100 in text:
        assert profile.efficiency == h100.efficiency
        assert profile.backward_efficiency == h100.backward_efficiency
    if PASSES_OF_H100 in text:
        assert profile.pass_efficiency == h100.pass_efficiency


def test_some_profiles_say_that_they_are_as_the_h100():
    texts = [path.read_text(encoding="utf-8") for path in (conf_dir() / GROUP).glob("*.yaml")]
    assert sum(SHARES_OF_H100 in text for text in texts) >= 4
    assert sum(PASSES_OF_H100 in text for text in texts) >= 6


def test_an_unknown_profile_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"device=k80 .*a100_80gb, .*v100_node"):
        load_profile("k80")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device_bytes": 0}, "device_bytes=0: must be a number above 0"),
        ({"memory_bytes_per_s": "900e9"}, "memory_bytes_per_s=900e9: must be a number above 0"),
        ({"kind": "tpu"}, "kind=tpu: must be cpu or cuda"),
        ({"efficiency": {"1x1": 0.5}}, "efficiency: expected 1x1, 3x3, large"),
        ({"speed": 1}, "is not a device profile"),
        ({"first_touch_s_per_byte": -1.0}, "first_touch_s_per_byte=-1.0: must not be negative"),
    ],
)
def test_a_wrong_value_is_refused_by_file_and_key(changes, text):
    with pytest.raises(ConfigError, match=r"somewhere\.yaml: ") as caught:
        profile_from_dict(values_of("h100_80gb") | changes, PATH)
    assert text in str(caught.value)


def test_a_calibrated_profile_survives_being_written_and_read():
    shape = Convolution(64, 128, (3, 3), (2, 2), 1, (1, 32, 32))
    profile = dataclasses.replace(
        load_profile("generic_cpu"),
        convolution_samples=(ConvolutionSample("bf16", "backward", shape, 1e9, 0.01),),
        pass_samples=(PassSample("norm", "fp32", 2**20, 0.001),),
    )
    assert profile_from_dict(profile_to_dict(profile), PATH) == profile
