"""Webdataset shards: finding them, their index, what is wrong with them, their order, and the images and pairs read from them."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from encoders.image_data import ImageFolder, find_images
from encoders.pairs import ShardPairs
from encoders.shards import SKIP_HINT, ShardOrder, Shards, expand_braces, find_shards, load_index, scan, split_name
from mmkit.batches import Layout, StreamOrder, micro_batches
from mmkit.errors import DataError
from mmkit.images import ImageError, ImageSpec
from mmkit.records import read_jsonl

SPEC = ImageSpec(size=16)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "cache"))


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pair(number: int, caption: str | None = None) -> list[tuple[str, bytes]]:
    return [(f"{number:05d}.png", png(number)), (f"{number:05d}.txt", (caption or f"picture {number}").encode())]


def three_shards(folder: Path, samples: int = 5) -> list[Path]:
    return [
        write_tar(folder / f"{shard:04d}.tar", [m for number in range(samples) for m in pair(10 * shard + number)]) for shard in range(3)
    ]


# ---- names ---------------------------------------------------------------------------------------------------------------------------


def test_braces_are_written_out_with_their_zeros() -> None:
    assert expand_braces("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand_braces("{x,y}/{0..1}.tar") == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]
    with pytest.raises(DataError, match="runs backwards"):
        expand_braces("{9..1}.tar")


def test_a_folder_a_pattern_and_a_range_find_the_same_shards(tmp_path: Path) -> None:
    paths = three_shards(tmp_path / "s", 1)
    for names in (str(tmp_path / "s"), str(tmp_path / "s" / "*.tar"), str(tmp_path / "s" / "{0000..0002}.tar"), paths):
        assert find_shards(names) == paths
    with pytest.raises(DataError, match=r"0003\.tar: there is no such shard \(of .*\{0002\.\.0003\}"):
        find_shards(str(tmp_path / "s" / "{0002..0003}.tar"))
    with pytest.raises(DataError, match="must lie in a file system"):
        find_shards("s3://bucket/{0..9}.tar")


def test_keys_end_at_the_first_dot_of_the_file_name() -> None:
    assert split_name("v1.0/b.seg.PNG") == ("v1.0/b", "seg.png")
    assert split_name("000.jpg") == ("000", "jpg")


# ---- the index -----------------------------------------------------------------------------------------------------------------------


def test_the_index_finds_what_tarfile_reads(tmp_path: Path) -> None:
    long = "a/" + "x" * 150  # needs an extended header
    scattered = [("b.png", png(1)), (f"{long}.png", png(2)), ("b.txt", b"late"), ("README", b"no sample"), (f"{long}.txt", b"long")]
    path = write_tar(tmp_path / "s.tar", scattered)
    shards = Shards([path])
    assert [sample.key for sample in shards] == ["b", long]
    with tarfile.open(path) as tar:
        for sample in shards:
            for extension, name in sample.names.items():
                file = tar.extractfile(name)
                assert file is not None
                assert shards.read(sample, extension) == file.read()


def test_the_index_is_made_once_and_anew_when_the_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "s.tar", pair(1))
    first = load_index(path)
    monkeypatch.setattr("encoders.shards.scan", lambda shard: pytest.fail("made again"))
    again = load_index(path)
    assert again.sample(0) == first.sample(0)
    monkeypatch.undo()
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "cache"))
    write_tar(path, [*pair(1), *pair(2)])
    assert len(load_index(path)) == 2
    for kept in (tmp_path / "cache").rglob("*.safetensors"):
        kept.write_bytes(b"damaged")
    assert len(load_index(path)) == 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: b"", "it is empty: 0 bytes"),
        (lambda content: bytes(10_240), "it is empty: no sample"),
        (lambda content: b"this is no tar file" * 100, "cannot be read"),
        (lambda content: b"\x1f\x8b\x08" + content, r"compressed \(gzip\)"),
        (lambda content: content[: 512 * 9 + 100], r"cut off after .*member '00003\.txt'|member '00002\.txt'|member '0000\d\.png'"),
        (lambda content: content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512), "the end mark of a tar file is missing"),
        (lambda content: content + content, "more behind its end mark"),
    ],
    ids=["0 bytes", "zeros", "text", "gzip", "cut", "no end", "joined"],
)
def test_an_unsound_shard_is_named_or_skipped_and_listed(tmp_path: Path, spoil: object, words: str) -> None:
    good = write_tar(tmp_path / "good.tar", pair(9))
    bad = write_tar(tmp_path / "bad.tar", [member for number in range(4) for member in pair(number)])
    bad.write_bytes(spoil(bad.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=words) as caught:
        Shards([good, bad])
    assert "bad.tar" in str(caught.value)
    assert str(caught.value).endswith(SKIP_HINT)
    skipping = Shards([good, bad], on_bad="skip")
    assert list(skipping.bad) == [str(bad)]
    assert all(shards_sound(skipping))


def shards_sound(shards: Shards) -> list[bool]:
    return [len(shards.read(sample, extension)) == sample.members[extension][1] for sample in shards for extension in sample.members]


def test_a_damaged_header_does_not_drop_the_rest_in_silence(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [member for number in range(4) for member in pair(number)])
    content = bytearray(path.read_bytes())
    offset = scan(path).sample(2).members["png"][0] - 512
    content[offset : offset + 20] = b"\xff" * 20
    path.write_bytes(bytes(content))
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 4  # of 8: tarfile takes it for the end
    with pytest.raises(DataError, match=r"header after member '00001\.txt' is damaged"):
        Shards([path])
    skipping = Shards([path], on_bad="skip")
    assert [sample.key for sample in skipping] == ["00000", "00001"]
    assert "(2 whole samples of it are used)" in skipping.bad[str(path)]


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [*pair(1), *pair(1)])
    with pytest.raises(DataError, match=r"holds the member '00001\.png' twice"):
        Shards([path])


# ---- order ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 16])
def test_an_epoch_sees_every_sample_once_and_a_group_of_shards_at_a_time(group: int) -> None:
    ends = np.cumsum([3, 1, 4, 2, 5])
    order = ShardOrder(ends, seed=1, epoch=0, group=group)
    assert sorted(order) == list(range(15))
    shards = np.searchsorted(ends, list(order), side="right")
    begin = 0
    for number in range(0, 5, group):
        mine = order.shards[number : number + group]
        count = sum([3, 1, 4, 2, 5][shard] for shard in mine)
        assert set(shards[begin : begin + count]) == set(mine)
        begin += count
    assert list(order) == list(ShardOrder(ends, 1, 0, group))
    assert list(order) != list(ShardOrder(ends, 1, 1, group))
    assert order[3:6] == [order[3], order[4], order[5]]


# ---- images --------------------------------------------------------------------------------------------------------------------------


def test_shards_and_folder_give_the_same_crops(tmp_path: Path) -> None:
    three_shards(tmp_path / "s")
    for shard in range(3):
        for number in range(5):
            (tmp_path / "f").mkdir(exist_ok=True)
            (tmp_path / "f" / f"{10 * shard + number:05d}.png").write_bytes(png(10 * shard + number))
    folder, shards = ImageFolder(tmp_path / "f", SPEC, seed=3), ImageFolder(str(tmp_path / "s/{0000..0002}.tar"), SPEC, seed=3)
    assert len(folder) == len(shards) == 15
    for index in (0, 7, 14):
        assert torch.equal(folder.get(2, index)["pixels"], shards.get(2, index)["pixels"])  # type: ignore[index]
    assert not hasattr(folder, "order")
    with pytest.raises(DataError, match="some are folders of images, others shards"):
        find_images([tmp_path / "f", tmp_path / "s"])


def test_ranks_and_workers_change_nothing_for_shards(tmp_path: Path) -> None:
    three_shards(tmp_path / "s")
    dataset = ImageFolder(tmp_path / "s", SPEC)

    def pixels(ranks: int, workers: int) -> torch.Tensor:
        found = []
        for rank in range(ranks):
            layout = Layout(8 // ranks, 1, ranks, rank)
            batches = micro_batches(dataset, lambda items: torch.stack([item["pixels"] for item in items]),
                                    StreamOrder(dataset, 0), layout, 0, 3, workers)  # fmt: skip
            found.append([micro.batch for micro in batches])
        return torch.cat([batch for step in zip(*found, strict=True) for batch in step])

    alone = pixels(1, 0)
    assert len(alone) == 24
    assert torch.equal(alone, pixels(2, 0))
    assert torch.equal(alone, pixels(1, 2))
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).get(0, 3)["pixels"], dataset.get(0, 3)["pixels"])  # type: ignore[index]


def test_a_bad_member_and_a_sample_without_image_are_named_or_listed(tmp_path: Path) -> None:
    broken = [("00007.png", png(7)[:200]), ("00007.txt", b"cut"), ("00008.txt", b"alone")]
    shard = write_tar(tmp_path / "s" / "a.tar", [*pair(1), *broken, *pair(2)])
    (tmp_path / "s" / "b.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.tar: it is empty"):
        ImageFolder(tmp_path / "s", SPEC)
    strict = ImageFolder(shard, SPEC)
    with pytest.raises(ImageError, match=rf"member '00007\.png' of {shard}\) is truncated or damaged"):
        strict.get(0, 1)
    with pytest.raises(DataError, match=rf"sample '00008' of {shard} has no image .*its members: 00008\.txt"):
        strict.get(0, 2)
    skipping = ImageFolder(tmp_path / "s", SPEC, on_bad_sample="skip", bad_list=tmp_path / "bad.jsonl")
    items = [skipping.get(epoch, index) for epoch in range(2) for index in range(4)]
    assert [item is None for item in items] == [False, True, True, False] * 2
    assert sorted(skipping.bad_images()) == [f"{shard}/00007", f"{shard}/00008", str(tmp_path / "s" / "b.tar")]
    assert len(read_jsonl(tmp_path / "bad.jsonl")) == 3


def test_an_empty_class_folder_does_not_matter_where_there_are_no_labels(tmp_path: Path) -> None:
    (tmp_path / "images" / "empty class").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no image"):
        ImageFolder(tmp_path / "images", SPEC)
    (tmp_path / "images" / "full class").mkdir()
    (tmp_path / "images" / "full class" / "a.png").write_bytes(png(0))
    assert len(ImageFolder(tmp_path / "images", SPEC)) == 1


def test_odd_pictures_pass_through_the_data_set_and_a_bomb_is_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "f").mkdir()
    Image.new("RGB", (20_000, 1), (9, 9, 9)).save(tmp_path / "f" / "a.png")
    Image.new("RGB", (1, 20_000), (9, 9, 9)).save(tmp_path / "f" / "b.jpg")
    noise.convert("P").save(tmp_path / "f" / "c.gif")
    noise.convert("CMYK").save(tmp_path / "f" / "d.jpg")
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "f" / "e.png")
    noise.save(tmp_path / "f" / "f.jpg", exif=turned)
    dataset = ImageFolder(tmp_path / "f", SPEC)
    for index in range(6):
        item = dataset.get(0, index)
        assert item is not None
        assert tuple(item["pixels"].shape) == (3, 16, 16), dataset.paths[index]
    Image.new("1", (20_000, 20_000)).save(tmp_path / "f" / "g.png")  # 50 kB, 400 million pixels
    with pytest.raises(ImageError, match=r"g\.png.*too many pixels"):
        ImageFolder(tmp_path / "f", SPEC).get(0, 6)


# ---- pairs ---------------------------------------------------------------------------------------------------------------------------


def test_pairs_have_their_own_captions(tmp_path: Path) -> None:
    members = [*pair(1, " a cat \n"), ("00002.png", png(2)), ("00002.json", json.dumps({"caption": ["x", "y"]}).encode())]
    pairs = ShardPairs(Shards([write_tar(tmp_path / "s.tar", members)]), SPEC, seed=0)
    assert pairs.caption(0, 0) == "a cat"
    assert [pairs.caption(epoch, 1) for epoch in range(3)] == ["y", "x", "y"]
    image, caption = pairs.get(0, 1)
    assert (image.dtype, tuple(image.shape), caption) == (torch.uint8, (3, 16, 16), "y")
    assert torch.equal(image, pairs.get(0, 1)[0])
    assert not torch.equal(image, pairs.get(1, 1)[0])


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (None, r"sample '00007' of .*s\.tar has no caption \(txt, json\); its members: 00007\.png"),
        (("00007.txt", b"  \n"), r"member '00007\.txt' of .*s\.tar: the caption is empty"),
        (("00007.txt", b"\xff\xfe\x00"), r"member '00007\.txt' of .*s\.tar is no UTF-8 text"),
        (("00007.json", b"{"), r"member '00007\.json' of .*s\.tar is no valid JSON"),
        (("00007.json", b'{"url": "x"}'), r"member '00007\.json' of .*s\.tar: 'caption' \(text, or a list of texts\) was expected"),
    ],
    ids=["none", "empty", "no text", "no JSON", "no caption"],
)
def test_a_sample_without_a_caption_is_named_or_replaced_and_listed(tmp_path: Path, member: tuple[str, bytes] | None, words: str) -> None:
    members = [("00007.png", png(7)), *([member] if member else []), *pair(1)]
    shards = Shards([write_tar(tmp_path / "s.tar", members)])
    with pytest.raises(DataError, match=words):
        ShardPairs(shards, SPEC, seed=0).get(0, 0)
    skipping = ShardPairs(shards, SPEC, seed=0, on_bad_sample="skip", bad_list=tmp_path / "bad.jsonl")
    assert [skipping.get(epoch, 0)[1] for epoch in range(2)] == ["picture 1"] * 2
    assert list(skipping.bad_samples()) == [f"{tmp_path / 's.tar'}/00007"]
    assert len(read_jsonl(tmp_path / "bad.jsonl")) == 1


def test_open_files_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_tar(tmp_path / f"{number}.tar", pair(number)) for number in range(6)]
    shards = Shards(paths)
    shards._files.most = 2
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(2):
        for sample in shards:
            assert shards.read(sample, "txt").startswith(b"picture")
    assert len(shards._files.values) == 2
    assert before is None or len(os.listdir("/proc/self/fd")) <= before + 2
