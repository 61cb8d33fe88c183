"""Contrastive training: the loss and its negatives over ranks, the pairs, the tokenizer, the trainer through its front door."""

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

import encoders
from encoders.clip_models import MINI_CLIP_CONFIG, OWN_TOKENIZER, build_clip, export_clip
from encoders.contrastive import contrastive_loss
from encoders.pairs import CaptionedImages, DrawnPairs, held_out_drawings, read_pairs
from encoders.text import END_ID, MINI_CLIP, word_tokenizer
from encoders.train_contrastive import RECIPES, ContrastiveConfig, main
from mmkit.config import load_config
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.images import ImageError, ImageSpec
from mmkit.records import read_jsonl

GOLDEN = Path(__file__).parent / "golden" / "uta"
TINY = ["--recipe", "mini_clip", "--steps", "4", "--micro_batch_size", "8", "--data.length", "64", "--eval_views", "1", "--eval_every", "0",
        "--export_every", "0", "--save_every", "2", "--log_every", "1", "--text_tower", ""]  # fmt: skip


def unit(rows: int, width: int = 16) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=-1)


def distinct(rows: int) -> Tensor:
    return torch.arange(rows)[:, None].expand(-1, 4).contiguous()


# ---- the loss ------------------------------------------------------------------------------------------------------------------------


def test_loss_and_gradients_equal_the_golden_ones() -> None:
    golden = load_file(GOLDEN / "loss_io.safetensors")
    expected = json.loads((GOLDEN / "config_expected.json").read_text())["expected"]["clip_loss_t001"]
    images, texts = (golden[f"clip.{name}_features"].clone().requires_grad_() for name in ("image", "text"))
    loss, terms = contrastive_loss(images, texts, torch.tensor(100.0), distinct(8))
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert loss.item() == pytest.approx((terms["image_to_text"].item() + terms["text_to_image"].item()) / 2, abs=1e-6)
    torch.testing.assert_close(images.grad, golden["clip.grad_image"], atol=2e-5, rtol=0)
    torch.testing.assert_close(texts.grad, golden["clip.grad_text"], atol=2e-5, rtol=0)


def test_distinct_captions_give_open_clips_own_loss() -> None:
    images, texts = unit(6), unit(6)
    mine, _ = contrastive_loss(images, texts, torch.tensor(20.0), distinct(6))
    torch.testing.assert_close(mine, open_clip.ClipLoss()(images, texts, torch.tensor(20.0)))


def test_equal_captions_are_not_each_others_negatives() -> None:
    images, texts, captions = unit(5), unit(5), distinct(5)
    captions[3] = captions[1]
    texts[3] = texts[1]
    _, terms = contrastive_loss(images, texts, torch.tensor(20.0), captions)
    logits = 20 * images @ texts.T
    rows = []
    for row in range(5):
        others = [column for column in range(5) if column == row or {row, column} != {1, 3}]
        rows.append(torch.logsumexp(logits[row, others], 0) - logits[row, row])
    torch.testing.assert_close(terms["image_to_text"], torch.stack(rows).mean())


def test_a_batch_of_one_caption_has_nothing_to_tell_apart() -> None:
    loss, _ = contrastive_loss(unit(4), unit(1).expand(4, -1), torch.tensor(20.0), torch.ones(4, 4, dtype=torch.long))
    assert float(loss) == 0.0


