"""Contrastive fine-tuning of an encoder folder: accumulation, ranks, layer-wise rates, masked pictures, shards, resume."""

import copy
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from encoders import train_contrastive
from encoders.catalog import load_encoder
from encoders.clip_models import OWN_TOKENIZER, build_clip, clip_from_encoder, export_clip
from encoders.clip_towers import install_patch_keeper, lr_scales, patch_keeper, tower_layers
from encoders.contrastive import contrastive_loss, encode_pairs
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.text import END_ID, load_text_tower
from encoders.train_contrastive import RECIPES, CachedFeatures, ContrastiveConfig, main
from mmkit.config import load_config
from mmkit.errors import ConfigError
from mmkit.images import ImageSpec
from mmkit.records import read_jsonl
from mmkit.run import Run

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 30),
    "blue": (30, 30, 220),
    "white": (250, 250, 250),
    "black": (9, 9, 9),
    "grey": (128,) * 3,
}
DEPTH, TEXT_DEPTH = 2, 1


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UTA-like student, its text tower, and two shards of captioned pictures."""
    folder = tmp_path_factory.mktemp("tuning")
    os.environ["MMKIT_CACHE"] = str(folder / "cache")
    torch.manual_seed(1)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": TEXT_DEPTH, "pool_type": "eos", "eos_id": END_ID}
    (folder / "teacher.json").write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**text, "hf_tokenizer_name": OWN_TOKENIZER}})
    )
    captions = [f"a {colour} wall number {number}" for colour in COLOURS for number in range(3)]
    (folder / "teacher").mkdir()
    export_clip(folder / "teacher", build_clip(str(folder / "teacher.json"), lambda: captions, folder / "none"), {"templates": "name"})
    args = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": DEPTH,
        "num_heads": 3,
        "global_pool": "token",
        "head_init_scale": 1.0,
    }
    spec = ImageSpec(32).to_dict()
    config = VisionEncoderConfig(architecture="eva02_tiny_patch14_224", model_args=args, joint_width=16, image_spec=spec)
    config.text_tower = str(folder / "teacher")
    VisionEncoder(config).save_pretrained(folder / "student")
    (folder / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"{shard:04d}.tar", "w") as tar:
            for number, caption in enumerate(captions[9 * shard : 9 * shard + 9]):
                noise = np.random.default_rng(number + 9 * shard).integers(-20, 20, (40, 36, 3))
                picture = np.clip(np.array(COLOURS[caption.split()[1]]) + noise, 0, 255).astype(np.uint8)
                out = io.BytesIO()
                Image.fromarray(picture).save(out, "PNG")
                for name, content in ((f"{number:04d}.png", out.getvalue()), (f"{number:04d}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def flags(material: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--encoder", str(material / "student"), "--data.source", str(material / "shards/{0000..0001}.tar"), "--output_dir", str(out)]
    method = ["--optimizer", "lamb", "--lr", "1e-2", "--layer_decay", "0.75", "--text_layer_decay", "0.5", "--text_lr_factor", "0.1"]
    rest = [
        "--temperature",
        "0.05",
        "--mask_ratio",
        "0.5",
        "--steps",
        "6",
        "--log_every",
        "1",
        "--save_every",
        "2",
        "--micro_batch_size",
        "8",
    ]
    return [*fixed, *method, *rest, *more]


def numbers(folder: Path, *names: str) -> list[tuple[float, ...]]:
    return [tuple(row[name] for name in names or ("loss", "image_to_text", "grad_norm")) for row in read_jsonl(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def tuned(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return main(flags(material, tmp_path_factory.mktemp("tuned") / "run"))


# ---- accumulation --------------------------------------------------------------------------------------------------------------------


class TinyTowers(nn.Module):
    """Two towers with dropout, as open_clip calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 6))
        self.embedding, self.dropout, self.projection = nn.Embedding(9, 8), nn.Dropout(0.3), nn.Linear(8, 6)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(images)

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.projection(self.dropout(self.embedding(ids).mean(1)))


