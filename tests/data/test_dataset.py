import dataclasses

import numpy as np
import pytest
import torch

from umtrain.data.augment import RadiographAugment, SlideAugment
from umtrain.data.dataset import RadiographDataset, SampleKey, SlideDataset
from umtrain.data.frame import transform
from umtrain.data.loader import make_loader
from umtrain.data.manifest import read_manifest
from umtrain.data.radiograph import read_radiograph
from umtrain.data.synthetic.radiographs import make_radiographs
from umtrain.data.synthetic.slides import make_slides
from umtrain.data.wsi import read_slide

LABELS = {"0": 0, "1": 1}
RES = 64


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return read_manifest(make_slides(tmp_path_factory.mktemp("slides"), 5, 256, 0), "wsi").records


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return read_manifest(make_radiographs(folder, 5, 200, 0), "spine").records


@pytest.fixture(scope="module")
def augmented(slides, films):
    """A dataset of each kind whose samples are random, and differ in every epoch."""
    return {
        "wsi": SlideDataset(slides, LABELS, RES, augment=SlideAugment(), seed=3),
        "spine": RadiographDataset(films, RES, augment=RadiographAugment(), seed=3),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def epochs(loader, n=2):
    batches = []
    for epoch in range(n):
        loader.set_epoch(epoch)
        batches.append(list(loader))
    return batches


def test_a_slide_sample_is_the_slide_as_a_channels_last_view(slides):
    sample = SlideDataset(slides, LABELS, RES)[SampleKey(0, 1)]
    pixels, _ = read_slide(slides[1].path, RES)
    assert sample["image"].shape == (3, RES, RES)
    assert sample["image"].dtype == torch.uint8
    assert sample["image"].permute(1, 2, 0).is_contiguous()
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), pixels)
    assert sample["label"] == int(slides[1].label)
    assert (sample["id"], sample["index"]) == (slides[1].slide_id, 1)


def test_the_manifests_mpp_wins_over_the_files(slides):
    # The synthetic slides say 1 micron per pixel.
    said = dataclasses.replace(slides[0], mpp=0.5)
    sample = SlideDataset([said], LABELS, RES, fit="crop", mpp=1.0)[SampleKey(0, 0)]
    twice_as_fine, _ = read_slide(said.path, RES, fit="crop", mpp=2.0, slide_mpp=1.0)
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), twice_as_fine)


def test_a_radiograph_sample_is_16_bit_in_a_frame_half_as_wide_as_high(films):
    sample = RadiographDataset(films, 96)[SampleKey(0, 0)]
    assert sample["image"].shape == (1, 96, 64)
    assert sample["image"].dtype == torch.uint16
    assert sample["keypoints"].dtype == torch.float32
    assert sample["image"].to(torch.float32).max() > 2**15


@pytest.mark.parametrize("augment", [None, RadiographAugment()])
def test_keypoints_map_back_to_the_manifests_pixels(films, augment):
    dataset = RadiographDataset(films, 128, augment=augment)
    for epoch in range(3):
        for position, film in enumerate(films):
            sample = dataset[SampleKey(epoch, position)]
            back = transform(sample["keypoints"].double().numpy(), sample["to_stored"].numpy())
            expected = np.array([[film.c7_x, film.c7_y], [film.s1_x, film.s1_y]])
            assert back == pytest.approx(expected, abs=1e-3)


def test_spacing_is_that_of_the_stored_pixels(films):
    without = next(film for film in films if film.mm_per_px is None)
    stored = read_radiograph(without.path)
    sample = RadiographDataset([without], RES)[SampleKey(0, 0)]
    assert tuple(sample["spacing_mm"].tolist()) == stored.spacing_mm


def test_a_mirrored_film_maps_back_to_the_same_sva(films):
    mirrored = RadiographAugment(rotation_deg=0, scaling=0, shift=0, mirror=1)
    for film in films:
        plain, flipped = (
            RadiographDataset([film], 128, augment=augment)[SampleKey(0, 0)]
            for augment in (None, mirrored)
        )
        assert plain["facing"] == flipped["facing"] == {"right": 1, "left": -1}[film.facing]
        stored_x = [
            transform(s["keypoints"].numpy().astype(float), s["to_stored"].numpy())[:, 0]
            for s in (plain, flipped)
        ]
        assert stored_x[0] == pytest.approx(stored_x[1], abs=1e-2)
        assert plain["keypoints"][0, 0] != pytest.approx(float(flipped["keypoints"][0, 0]), abs=1)


