"""N ranks with batches of b train as one process with N·b does."""

import pytest

EXACT = 1e-11
STRATEGIES = (
    "vanilla",
    "checkpoint",
    "vdnn",
    "lms",
    "um",
    "um_group",
    "um_group_prefetch",
    "stream",
)


def assert_exact(answers):
    for answer in answers:
        assert answer["error"] <= EXACT, answer


@pytest.mark.parametrize("n_ranks", [2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_as_one_process_with_joint_statistics(crew, strategy, n_ranks):
    sizes = [2 * n_ranks, 2 * n_ranks]
    assert_exact(crew(n_ranks).run("steps", model="residual", strategy=strategy, sizes=sizes))


@pytest.mark.parametrize("strategy", ["vanilla", "stream"])
def test_volumes_join_their_statistics_too(crew, strategy):
    answers = crew(2).run(
        "steps", model="volume", strategy=strategy, sizes=[2, 3], shape=[1, 8, 20, 18]
    )
    assert_exact(answers)


@pytest.mark.parametrize("strategy", ["vanilla", "checkpoint", "stream"])
@pytest.mark.parametrize("n_images", [1, 2, 4, 5])
def test_shares_of_an_uneven_batch_weigh_by_their_images_even_if_there_are_none(
    crew, strategy, n_images
):
    sizes = [6, n_images]
    assert_exact(crew(3).run("steps", model="residual", strategy=strategy, sizes=sizes))


@pytest.mark.parametrize("strategy", ["vanilla", "stream"])
def test_a_rank_without_an_image_waits_where_no_statistics_are_joined(crew, strategy):
    answers = crew(3).run(
        "steps", model="residual", strategy=strategy, sizes=[3, 1], norm="group", sync=False
    )
    assert_exact(answers)


@pytest.mark.parametrize("strategy", ["lms", "stream"])
def test_norms_that_look_at_one_image_need_no_other_rank(crew, strategy):
    answers = crew(2).run(
        "steps", model="residual", strategy=strategy, sizes=[4, 3], norm="group", sync=False
    )
    assert_exact(answers)


@pytest.mark.parametrize("strategy", ["vanilla", "stream"])
def test_joint_statistics_in_bf16_err_as_bf16_does(crew, strategy):
    for answer in crew(2).run("mixed", strategy=strategy):
        assert answer["of_ranks"] < 1.5 * answer["of_one"]


@pytest.mark.parametrize("strategy", ["vanilla", "stream"])
def test_batches_that_add_up_to_a_step_are_summed_once(crew, strategy):
    answers = crew(2).run(
        "steps", model="residual", strategy=strategy, sizes=[4, 4, 4, 3], accumulate=2
    )
    assert_exact(answers)


@pytest.mark.parametrize("model", ["resnet50", "resunet35"])
def test_whole_networks_stream_on_two_ranks(crew, model):
    shape = [3, 65, 97] if model == "resnet50" else [1, 128, 64]
    assert_exact(crew(2).run("steps", model=model, strategy="stream", sizes=[4], shape=shape))
