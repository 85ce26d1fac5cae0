import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import noise, picture, pictures

import a2k.data
from a2k.data import PairDataset, draw_image, make_loader, random_crop, readable_images, split_files
from a2k.images import ImageError, find_images, to_tensor

SIZE = {"width": 90, "height": 70}


@pytest.fixture
def files(tmp_path):
    """Photos and paintings."""
    return [find_images([pictures(tmp_path / name, 5, **SIZE)]) for name in ("content", "style")]


def dataset(files, seed=0, crop=32, length=12, scale=(2.0, 2.0)):
    return PairDataset(*files, (crop,), 2, length, seed, scale)


def alternating(files, length):
    """Two steps of three items of 32 px, a step of three of 64 px of which one is used, and so on."""
    return PairDataset(*files, (32, 32, 64), 6, length, 0, (1.0, 1.0))


# --- pairs


def test_items(files):
    data = dataset(files)
    assert len(data) == 12
    for item in range(12):
        for crop in data[item]:
            assert crop.shape == (3, 32, 32)
            assert crop.dtype == torch.float32
            assert 0 <= crop.min() <= crop.max() <= 1


def test_an_item_depends_on_seed_and_place_alone(files):
    first, again, other = dataset(files), dataset(files, length=100), dataset(files, seed=1)
    again[3]
    for item in (7, 2):
        torch.testing.assert_close(first[item], again[item], rtol=0, atol=0)
        assert not torch.equal(first[item][0], other[item][0])
    assert not torch.equal(first[0][0], first[1][0])


def test_all_files_are_drawn(files):
    seen = {crop.sum().item() for crop, _ in (dataset(files)[item] for item in range(12))}
    assert len(seen) == 12
    rng = np.random.default_rng(0)
    assert len({draw_image(files[0], rng).tobytes() for _ in range(60)}) == 5


@pytest.mark.parametrize("workers", (0, 1))
def test_loader_goes_on_where_it_is_told(files, workers):
    data = dataset(files)
    batches = list(make_loader(data, 2, workers, first_batch=2))
    assert len(batches) == 4
    for i, batch in enumerate(batches):
        for k, images in enumerate(batch):
            expected = torch.stack([data[item][k] for item in (4 + 2 * i, 5 + 2 * i)])
            torch.testing.assert_close(images, expected, rtol=0, atol=0)
    assert list(make_loader(data, 2, 0, first_batch=6)) == []


