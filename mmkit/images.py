"""Pictures: opening them safely, and turning them into the tensor an encoder was trained on.

An `ImageSpec` travels with every encoder, so that no script guesses a mean, a size or a way to resize.
"""

import io
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmkit.errors import ConfigError, DataError

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Resize = Literal["crop", "squash", "pad"]
LARGEST = 89_478_485  # pixels that making a tensor may hold at once; PIL's own limit for opening a file without a warning
Transform = Callable[[Image.Image], Tensor]


class ImageError(DataError):
    """A picture is missing, cut off, or no picture at all."""


def open_image(source: Path | str | bytes | Image.Image, where: str = "") -> Image.Image:
    """Open a picture as RGB and read every pixel of it.

    The orientation from EXIF is applied, transparency is laid over white, the first frame of an animation is taken, 16-bit grey is scaled
    (not cut) to 8 bits, CMYK and palettes are converted.

    Args:
        source: A file, its bytes, or a picture already open.
        where: The record that asked for the picture, for the message ("row 17 of pretrain.json").

    Raises:
        ImageError: The file is missing, empty, truncated, not a picture, or too large to be decoded safely.
    """
    name = (
        f"'{source}'"
        if isinstance(source, str | Path)
        else f"a picture of {len(source)} bytes"
        if isinstance(source, bytes)
        else "a picture"
    )
    place = f" ({where})" if where else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(_read(source)))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise ImageError(f"no image {name}{place}: the file does not exist. Check the image folder the names are relative to.") from error
    except IsADirectoryError as error:
        raise ImageError(f"image {name}{place} is a folder; a picture file was expected.") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}{place} is not an image{_looks_like(source)}. Replace or remove it.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"image {name}{place} has too many pixels to be opened safely ({error}). Scale it down first.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"image {name}{place} is truncated or damaged ({error}). Fetch it again, or remove it.") from error


def _read(source: str | Path | bytes) -> bytes:
    """Give the file's bytes; a whole read also means that no file stays open."""
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _looks_like(source: object) -> str:
    """Say what a file holds instead of a picture, where this is easy to tell."""
    if isinstance(source, Image.Image):
        return ""
    assert isinstance(source, str | Path | bytes)
    head = _read(source)[:64]
    if not head:
        return " (the file is empty)"
    if head[:16].isascii() and head[:16].decode("ascii").isprintable():
        return f" (it is text that begins with {head[:24].decode('ascii', 'replace')!r})"
    return ""


