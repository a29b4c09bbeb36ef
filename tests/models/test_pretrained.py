"""Weights from real files: what matches is loaded, what does not is said."""

import logging
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from umtrain import models
from umtrain.errors import ConfigError
from umtrain.models.norm import FrozenBatchNorm2d
from umtrain.models.pretrained import load_pretrained


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    """A torchvision ResNet-50 that has seen data, so that its running statistics are its own."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    return model.eval()


@pytest.fixture(scope="module")
def stock_file(stock: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(stock.state_dict(), tmp_path_factory.mktemp("stock"))


def saved(content: object, folder: Path) -> Path:
    path = folder / "weights.pt"
    torch.save(content, path)
    return path


def small_model(in_channels: int = 3, n_outputs: int = 2) -> nn.Module:
    layers = {
        "conv1": nn.Conv2d(in_channels, 4, 3),
        "bn1": FrozenBatchNorm2d(4),
        "fc": nn.Linear(4, n_outputs),
    }
    return nn.Sequential(OrderedDict(layers))


def create(path: Path | None, **options: object) -> nn.Module:
    defaults = {"in_channels": 3, "n_outputs": 1000, "pool": "avg"}
    return models.create("resnet50", pretrained=path, **{**defaults, **options})


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_torchvision_weights_give_torchvision_outputs(
    stock: nn.Module, stock_file: Path, norm: str
) -> None:
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(create(stock_file, norm=norm).eval()(image), stock(image))


def test_a_head_of_another_size_is_left_as_initialised_and_reported(
    stock: nn.Module, stock_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        model = create(stock_file, n_outputs=2)
    assert model.fc.weight.shape == (2, 2048)
    assert torch.equal(model.layer4[2].conv3.weight, stock.layer4[2].conv3.weight)
    assert "318 tensors loaded; 2 of the model not in the file (fc.weight, fc.bias)" in caplog.text
    assert "2 of the file not used (fc.weight, fc.bias)" in caplog.text


def test_a_grey_image_excites_an_adapted_first_convolution_as_in_three_channels(
    stock: nn.Module, stock_file: Path
) -> None:
    grey = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        adapted = create(stock_file, in_channels=1).eval()(grey)
        torch.testing.assert_close(adapted, stock(grey.expand(1, 3, 64, 64)), rtol=1e-3, atol=1e-3)


def test_one_channel_weights_spread_evenly_over_three(tmp_path: Path) -> None:
    grey_model, model = small_model(in_channels=1), small_model(in_channels=3)
    load_pretrained(model, saved(grey_model.state_dict(), tmp_path), "fc")
    grey = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        spread = model.conv1(grey.expand(1, 3, 8, 8))
        torch.testing.assert_close(spread, grey_model.conv1(grey))


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("container", [None, "state_dict", "model_state_dict", "model"])
def test_prefixes_and_containers_of_other_trainers_are_taken_off(
    tmp_path: Path, prefix: str, container: str | None
) -> None:
    source, model = small_model(), small_model()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    path = saved(state if container is None else {container: state, "epoch": 3}, tmp_path)
    report = load_pretrained(model, path, "fc")
    assert (report.missing, report.unexpected) == ((), ())
    assert torch.equal(model.conv1.weight, source.conv1.weight)


def test_weights_of_the_same_resunet_come_back_but_for_another_head(tmp_path: Path) -> None:
    source = models.create("resunet35", in_channels=1, n_outputs=2)
    path = saved(source.state_dict(), tmp_path)
    copy = models.create("resunet35", in_channels=1, n_outputs=4, pretrained=path)
    assert torch.equal(copy.decoder[0].conv1.weight, source.decoder[0].conv1.weight)
    assert copy.head[-1].weight.shape[0] == 4


def test_missing_and_unexpected_keys_are_reported(tmp_path: Path) -> None:
    state = small_model().state_dict()
    del state["conv1.bias"]
    path = saved({**state, "extra.weight": torch.zeros(1)}, tmp_path)
    report = load_pretrained(small_model(), path, "fc")
    assert report.missing == ("conv1.bias",)
    assert report.unexpected == ("extra.weight",)
    assert len(report.matched) == len(state)


def test_a_file_where_nothing_matches_names_both_sides(tmp_path: Path) -> None:
    path = saved({"encoder.weight": torch.zeros(3), "encoder.bias": torch.zeros(3)}, tmp_path)
    with pytest.raises(ConfigError) as caught:
        create(path)
    assert str(path) in str(caught.value)
    assert "expected keys such as conv1.weight, bn1.weight" in str(caught.value)
    assert "found encoder.weight, encoder.bias" in str(caught.value)


def test_a_file_where_only_the_counters_match_matches_nothing(tmp_path: Path) -> None:
    path = saved({"bn1.num_batches_tracked": torch.tensor(7)}, tmp_path)
    with pytest.raises(ConfigError, match="none of its weights belong to this model"):
        load_pretrained(small_model(), path, "fc")


def test_weights_of_another_architecture_name_the_first_tensor_that_differs(tmp_path: Path) -> None:
    path = saved(torchvision.models.resnet18().state_dict(), tmp_path)
    with pytest.raises(
        ConfigError, match=r"layer1\.0\.conv1\.weight has shape \(64, 64, 3, 3\).*\(64, 64, 1, 1\)"
    ):
        create(path)


def test_weights_of_a_deeper_network_of_the_kind_are_not_taken_in_part(tmp_path: Path) -> None:
    path = saved(torchvision.models.resnet34().state_dict(), tmp_path)
    with pytest.raises(ConfigError, match=r"has layer1\.2\.conv1\.weight, and layer1 of the model"):
        models.create("resnet18", in_channels=3, n_outputs=2, pretrained=path)


def test_frozen_norm_refuses_weights_without_running_statistics(tmp_path: Path) -> None:
    state = small_model().state_dict()
    del state["bn1.running_mean"]
    with pytest.raises(ConfigError, match=r"no running statistics for bn1.*model\.norm=frozen"):
        load_pretrained(small_model(), saved(state, tmp_path), "fc")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.pt: there is no such file"):
        create(tmp_path / "absent.pt")


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 half a zip"])
def test_a_file_that_is_no_weights_says_how_to_make_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot be read as weights; expected a state dict"):
        create(path)


def test_a_whole_pickled_model_is_not_executed(tmp_path: Path) -> None:
    path = saved(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        create(path)


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2]])
def test_a_file_without_tensors_says_so(tmp_path: Path, content: object) -> None:
    with pytest.raises(ConfigError, match="holds no tensors; expected a state dict"):
        create(saved(content, tmp_path))
