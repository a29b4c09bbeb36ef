import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umtrain.config import (
    CHOICES,
    GROUPS,
    config_from_dict,
    config_to_dict,
    group_options,
    load_config,
    quoted,
    schema_keys,
    sweep_axes,
)
from umtrain.data.frame import network_width_px
from umtrain.errors import ConfigError
from umtrain.models.resunet35 import SIZE_MULTIPLE

# Options that need another key to make sense.
_NEEDS = {
    "resunet35": ["dataset=spine"],
    "resnet18_3d": ["dataset=ct"],
    "resnet101_3d": ["dataset=ct"],
    "placement": ["memory.cpu_layers=[layer1]"],
}


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group in GROUPS for option in group_options(group)],
)
def test_every_option_of_every_group_composes(group, option):
    config = load_config([f"{group}={option}", *_NEEDS.get(option, [])])
    assert getattr(config, group).name == option


def test_a_dataset_brings_its_model_and_an_explicit_model_wins():
    assert load_config(["dataset=spine"]).model.name == "resunet35"
    assert load_config(["dataset=wsi"]).model.name == "resnet50"
    assert load_config(["model=resnet101", "dataset=wsi"]).model.name == "resnet101"
    assert load_config(["dataset=ct"]).model.name == "resnet18_3d"
    assert load_config(["dataset=ct", "model=resnet101_3d"]).model.name == "resnet101_3d"
    with pytest.raises(ConfigError, match="model=resnet50 does not fit dataset=spine"):
        load_config(["dataset=spine", "model=resnet50"])


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_an_approach_brings_its_defaults_and_an_explicit_value_wins(optim):
    assert set(CHOICES["approach"]) == set(group_options("approach"))
    whole = load_config(["approach=no_fuss", f"optim={optim}"])
    assert whole == load_config([f"optim={optim}"])
    patches = load_config(["approach=two_stage", f"optim={optim}"])
    assert patches.batch_size > whole.batch_size
    assert patches.res < whole.res
    assert patches.optim.lr > whole.optim.lr
    own = ["batch_size=3", "res=128", "optim.lr=0.5", "dataset.patches_per_slide=7", "epochs=9"]
    given = load_config([*own, "approach=two_stage", f"optim={optim}"])
    assert (given.batch_size, given.res, given.optim.lr) == (3, 128, 0.5)
    assert (given.dataset.patches_per_slide, given.epochs) == (7, 9)


def test_patches_are_read_at_an_mpp_without_a_fit():
    assert load_config(["approach=two_stage", "dataset.mpp=0.5"]).dataset.mpp == 0.5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset.patches_per_slide=4"], "has no effect with approach=no_fuss"),
        (["approach=two_stage", "dataset.patches_per_slide=null"], "approach=two_stage needs it"),
        (["approach=two_stage", "dataset.patches_per_slide=0"], "must be at least 1"),
        (["approach=two_stage", "dataset=spine"], "dataset=spine has only approach=no_fuss"),
        (
            ["approach=two_stage", "dataset.fit=crop", "dataset.mpp=1"],
            "has no effect with approach=two_stage",
        ),
        (["approach=three_stage"], "unknown approach 'three_stage'"),
    ],
)
def test_keys_that_do_not_suit_the_approach_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(overrides)


def test_a_config_of_before_there_were_approaches_is_that_of_whole_slides():
    values = config_to_dict(load_config([]))
    del values["approach"], values["dataset"]["patches_per_slide"]
    assert config_from_dict(values) == load_config([])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rez=512", ["unknown key 'rez'", "Did you mean res", "Possible:"]),
        ("lr=0.1", ["unknown key 'lr'", "Did you mean optim.lr"]),
        ("model=resnet52", ["unknown model 'resnet52'", "resnet50", "Possible: resnet101"]),
        ("precision=fp16", ["unknown precision 'fp16'", "auto, fp32, bf16"]),
        ("res=big", ["res=big: expected a whole number"]),
        ("res=1.5", ["res=1.5: expected a whole number"]),
        ("res=true", ["res=True: expected a whole number"]),
        ("dataset.augment=7", ["dataset.augment=7: expected true or false"]),
        ("res=63", ["res=63: must be at least 64"]),
        ("batch_size=0", ["batch_size=0: must be at least 1"]),
        ("optim.lr=0", ["optim.lr=0.0: must be more than 0"]),
        ("optim.lr=nan", ["optim.lr=nan: must be more than 0"]),
        ("max_steps=0", ["max_steps=0: must be at least 1"]),
        ("memory.device_budget=plenty", ["memory.device_budget=plenty is not a size", "2GiB"]),
        ("res=256,512", ["umtrain sweep res=256,512"]),
        ("res", ["'res' is not an override", "key=value"]),
        ("+res=3", ["cannot be added or removed"]),
        ("~res", ["cannot be added or removed"]),
        ("dataset.fit=pad", ["needs dataset.mpp"]),
        ("dataset.manifest=nowhere.csv", ["dataset.manifest=nowhere.csv: no such file"]),
        ("dataset.manifest=my (1).csv", ["quote a value with special characters"]),
        ("model.norm=frozen", ["give model.pretrained=PATH"]),
        ("optim.name=adamw", ["unknown key 'optim.name'"]),
        ("dataset.mpp=0.5", ["has no effect with dataset.fit=resize"]),
        ("parallel=spatial", ["which only memory=stream can, not memory=auto"]),
        ("parallel=both", ["unknown parallel 'both'", "data, spatial"]),
        ("memory.oversubscribe=2", ["memory.oversubscribe=2: expected true or false"]),
        ("optim.lr=inf", ["optim.lr=inf: must be more than 0, and finite"]),
        ("seed=99999999999999999999", ["below 2**63"]),
        ("_target_=os.system", ["unknown key '_target_'"]),
        ("hydra.run.dir=x", ["unknown key 'hydra.run.dir'"]),
    ],
)
def test_a_wrong_override_is_refused_with_what_to_do(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset.depth=16"], "dataset.depth: slides have no such choice"),
        (["dataset=spine", "dataset.spacing_mm=2"], "radiographs have no such choice"),
        (["dataset=ct", "dataset.mpp=1"], "dataset.mpp: volumes have no such choice"),
        (["dataset=ct", "dataset.depth=null"], "dataset.depth: volumes need it"),
        (["dataset=ct", "dataset.depth=0"], "dataset.depth=0: must be at least 1"),
        (["dataset=ct", "dataset.window_width=0"], "must be more than 0"),
        (["dataset=ct", "dataset.window_center=inf"], "dataset.window_center=inf: must be finite"),
        (["dataset=ct", "res=31"], "res=31: must be at least 32"),
        (["dataset=ct", "res=32", "dataset.depth=16"], "use dataset.depth=17 or more, or res=33"),
        (["dataset=ct", "model=resnet50"], r"use model=resnet18_3d\|resnet101_3d"),
        (["dataset=ct", "approach=two_stage"], "dataset=ct has only approach=no_fuss"),
    ],
)
def test_keys_that_do_not_suit_volumes_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(overrides)


