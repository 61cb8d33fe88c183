"""Opening pictures, and making tensors of them: mmkit/images.py."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from mmkit.errors import ConfigError
from mmkit.images import LARGEST, ImageError, ImageSpec, open_image, renormalise, to_images

GOLDEN = Path(__file__).parent / "golden" / "uta"


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_the_official_preprocessing_is_reproduced_exactly() -> None:
    golden = load_file(str(GOLDEN / "preprocess_io.safetensors"))
    numbers = sorted(name.rsplit("_", 1)[1] for name in golden if name.startswith("image_u8_"))
    assert len(numbers) >= 2
    for number in numbers:
        image = Image.fromarray(golden[f"image_u8_{number}"].numpy())
        assert_close(ImageSpec(size=56).transform()(image), golden[f"pixels_{number}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(96, 96), (131, 97), (80, 123)])
def test_the_image_processor_makes_the_same_tensors(resize: str, size: tuple[int, int]) -> None:
    spec = ImageSpec(size=64, resize=resize)  # type: ignore[arg-type]
    image = picture(*size)
    theirs = spec.image_processor()(image, return_tensors="pt").pixel_values[0]
    assert_close(spec.transform()(image), theirs, rtol=0, atol=1e-6)


def test_a_spec_survives_json_and_refuses_unknown_keys() -> None:
    spec = ImageSpec(size=96, resize="squash", crop_pct=0.9)
    assert ImageSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ConfigError, match="unknown colour"):
        ImageSpec.from_dict({"colour": "blue"})
    with pytest.raises(ConfigError, match="'stretch' is not one of crop, squash, pad"):
        ImageSpec(resize="stretch")  # type: ignore[arg-type]


def test_a_training_crop_is_a_function_of_its_generator() -> None:
    spec, image = ImageSpec(size=32), picture()
    first, again, other = (spec.training_transform(image, random.Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3, 32, 32)


def test_renormalised_images_are_what_the_other_spec_would_have_made() -> None:
    clip, siglip = ImageSpec(size=32), ImageSpec(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    mine, theirs = clip.transform()(picture()), siglip.transform()(picture())
    assert_close(renormalise(mine[None], clip, siglip)[0], theirs, rtol=0, atol=1e-5)
    images = mine[None]
    assert renormalise(images, clip, clip) is images
    with pytest.raises(ConfigError, match="32 pixels"):
        renormalise(images, clip, ImageSpec(size=64))


def test_bytes_become_the_same_images_on_the_device_as_on_the_way_in() -> None:
    spec, image = ImageSpec(size=30), picture(30, 30)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    assert_close(to_images(pixels, spec)[0], spec.transform()(image), rtol=0, atol=1e-6)
    assert to_images(pixels, ImageSpec(size=16)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"this is a text file, named .jpg", "is not an image.*it is text that begins with 'this is"),
        (b"", "is not an image.*the file is empty"),
        (encoded(picture(200, 200), "JPEG")[:2000], "is truncated or damaged"),
        (encoded(picture(200, 200), "PNG")[:5000], "is truncated or damaged"),
    ],
    ids=["text", "empty", "half a JPEG", "half a PNG"],
)
def test_what_is_no_whole_picture_is_named_with_its_record(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a picture.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=words) as caught:
        open_image(path, "row 17 of pretrain.json")
    assert str(path) in str(caught.value)
    assert "row 17 of pretrain.json" in str(caught.value)


def test_a_missing_file_a_folder_and_a_bomb_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ImageError, match="too many pixels"):
        open_image(encoded(picture(40, 30), "PNG"))


def test_every_kind_of_picture_comes_out_as_rgb() -> None:
    image = picture()
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(encoded(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    grey16 = Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16))
    assert open_image(encoded(grey16, "PNG")).getpixel((1, 1)) == (128, 128, 128)
    for form, mode in (("GIF", "P"), ("PNG", "1"), ("PNG", "LA"), ("JPEG", "CMYK"), ("PNG", "L"), ("WEBP", "RGB")):
        opened = open_image(encoded(image.convert(mode), form))
        assert (opened.mode, opened.size) == ("RGB", image.size), (form, mode)


def test_the_orientation_of_a_photograph_is_applied() -> None:
    tags = Image.Exif()
    tags[0x0112] = 6  # turned by 90 degrees
    assert open_image(encoded(picture(40, 30), "JPEG", exif=tags)).size == (30, 40)


# ---- pictures that are no ordinary pictures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)], ids=["wide", "high"])
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_a_strip_of_one_pixel_becomes_a_tensor_without_gigabytes(
    size: tuple[int, int], resize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    new, scale = Image.new, Image.Image.resize
    monkeypatch.setattr(Image, "new", lambda mode, size, *rest: made.append(size[0] * size[1]) or new(mode, size, *rest))
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest, **more: made.append(size[0] * size[1]) or scale(self, size, *rest, **more)
    )
    image = open_image(encoded(picture(*size), "PNG"))
    spec = ImageSpec(size=224, resize=resize)  # type: ignore[arg-type]
    assert spec.transform()(image).shape == (3, 224, 224)
    assert spec.training_transform(image, random.Random(0)).shape == (3, 224, 224)
    assert max(made) <= LARGEST


@pytest.mark.parametrize("size", [(300, 40), (41, 500), (90, 90)])
def test_the_way_for_strips_makes_the_same_picture_as_the_ordinary_way(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, image = ImageSpec(size=32, crop_pct=0.9), picture(*size)
    ordinary = np.asarray(spec.fit(image)).astype(int)
    monkeypatch.setattr("mmkit.images.LARGEST", 0)
    assert np.abs(np.asarray(spec.fit(image)).astype(int) - ordinary).max() <= 1  # grey levels: box edges are float32


def test_a_file_that_claims_more_pixels_than_memory_is_refused_unread() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match=r"too many pixels.*member 'x.png' of a.tar|member 'x.png' of a.tar.*too many pixels"):
        open_image(bomb, "member 'x.png' of a.tar")


def test_an_animation_gives_its_first_frame_and_16_bits_their_upper_ones() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    assert open_image(out.getvalue()).getpixel((3, 3)) == (250, 0, 0)
    ramp = np.linspace(0, 65_535, 64, dtype=np.uint16).reshape(8, 8)
    for form in ("PNG", "TIFF"):
        grey = np.asarray(open_image(encoded(Image.fromarray(ramp), form)))[..., 0]
        assert np.abs(grey.astype(float) - ramp / 257).max() <= 0.5, form
