"""Images in batches for evaluation: opened in order, here or by worker processes; what cannot be read is named, not lost."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmkit.images import ImageError, ImageSpec, open_image

Source = Callable[[str], Path | Image.Image | bytes]


@dataclass(frozen=True)
class Broken:
    """An image that could not be read, and why."""

    name: str
    reason: str


class _Opened(Dataset[tuple[str, Tensor | Broken]]):
    """Each image as the encoder takes it, [3, size, size], or what is wrong with it."""

    def __init__(self, source: Source, names: Sequence[str], spec: ImageSpec) -> None:
        self.source, self.names, self.spec = source, names, spec

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Tensor | Broken]:
        name = self.names[index]
        try:
            return name, self.spec.normalise(self.spec.fit(open_image(self.source(name))))
        except ImageError as error:
            return name, Broken(name, str(error))


def batches(
    source: Source, names: Sequence[str], spec: ImageSpec, batch_size: int, workers: int = 0
) -> Iterator[tuple[list[str], Tensor, list[Broken]]]:
    """Open images a batch at a time, in the order given.

    Args:
        source: Gives the file (or the image) of a name.
        names: Which images.
        spec: How they are prepared.
        batch_size: Images at once.
        workers: Processes that open images; 0 opens them in this one. The order and the tensors are the same.

    Yields:
        Names of the images that could be read, the images [b, 3, size, size], and those that could not.
    """
    if not names:
        return
    loader = DataLoader(_Opened(source, names, spec), batch_size=batch_size, num_workers=workers, collate_fn=list)
    for items in loader:
        read = [(name, value) for name, value in items if isinstance(value, Tensor)]
        broken = [value for _, value in items if isinstance(value, Broken)]
        images = torch.stack([value for _, value in read]) if read else torch.empty(0, 3, spec.size, spec.size)
        yield [name for name, _ in read], images, broken