def test_volumes_take_any_size():
    config = load_config(["dataset=ct", "res=577", "dataset.depth=42", "model=resnet101_3d"])
    assert (config.res, config.dataset.depth) == (577, 42)


def test_oversubscribing_is_for_gpus():
    assert load_config(["memory.oversubscribe=true", "device=cuda"]).memory.oversubscribe
    with pytest.raises(ConfigError, match=r"memory.oversubscribe: is about a GPU"):
        load_config(["memory.oversubscribe=true", "device=cpu"])


def test_a_radiograph_needs_a_resolution_that_the_network_can_halve():
    with pytest.raises(ConfigError, match=r"res=1000: .* for example res=1024"):
        load_config(["dataset=spine", "res=1000"])


@given(st.integers(1, 200), st.sampled_from([0.25, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_every_resolution_that_is_accepted_suits_the_network(multiple, aspect):
    res = 64 * multiple
    size = (res, network_width_px(res, aspect))
    assert all(side % SIZE_MULTIPLE == 0 for side in size)
    if res >= 128:
        assert load_config(["dataset=spine", f"res={res}", f"dataset.aspect={aspect}"]).res == res


def test_a_path_with_commas_is_no_sweep(tmp_path):
    path = tmp_path / "a,b.csv"
    path.touch()
    with pytest.raises(ConfigError, match="quote a path with commas"):
        load_config([f"dataset.manifest={path}"])


def test_a_config_survives_its_file():
    config = load_config(["dataset=spine", "res=512", "optim=sgd", "memory.device_budget=2GiB"])
    assert config_from_dict(config_to_dict(config)) == config


def test_every_key_says_what_it_is():
    assert all(item.metadata["help"] for item in schema_keys().values())


def test_a_value_swept_twice_is_one_job():
    assert sweep_axes(["res=256,512,256"])[0] == {"res": ["256", "512"]}


@pytest.mark.parametrize("override", ["dataset.fit=pad", "dataset.positive=x"])
def test_radiographs_refuse_what_only_slides_have(override):
    with pytest.raises(ConfigError, match="radiographs"):
        load_config(["dataset=spine", override])


@pytest.mark.parametrize(("dataset", "least"), [("wsi", 64), ("spine", 128), ("ct", 32)])
def test_an_image_too_small_for_the_network_is_refused_with_the_least_size(dataset, least):
    assert load_config([f"dataset={dataset}", f"res={least}"]).res == least
    with pytest.raises(ConfigError, match=f"must be at least {least}"):
        load_config([f"dataset={dataset}", f"res={least // 2}"])


def test_sweep_axes_keep_the_order_of_the_command_line():
    axes, fixed = sweep_axes(["res=256,512", "epochs=2", "seed=0,1"])
    assert list(itertools.product(*axes.values())) == [
        ("256", "0"),
        ("256", "1"),
        ("512", "0"),
        ("512", "1"),
    ]
    assert fixed == ["epochs=2"]


def test_a_sweep_of_nothing_says_how_to_sweep():
    with pytest.raises(ConfigError, match="nothing to sweep; give a key several values"):
        sweep_axes(["res=256"])


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1))
def test_a_quoted_path_comes_back_whatever_it_holds(text):
    if "${" in text:
        return  # an interpolation in OmegaConf's own language
    assert load_config([f"run_dir={quoted(text)}"]).run_dir == text