def test_cached_accumulation_has_the_gradient_of_the_big_batch_dropout_included() -> None:
    clip, spec = TinyTowers(), ImageSpec(2)
    batches = [
        {"images": torch.randint(0, 256, (n, 3, 2, 2), dtype=torch.uint8), "text_ids": torch.randint(0, 9, (n, 4))} for n in (3, 3, 3)
    ]
    batches[2]["text_ids"][0] = batches[0]["text_ids"][1]  # a caption that occurs twice, in two micro-batches

    def seeded() -> Iterator[dict[str, Tensor]]:
        for number, batch in enumerate(batches):
            torch.manual_seed(number)  # as Run does
            yield batch

    run: Any = SimpleNamespace(forward=lambda function, *args: function(clip, *args), accumulation=len(batches))
    cached = CachedFeatures(run, spec)
    whole = [cached.encode(batch) for batch in seeded()]
    captions = torch.cat([batch["text_ids"] for batch in batches])
    loss, terms = contrastive_loss(torch.cat([row[0] for row in whole]), torch.cat([row[1] for row in whole]), whole[0][2], captions)
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in clip.named_parameters() if parameter.grad is not None}
    clip.zero_grad()
    cached.look_ahead(seeded())
    for batch in seeded():
        part, found = cached(batch)
        assert part.item() == pytest.approx(loss.item(), abs=1e-6)
        (part / len(batches)).backward()  # what Run and Accelerate do
    assert found.keys() == terms.keys()
    assert expected.keys() == dict(clip.named_parameters()).keys()
    for name, parameter in clip.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4, msg=name)  # float32, another order of sums


def test_accumulated_micro_batches_equal_one_batch(material: Path, tuned: Path, tmp_path: Path) -> None:
    parts = main(flags(material, tmp_path / "parts", "--micro_batch_size", "2", "--gradient_accumulation_steps", "4"))
    torch.testing.assert_close(torch.tensor(numbers(parts)), torch.tensor(numbers(tuned)), atol=1e-4, rtol=1e-3)
    plain = [row[0] for row in numbers(tuned, "loss")]
    assert max(plain) - min(plain) > 1e-2  # it moves: equality is no accident


def _rank(rank: int, port: int, arguments: list[str]) -> None:
    PartialState._reset_state()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    main(arguments)


