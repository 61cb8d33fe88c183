"""`mmkit data check`: every kind of bad row is named, the good ones come out as they went in, and its figures are those of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llava_tiny import tiny_llm, write_parts
from PIL import Image

from apps.cli import main as mmkit
from llm_stage.chat_format import ChatFormat
from llm_stage.check_data import main, row_texts
from llm_stage.conversations import ConversationDataset, collate
from llm_stage.llava import with_dummy_row
from llm_stage.llms import load_llm
from llm_stage.packing import packed_batch, real_tokens
from llm_stage.preflight import Lengths, llm_sizes, memory, padding
from llm_stage.rows import read_rows
from mmkit.batches import Layout, StreamOrder
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec

TOKENS = 16


def row(name: str, *texts: str, image: Any = None) -> dict[str, Any]:
    turns = [{"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts, pictures of every sort, and rows of which some are bad."""
    folder = tmp_path_factory.mktemp("check")
    write_parts(folder)
    images = folder / "images"
    images.mkdir()
    for index in range(8):
        Image.effect_noise((40 + index, 30), 40).convert("RGB").save(images / f"{index}.png")
    Image.effect_noise((64, 64), 50).convert("RGB").save(images / "whole.jpg")
    (images / "cut.jpg").write_bytes((images / "whole.jpg").read_bytes()[:900])
    (images / "cut.png").write_bytes((images / "0.png").read_bytes()[:300])
    (images / "text.jpg").write_text("this is not a picture")
    Image.new("P", (20, 20)).save(images / "really_a_gif.jpg", format="GIF")
    write(folder / "data.json", GOOD + BAD)
    return folder


