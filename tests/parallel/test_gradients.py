"""Gradients are summed in buckets, in one order on all ranks."""

import pytest


@pytest.mark.parametrize("n_ranks", [2, 3])
@pytest.mark.parametrize("bucket_bytes", [1, 200, 2**20])
@pytest.mark.parametrize("passes", [1, 2])
def test_sums_are_those_of_one_process_whatever_a_rank_has_not_used(
    crew, n_ranks, bucket_bytes, passes
):
    for answer in crew(n_ranks).run("sums", bucket_bytes=bucket_bytes, passes=passes):
        assert answer["error"] <= 1e-14
        assert answer["missing"] == ["unused.weight", "unused.bias"]


def test_a_gradient_that_comes_after_its_sum_has_begun_is_summed_too(crew):
    for answer in crew(2).run("late"):
        assert answer["gradient"] == [33.0, 33.0, 33.0]