def _to_rgb(image: Image.Image) -> Image.Image:
    """Bring any mode to RGB; transparent pixels show white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F", "I;16", "I;16B", "I;16L"):  # convert("RGB") would clip everything above 255 to white
        grey = np.asarray(image, dtype=np.float64)
        grey = grey / 257.0 if grey.size and grey.max() > 255 else grey
        return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8), "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes a row of `images`: what an encoder was trained on, and what it is given ever after.

    Attributes:
        size: Height and width of the tensor, pixels.
        mean, std: Per channel, of values in [0, 1].
        interpolation: PIL's filter.
        resize: "crop" scales the short side and cuts out the centre, "squash" ignores the aspect ratio, "pad" adds bars in the mean colour.
        crop_pct: Share of the scaled short side (or of the squashed square) that the centre crop keeps.
    """

    size: int = 224
    mean: tuple[float, float, float] = OPENAI_CLIP_MEAN
    std: tuple[float, float, float] = OPENAI_CLIP_STD
    interpolation: str = "bicubic"
    resize: Resize = "crop"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        if self.interpolation not in FILTERS:
            raise ConfigError(f"image spec: interpolation '{self.interpolation}' is not one of {', '.join(FILTERS)}")
        if self.resize not in get_args(Resize):
            raise ConfigError(f"image spec: resize '{self.resize}' is not one of {', '.join(get_args(Resize))}")
        if not (isinstance(self.size, int) and self.size > 0 and 0 < self.crop_pct <= 1):
            raise ConfigError(
                f"image spec: size {self.size!r}, crop_pct {self.crop_pct!r}; a positive whole number and a share in (0, 1] were expected"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"image spec: mean {self.mean}, std {self.std}; three numbers each were expected, std above 0")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ImageSpec":
        """Build a spec from JSON values.

        Raises:
            ConfigError: A key is unknown or a value cannot be used.
        """
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"image spec: unknown {', '.join(unknown)}; known are {', '.join(cls.__dataclass_fields__)}")
        fields: dict[str, Any] = {key: tuple(value) if key in ("mean", "std") else value for key, value in values.items()}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Give JSON values that `from_dict` takes back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def transform(
        self,
        training: bool = False,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> Transform:
        """Make the function from an RGB picture to a normalised tensor [3, size, size].

        Args:
            training: Cut out a random rectangle and mirror at random, instead of the fixed way that `resize` names. It draws from Python's
                `random`; `image_data` passes a generator of its own to `training_transform`.
            scale: Share of the area a random rectangle covers, from and to.
            flip: Probability of mirroring left and right.
            ratio: Width by height of a random rectangle, from and to.
        """
        if training:
            return lambda image: self.training_transform(image, random, scale=scale, flip=flip, ratio=ratio)
        return lambda image: self.normalise(self.fit(image))

    def training_transform(
        self,
        image: Image.Image,
        generator: Any,
        *,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> Tensor:
        """Cut out, scale and mirror at random, all drawn from `generator`; the same generator state gives the same tensor.

        Args:
            image: An RGB picture.
            generator: `random.Random` or the module `random`.
            scale, flip, ratio: As in `transform`.
        """
        return self.normalise(self.random_crop(image, generator, scale=scale, flip=flip, ratio=ratio))

    def random_crop(
        self,
        image: Image.Image,
        generator: Any,
        *,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> Image.Image:
        """Give the picture of `training_transform` before it is normalised."""
        box = random_box(image.width, image.height, generator, scale, ratio)
        image = image.resize((self.size, self.size), FILTERS[self.interpolation], box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < flip else image

    def fit(self, image: Image.Image) -> Image.Image:
        """Bring a picture to size x size in the fixed way that `resize` names.

        A picture of 1 x 20,000 pixels passes too, and takes no more memory than others: see `_fit_strip` and `_pad`.
        """
        scaled = math.floor(self.size / self.crop_pct)
        if self.resize == "pad":
            image = self._pad(image, scaled)
        if self.resize == "crop":  # the long side is cut down to a whole pixel, as torchvision and transformers do
            short = min(image.size)
            width, height = (scaled if edge == short else int(scaled * edge / short) for edge in image.size)
        else:
            width, height = scaled, scaled
        if width * height > LARGEST:
            return self._fit_strip(image, width, height)
        image = image.resize((width, height), FILTERS[self.interpolation])
        left, top = (round((edge - self.size) / 2.0) for edge in image.size)  # half to even, as torchvision does, and CLIP with it
        return image.crop((left, top, left + self.size, top + self.size)) if image.size != (self.size, self.size) else image

    def _fit_strip(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Make the centre of the picture scaled to width x height, and nothing of the rest: it would be gigabytes of a strip."""
        left, top = round((width - self.size) / 2.0), round((height - self.size) / 2.0)
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + self.size) * across, (top + self.size) * down)
        return image.resize((self.size, self.size), FILTERS[self.interpolation], box=box)

    def _pad(self, image: Image.Image, scaled: int) -> Image.Image:
        """Lay a picture on a square in the mean colour; one whose square would be too large is scaled first, which moves its rim a little."""
        side = max(image.size)
        if side * side > LARGEST:
            width, height = (max(1, round(edge * scaled / side)) for edge in image.size)
            image, side = image.resize((width, height), FILTERS[self.interpolation]), scaled
        canvas = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in self.mean))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas

    def normalise(self, image: Image.Image) -> Tensor:
        """Turn a picture of the right size into a tensor [3, size, size], mean and std applied."""
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    def image_processor(self) -> Any:
        """Give a transformers image processor that makes the same tensors, to travel with a model that others load.

        Returns:
            `CLIPImageProcessorPil`, or `LlavaImageProcessorPil` where bars are added. Both resize with PIL: the torchvision-backed
            ones differ by up to one grey level in some pixels. The one difference left: where the centre crop takes off 3, 7, 11...
            pixels in all, transformers begins it one pixel further left (or up) than torchvision and this module.
        """
        from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

        scaled = math.floor(self.size / self.crop_pct)
        square = {"height": scaled, "width": scaled}
        settings: dict[str, Any] = {
            "size": {"shortest_edge": scaled} if self.resize == "crop" else square,
            "do_center_crop": self.resize == "crop" or scaled != self.size,
            "crop_size": {"height": self.size, "width": self.size},
            "resample": int(FILTERS[self.interpolation]),
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        return LlavaImageProcessorPil(do_pad=True, **settings) if self.resize == "pad" else CLIPImageProcessorPil(**settings)


def to_images(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """Turn square crops as bytes into what an encoder takes, on the device they are on.

    Args:
        pixels: uint8 [B, 3, S, S]. Where S is not the spec's size they are resized (bicubic, antialiased), as for a teacher and a student
            that see one crop at two sizes.

    Returns:
        float32 [B, 3, size, size], mean and std applied.
    """
    values = pixels.float()
    if pixels.shape[-1] != spec.size:
        size = (spec.size, spec.size)
        values = torch.nn.functional.interpolate(values, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    mean, std = values.new_tensor(spec.mean).view(3, 1, 1), values.new_tensor(spec.std).view(3, 1, 1)
    return (values / 255 - mean) / std


def random_box(
    width: int, height: int, generator: Any, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw the rectangle of a random resized crop (left, top, right, bottom): area and log aspect uniform, ten tries, else the centre.

    Source: the augmentation of Inception (Szegedy et al., 2015), in torchvision's form (RandomResizedCrop).
    """
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = generator.randint(0, width - box_width), generator.randint(0, height - box_height)
            return left, top, left + box_width, top + box_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width, box_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def renormalise(images: Tensor, source: ImageSpec, target: ImageSpec) -> Tensor:
    """Take images [B, 3, H, W] from one mean and std to another; the very same tensor where both agree.

    Raises:
        ConfigError: The specs differ in size: pixels are not made here.
    """
    if source.size != target.size:
        raise ConfigError(f"images of {source.size} pixels cannot be renormalised for an encoder that takes {target.size}")
    if (source.mean, source.std) == (target.mean, target.std):
        return images
    mean_s, std_s, mean_t, std_t = (
        images.new_tensor(values).view(3, 1, 1) for values in (source.mean, source.std, target.mean, target.std)
    )
    return (images * std_s + (mean_s - mean_t)) / std_t