GOOD = [row(f"good{i}", "<image>\nwhat colour is it", "it is red " * (i % 5 + 1), image=f"{i % 8}.png") for i in range(12)]
GOOD += [row(f"text{i}", "say red", "red " * (1 + 3 * i), "and again", "green") for i in range(5)]
GOOD += [row("good0", "what", "that"), row("twice", "what", "that"), row("gif", "<image>", "it is white", image="really_a_gif.jpg")]
BAD = [
    row("gone", "<image>", "a", image="gone.png"),
    row("cut", "<image>", "a", image="cut.jpg"),
    row("cut2", "<image>", "a", image="cut.png"),
    row("nopicture", "<image>", "a", image="text.jpg"),
    row("blind", "what", "a", image="0.png"),
    row("unanswered", "what"),
    row("empty", "what", "  "),
    row("endless", "what", "red " * 300),
    {"id": "formless"},
    "no object",
    {"id": "speaker", "conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]},
]
REASONS = ["image missing", "image unreadable", "image unreadable", "image unreadable", "image marks", "roles", "empty answers", "too long",
           "form", "form", "roles"]  # fmt: skip


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def arguments(world: Path, *more: str, file: str = "data.json") -> list[str]:
    parts = ["--images", str(world / "images"), "--llm", str(world / "llm"), "--encoder", str(world / "encoder"), "--max_length", "256"]
    return [str(world / file), *parts, "--micro_batch_size", "4", "--global_batch_size", "8", "--lora_rank", "4", *more]


def test_every_bad_row_is_named_with_its_reason_and_the_others_are_written_as_they_were(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = ["--report", str(tmp_path / "report.json"), "--clean", str(tmp_path / "good.json")]
    assert mmkit(["data", "check", *arguments(world, *outs)]) == 2
    shown = capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [entry["reason"] for entry in report["bad"]] == REASONS
    assert [entry["row"] for entry in report["bad"]] == list(range(len(GOOD), len(GOOD) + len(BAD)))
    for entry in report["bad"]:
        assert f"data.json, row {entry['row']}" in entry["message"]
        assert f"[{entry['reason']}] {entry['message']}" in shown.out
    assert f"11 of {len(GOOD) + 11} rows" in shown.err
    assert "good.json" in shown.err
    assert read_rows(tmp_path / "good.json") == GOOD
    assert row_texts(tmp_path / "good.json")[0] == row_texts(world / "data.json")[0][: len(GOOD)]
    assert (report["image_rows"], report["text_rows"], report["images"], report["rounds"]) == (13, 7, 13, 25)
    assert report["duplicate_ids"] == {"good0": 2}
    assert report["identical_rows"] == 1
    assert "really_a_gif.jpg is a GIF by its content" in shown.out
    assert mmkit(["data", "check", *arguments(tmp_path, file="good.json"), "--images", str(world / "images"), "--llm", str(world / "llm"),
                  "--encoder", str(world / "encoder")]) == 0  # fmt: skip


def test_strict_makes_a_gif_named_jpg_a_bad_row(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(world / "gif.json", GOOD[-1:])
    assert main([str(world / "gif.json"), "--images", str(world / "images"), "--decode"]) == world / "gif.json"
    with pytest.raises(DataError, match="1 of 1 rows"):
        main([str(world / "gif.json"), "--images", str(world / "images"), "--strict"])
    assert "[image format]" in capsys.readouterr().out


def test_its_figures_are_those_of_the_training(world: Path, tmp_path: Path) -> None:
    """Tokens, labels, padding: against the batches that a training makes of the same rows in the same order."""
    write(world / "good.json", GOOD)
    main([*arguments(world, file="good.json"), "--report", str(tmp_path / "report.json"), "--pack_length", "100"])
    report = json.loads((tmp_path / "report.json").read_text())
    (_, tokenizer), spec = load_llm(str(world / "llm")), ImageSpec(size=32)
    data = ConversationDataset(world / "good.json", world / "images", ChatFormat(tokenizer), spec, TOKENS, 256)
    items = [data[index] for index in range(len(data))]
    assert report["tokens"]["per_image"] == TOKENS
    assert report["tokens"]["total"] == sum(len(item["input_ids"]) for item in items)
    assert report["tokens"]["supervised"] == sum(label != -100 for item in items for label in item["labels"])
    assert sum(report["tokens"]["histogram"].values()) == len(items)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = type("Config", (), {"image_token_id": image, "image_seq_length": TOKENS})
    layout = Layout(4, 2, 1, 0)
    for name, options in (
        ("as it comes", {}),
        ("run.group_by_length 8", {"group": 8}),
        ("run.group_by_modality and length", {"group": 8, "by_modality": True}),
        ("data.pack into 100", {}),
    ):
        order = StreamOrder(data, 0, global_batch_size=8, **options)
        useful = computed = 0
        for begin in range(0, 16, layout.micro):
            chosen = [items[order(place)[1]] for place in range(begin, begin + 4)]
            if "pack" in name:
                batch = packed_batch(chosen, 0, image, TOKENS, 32, 100)
            else:
                batch = with_dummy_row(collate(chosen, 0), config, 32, 0)
            useful += sum(len(item["input_ids"]) for item in chosen)
            computed += batch["input_ids"].numel()
            assert real_tokens(batch) <= computed
        assert report["padding"][name] == pytest.approx(1 - useful / computed), name
    assert report["steps"] == 3  # 20 rows in steps of 8
    assert report["padding"]["data.pack into 100"] < report["padding"]["as it comes"]


def test_memory_is_counted_from_configs_alone(world: Path) -> None:
    llm, _ = tiny_llm()
    sizes = llm_sizes(str(world / "llm"))
    assert sizes.llm == sum(parameter.numel() for parameter in llm.parameters())
    assert (sizes.hidden, sizes.vocabulary) == (48, llm.config.vocab_size)
    per_layer = 2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 96)  # q o, k v of two heads, gate up down
    assert sizes.lora_rank_1 == 2 * per_layer
    sizes.tower, sizes.projector, sizes.llm = 300, 20, 6000
    found = memory(sizes, lora_rank=1, ranks=4)
    assert found["stage 1"]["one process"] == 2 * 6300 + 16 * 20
    assert found["stage 2, full"]["ZeRO-2 on 4"] == 2 * 300 + 6020 * 2 + 6020 * 14 / 4
    assert found["stage 2, full"]["ZeRO-3 on 4"] == (2 * 300 + 16 * 6020) / 4
    assert found["stage 2, LoRA rank 1"]["one process"] == 2 * 6300 + 16 * (20 + sizes.lora_rank_1)


def test_padding_of_rows_of_one_length_is_none_but_for_the_image_that_text_gets() -> None:
    rows = Lengths([10] * 8, [True] * 8, [10] * 8)
    assert padding(rows, Layout(4, 1, 1, 0), 6) == (0, 80)
    assert padding(Lengths([10] * 8, [False] * 8, [10] * 8), Layout(4, 1, 1, 0), 6) == (1 - 80 / 100, 100)
    assert padding(Lengths([10] * 8, [False] * 8, [10] * 8), Layout(4, 1, 1, 0), 5, budget=45) == (1 - 80 / 90, 90)


def test_show_prints_a_row_with_what_is_learned(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(world / "data.json"), "--llm", str(world / "llm"), "--tokens_per_image", "3", "--show", "1"])
    shown = capsys.readouterr().out
    assert "data.json, row 1 (id 'good1')" in shown
    assert "<image>x3\nwhat colour is it" in shown
    assert "【it is red it is red <|im_end|>】" in shown
    with pytest.raises(DataError, match="there is no row 99"):
        main([str(world / "data.json"), "--llm", str(world / "llm"), "--show", "99"])
    with pytest.raises(ConfigError, match="--show needs a tokenizer"):
        main([str(world / "data.json"), "--show", "0"])


def test_workers_find_what_one_process_finds(world: Path, tmp_path: Path) -> None:
    for workers in ("0", "2"):
        with pytest.raises(DataError):
            main([*arguments(world), "--num_workers", workers, "--report", str(tmp_path / f"{workers}.json")])
    assert (tmp_path / "0.json").read_text() == (tmp_path / "2.json").read_text()


def test_without_a_tokenizer_the_rest_is_checked(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="6 of 31 rows"):  # no pictures, no tokens
        main([str(world / "data.json"), "--list", "2"])
    shown = capsys.readouterr().out
    assert "with --llm NAME_OR_FOLDER" in shown
    assert "... and 4 more" in shown


LINE = '{"id": "a",  "conversations":[{"from":"human","value":"\\u00e9 \u2028 é"},{"value":"1e2","from":"gpt"}], "n": 1.50}'


@pytest.mark.parametrize("form", ['\ufeff[ {0},\r\n\t"bad" ,{0}\n ]\n', "{0}\r\nnull\n\n{0}"], ids=["list", "lines"])
def test_good_rows_keep_their_very_characters(tmp_path: Path, form: str) -> None:
    path, out = tmp_path / "in.json", tmp_path / "out.json"
    path.write_bytes(form.replace("{0}", LINE).encode())
    with pytest.raises(DataError, match=r"1 of 3 rows.*train on .*out\.json"):
        main([str(path), "--clean", str(out)])
    assert out.read_bytes().decode() == (f"[\n{LINE},\n{LINE}\n]\n" if "[" in form else f"{LINE}\n{LINE}\n")
    assert main([str(out)]) == out


def test_nothing_is_written_over_and_nothing_is_left_half(tmp_path: Path) -> None:
    path = write(tmp_path / "in.json", ["bad"])
    with pytest.raises(DataError, match="not one of the 1 rows"):
        main([str(path), "--clean", str(tmp_path / "out.json")])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.json"]
    with pytest.raises(ConfigError, match="is the file that is checked"):
        main([str(path), "--clean", str(path), "--overwrite"])
    (tmp_path / "there.json").write_text("precious")
    with pytest.raises(ConfigError, match=r"there\.json exists"):
        main([str(path), "--report", str(tmp_path / "there.json")])
    assert (tmp_path / "there.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max_length", "0"], "--max_length is 0; 1 or more"),
        (["--pack_length", "-1"], "--pack_length is -1; 0 or more"),
        (["--images", "nowhere"], "--images nowhere is no folder"),
        (["--llm", "mini-lm"], "mini-llm"),
    ],
)
def test_flags_that_mean_nothing_are_named(world: Path, flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmkit(["data", "check", str(world / "data.json"), *flags]) == 2
    assert expected in capsys.readouterr().err
