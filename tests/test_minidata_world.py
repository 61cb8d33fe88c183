"""Drawings, names and scenes of the embedded world."""

import re
from dataclasses import replace
from pathlib import Path

import emoji
import numpy as np
import pytest

from mmkit.errors import NameNotFound
from mmkit.minidata import drawings, names, world
from mmkit.minidata.scene import Scene, relation

TRAINED = names.object_names("trained")


def scenes(count: int, n_objects: int | None = None, word_probability: float = 0.3) -> list[Scene]:
    return [world.sample_scene(np.random.default_rng((5, index)), TRAINED, n_objects, word_probability) for index in range(count)]


def test_names_are_unicodes_own_in_lower_case() -> None:
    for row in names.table().values():
        symbol = "".join(chr(int(code, 16)) for code in row.file.split("-"))
        entry = emoji.EMOJI_DATA.get(symbol) or emoji.EMOJI_DATA[symbol + "\N{VARIATION SELECTOR-16}"]
        known = [
            word.strip(":").replace("_", " ").lower().replace("’", "'").replace("ñ", "n") for word in [entry["en"], *entry.get("alias", [])]
        ]
        shortened = set(row.name.split()) <= {word for name in known for word in name.split()}
        assert row.name in known or shortened, (row.name, known)
        assert re.fullmatch(r"[a-z0-9' -]+", row.name), row.name


def test_the_splits_of_drawings_share_no_name_and_no_file() -> None:
    unseen = names.object_names("unseen")
    assert not set(TRAINED) & set(unseen)
    files = {split: {names.lookup(name).file for name in names.object_names(split)} for split in ("trained", "unseen")}
    assert not files["trained"] & files["unseen"]
    assert len(TRAINED) >= 550
    assert len(unseen) >= 55


def test_no_two_drawings_look_the_same() -> None:
    pixels = drawings.all_drawings(drawings.MASTER_SIZE)[:, ::8, ::8].reshape(len(names.table()), -1).astype(np.float32)
    squared = (pixels**2).sum(1)
    distance = squared[:, None] + squared[None] - 2 * pixels @ pixels.T
    np.fill_diagonal(distance, np.inf)
    first, second = np.unravel_index(distance.argmin(), distance.shape)
    per_value = np.sqrt(distance.min() / pixels.shape[1])
    order = list(names.table())
    assert per_value > 8, f"{order[first]} and {order[second]} differ by {per_value:.1f} of 255"


def test_the_side_tables_name_only_drawings_that_exist() -> None:
    for group in names.confusable_groups():
        for name in group:
            names.lookup(name)
    for name in names._synonym_table():
        names.lookup(name)


def test_plurals_and_articles() -> None:
    plurals = {"cat": "cats", "mouse": "mice", "wolf": "wolves", "butterfly": "butterflies", "pot of food": "pots of food"}
    plurals |= {"cup with straw": "cups with straw", "takeout box": "takeout boxes", "t-rex": "t-rexes", "bread": "bread"}
    assert {name: names.plural(name) for name in plurals} == plurals
    phrases = ["an owl", "a unicorn", "an hourglass", "a ewe", "some bread", "some grapes"]
    assert [names.with_article(phrase.split()[1]) for phrase in phrases] == phrases


def test_a_misspelt_drawing_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(NameNotFound, match=r"girafe.*giraffe"):
        drawings.drawing("girafe")


def test_absent_names_are_beyond_dispute() -> None:
    absent = names.absent_names(["penguin", "poodle"], [*TRAINED, *names.object_names("unseen")])
    assert not {"penguin", "bird", "dog", "poodle"} & set(absent)
    assert "guitar" in absent


def test_the_cache_gives_the_same_pixels_as_drawing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = drawings.drawing("cat", 96)
    assert np.array_equal(kept, drawings.rasterise("cat", 96))
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path))
    drawings.all_drawings.cache_clear()
    first = np.array(drawings.all_drawings(24))
    (file,) = tmp_path.iterdir()
    drawings.all_drawings.cache_clear()
    assert np.array_equal(first, drawings.all_drawings(24))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])  # cut short by a crash: drawn again
    drawings.all_drawings.cache_clear()
    assert np.array_equal(first, drawings.all_drawings(24))
    assert file.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    drawings.all_drawings.cache_clear()


