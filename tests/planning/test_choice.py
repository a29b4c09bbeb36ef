"""memory=auto's choice: the fastest that fits, or a refusal that names what would do."""

import dataclasses

import pytest
import torch

from umtrain import memory, models
from umtrain.errors import OutOfMemoryError
from umtrain.memory.options import Options
from umtrain.planning.choice import Choice, choose
from umtrain.planning.predict import Prediction, predict
from umtrain.planning.profile import load_profile
from umtrain.planning.subject import Subject
from umtrain.units import parse_bytes

GIB = 2**30
CPU = dataclasses.replace(load_profile("generic_cpu"), host_bytes=100 * GIB)


@pytest.fixture(scope="module")
def resnet() -> Subject:
    model = models.create("resnet50", in_channels=3, n_outputs=2)
    model = model.to(memory_format=torch.channels_last)
    x = torch.empty(1, 3, 512, 512).contiguous(memory_format=torch.channels_last)
    return Subject(model, x, "fp32")


def with_memory(device_bytes: int):
    return dataclasses.replace(CPU, device_bytes=device_bytes)


def test_with_plenty_nothing_but_a_clearly_faster_strategy_displaces_vanilla(resnet):
    choice = choose(resnet, with_memory(16 * GIB), Options(), ["vanilla", "checkpoint", "lms"])
    assert choice.prediction.strategy == "vanilla"


@pytest.mark.parametrize("device_budget", ["700MiB", "900MiB"])
def test_takes_the_fastest_of_those_that_fit(resnet, device_budget):
    options = Options.parse(device_budget=device_budget)
    choice = choose(resnet, with_memory(16 * GIB), options)
    fitting = [each for each in choice.considered if each.fits]
    assert not next(e for e in choice.considered if e.strategy == "vanilla").fits
    assert choice.prediction.fits
    assert choice.prediction.step_s < min(each.step_s for each in fitting) / 0.9
    assert choice.prediction.device_peak_bytes <= parse_bytes(device_budget)
    assert choice.prediction.strategy in choice.sentence


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (Prediction("stream", fits=False, why="long", least_host_bytes=GIB), "(does not fit)"),
        (Prediction("stream", fits=False, why="long", least_budget_bytes=GIB), "(does not fit)"),
        (Prediction("stream", fits=False, why="has a scan"), "(has a scan)"),
    ],
)
def test_a_strategy_that_was_refused_is_named_with_its_reason(refused, words):
    taken = Prediction("vanilla", fits=True, device_peak_bytes=GIB, step_s=1.0)
    assert Choice(taken, (taken, refused), 2 * GIB).sentence.endswith(f"; stream {words}")
    assert Choice(taken, (taken,), 2 * GIB).sentence.endswith("; nothing else would be faster")


def test_a_strategy_that_has_not_the_host_memory_is_named(resnet):
    poor = dataclasses.replace(with_memory(16 * GIB), host_bytes=2**20)
    options = Options.parse(device_budget="710MiB")
    choice = choose(resnet, poor, options, ["checkpoint", "stream"])
    assert choice.prediction.strategy == "checkpoint"
    assert "stream (does not fit)" in choice.sentence


def test_refuses_with_the_least_of_all_strategies(resnet):
    options = Options.parse(device_budget="128MiB")
    with pytest.raises(OutOfMemoryError, match=r"no strategy fits in 128\.00 MiB") as refused:
        choose(resnet, with_memory(16 * GIB), options)
    text = str(refused.value).split("predicted ")[1].split(":")[0]
    again = choose(resnet, with_memory(16 * GIB), Options.parse(device_budget=f"{text[:-4]}MiB"))
    assert again.prediction.fits


def test_host_memory_counts_too(resnet):
    poor = dataclasses.replace(with_memory(16 * GIB), host_bytes=2**20)
    options = Options.parse(device_budget="700MiB")
    with pytest.raises(OutOfMemoryError, match=r"in the place of 1\.00 MiB") as refused:
        choose(resnet, poor, options, ["stream", "lms"])
    needed = str(refused.value).split(" would with ")[1].split(" of host")[0]
    enough = dataclasses.replace(poor, host_bytes=parse_bytes(needed.replace(" ", "")) + 2**20)
    assert choose(resnet, enough, options, ["stream", "lms"]).prediction.fits


def test_a_network_that_cannot_be_streamed_gets_the_best_of_the_others():
    model = torch.nn.Sequential(
        *(torch.nn.Conv1d(c, 8, 3, padding=1) for c in (1, 8, 8)), torch.nn.Tanh()
    )
    subject = Subject(model, torch.empty(1, 1, 2**20), "fp32")
    stream = predict(subject, "stream", CPU, Options())
    assert not stream.fits
    assert stream.why
    vanilla = predict(subject, "vanilla", CPU, Options())
    tight = Options.parse(device_budget=vanilla.least_budget_bytes)
    choice = choose(subject, with_memory(16 * GIB), tight)
    assert choice.prediction.strategy not in ("vanilla", "stream")


class TestAuto:
    def chosen(self, caplog, model, x, **options) -> str:
        strategy = memory.create("auto", **options)
        with caplog.at_level("INFO", "umtrain"):
            try:
                strategy.prepare(model, x)
            finally:
                strategy.close()
        return strategy.running_name

    def small_network(self):
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU()
        )

    def test_says_what_it_takes_and_why(self, caplog):
        x = torch.randn(1, 3, 256, 256)
        name = self.chosen(caplog, self.small_network(), x, device_budget="4GiB")
        assert f"memory=auto: {name}, predicted" in caplog.text
        assert "of 4.00 GiB" in caplog.text

    def test_takes_something_else_where_ordinary_training_does_not_fit(self, caplog):
        x = torch.randn(1, 3, 1024, 1024)
        name = self.chosen(caplog, self.small_network(), x, device_budget="250MiB")
        assert name != "vanilla"
        assert "(does not fit)" in caplog.text

    def test_refuses_where_nothing_fits(self, caplog):
        x = torch.randn(1, 3, 1024, 1024)
        with pytest.raises(OutOfMemoryError, match="needs the least"):
            self.chosen(caplog, self.small_network(), x, device_budget="32MiB")

    def test_trains_what_cannot_be_predicted_as_usual(self, caplog):
        class DataDependent(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(2, 2)

            def forward(self, x):
                return self.layer(x) if x.sum() > 0 else x

        assert self.chosen(caplog, DataDependent(), torch.ones(1, 2)) == "vanilla"
        assert "nothing can be predicted" in caplog.text

    def test_evaluates_in_strips_where_whole_maps_do_not_fit(self, caplog):
        strategy = memory.create("auto", device_budget="150MiB")
        model, x = self.small_network().eval(), torch.randn(1, 3, 1024, 1024)
        with torch.inference_mode():
            strategy.prepare_inference(model, x)(x)
        strategy.close()
        assert strategy.running_name == "stream"
