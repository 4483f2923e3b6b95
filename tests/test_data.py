"""Images: torchvision's presets are matched bit for bit, and every unreadable file says why."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.models import ResNet50_Weights

from resnet_fused.data import ImageError, crops, load_image, photographs, preprocess


def _gradient(width: int = 64, height: int = 48) -> Image.Image:
    across = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (across, across.rotate(180), Image.new("L", (width, height), 90)))


def test_photographs_are_two_different_rgb_pictures() -> None:
    china, flower = photographs()
    assert china.mode == flower.mode == "RGB"
    assert china.size == flower.size == (640, 427)
    assert china.tobytes() != flower.tobytes()


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "IMAGENET1K_V2"])
def test_preprocess_is_torchvisions_preset(name: str) -> None:
    preset = ResNet50_Weights[name].transforms()
    for image in photographs():
        ours = preprocess(image, preset.crop_size[0], preset.resize_size[0])
        torch.testing.assert_close(ours, preset(image), rtol=0, atol=0)


def test_crops_start_with_the_presets_crop_of_each_photograph() -> None:
    batch = crops(5, size=48, seed=3)
    assert batch.shape == (5, 3, 48, 48)
    assert batch.dtype == torch.float32
    for index, image in enumerate(photographs()):
        assert torch.equal(batch[index], preprocess(image, 48))
    assert len({tuple(crop.flatten().tolist()) for crop in batch}) == 5
    assert torch.isfinite(batch).all()


def test_crops_repeat_with_the_seed_and_differ_without() -> None:
    first = crops(4, size=32, seed=1)
    assert torch.equal(first, crops(4, size=32, seed=1))
    other = crops(4, size=32, seed=2)
    assert torch.equal(first[:2], other[:2])
    assert not torch.equal(first[2:], other[2:])


def test_crops_of_given_images() -> None:
    batch = crops(3, size=32, images=[_gradient()])
    assert torch.equal(batch[0], preprocess(_gradient(), 32))
    assert crops(0, size=32, images=[_gradient()]).shape == (0, 3, 32, 32)


def test_crops_of_a_one_pixel_image() -> None:
    batch = crops(3, size=8, images=[Image.new("RGB", (1, 1), (255, 0, 0))])
    assert torch.isfinite(batch).all()
    assert (batch[:, 0] > 2).all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n": -1}, r"n: expected 0 crops or more, got -1"),
        ({"n": 1, "size": 0}, r"size: expected at least 1 pixel, got 0"),
        ({"n": 1, "images": []}, r"images: expected at least one image"),
    ],
)
def test_crops_refuses(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        crops(**arguments)  # type: ignore[arg-type]


def test_preprocess_refuses_bad_sizes() -> None:
    with pytest.raises(ValueError, match="size: expected at least 1 pixel, got 0"):
        preprocess(_gradient(), 0)
    with pytest.raises(ValueError, match="resize: expected at least the crop's 32 pixels, got 16"):
        preprocess(_gradient(), 32, resize=16)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_load_image_converts_every_mode_to_rgb(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    _gradient().convert(mode).save(file)
    image = load_image(file)
    assert image.mode == "RGB"
    assert image.size == (64, 48)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_load_image_keeps_the_range_of_16_bits(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"deep.{kind}"
    deep = Image.new("I;16", (4, 3), 0x8000)
    deep.putpixel((1, 2), 0xFFFF)
    deep.save(file)
    image = load_image(file)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (128, 128, 128)
    assert image.getpixel((1, 2)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_load_image_refuses_pixels_without_a_range(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 3), 1).save(tmp_path / "measured.tiff")
    with pytest.raises(ImageError, match=r"measured\.tiff' has pixels of 32 bits"):
        load_image(tmp_path / "measured.tiff")


def test_load_image_takes_the_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "two.gif").getpixel((0, 0)) == (255, 0, 0)


def test_load_image_names_the_file_whatever_a_reader_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reader(file: object) -> None:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image, "open", reader)
    with pytest.raises(ImageError, match=r"odd\.tif' is corrupt or cut short \(unpack requires"):
        load_image(tmp_path / "odd.tif")


def test_load_image_turns_by_the_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90 degrees
    _gradient().save(tmp_path / "upright.jpg", exif=exif)
    assert load_image(tmp_path / "upright.jpg").size == (48, 64)


def test_load_image_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no such file: '.*absent\.jpg'"):
        load_image(tmp_path / "absent.jpg")


def test_load_image_refuses_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a directory"):
        load_image(tmp_path)


def test_load_image_refuses_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("this is no picture")
    with pytest.raises(ImageError, match=r"'.*notes\.jpg' is not an image"):
        load_image(tmp_path / "notes.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_load_image_refuses_a_file_cut_short(tmp_path: Path, kind: str) -> None:
    whole = io.BytesIO()
    _gradient(256, 256).save(whole, kind)
    (tmp_path / "cut").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(ImageError, match="corrupt or cut short"):
        load_image(tmp_path / "cut")
