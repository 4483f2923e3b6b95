"""Data by name, in an order and a shape that any process can make again."""

from __future__ import annotations

import pickle
from itertools import chain

import numpy as np
import pytest
import torch
import train_runs as runs
from PIL import Image

from resnet_fused.data import augment, loading
from resnet_fused.data.sources import DataError, Stored, open_source


def test_digits_are_split_once_and_for_all():
    source = open_source("digits")
    assert (len(source.train), len(source.val), source.size, source.channels) == (1437, 360, 8, 1)
    image, label = source.train[0]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.uint8
    assert source.classes[label] == str(label)
    both = {bytes(i.numpy()) for i in source.val.images} & {
        bytes(i.numpy()) for i in source.train.images
    }
    assert not both, "an image is in both parts"
    values = source.train.images.double() / 255
    assert source.mean == (pytest.approx(float(values.mean())),)


def test_a_folder_of_classes(tmp_path):
    source = open_source(f"imagefolder:{runs.picture_folder(tmp_path)}")
    assert source.classes == ("cat", "dog")
    assert (len(source.train), len(source.val), source.size) == (12, 6, None)
    image, label = source.train[11]
    assert (image.shape, image.dtype, label) == ((3, 40, 50), torch.uint8, 1)
    assert image.float().mean() > 140


def labelled(top, lines, names=("0.png", "1.png")):
    """val as a folder of images beside val.csv."""
    runs.picture_folder(top)
    for name in ("cat", "dog"):
        for file in (top / "val" / name).iterdir():
            file.unlink()
        (top / "val" / name).rmdir()
    for name in names:
        Image.new("RGB", (9, 9)).save(top / "val" / name)
    (top / "val.csv").write_text("\n".join(lines) + "\n")
    return f"imagefolder:{top}"


def test_a_folder_of_images_beside_a_file_of_labels(tmp_path):
    source = open_source(labelled(tmp_path, ["file,class", "1.png,cat", "0.png,dog"]))
    assert [source.val[i][1] for i in range(2)] == [1, 0]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["0.png,cat"], ["no class for", "1.png"]),
        (["0.png,cat", "1.png,dog", "2.png,dog"], ["2.png", "not there"]),
        (["0.png,cat", "1.png,cow"], ["cow", "train has not"]),
        (["0.png,cat", "0.png,dog", "1.png,dog"], ["0.png", "two classes"]),
        (["0.png cat", "1.png,dog"], ["entry 1", "file,class"]),
        (["file,class"], ["no class for"]),
    ],
)
def test_labels_that_do_not_match_are_named(tmp_path, lines, words):
    with pytest.raises(DataError) as error:
        open_source(labelled(tmp_path, lines))
    assert all(word in str(error.value) for word in words), error.value


def test_an_empty_class_and_missing_folders_are_named(tmp_path):
    top = runs.picture_folder(tmp_path / "a")
    (top / "train" / "emu").mkdir()
    with pytest.raises(DataError, match="no image in the class 'emu'"):
        open_source(f"imagefolder:{top}")
    (top / "train" / "emu").rmdir()
    (top / "val" / "emu").mkdir()
    Image.new("RGB", (9, 9)).save(top / "val" / "emu" / "0.png")
    with pytest.raises(DataError, match="the class 'emu', which train has not"):
        open_source(f"imagefolder:{top}")
    (tmp_path / "b" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="no folder 'val'"):
        open_source(f"imagefolder:{tmp_path / 'b'}")
    (tmp_path / "b" / "val").mkdir()
    with pytest.raises(DataError, match=r"no folder of a class.*train\.csv"):
        open_source(f"imagefolder:{tmp_path / 'b'}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cifar", ["'cifar' is no data set", "cifar10"]),
        ("digits:here", ["no path"]),
        ("imagefolder", ["needs a path"]),
        ("imagefolder:/nowhere/at/all", ["no such folder", "/nowhere/at/all"]),
        ("synthetic:none", ["number of classes"]),
        ("cifar10:/nowhere", ["cannot be read from '/nowhere'", "--download"]),
    ],
)
def test_data_that_cannot_be_opened_is_named(spec, words):
    with pytest.raises(DataError) as error:
        open_source(spec)
    assert all(word in str(error.value) for word in words), error.value


def test_cifar_is_read_from_its_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list):
        content = {
            "data": rng.integers(0, 256, (2, 3072), dtype=np.uint8),
            "labels": [3, int(name[-1]) if name[-1].isdigit() else 9],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    names = {"label_names": [f"kind {i}" for i in range(10)]}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(names))
    # Of the files torchvision knows the sums, and these are not those.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = open_source(f"cifar10:{tmp_path}")
    assert (len(source.train), len(source.val), source.size) == (10, 2, 32)
    assert [source.train[i][1] for i in range(10)][1::2] == [1, 2, 3, 4, 5]
    assert source.train[0][0].shape == (3, 32, 32)


def test_synthetic_images_are_the_same_each_time():
    source = open_source("synthetic:7", size=12)
    assert source.train[3][0].shape == (3, 12, 12)
    assert torch.equal(source.train[70][0], open_source("synthetic:7", size=12).train[70][0])
    assert {source.train[i][1] for i in range(30)} == set(range(7))


def test_several_ranks_take_what_one_would():
    whole = list(loading.Steps(50, 12, 12, 7))
    for world in (2, 3):
        parts = [list(loading.Steps(50, 12, 12, 7, rank, world)) for rank in range(world)]
        assert [list(chain(*step)) for step in zip(*parts, strict=True)] == whole
    assert len(whole) == 12
    for epoch in range(3):
        keys = list(chain(*whole[4 * epoch : 4 * epoch + 4]))
        assert {key[0] for key in keys} == {epoch}
        assert len({key[1] for key in keys}) == 48
    assert whole[0] != whole[4], "each epoch has an order of its own"
    assert list(loading.Steps(50, 12, 12, 7, first=5)) == whole[5:]
    assert list(loading.Steps(50, 12, 6, 7)) == whole[:6], "a run may end within an epoch"


