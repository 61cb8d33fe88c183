"""Zero-shot classification: prompts, a classifier made of text, and where the right name ranks."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from encoders.text import TextTower
from encoders.zeroshot_sets import facts
from mmkit.checkpoint import save_weights
from mmkit.errors import ConfigError, DataError, find
from mmkit.minidata import names as mini_names
from mmkit.trainable import weights_hash

Template = Callable[[str], str]


def phrase(name: str) -> str:
    """Give a name its article: "a cat", "an owl", "some bread" (a drawing's own grammar where it is one of minidata's)."""
    if name in mini_names.table():
        return mini_names.with_article(name)
    return f"{mini_names.article(name)} {name}" if name else name


# The embedded world's captions are short and say little more than what is there; these are the ways in which they say it.
MINI_TEMPLATES: tuple[Template, ...] = (
    phrase,
    lambda name: name,
    lambda name: f"a picture of {phrase(name)}",
    lambda name: f"there is {phrase(name)}",
)


def _filled(line: str) -> Template:
    """Make a function of a line with {} where the class name goes."""
    return lambda name: line.replace("{}", name)


TEMPLATES: Mapping[str, Sequence[Template]] = {
    "mini": MINI_TEMPLATES,
    "openai": OPENAI_IMAGENET_TEMPLATES,
    "name": (lambda name: name,),
    **{name: tuple(map(_filled, lines)) for name, lines in facts()["prompts"].items()},  # cifar, eurosat, gtsrb, caltech101
}
TEXTS_AT_ONCE = 4096  # of a classifier: 80,000 texts are encoded in parts, with progress


def load_templates(prompts: str) -> Sequence[Template]:
    """Give the prompts of a name of `TEMPLATES`, or of a text file, one a line with {} where the class name goes.

    Raises:
        NameNotFound: Neither a known set nor a file.
        ConfigError: A line of the file has no {}.
    """
    path = Path(prompts)
    if prompts not in TEMPLATES and path.is_file():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            if "{}" not in line:
                raise ConfigError(f"{path}, line {number}: '{line}' has no {{}} for the class name")
        if not lines:
            raise ConfigError(f"{path} has no prompts in it; one a line, with {{}} where the class name goes")
        return [_filled(line) for line in lines]
    return find("prompt set", TEMPLATES, prompts)


def classifier_from_features(features: Tensor) -> Tensor:
    """Turn text features [C, T, E] of C classes under T templates into a classifier [E, C].

    Each text is normalised, a class is the mean over its templates, normalised again: prompts count alike, whatever their length.

    Source: CLIP (Radford et al., 2021), section 3.1.4, as open_clip and UTA's evaluation compute it.
    """
    if features.ndim != 3:
        raise DataError(f"text features {list(features.shape)}: [classes, templates, joint width] was expected")
    mean = F.normalize(features.float(), dim=-1).mean(dim=1)  # [C, E]
    return F.normalize(mean, dim=-1).T.contiguous()


def zeroshot_weights(encode: Callable[[list[str]], Tensor], classnames: Sequence[str], templates: Sequence[Template]) -> Tensor:
    """Build the classifier [E, C] of some class names.

    Args:
        encode: Texts to features [n, E], normalised or not.
        classnames: C names. Equal names are allowed and tie.
        templates: T prompts.

    Raises:
        DataError: There are no names or no prompts.
    """
    if not classnames or not templates:
        raise DataError(f"a zero-shot classifier of {len(classnames)} classes and {len(templates)} prompts: at least one of each is needed")
    step = max(1, TEXTS_AT_ONCE // len(templates))  # classes
    parts = []
    with tqdm(
        total=len(classnames), desc=f"names under {len(templates)} prompts", unit="class", disable=len(classnames) <= step
    ) as progress:
        for start in range(0, len(classnames), step):
            names = classnames[start : start + step]
            features = encode([template(name) for name in names for template in templates])
            parts.append(classifier_from_features(features.unflatten(0, (len(names), len(templates)))))
            progress.update(len(names))
    return torch.cat(parts, dim=1)


def cached_weights(tower: TextTower, classnames: Sequence[str], templates: Sequence[Template]) -> Tensor:
    """Build a classifier once per tower (its weights count, not its name), names and prompts; after that read it from the cache folder.

    80 prompts for 1,000 names are 80,000 texts, minutes for a large tower, and every evaluation of an encoder wants the same ones.
    """
    texts = "\n".join(template(name) for name in classnames for template in templates)
    key = hashlib.sha256(f"{weights_hash(tower)}\n{len(classnames)}\n{texts}".encode()).hexdigest()[:32]
    root = Path(os.environ.get("MMKIT_CACHE") or Path.home() / ".cache" / "mmkit")
    path = root / "zeroshot" / f"{key}.safetensors"
    if path.is_file():
        try:
            return load_file(path)["weights"]
        except (SafetensorError, KeyError, OSError):
            path.unlink(missing_ok=True)  # a damaged cache is made again, not reported
    weights = zeroshot_weights(tower.encode, classnames, templates)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights({"weights": weights}, path)
    except OSError as error:
        print(f"the zero-shot classifier could not be kept at {path} ({error}); it will be computed again next time")
    return weights


def similarities(image_features: Tensor, weights: Tensor) -> Tensor:
    """Cosine of images [B, E] (any length) and classes [E, C]: [B, C].

    Raises:
        DataError: The widths differ: the text tower belongs to another joint space.
    """
    if image_features.shape[-1] != weights.shape[0]:
        raise DataError(
            f"image features have width {image_features.shape[-1]}, the text tower's classifier {weights.shape[0]}: "
            "zero-shot needs the text tower of the encoder's own joint space (--text_tower)"
        )
    return F.normalize(image_features.float(), dim=-1) @ weights.to(image_features.device)


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Say at which place (0 is first) the right class stands, ties counted against it: [B], int64.

    Args:
        scores: Similarities [B, C].
        labels: Index of the right class [B].
    """
    own = scores.gather(1, labels[:, None])  # [B, 1]
    # Of equal scores only the label itself is not counted: two classes with one name must not both be right.
    return (scores >= own).sum(dim=1) - 1


def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Give the share of rows whose label is among the k best classes, in [0, 1]."""
    return float((label_ranks(scores, labels) < k).double().mean())


@torch.no_grad()
def zeroshot_ranks(
    encode_images: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, weights: Tensor, batch_size: int = 256
) -> Tensor:
    """Rank of the label for a whole set of images in memory [N, 3, H, W]; `encode_images` takes them batch by batch."""
    parts = [
        label_ranks(similarities(encode_images(images[start : start + batch_size]).cpu(), weights), labels[start : start + batch_size])
        for start in range(0, len(images), batch_size)
    ]
    return torch.cat(parts)
