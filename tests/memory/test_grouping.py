"""Working sets from fake tensors, and the groups made of them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from umtrain import memory, models
from umtrain.errors import ConfigError
from umtrain.memory.grouping import (
    Group,
    block_names,
    group_by_blocks,
    group_equally,
    group_rows,
)
from umtrain.memory.working_set import LayerUse, measure_working_sets, working_set_bytes


@pytest.fixture
def resnet():
    return models.create("resnet50", in_channels=3, n_outputs=2, pool="avg")


def test_a_layer_touches_its_input_output_and_parameters():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False))
    (conv,) = measure_working_sets(model, torch.empty(1, 4, 32, 32)).layers
    map_bytes = 32 * 32 * 4
    touched = 4 * map_bytes + 8 * map_bytes + 8 * 4 * 9 * 4
    assert conv.name == "0"
    assert conv.kind == "Conv2d"
    assert conv.workspace_bytes == 8 * map_bytes
    assert conv.working_set_bytes == touched + conv.workspace_bytes


def test_measuring_costs_no_memory_and_changes_nothing(resnet):
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    huge = torch.empty(1).expand(1, 3, 10016, 10016)
    measured = measure_working_sets(resnet, huge)
    assert measured.saved_bytes > 100 * 2**30
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())


def test_saved_bytes_are_what_a_step_saves(resnet):
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    resnet.to(memory_format=torch.channels_last)
    resting = {t.untyped_storage().data_ptr() for t in (*resnet.parameters(), *resnet.buffers())}
    saved = {}
    kept = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resting:
            saved[storage.data_ptr()] = storage.nbytes()
        kept.append(storage)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        resnet(x)
    assert measure_working_sets(resnet, x).saved_bytes == sum(saved.values())


def test_autocast_halves_what_is_saved(resnet):
    x = torch.empty(1, 3, 1024, 1024)
    full = measure_working_sets(resnet, x).saved_bytes
    with torch.autocast("cpu", torch.bfloat16):
        half = measure_working_sets(resnet, x).saved_bytes
    # Autocast also saves its copies of the weights.
    assert 0.5 * full < half < 0.6 * full


def test_a_model_that_needs_data_is_refused():
    class DataDependent(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(
        ConfigError, match="layers of DataDependent cannot be measured without data"
    ):
        measure_working_sets(DataDependent(), torch.ones(2, 2))


def test_blocks_are_the_networks_own(resnet):
    names = block_names(resnet)
    assert len(names) == 3 + 4 + 6 + 3
    assert "layer3.5" in names
    groups = group_by_blocks(resnet, measure_working_sets(resnet, torch.empty(1, 3, 64, 64)).layers)
    assert [g.name for g in groups][1:4] == ["layer1.0", "layer1.1", "layer1.2"]
    assert groups[0].name.startswith("conv1")


@pytest.mark.parametrize("name", ["resnet50", "resunet35"])
def test_groups_are_all_layers_in_order(name):
    channels = 1 if name == "resunet35" else 3
    model = models.create(name, in_channels=channels, n_outputs=2)
    layers = measure_working_sets(model, torch.empty(1, channels, 128, 128)).layers
    for groups in (group_by_blocks(model, layers), group_equally(layers, 4 * 2**20)):
        assert [layer for group in groups for layer in group.layers] == layers


USES = st.lists(
    st.dictionaries(st.integers(0, 12), st.integers(1, 100), min_size=1, max_size=4), max_size=20
)


@given(USES, st.integers(1, 400))
def test_equal_groups_stay_within_the_limit_and_could_not_be_longer(uses, limit_bytes):
    sizes = {}
    layers = []
    for index, use in enumerate(uses):
        storages = {key: sizes.setdefault(key, size) for key, size in use.items()}
        layers.append(LayerUse(f"layer{index}", "", storages))
    groups = group_equally(layers, limit_bytes)
    assert [layer for group in groups for layer in group.layers] == layers
    for group in groups:
        assert len(group.layers) == 1 or group.working_set_bytes <= limit_bytes
    for group, after in itertools.pairwise(groups):
        assert working_set_bytes([*group.layers, after.layers[0]]) > limit_bytes


def test_a_storage_that_layers_share_counts_once():
    layers = (
        LayerUse("a", "", {1: 10, 2: 20}),
        LayerUse("b", "", {2: 20, 3: 5}, workspace_bytes=7),
    )
    assert Group("a … b", layers).working_set_bytes == 35 + 7


def test_the_table_has_name_layers_and_working_set(resnet):
    strategy = memory.create("um_group", grouping="equal", group_bytes="8MiB")
    strategy.prepare(resnet, torch.empty(1, 3, 128, 128))
    rows = group_rows(strategy.groups)
    strategy.close()
    assert sum(n_layers for _, n_layers, _ in rows) == sum(len(g.layers) for g in strategy.groups)
    assert all(size.endswith("iB") for _, _, size in rows)
