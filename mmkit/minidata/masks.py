"""Masks in COCO's two forms: polygons along the pixels' edges where these give back the very same mask, else run lengths."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Polygon = list[int]  # x1, y1, x2, y2, ... : corners, clockwise, in pixels


def segmentation_of(mask: np.ndarray) -> list[Polygon] | dict[str, Any]:
    """COCO's `segmentation` of one object.

    Args:
        mask: bool [height, width].

    Returns:
        Polygons, one for each connected part; or compressed run lengths {"size", "counts"} where polygons cannot say it (holes, parts that
        touch at a corner). Either way, pycocotools decodes exactly `mask`.
    """
    runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    polygons = _outlines(mask)
    if polygons is not None:
        height, width = mask.shape
        drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
        if np.array_equal(drawn.astype(bool), mask):
            return polygons
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode("ascii")}


def _outlines(mask: np.ndarray) -> list[Polygon] | None:
    """Closed walks along the pixel edges with the mask on the right hand; None where there is a hole or a corner shared by two walks."""
    padded = np.pad(mask.astype(np.int8), 1)
    change_down, change_right = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1]
    after: dict[tuple[int, int], tuple[int, int]] = {}
    edges: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for y, x in np.argwhere(change_down):  # top edges run to the right, bottom edges to the left
        top = change_down[y, x] > 0
        edges.append(((int(x), int(y)), (int(x) + 1, int(y))) if top else ((int(x) + 1, int(y)), (int(x), int(y))))
    for y, x in np.argwhere(change_right):  # left edges run upwards, right edges downwards
        left = change_right[y, x] > 0
        edges.append(((int(x), int(y) + 1), (int(x), int(y))) if left else ((int(x), int(y)), (int(x), int(y) + 1)))
    for start, end in edges:
        if start in after:
            return None
        after[start] = end
    polygons = []
    while after:
        first = min(after)
        walk = [first]
        while (step := after.pop(walk[-1])) != first:
            walk.append(step)
        corners = [
            point
            for before, point, following in zip([walk[-1], *walk[:-1]], walk, [*walk[1:], walk[0]], strict=True)
            if (point[0] - before[0], point[1] - before[1]) != (following[0] - point[0], following[1] - point[1])
        ]
        if _signed_area(corners) < 0:
            return None
        polygons.append([coordinate for corner in corners for coordinate in corner])
    return polygons


def _signed_area(corners: list[tuple[int, int]]) -> int:
    """Twice the area; negative for a walk around a hole."""
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(corners, [*corners[1:], corners[0]], strict=True))