def test_a_film_is_read_once_and_augmented_anew(films, monkeypatch):
    reads = []
    monkeypatch.setattr(
        "umtrain.data.dataset.read_radiograph",
        lambda path: reads.append(path) or read_radiograph(path),
    )
    dataset = RadiographDataset(films[:1], 128, augment=RadiographAugment())
    first, second = dataset[SampleKey(0, 0)], dataset[SampleKey(1, 0)]
    assert len(reads) == 1
    assert not torch.equal(first["image"].to(torch.int32), second["image"].to(torch.int32))


@pytest.mark.parametrize("kind", ["wsi", "spine"])
def test_a_sample_depends_on_seed_epoch_and_position_alone(augmented, kind):
    dataset = augmented[kind]
    first = dataset[SampleKey(1, 2)]
    dataset[SampleKey(1, 3)]
    assert same(first, dataset[SampleKey(1, 2)])
    assert not same(first, dataset[SampleKey(2, 2)])


@pytest.mark.parametrize("kind", ["wsi", "spine"])
def test_batches_are_the_same_for_any_number_of_readers(augmented, kind):
    expected = epochs(make_loader(augmented[kind], 2, shuffle=True, seed=5))
    assert not same(expected[0], expected[1])
    for workers in (1, 2):
        loader = make_loader(augmented[kind], 2, shuffle=True, seed=5, workers=workers)
        assert same(epochs(loader), expected)


def test_an_epoch_can_be_left_early_and_begun_again(augmented):
    loader = make_loader(augmented["wsi"], 1, shuffle=True, workers=1)
    loader.set_epoch(4)
    first = next(iter(loader))
    assert same(first, next(iter(loader)))


def test_an_epoch_has_every_record_once_in_an_order_of_its_own(slides):
    loader = make_loader(SlideDataset(slides, LABELS, 8), 2, shuffle=True, seed=1)
    orders = [[i for b in batches for i in b["index"].tolist()] for batches in epochs(loader, 6)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len(set(map(tuple, orders))) > 1
    assert len(loader) == 3


def test_without_shuffling_records_come_in_file_order(slides):
    loader = make_loader(SlideDataset(slides, LABELS, 8), 2, shuffle=False)
    assert [name for batch in loader for name in batch["id"]] == [s.slide_id for s in slides]


def test_a_last_batch_that_is_not_full_can_be_dropped(slides):
    loader = make_loader(SlideDataset(slides, LABELS, 8), 2, shuffle=False, drop_last=True)
    assert [len(batch["id"]) for batch in loader] == [2, 2]
    assert len(loader) == 2


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_of_slides_are_channels_last_bytes(slides, batch_size, workers):
    dataset = SlideDataset(slides, LABELS, RES)
    batch = next(iter(make_loader(dataset, batch_size, shuffle=False, workers=workers)))
    assert batch["image"].shape == (batch_size, 3, RES, RES)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["image"].stride() == (3 * RES * RES, 1, 3 * RES, 3)
    assert batch["label"].tolist() == [int(s.label) for s in slides[:batch_size]]


def test_a_batch_of_radiographs_has_a_row_for_each(films):
    batch = next(iter(make_loader(RadiographDataset(films, RES), 3, shuffle=False)))
    shapes = {key: tuple(value.shape) for key, value in batch.items() if key != "id"}
    assert shapes == {
        "image": (3, 1, RES, 64),
        "keypoints": (3, 2, 2),
        "to_stored": (3, 2, 3),
        "spacing_mm": (3, 2),
        "facing": (3,),
        "index": (3,),
    }
    assert batch["image"].dtype == torch.uint16


def test_a_loader_draws_nothing_from_torchs_generator(slides):
    before = torch.get_rng_state()
    list(make_loader(SlideDataset(slides, LABELS, 8), 2, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_can_begin_in_its_middle_and_reads_nothing_of_what_is_before(augmented):
    dataset = augmented["wsi"]
    whole = epochs(make_loader(dataset, 2, shuffle=True, seed=5))[1]
    gone = [
        dataclasses.replace(record, path=record.path / "gone")
        if record.id in whole[0]["id"]
        else record
        for record in dataset.records
    ]
    rest = SlideDataset(gone, LABELS, RES, augment=SlideAugment(), seed=3)
    loader = make_loader(rest, 2, shuffle=True, seed=5)
    loader.set_epoch(1, first_batch=1)
    assert same(list(loader), whole[1:])