def _one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = torch.load(f"{folder}/data.pt", weights_only=True)
    half = slice(4 * rank, 4 * rank + 4)
    weight = data["weight"].clone().requires_grad_()
    images, texts = (F.normalize(data[name][half] @ weight, dim=-1) for name in ("images", "texts"))
    loss, _ = contrastive_loss(images, texts, torch.tensor(10.0), data["captions"][half])
    loss.backward()
    assert weight.grad is not None
    both = torch.cat([loss.detach().reshape(1), weight.grad.flatten()])
    dist.all_reduce(both)  # what DDP does: the mean over ranks
    torch.save(both / 2, f"{folder}/out{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_in_loss_and_gradient(tmp_path: Path) -> None:
    captions = distinct(8)
    captions[6] = captions[1]  # a double across the ranks
    data = {"images": torch.randn(8, 12), "texts": torch.randn(8, 12), "weight": torch.randn(12, 6), "captions": captions}
    torch.save(data, tmp_path / "data.pt")
    context = multiprocessing.get_context("spawn")  # autograd, used by the tests before, forbids fork
    children = [context.Process(target=_one_of_two, args=(rank, str(tmp_path))) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
    assert [child.exitcode for child in children] == [0, 0]
    weight = data["weight"].clone().requires_grad_()
    images, texts = (F.normalize(data[name] @ weight, dim=-1) for name in ("images", "texts"))
    loss, _ = contrastive_loss(images, texts, torch.tensor(10.0), captions)
    loss.backward()
    assert weight.grad is not None
    found = torch.load(tmp_path / "out0.pt", weights_only=True)
    torch.testing.assert_close(found[0], loss.detach())
    torch.testing.assert_close(found[1:].view(12, 6), weight.grad, atol=1e-6, rtol=1e-4)  # float32, sums in another order


def small_config(layers: int, image_size: int = 32) -> dict[str, Any]:
    vision = {"image_size": image_size, "layers": layers, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1, "pool_type": "eos", "eos_id": END_ID}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**text, "hf_tokenizer_name": OWN_TOKENIZER}}


# ---- tokenizer, models ---------------------------------------------------------------------------------------------------------------


def test_own_tokenizer_keeps_known_words_whole_and_spells_others() -> None:
    tokenizer = word_tokenizer(["a cat on a red background", "an aubergine"] * 20, 200)
    assert tokenizer.tokenize("A Cat") == ["a", "cat"]
    assert len(tokenizer.tokenize("cta")) > 1
    assert tokenizer.unk_token_id not in tokenizer("cta").input_ids
    assert tokenizer("a cat").input_ids[-1] == END_ID
    # features are read at the end: it must survive truncation
    assert tokenizer("a cat " * 30, max_length=6, truncation=True).input_ids[-1] == END_ID


def test_an_exported_model_is_an_open_clip_folder(tmp_path: Path) -> None:
    parts = build_clip("mini-clip-new", lambda: ["a cat", "two dogs"], tmp_path / "none")
    (tmp_path / "clip").mkdir()
    export_clip(tmp_path / "clip", parts, {"templates": "mini"}, half=False)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")
    texts, images = ["a cat", "two dogs"], torch.randn(2, 3, 96, 96)
    assert torch.equal(tokenizer(texts), parts.tokenizer(texts))
    for module in (model, parts.model):
        module.eval()
    torch.testing.assert_close(model.encode_image(images), parts.model.encode_image(images), atol=0, rtol=0)
    torch.testing.assert_close(model.encode_text(tokenizer(texts)), parts.model.encode_text(parts.tokenizer(texts)), atol=0, rtol=0)
    assert transform(Image.new("RGB", (200, 100))).shape == (3, 96, 96)


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(NameNotFound, match="ViT-B-16"):
        build_clip("ViT-B-17", lambda: [], Path("none"))


def test_the_small_config_stays_as_shipped() -> None:
    shipped = json.loads((MINI_CLIP / "open_clip_config.json").read_text())["model_cfg"]
    wanted = json.loads(json.dumps(MINI_CLIP_CONFIG))
    wanted["text_cfg"]["vocab_size"] = shipped["text_cfg"]["vocab_size"]  # as large as the captions made it
    assert shipped == wanted


# ---- pairs ---------------------------------------------------------------------------------------------------------------------------


