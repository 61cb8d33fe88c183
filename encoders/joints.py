"""The keypoints that a COCO-format set knows: their names, how exactly people mark them, and which change places in a mirror."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkit.errors import DataError

# COCO's own, of its 17 keypoints from nose to ankles: the spread of people's marks relative to the object's size.
COCO_SIGMAS = (0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089)


@dataclass(frozen=True)
class Joints:
    """Keypoints of all categories of a set.

    Attributes:
        names: K names.
        sigmas: Per name, for object keypoint similarity.
    """

    names: tuple[str, ...]
    sigmas: tuple[float, ...]

    @property
    def mirrored(self) -> list[int]:
        """The keypoint that each becomes in a mirror: left and right change places, by their names."""
        other = [name.replace("left", "\0").replace("right", "left").replace("\0", "right") for name in self.names]
        return [self.names.index(name) if name in self.names else place for place, name in enumerate(other)]


def joints_of(content: Mapping[str, Any], file: Path | str) -> Joints | None:
    """Give the keypoints of a file's categories; None where no category has any.

    A category may say its own "sigmas" beside its "keypoints"; COCO's 17 have theirs here.

    Raises:
        DataError: Categories have different keypoints, or nobody says how exactly they are marked.
    """
    known = [row for row in content["categories"] if row.get("keypoints")]
    if not known:
        return None
    names = tuple(str(name) for name in known[0]["keypoints"])
    if other := next((row for row in known if tuple(row["keypoints"]) != names), None):
        raise DataError(
            f"{file}: categories '{known[0]['name']}' and '{other['name']}' have other keypoints; one head learns one list: split the file"
        )
    sigmas = known[0].get("sigmas") or (COCO_SIGMAS if len(names) == len(COCO_SIGMAS) else None)
    if sigmas is not None and not all(isinstance(sigma, int | float) and sigma > 0 for sigma in sigmas):
        raise DataError(f"{file}: category '{known[0]['name']}' has sigmas {sigmas}; numbers above 0 are right")
    if sigmas is None or len(sigmas) != len(names):
        raise DataError(
            f"{file}: category '{known[0]['name']}' has {len(names)} keypoints and {len(sigmas or [])} sigmas; give one each (COCO's 17 are known)"
        )
    return Joints(names, tuple(float(sigma) for sigma in sigmas))