def test_scenes_come_with_the_number_of_objects_asked_for() -> None:
    for count in range(6):
        for scene in scenes(20, count, 1.0 if count == 0 else 0.2):
            assert len(scene.objects) == count
            assert render_shape(scene) == (96, 96, 3)


def render_shape(scene: Scene) -> tuple[int, ...]:
    pixels = world.render(scene)
    assert pixels.dtype == np.uint8
    return pixels.shape


def test_masks_are_what_one_sees_of_each_object() -> None:
    """Paint the objects on black and on white: where the two pictures differ little, an object is what one sees."""
    for scene in scenes(60):
        bare = replace(scene, word=None, split="plain")
        dark = world.render(replace(bare, tones=((0, 0, 0),))).astype(float)
        bright = world.render(replace(bare, tones=((255, 255, 255),))).astype(float)
        alpha = 1 - (bright - dark).mean(2) / 255
        union = np.zeros((96, 96), dtype=bool)
        for item in scene.objects:
            assert not (union & item.mask).any()  # no pixel belongs to two objects
            union |= item.mask
        assert alpha[union].min(initial=1) > 0.49  # half transparent at least, up to rounding of 8-bit blending
        if len(scene.objects) == 1:
            assert np.array_equal(union, alpha > 0.5)


def test_boxes_are_tight_around_the_masks() -> None:
    for scene in scenes(40):
        for item in scene.objects:
            rows, columns = np.nonzero(item.mask)
            assert item.box == (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)


def test_single_objects_are_between_two_fifths_of_the_canvas_and_nearly_all_of_it() -> None:
    sides = np.array([max(scene.objects[0].box[2:]) for scene in scenes(200, 1, 0.0)])
    assert sides.min() >= 0.33 * 96  # the drawn range begins at 0.40; a turn and the cut to opaque pixels take a little
    assert sides.max() <= 96
    assert sides.std() > 8


def test_words_are_written_inside_the_canvas_and_off_the_objects() -> None:
    for scene in scenes(60, 2, 1.0):
        assert scene.word is not None
        x, y, width, height = scene.word.box
        assert x >= 0
        assert y >= 0
        assert x + width <= 96
        assert y + height <= 96
        changed = (world.render(scene) != world.render(replace(scene, word=None))).any(2)
        rows, columns = np.nonzero(changed)
        assert columns.min() >= x - 1
        assert columns.max() <= x + width
        assert rows.min() >= y - 1
        assert rows.max() <= y + height
        assert not any(item.mask[y : y + height, x : x + width].any() for item in scene.objects)


def test_clear_relations_are_mirrored_and_agree_with_the_masks() -> None:
    seen = set()
    for scene in scenes(150, 3, 0.0):
        for first in scene.objects:
            for second in scene.objects:
                side = relation(first, second, 96) if first is not second else None
                if side is None:
                    continue
                seen.add(side)
                (y1, x1), (y2, x2) = (np.argwhere(item.mask).mean(0) for item in (first, second))
                assert {"left": x1 < x2, "right": x1 > x2, "above": y1 < y2, "below": y1 > y2}[side]
                assert relation(second, first, 96) == {"left": "right", "right": "left", "above": "below", "below": "above"}[side]
    assert seen == {"left", "right", "above", "below"}


def test_pairs_are_the_same_whenever_and_in_whatever_order_they_are_asked_for() -> None:
    forward = world.pairs(3, 40)
    backward = world.pairs(3, 40)
    first = [forward.get(2, index) for index in range(40)]
    again = [backward.get(2, index) for index in reversed(range(40))][::-1]
    for (pixels, text), (same_pixels, same_text) in zip(first, again, strict=True):
        assert np.array_equal(pixels, same_pixels)
        assert text == same_text
    assert any(text != forward.get(3, index)[1] for index, (_, text) in enumerate(first))
    assert any(text != world.pairs(4, 40).get(2, index)[1] for index, (_, text) in enumerate(first))


def test_pairs_never_show_an_unseen_drawing() -> None:
    dataset = world.pairs(0, 500)
    shown = {name for index in range(500) for name in dataset.scene(0, index)[0].names}
    assert not shown & set(names.object_names("unseen"))


@pytest.mark.parametrize(("n_objects", "pool"), [(6, TRAINED), (3, ["cat", "dog"]), (0, TRAINED)])
def test_impossible_scenes_are_refused(n_objects: int, pool: list[str]) -> None:
    with pytest.raises(ValueError, match="objects"):
        world.sample_scene(np.random.default_rng(0), pool, n_objects)