def test_ranks_share_the_items(files):
    data = dataset(files, length=13)
    ranks = [list(make_loader(data, 2, 0, first_batch=1, rank=rank, ranks=3)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [1, 1, 1]  # items 6 to 11; the last one makes no step of all ranks
    together = torch.cat([batch[0][0] for batch in ranks])
    torch.testing.assert_close(together, torch.stack([data[i][0] for i in range(6, 12)]), rtol=0, atol=0)


@pytest.mark.parametrize("first_step", (0, 1, 2))
def test_steps_take_several_crops_in_turn(files, first_step):
    data = alternating(files, 36)
    batches = list(make_loader(data, 6, 0, first_step))
    expected = [(6, 32), (6, 32), (1, 64), (6, 32), (6, 32), (1, 64)]
    assert [(len(photos), photos.shape[-1]) for photos, _ in batches] == expected[first_step:]
    for step, batch in enumerate(batches, first_step):
        for k, images in enumerate(batch):
            assert torch.equal(images, torch.stack([data[6 * step + i][k] for i in range(len(images))]))


def test_accumulated_batches_and_ranks_take_crops_of_the_same_step(files):
    data = PairDataset(*files, (32, 64), 24, 72, 0, (1.0, 1.0))  # steps of 2 ranks x 3 batches x 4 pairs
    ranks = [[x for x, _ in make_loader(data, 4, 0, accumulate=3, rank=rank, ranks=2)] for rank in range(2)]
    for batches in ranks:
        assert [x.shape for x in batches] == [(12, 3, 32, 32), (3, 3, 64, 64), (12, 3, 32, 32)]
    for step, count in enumerate((12, 3, 12)):
        together = torch.cat([batches[step] for batches in ranks])
        assert torch.equal(together, torch.stack([data[24 * step + i][0] for i in range(2 * count)]))


# --- crops


def test_crop_is_cut_from_the_resized_picture():
    image = Image.fromarray(noise(120, 100))  # a short side of 2 * 25 is a half of it exactly
    half = to_tensor(image.resize((60, 50), Image.Resampling.LANCZOS))[0]
    windows = half.unfold(1, 25, 1).unfold(2, 25, 1)  # (3, 26, 36, 25, 25)
    flips = set()
    for seed in range(12):
        crop = random_crop(image, 25, 50, np.random.default_rng(seed))
        errors = [(windows - x[:, None, None]).abs().amax((0, 3, 4)).min() for x in (crop, crop.flip(-1))]
        assert min(errors) < 0.02
        flips.add(bool(errors[0] < errors[1]))
    assert flips == {True, False}


def test_crops_are_everywhere():
    ramp = np.indices((64, 96)).transpose(1, 2, 0).astype(np.uint8)
    image = Image.fromarray(np.concatenate([ramp, ramp[..., :1]], 2))
    crops = [random_crop(image, 32, 64, np.random.default_rng(seed)) * 255 for seed in range(200)]
    tops, lefts = ([int(x[channel].min().round()) for x in crops] for channel in (0, 1))
    assert (min(tops), max(tops)) == (0, 32)
    assert (min(lefts), max(lefts)) == (0, 64)


@pytest.mark.parametrize("size", ((1, 1), (3, 1), (1, 100_000), (100_000, 1), (31, 32), (1000, 999)))
def test_crop_of_any_size(size):
    for seed in range(5):
        short_side = (48.0, 96.0, 76.8, 100 / 3 * 2, 48 * 1.1)[seed]
        crop = random_crop(Image.new("RGB", size, (255, 0, 51)), 48, short_side, np.random.default_rng(seed))
        torch.testing.assert_close(crop, torch.tensor([1.0, 0, 0.2])[:, None, None].expand(3, 48, 48))


@pytest.fixture
def drawn(monkeypatch):
    """(crop, short side) of every crop that is taken."""
    calls = []

    def record(image, crop, short_side, rng):
        calls.append((crop, short_side))
        return random_crop(image, crop, short_side, rng)

    monkeypatch.setattr(a2k.data, "random_crop", record)
    return calls


def test_the_published_scale(files, drawn):
    dataset(files)[0]
    assert drawn == [(32, 64)] * 2


def test_scales_are_log_uniform_and_those_of_a_pair_equal(files, drawn):
    data = dataset(files, length=200, scale=(1.0, 4.0))
    for item in range(len(data)):
        data[item]
    octaves, of_paintings = np.log2([short_side / crop for crop, short_side in drawn]).reshape(-1, 2).T
    np.testing.assert_array_equal(octaves, of_paintings)
    assert 0 <= octaves.min() < 0.05 and 1.95 < octaves.max() <= 2
    np.testing.assert_allclose(np.histogram(octaves, 4, (0, 2))[0], 50, atol=22)


def test_the_whole_short_side_at_scale_1(files):
    crop = dataset(files, crop=70, scale=(1.0, 1.0))[0][0]
    images = [to_tensor(Image.open(path))[0] for path in files[0]]
    windows = torch.cat([x.unfold(2, 70, 1).movedim(2, 0) for image in images for x in (image, image.flip(-1))])
    assert (windows - crop).abs().amax((1, 2, 3)).min() < 1e-6


@pytest.mark.parametrize("scale", ((0.5, 2), (2, 1), (0, 0), (1, float("inf")), (float("nan"), 2)))
def test_scales_that_cannot_be(files, scale):
    with pytest.raises(ValueError, match=r"scale is .*; give a lowest of at least 1 and a highest of no less"):
        dataset(files, scale=scale)


# --- broken files, and large ones


def test_a_broken_picture_is_named_and_replaced(files):
    files[1][2].write_bytes(b"broken")
    with pytest.warns(UserWarning, match="skipped: cannot read") as caught:
        for item in range(12):
            dataset(files)[item]
    assert all(str(files[1][2]) in str(warning.message) for warning in caught)


def test_a_picture_that_vanishes_is_named_and_replaced(files):
    data = dataset(files)
    files[0][2].unlink()
    with pytest.warns(UserWarning, match=f"skipped: cannot read {files[0][2]}: No such file") as caught:
        crops = [data[item] for item in range(12)]
    assert len(caught) < len(crops) == 12


def test_a_folder_that_vanishes(files):
    data = dataset(files)
    shutil.rmtree(files[1][0].parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            ImageError, match=r"100 pictures in a row could not be read.*style.*; check the data folders"
        ):
            data[0]


def test_a_large_jpeg_is_decoded_small(tmp_path, monkeypatch):
    sizes = []

    def record(image, *others):
        sizes.append(image.size)
        return random_crop(image, *others)

    monkeypatch.setattr(a2k.data, "random_crop", record)
    path = picture(tmp_path / "large.jpg", 1200, 1000)
    data = dataset([[path], [path]], scale=(2.0, 8.0), length=40)
    for item in range(len(data)):
        data[item]
    assert {size[1] for size in sizes} == {125, 250, 500}


def test_a_picture_of_too_many_pixels_is_skipped(files):
    Image.new("1", (20_000, 10_000)).save(files[0][2])
    with pytest.warns(UserWarning, match=f"skipped: {files[0][2]} is 20000x10000, 200000000 pixels, over the limit"):
        for item in range(12):
            dataset(files)[item]


def test_nothing_but_broken_pictures(files):
    for path in files[0]:
        path.write_bytes(b"broken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError, match=r"100 pictures in a row could not be read, the last one .*content"):
            dataset(files)[0]
        with pytest.raises(ImageError, match=r"none of 5 pictures in .*content can be read; check the folder"):
            readable_images(files[0], 2)


def test_readable_images(files):
    files[0][1].write_bytes(b"broken")
    with pytest.warns(UserWarning, match=f"skipped: cannot read {files[0][1]}"):
        images = readable_images(files[0], 2)
    assert [image.tobytes() for image in images] == [Image.open(files[0][i]).tobytes() for i in (0, 2)]


# --- splits


def test_split(tmp_path):
    folder = pictures(tmp_path, 5)
    names = [[path.stem for path in part] for part in split_files(folder, 2)]
    assert names == [["0", "1", "2"], ["3", "4"]]
    assert [len(part) for part in split_files(folder, 0)] == [5, 0]


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        (5, "has 5 images, of which holdout=5 leaves none; lower it"),
        (40, "has 5 images, of which holdout=40 leaves none; lower it"),
        (-1, "holdout is -1; it must be at least 0"),
    ],
)
def test_splits_that_cannot_be(tmp_path, holdout, message):
    with pytest.raises(ImageError, match=message):
        split_files(pictures(tmp_path, 5), holdout)


def test_folder_that_is_missing(tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        split_files(tmp_path / "none", 0)
    picture(tmp_path / "a.png")
    assert split_files(tmp_path / "a.png", 0) == ([tmp_path / "a.png"], [])
