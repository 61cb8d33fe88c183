"""Which class index, and which logit of a head, a COCO category id is.

Category ids have gaps (COCO's 80 end at 90) and a file may list them in any order. Targets number them 0 to n - 1 by ascending id; a head
says which of its logits each of them is, so that heads trained under another numbering (the authors') keep it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmkit.errors import DataError

# Of COCO 2017's instances, in ascending order: 1 to 90 without these ten.
COCO_IDS = tuple(number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))


@dataclass(frozen=True)
class Classes:
    """The categories a head knows.

    Attributes:
        ids: Raw category ids, ascending. A target's label k is `ids[k]`.
        names: Their names.
        index: The logit of each. Ascending from 0 unless the head was trained under another numbering.
        num_logits: All logits of the head; the last one is "no object".
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    index: tuple[int, ...]
    num_logits: int

    def __post_init__(self) -> None:
        if not self.ids or not len(self.ids) == len(self.names) == len(self.index):
            raise DataError(f"{len(self.ids)} category ids, {len(self.names)} names, {len(self.index)} logits: one of each per category")
        if list(self.ids) != sorted(set(self.ids)):
            raise DataError(f"category ids must ascend and differ; they are {list(self.ids)[:8]}...")
        if len(set(self.index)) != len(self.index) or min(self.index) < 0 or max(self.index) >= self.num_logits:
            raise DataError(
                f"logits {min(self.index)} to {max(self.index)} for {len(self.ids)} categories do not fit into {self.num_logits}"
            )

    @property
    def no_object(self) -> int:
        """The logit of "no object"."""
        return self.num_logits - 1

    @classmethod
    def contiguous(cls, ids: Iterable[int], names: Iterable[str]) -> "Classes":
        """Number the logits 0 to n - 1 by ascending id, "no object" last."""
        pairs = sorted(zip(ids, names, strict=True))
        return cls(tuple(i for i, _ in pairs), tuple(name for _, name in pairs), tuple(range(len(pairs))), len(pairs) + 1)

    @classmethod
    def raw_ids(cls, ids: Iterable[int], names: Iterable[str]) -> "Classes":
        """Let each raw id be its own logit, as DETR and the authors' detection head do: ids 1 to 90 make 92 logits, 91 is "no object"."""
        pairs = sorted(zip(ids, names, strict=True))
        numbers = tuple(i for i, _ in pairs)
        return cls(numbers, tuple(name for _, name in pairs), numbers, numbers[-1] + 2)

    @classmethod
    def authors_segmentation(cls, ids: Iterable[int], names: Iterable[str]) -> "Classes":
        """The authors' segmentation labels, 1 to 80 of 81 logits: the last category shares its logit with "no object". For imports only.

        Source: ViSFT, mmf/datasets; spec: toothbrush is trained as background and logit 0 is never used.
        """
        pairs = sorted(zip(ids, names, strict=True))
        return cls(tuple(i for i, _ in pairs), tuple(name for _, name in pairs), tuple(range(1, len(pairs) + 1)), len(pairs) + 1)

    def label_of(self) -> dict[int, int]:
        """Give raw id -> label (0 to n - 1)."""
        return {raw: label for label, raw in enumerate(self.ids)}

    def to_dict(self) -> dict[str, Any]:
        """Give JSON values that `from_dict` takes back."""
        return {"ids": list(self.ids), "names": list(self.names), "index": list(self.index), "num_logits": self.num_logits}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Classes":
        """Build from JSON values.

        Raises:
            DataError: A key is missing or the numbers contradict each other.
        """
        try:
            return cls(tuple(values["ids"]), tuple(values["names"]), tuple(values["index"]), int(values["num_logits"]))
        except (KeyError, TypeError) as error:
            raise DataError(f"classes need ids, names, index and num_logits; these have {sorted(values)} ({error})") from error

    def check_covers(self, other: "Classes", mine: str, theirs: str) -> None:
        """Refuse a head for data with other categories.

        Args:
            other: The data's.
            mine, theirs: Where each came from.

        Raises:
            DataError: The ids differ; some that only one side has are named.
        """
        if self.ids == other.ids:
            return
        names = dict(zip((*self.ids, *other.ids), (*self.names, *other.names), strict=True))
        only_mine = [f"{i} ({names[i]})" for i in self.ids if i not in other.ids][:4]
        only_theirs = [f"{i} ({names[i]})" for i in other.ids if i not in self.ids][:4]
        raise DataError(
            f"{mine} knows {len(self.ids)} categories, {theirs} has {len(other.ids)}; only the first has {', '.join(only_mine) or 'none'}, "
            f"only the second {', '.join(only_theirs) or 'none'}. Train a head on this data, or give data with the head's categories"
        )