def test_a_pass_over_everything_leaves_no_image_out():
    for world in (1, 3, 4):
        keys = [
            key for rank in range(world) for part in loading.shares(13, 4, rank, world)
            for key in part
        ]  # fmt: skip
        assert sorted(keys) == [(0, i) for i in range(13)]


def test_scale_augmentation_takes_every_side_between_its_ends():
    told = augment.Augmentation(crop="scaled", sides=(8, 10), flip=False)
    image = torch.arange(16 * 12, dtype=torch.uint8).view(1, 16, 12)
    transform = augment.training_transform(told, 8)
    found = set()
    for index in range(40):
        with loading.seeded(0, index):
            cut = transform(image)
        assert cut.shape == (1, 8, 8)
        found.add(cut.numpy().tobytes())
    sides = [augment._Scaled((8, 10))(image).shape[-1] for _ in range(60)]
    assert set(sides) == {8, 9, 10}
    assert len(found) > 10
    with pytest.raises(ValueError, match=r"sides: expected at least the size, 12"):
        augment.training_transform(told, 12)
    with pytest.raises(ValueError, match="the least stands first"):
        augment.Augmentation(sides=(9, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_lighting_adds_one_colour_to_all_pixels(channels):
    light = augment.training_transform(
        augment.Augmentation(crop="none", flip=False, lighting=0.1), 4
    )
    image = torch.full((channels, 4, 4), 128, dtype=torch.uint8)
    image[:, 0, 0] = 255
    shifts = []
    for index in range(400):
        with loading.seeded(1, index):
            made = light(image)
        assert made.dtype is torch.uint8 and int(made[:, 0, 0].min()) >= 128
        shift = made[:, 1:].double().mean((1, 2)) - 128
        assert bool((made[:, 1:].double() - 128 == shift.view(-1, 1, 1)).all())
        shifts.append(shift)
    # Along the components the deviations are a tenth of those of ImageNet's colours.
    found = torch.stack(shifts)
    if channels == 3:
        parts = found @ torch.tensor(augment._Lighting.COMPONENTS, dtype=torch.float64)
        expected = 0.1 * torch.tensor(augment._Lighting.DEVIATIONS, dtype=torch.float64)
        assert torch.allclose(parts.std(0), expected, rtol=0.15, atol=0.4)
    assert float(found.std()) > 2


def test_an_image_looks_the_same_whoever_makes_it():
    data = runs.source()
    transform = augment.training_transform(augment.Augmentation(crop="padded", padding=2), 8)
    samples = loading.Samples(data.train, transform, seed=5)
    state = torch.get_rng_state()
    first = [samples[1, i][0] for i in range(6)]
    assert torch.equal(torch.get_rng_state(), state), "the generator of others was moved"
    torch.manual_seed(99)
    again = [samples[1, i][0] for i in reversed(range(6))][::-1]
    assert all(map(torch.equal, first, again))
    other = [samples[2, i][0] for i in range(6)]
    assert not all(map(torch.equal, first, other)), "each epoch varies its images anew"
    keys = [[(1, i) for i in range(6)]]
    by_worker = next(iter(loading.loader(samples, keys, workers=1)))
    assert torch.equal(by_worker[0], torch.stack(first))


def test_what_cannot_be_read_is_told_and_replaced_or_left_out(tmp_path):
    top = runs.picture_folder(tmp_path)
    (top / "train" / "cat" / "2.png").write_bytes(b"no picture")
    images = open_source(f"imagefolder:{top}").train
    transform = augment.evaluation_transform(16)
    keys = [[(0, i) for i in range(1, 4)]]
    left = next(iter(loading.loader(loading.Samples(images, transform), keys)))
    assert left[0].shape == (2, 3, 16, 16)
    assert len(left[2]) == 1
    assert "2.png" in left[2][0]
    instead = loading.Samples(images, transform, on_error="replace")
    batch = next(iter(loading.loader(instead, keys)))
    assert batch[0].shape == (3, 3, 16, 16)
    assert torch.equal(batch[0][1], batch[0][2])
    assert "2.png" in batch[2][0]


def test_transforms_give_the_size_that_is_asked_for():
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    kinds = [
        augment.Augmentation(policy=policy, erasing=0.5)
        for policy in ("none", "randaugment", "trivialaugment", "augmix")
    ]
    kinds += [augment.Augmentation(crop=crop) for crop in ("padded", "none")]
    for kind in kinds:
        made = augment.training_transform(kind, 24)(image)
        assert (made.shape, made.dtype) == ((3, 24, 24), torch.uint8)
    assert augment.evaluation_transform(24, 30)(image).shape == (3, 24, 24)
    crops = augment.ten_crops(24, 30)(image)
    assert crops.shape == (10, 3, 24, 24)
    assert torch.equal(crops[5], crops[1].flip(-1)), "top left of the mirror image"
    with pytest.raises(ValueError, match="resize: expected at least"):
        augment.evaluation_transform(24, 20)


def test_stored_images_are_what_they_were():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1)
    stored = Stored(images, torch.tensor([3, 2, 1, 0]))
    assert [(int(image), label) for image, label in (stored[i] for i in range(4))] == [
        (0, 3), (1, 2), (2, 1), (3, 0),
    ]  # fmt: skip