def test_drawn_pairs_depend_on_seed_epoch_and_index_alone() -> None:
    first, again, other = DrawnPairs(1, 50), DrawnPairs(1, 50), DrawnPairs(2, 50)
    image, caption = first.get(3, 7)
    first.get(0, 1)
    assert torch.equal(image, again.get(3, 7)[0])
    assert caption == again.get(3, 7)[1] == again.caption(3, 7)
    assert not torch.equal(image, other.get(3, 7)[0])
    assert not torch.equal(image, first.get(4, 7)[0])


def test_plain_share_decides_how_many_captions_are_names_alone() -> None:
    from mmkit.minidata import names

    plain = {names.with_article(name) for name in names.object_names()}
    counts = [sum(DrawnPairs(0, 200, 1.0, share).caption(0, index) in plain for index in range(200)) for share in (0.0, 1.0)]
    assert counts[0] < 150 < 180 < counts[1]


def _image(path: Path, colour: tuple[int, int, int] = (200, 30, 30)) -> None:
    Image.new("RGB", (40, 30), colour).save(path)


def test_coco_list_and_folder_give_the_same_pairs(tmp_path: Path) -> None:
    for number in range(2):
        _image(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"picture {number}\n")
    coco = {"images": [{"id": 5, "file_name": "0.png"}, {"id": 6, "file_name": "1.png"}],
            "annotations": [{"image_id": 6, "caption": "picture 1"}, {"image_id": 5, "caption": "picture 0"}]}  # fmt: skip
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    rows = [{"image": f"{number}.png", "caption": f"picture {number}"} for number in range(2)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = [read_pairs(str(tmp_path / name)) for name in ("coco.json", "list.json", "list.jsonl", ".")]
    assert read[0] == read[1] == read[2] == [(tmp_path / f"{n}.png", (f"picture {n}",)) for n in range(2)]
    assert [captions for _, captions in read[3]] == [captions for _, captions in read[0]]


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "no valid JSON"),
        ("7", "was expected, not a int"),
        ('[{"image": "a.png"}]', "record 0"),
        ('[{"image": "a.png", "caption": "x"}, {"caption": "x"}]', "record 1"),
        ('{"images": []}', "annotations"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]}', "image 0"),
        ('{"images": [], "annotations": [{"image_id": 1}]}', "annotation 0"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', "none of its 1 images"),
    ],
)
def test_bad_pair_files_name_the_record(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint) as caught:
        read_pairs(str(path))
    assert "pairs.json" in str(caught.value)


def test_an_unreadable_image_stops_or_is_listed(tmp_path: Path) -> None:
    _image(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_text("no picture")
    records = [(tmp_path / "bad.jpg", ("bad",)), (tmp_path / "good.png", ("good",))]
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        CaptionedImages(records, ImageSpec(32), 0).get(0, 0)
    skipping = CaptionedImages(records, ImageSpec(32), 0, on_bad_sample="skip")
    assert skipping.get(0, 0)[1] == "good"
    assert list(skipping.bad) == [str(tmp_path / "bad.jpg")]


def test_crops_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    pairs = CaptionedImages([(tmp_path / "a.png", ("x", "y"))], ImageSpec(32), 3)
    first = pairs.get(0, 0)[0]
    torch.manual_seed(99)
    assert torch.equal(first, pairs.get(0, 0)[0])
    assert not torch.equal(first, pairs.get(1, 0)[0])
    assert [pairs.caption(epoch, 0) for epoch in range(3)] == ["x", "y", "x"]


# ---- the trainer ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return main([*TINY, "--output_dir", str(tmp_path_factory.mktemp("run") / "mini")])


def test_a_run_leaves_a_clip_folder_and_an_encoder_that_agree(trained: Path) -> None:
    from encoders.catalog import load_encoder

    clip = open_clip.create_model(f"local-dir:{trained / 'clip'}").eval()
    encoder = load_encoder(str(trained / "encoder")).eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).pooler_output, clip.encode_image(images), atol=1e-6, rtol=1e-5)
    assert encoder.joint_width == 256
    assert encoder.config.training["step"] == 4
    assert encoder.spec.size == 96
    assert encoder.spec.crop_pct == 1.0


