"""One image over several ranks, each with a band of rows of every map."""

import pytest

EXACT = 1e-11


def assert_exact(answers):
    for answer in answers:
        assert answer["error"] <= EXACT, answer


@pytest.mark.parametrize("n_ranks", [2, 3])
@pytest.mark.parametrize("rows", [48, 65, 71, 97])
@pytest.mark.parametrize("strip_bytes", [1500, 2**23])
def test_bands_of_any_height_give_the_gradients_of_the_whole_image(
    crew, n_ranks, rows, strip_bytes
):
    answers = crew(n_ranks).run(
        "spread", model="residual", shape=[3, rows, 33], strip_bytes=strip_bytes
    )
    assert_exact(answers)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_several_images_are_spread_alike(crew, norm):
    assert_exact(crew(3).run("spread", model="residual", shape=[3, 67, 35], n_images=3, norm=norm))


@pytest.mark.parametrize("n_ranks", [2, 3])
@pytest.mark.parametrize("model", ["resnet50", "resunet35"])
def test_whole_networks_are_exact(crew, model, n_ranks):
    shape = [3, 161, 97] if model == "resnet50" else [1, 192, 128]
    assert_exact(crew(n_ranks).run("spread", model=model, shape=shape, strip_bytes=20_000))


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_a_volume_is_spread_by_its_slices(crew, n_ranks):
    assert_exact(crew(n_ranks).run("spread", model="volume", shape=[1, 13, 20, 18], n_images=2))


@pytest.mark.parametrize("kept_share", [0.7, 0.45])
def test_maps_that_are_made_again_or_put_out_keep_their_margins(crew, kept_share):
    answers = crew(3).run(
        "spread", model="resunet35", shape=[1, 192, 64], kept_share=kept_share, strip_bytes=9000
    )
    assert_exact(answers)
    assert all(answer["written_bytes"] > 0 for answer in answers)


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_may_be_given_their_rows_of_the_image_alone(crew, n_ranks):
    answers = crew(n_ranks).run(
        "steps",
        model="residual",
        strategy="stream",
        mode="spatial",
        sizes=[1, 2],
        as_bands=True,
        shape=[3, 331, 33],
    )
    assert_exact(answers)


def test_training_of_several_steps_is_that_of_one_process(crew):
    answers = crew(2).run(
        "steps",
        model="residual",
        strategy="stream",
        mode="spatial",
        sizes=[2, 2, 1, 1],
        accumulate=2,
        shape=[3, 65, 65],
    )
    assert_exact(answers)