def test_two_processes_equal_one(material: Path, tuned: Path, tmp_path: Path, free_port: int) -> None:
    arguments = flags(material, tmp_path / "two", "--micro_batch_size", "2", "--gradient_accumulation_steps", "2")
    context = multiprocessing.get_context("spawn")  # autograd, used by the tests before, forbids fork
    children = [context.Process(target=_rank, args=(rank, free_port, arguments)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=240)
    assert [child.exitcode for child in children] == [0, 0]
    torch.testing.assert_close(torch.tensor(numbers(tmp_path / "two")), torch.tensor(numbers(tuned)), atol=1e-4, rtol=1e-3)


def test_a_run_that_is_cut_off_goes_on_bit_for_bit(material: Path, tmp_path: Path) -> None:
    accumulated = flags(material, tmp_path / "run", "--micro_batch_size", "2", "--gradient_accumulation_steps", "4")
    run = main(accumulated)
    whole = numbers(run), load_file(run / "clip" / "open_clip_model.safetensors")
    for name in ("clip", "encoder", "checkpoints/step_00000006"):
        shutil.rmtree(run / name)
    main([*accumulated, "--resume"])
    rows = numbers(run)
    assert (rows[:6] if len(rows) == 6 else rows[:4] + rows[6:]) == whole[0]
    again = load_file(run / "clip" / "open_clip_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole[1].items())


# ---- towers --------------------------------------------------------------------------------------------------------------------------


def test_each_layers_rate_holds_at_every_step_of_the_schedule(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    log = Run.log

    def look(self: Run, **terms: Any) -> None:
        groups = {id(parameter): group["lr"] for group in self._optimizer.param_groups for parameter in group["params"]}
        seen.append({name: groups[id(parameter)] for name, parameter in self.unwrap().named_parameters() if id(parameter) in groups})
        log(self, **terms)

    monkeypatch.setattr(Run, "log", look)
    main(flags(material, tmp_path / "run", "--warmup", "3", "--save_every", "0"))
    assert [rates["visual.trunk.head.weight"] for rates in seen[:3]] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    d, t, trunk, blocks = 0.75, 0.5, "visual.trunk.", "transformer.resblocks."
    factors = {
        **{f"{trunk}{name}": d ** (DEPTH + 1) for name in ("patch_embed.proj.weight", "pos_embed", "cls_token")},
        **{f"{trunk}blocks.{block}.attn.qkv.weight": d ** (DEPTH - block) for block in range(DEPTH)},
        **{f"{trunk}{name}": 1.0 for name in ("norm.weight", "head.weight", "head.bias")},
        **{name: 0.1 * t ** (TEXT_DEPTH + 1) for name in ("token_embedding.weight", "positional_embedding")},
        f"{blocks}0.mlp.c_fc.weight": 0.1 * t,
        **{name: 0.1 for name in ("ln_final.weight", "text_projection")},
        "logit_scale": 1.0,
    }
    for step, rates in enumerate(seen):
        peak = rates["visual.trunk.head.weight"]
        assert {name: rates[name] / peak for name in factors} == pytest.approx(factors), step
    assert [rates["visual.trunk.head.weight"] for rates in seen[3:]] == pytest.approx([1e-2, 7.5e-3, 2.5e-3])  # the cosine


@pytest.mark.parametrize(
    "architecture", ["vit_base_patch16_clip_224", "vit_base_patch16_siglip_224", "eva_giant_patch14_224", "eva02_base_patch14_224"]
)
def test_layers_of_timms_towers_are_told(architecture: str) -> None:
    network = timm.create_model(architecture, img_size=32, patch_size=16, embed_dim=48, depth=3, num_heads=3)
    layers, top = tower_layers([name for name, _ in network.named_parameters()], "image tower")
    assert top == 4
    front = {name for name, layer in layers.items() if layer == 0}
    assert {"pos_embed", "patch_embed.proj.weight"} <= front
    assert {name.split(".")[0] for name in front} <= {"pos_embed", "patch_embed", "cls_token", "norm_pre"}
    assert all(layer == int(name.split(".")[1]) + 1 for name, layer in layers.items() if name.startswith("blocks."))
    assert {name.split(".")[0] for name, layer in layers.items() if layer == top} <= {"norm", "fc_norm", "head", "attn_pool"}


def test_layers_of_open_clips_and_transformers_towers_are_told(material: Path) -> None:
    clip = build_clip(str(material / "teacher"), lambda: [], Path()).model
    scales = lr_scales(clip, 0.5, 0.25)
    assert scales.keys() == dict(clip.named_parameters()).keys()
    assert {scales[f"visual.{name}"] for name in ("conv1.weight", "class_embedding", "positional_embedding", "ln_pre.weight")} == {0.25}
    assert {scales[f"visual.{name}"] for name in ("ln_post.bias", "proj")} == {scales["text_projection"], scales["logit_scale"]} == {1.0}
    assert scales["visual.transformer.resblocks.0.attn.in_proj_weight"] == 0.5
    roberta = {
        "text.transformer.embeddings.word_embeddings.weight": 0,
        "text.transformer.encoder.layer.0.attention.self.query.weight": 1,
        "text.transformer.encoder.layer.11.output.dense.weight": 12,
        "text.proj.0.weight": 13,
    }
    assert tower_layers(roberta, "text tower") == (roberta, 13)


def test_a_tower_without_blocks_cannot_decay() -> None:
    with pytest.raises(ConfigError, match="image tower has no numbered blocks"):
        tower_layers(["visual.layer1.0.conv1.weight"], "image tower")


def test_a_student_and_its_teachers_text_tower_start_as_they_were(material: Path) -> None:
    parts = clip_from_encoder(str(material / "student"))
    clip: Any = parts.model
    encoder, tower = load_encoder(str(material / "student")), load_text_tower(str(material / "teacher"))
    images = torch.randn(2, 3, 32, 32)
    clip.eval()
    with torch.no_grad():
        assert torch.equal(clip.encode_image(images), encoder(images).pooler_output)
        texts = nn.functional.normalize(clip.encode_text(parts.tokenizer(["a red wall"])), dim=-1)
    torch.testing.assert_close(texts, tower.encode(["a red wall"]))
    with pytest.raises(ConfigError, match="joint width 16, text tower mini-clip has 256"):
        clip_from_encoder(str(material / "student"), "mini-clip")
    with pytest.raises(ConfigError, match="a text tower has weights"):
        clip_from_encoder(str(material / "student"), "openclip:ViT-B-16")


def test_a_tuned_encoder_and_its_clip_folder_agree_and_train_on(tuned: Path, material: Path, tmp_path: Path) -> None:
    encoder, before = load_encoder(str(tuned / "encoder")), load_encoder(str(material / "student"))
    assert encoder.config.text_tower == str(tuned / "clip")
    assert encoder.config.model_args == before.config.model_args
    assert (encoder.config.training["objective"], encoder.config.training["step"]) == ("contrastive", 6)
    read_back = load_encoder(f"openclip:{tuned / 'clip'}")
    clip: Any = build_clip(str(tuned / "clip"), lambda: [], tmp_path).model.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = encoder(images).pooler_output
        assert torch.equal(features, clip.encode_image(images))
        torch.testing.assert_close(features, read_back(images).pooler_output, atol=1e-5, rtol=1e-5)
        assert (features - before(images).pooler_output).abs().max() > 1e-3
    assert load_text_tower(str(tuned / "clip")).joint_width == 16
    assert len(numbers(main(flags(material, tmp_path / "on", "--encoder", "", "--model", str(tuned / "clip"), "--steps", "1")))) == 1


# ---- masked pictures -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eva", "native"])
def test_a_masked_picture_is_one_without_those_patches(material: Path, kind: str) -> None:
    parts = clip_from_encoder(str(material / "student")) if kind == "eva" else build_clip(str(material / "teacher"), lambda: [], Path())
    clip: Any = parts.model.eval()
    images, ids = torch.randn(3, 3, 32, 32), parts.tokenizer(["a red wall", "a blue wall", "a white wall"])
    bare = clip.encode_image(images)
    state = clip.state_dict().keys()
    grid = install_patch_keeper(clip)
    assert clip.state_dict().keys() == state
    patches, patch = grid[0] * grid[1], 32 // grid[0]
    full, _, _ = encode_pairs(clip, images, ids, torch.arange(patches).expand(3, -1))
    torch.testing.assert_close(full, nn.functional.normalize(bare, dim=-1), atol=1e-6, rtol=1e-5)
    keep = torch.stack([torch.arange(1, patches, 2)] * 3)
    some, _, _ = encode_pairs(clip, images, ids, keep)
    changed = images.clone()
    changed[:, :, :patch, :patch] += 9  # patch 0 is not kept
    torch.testing.assert_close(encode_pairs(clip, changed, ids, keep)[0], some, atol=0, rtol=0)
    assert (some - full).abs().max() > 1e-4
    keeper = patch_keeper(clip)
    assert keeper is not None
    assert keeper.keep is None


# ---- settings ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--optimizer", "lamb", "--run.deepspeed.zero_optimization.stage", "1"], "lamb does not work on DeepSpeed"),
        (["--run.deepspeed.zero_optimization.stage", "3"], "ZeRO-3 shards the weights"),
        (["--layer_decay", "1.5"], "layer_decay is 1.5"),
        (["--mask_ratio", "1"], "mask_ratio is 1.0"),
        (["--temperature", "0.001"], "temperature is 0.001"),
        (["--data.scale", "[0.9, 0.1]"], "data.scale is"),
        (["--micro_batch_size", "1"], "has no negatives"),
    ],
    ids=["lamb", "zero3", "decay", "mask", "temperature", "scale", "one"],
)
def test_settings_that_cannot_be_meant_are_refused(more: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(ContrastiveConfig, more)


def test_a_bad_shard_stops_before_anything_is_written(material: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad\.tar: it is empty"):
        main(flags(material, tmp_path / "run", "--data.source", str(tmp_path / "bad.tar")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*contrastive*.yaml")), ids=lambda path: path.stem)
def test_recipe_trains_at_tiny_size(path: Path, material: Path, tmp_path: Path) -> None:
    settings = load_config(ContrastiveConfig, ["--recipe", str(path)])
    source = material / "shards/{0000..0001}.tar"
    small = ["--encoder", str(material / "student"), "--encoder_text", str(material / "teacher"), "--data.source", str(source)]
    batch = ["--micro_batch_size", "4", "--gradient_accumulation_steps", "2", "--global_batch_size", "0", "--num_workers", "0"]
    run = ["--steps", "1", "--precision", "fp32", "--log_every", "1", "--output_dir", str(tmp_path / "run")]
    folder = main(["--recipe", str(path), *small, *batch, *run])
    row = read_jsonl(folder / "metrics.jsonl")[0]
    if settings.temperature is not None:
        assert row["logit_scale"] == pytest.approx(1 / settings.temperature, rel=1e-5)
    head = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("# ") and not line.startswith("#  ")]
    assert {"run", "try", "needs", "expect"} <= set(head)


def test_the_recipes_of_the_paper_have_its_numbers() -> None:
    rows = {}
    for name in ("b16", "l14", "g14"):
        c = load_config(ContrastiveConfig, ["--recipe", str(RECIPES / f"contrastive_uta_{name}.yaml")])
        assert (c.optimizer, c.train_scale, c.temperature, c.weight_decay, c.run.global_batch_size) == ("lamb", False, 0.01, 0.05, 49_152)
        rows[name] = (c.lr, c.layer_decay, round(c.run.steps * c.run.global_batch_size / 1e9, 1))
    assert rows["b16"] == (2e-4, 0.75, 2.0)
    assert rows["l14"] == (4e-4, 0.85, 4.0)
    assert rows["g14"][2] == 2.0


def test_a_copy_of_a_model_keeps_its_own_patches(material: Path) -> None:
    clip: Any = clip_from_encoder(str(material / "student")).model
    install_patch_keeper(clip)
    other = copy.deepcopy(clip)
    assert patch_keeper(other) is not patch_keeper(clip)
    assert pytest.approx(np.log(100)) == train_contrastive.LARGEST_SCALE