def test_a_run_logs_terms_and_the_zero_shot_check(trained: Path) -> None:
    rows = read_jsonl(trained / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "image_to_text", "text_to_image", "logit_scale"} <= rows[0].keys()
    check = read_jsonl(trained / "zeroshot.jsonl")[-1]
    assert check["n"] == len(held_out_drawings(0, 1)[2])
    assert check["top1_low"] <= check["top1"] <= check["top1_high"]
    log = read_jsonl(trained / "clip" / "training_log.jsonl")
    assert any("top1" in row for row in log)
    assert any("loss" in row for row in log)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    for name in ("clip", "encoder"):
        shutil.rmtree(folder / name)
    main([*TINY, "--output_dir", str(folder), "--resume"])
    before, after = (read_jsonl(run / "metrics.jsonl") for run in (trained, folder))
    assert [row["loss"] for row in before] == [row["loss"] for row in after]
    weights = [load_file(run / "clip" / "open_clip_model.safetensors") for run in (trained, folder)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def test_training_on_files_learns_them(tmp_path: Path) -> None:
    colours = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
    rows = []
    for name, colour in colours.items():
        _image(tmp_path / f"{name}.png", colour)
        rows.append({"image": f"{name}.png", "caption": f"a {name} wall"})
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    (tmp_path / "tiny.json").write_text(json.dumps(small_config(layers=1)))
    files = ["--model", str(tmp_path / "tiny.json"), "--data.source", str(tmp_path / "pairs.json"), "--output_dir", str(tmp_path / "run")]
    folder = main([*files, "--steps", "60", "--micro_batch_size", "4", "--lr", "3e-3", "--log_every", "1"])  # fmt: skip
    losses = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl")]
    assert losses[0] > 1.0
    assert losses[-1] < 0.1


def test_a_model_of_another_size_is_refused_for_drawn_pairs(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(small_config(layers=1, image_size=64)))
    with pytest.raises(ConfigError, match="minidata draws 96"):
        main([*TINY, "--model", str(tmp_path / "model.json"), "--output_dir", str(tmp_path / "run")])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("mini_clip*.yaml")), ids=lambda path: path.stem)
def test_recipe_loads_and_says_how_to_run_it(path: Path) -> None:
    load_config(ContrastiveConfig, ["--recipe", str(path)])
    head = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("# ")]
    assert {"run", "try", "needs", "expect"} <= set(head)


def test_the_script_runs_as_a_file_and_says_what_is_wrong(tmp_path: Path, child_environment: dict[str, str]) -> None:
    script = Path(encoders.__file__).parent / "train_contrastive.py"
    environment = {key: value for key, value in child_environment.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(script), "--lrr", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error:")
    assert "'lrr'" in done.stderr
    assert "lr" in done.stderr
    assert not os.listdir(tmp_path)


def test_scale_never_exceeds_one_hundred_and_a_folder_can_be_trained_on(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "clip", tmp_path / "hot")
    weights = load_file(tmp_path / "hot" / "open_clip_model.safetensors")
    weights["logit_scale"] = torch.tensor(math.log(200.0))
    save_file(weights, tmp_path / "hot" / "open_clip_model.safetensors")
    folder = main([*TINY, "--model", str(tmp_path / "hot"), "--output_dir", str(tmp_path / "run"), "--steps", "1", "--save_every", "0"])
    assert read_jsonl(folder / "metrics.jsonl")[0]["logit_scale"] == pytest.approx(100, abs=0.1)
    scale = load_file(folder / "clip" / "open_clip_model.safetensors")["logit_scale"]
    assert scale.dtype == torch.float32
    assert scale.item() <= math.log(100) + 1e-6
