"""Which images of each batch are whose."""

from hypothesis import given
from hypothesis import strategies as st

from umtrain.data.loader import EpochSampler
from umtrain.data.share import Share

ranks = st.integers(1, 5)
sizes = st.integers(1, 4)
counts = st.integers(0, 40)


@given(ranks, counts)
def test_shares_are_neighbours_that_make_up_the_batch_and_differ_by_one_at_most(n_ranks, n):
    batch = list(range(n))
    parts = [Share(rank, n_ranks).of_batch(batch) for rank in range(n_ranks)]
    assert [image for part in parts for image in part] == batch
    assert [len(part) for part in parts] == [Share(r, n_ranks).n_own(n) for r in range(n_ranks)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(ranks, sizes, counts, st.integers(0, 3))
def test_batches_of_all_ranks_together_are_those_of_one_process(n_ranks, batch_size, n, seed):
    together = batch_size * n_ranks
    one = [key.position for key in EpochSampler(n, seed)]
    samplers = [EpochSampler(n, seed, batch_size, Share(r, n_ranks)) for r in range(n_ranks)]
    epochs = [[key.position for key in sampler] for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(epoch) for epoch in epochs]
    for k in range(-(-n // together)):
        batch = one[k * together : (k + 1) * together]
        for rank, epoch in enumerate(epochs):
            part = epoch[k * batch_size : (k + 1) * batch_size]
            assert part == Share(rank, n_ranks).of_batch(batch)


@given(ranks, sizes, counts)
def test_in_evaluation_every_image_is_read_once(n_ranks, batch_size, n):
    read = [
        key.position
        for rank in range(n_ranks)
        for key in EpochSampler(n, None, batch_size, Share(rank, n_ranks))
    ]
    assert sorted(read) == list(range(n))
