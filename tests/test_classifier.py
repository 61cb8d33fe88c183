"""Fine-tuning for classification: the laws of the network, its groups, its freezing, its data (FT-CLIP)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

from encoders.class_folders import AugmentConfig, ClassFolders, LabelledImages, hold_out, match_classes, read_class_folders, spread
from encoders.classifier import NetworkConfig, build_classifier, load_classifier, resample_positions, save_classifier
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.train_classifier import classification_loss, mix
from mmkit.batches import derive_seed, seed_everything
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec
from mmkit.optim import cosine_schedule, param_groups

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three encoder folders: a CLIP form, an EVA-02 form, a SigLIP form without CLS; their norms are no longer 1 and 0."""
    folder, found = tmp_path_factory.mktemp("encoders"), {}
    forms: dict[str, tuple[str, dict[str, Any]]] = {
        "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
        "eva": ("eva02_base_patch14_224", {"global_pool": "token"}),
        "siglip": ("vit_base_patch16_siglip_224", {"num_classes": 0}),
    }
    for name, (architecture, args) in forms.items():
        torch.manual_seed(3)
        encoder = VisionEncoder(
            VisionEncoderConfig(architecture=architecture, model_args={**SIZES, **args}, joint_width=48 if name == "siglip" else 16)
        )
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        encoder.save_pretrained(folder / name)
        found[name] = str(folder / name)
    return found


def network_of(encoder: str, **settings: Any) -> Any:
    config = NetworkConfig(encoder=encoder, head_scale=1.0, **settings)
    config.validate()
    return build_classifier(config, NAMES).network


# ---- the network ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["clip", "eva", "siglip"])
def test_logits_are_the_head_of_the_mean_of_normalised_patches(encoders: dict[str, str], form: str) -> None:
    network = network_of(encoders[form]).eval()
    tokens: list[torch.Tensor] = []
    network.norm.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    logits = network(torch.randn(2, 3, 32, 32))
    patches = tokens[0][:, network.num_prefix_tokens :]
    expected = network.head(F.layer_norm(patches, (48,), network.norm.weight, network.norm.bias, network.norm.eps).mean(dim=1))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_the_last_blocks_cls_token_does_not_reach_the_logits(encoders: dict[str, str]) -> None:
    network, images = network_of(encoders["clip"]).eval(), torch.randn(2, 3, 32, 32)
    plain = network(images)
    network.blocks[-1].register_forward_hook(lambda _, __, out: torch.cat([out[:, :1] + 5.0, out[:, 1:]], dim=1))
    assert torch.equal(network(images), plain)


def test_the_three_poolings_are_three_networks(encoders: dict[str, str]) -> None:
    images, found = torch.randn(2, 3, 32, 32), []
    for pooling in ("norm_then_mean", "mean_then_norm", "cls"):
        torch.manual_seed(0)
        found.append(network_of(encoders["clip"], pooling=pooling).eval()(images))
    assert not any(
        torch.allclose(one, other, atol=1e-3) for one, other in [(found[0], found[1]), (found[0], found[2]), (found[1], found[2])]
    )


@pytest.mark.parametrize("form", ["clip", "eva"])
def test_the_trunk_is_the_encoders_and_its_final_norm_does_not_survive(encoders: dict[str, str], form: str) -> None:
    encoder = VisionEncoder.from_pretrained(encoders[form])
    fresh, kept = network_of(encoders[form]), network_of(encoders[form], fresh_norm=False)
    assert torch.equal(fresh.norm.weight, torch.ones(48))
    assert torch.equal(fresh.norm.bias, torch.zeros(48))
    assert torch.equal(kept.norm.weight, encoder.network.norm.weight)
    for name, tensor in fresh.state_dict().items():
        if not name.startswith(("norm.", "head.")):
            assert torch.equal(tensor, encoder.network.state_dict()[name]), name


def test_a_head_begins_small(encoders: dict[str, str]) -> None:
    head = build_classifier(NetworkConfig(encoder=encoders["clip"]), NAMES).network.head
    assert 0 < head.weight.std() < 3e-5
    assert not head.bias.any()


def test_from_scratch_is_the_same_network_with_other_weights(encoders: dict[str, str]) -> None:
    tuned, scratch = network_of(encoders["clip"]), network_of(encoders["clip"], scratch=True, freeze_patch_embed=False)
    assert {name: p.shape for name, p in tuned.state_dict().items()} == {name: p.shape for name, p in scratch.state_dict().items()}
    assert not torch.equal(tuned.blocks[0].attn.qkv.weight, scratch.blocks[0].attn.qkv.weight)


def test_positions_are_resampled_by_the_named_rule() -> None:
    positions = torch.randn(1, 1 + 14 * 14, 8)
    theirs = resample_abs_pos_embed(positions, [24, 24], old_size=[14, 14], num_prefix_tokens=1)
    plain = resample_positions(positions, (14, 14), (24, 24))
    torch.testing.assert_close(resample_positions(positions, (14, 14), (24, 24), antialias=True), theirs)
    assert torch.equal(plain[:, 0], positions[:, 0])
    grid = F.interpolate(positions[:, 1:].reshape(1, 14, 14, 8).permute(0, 3, 1, 2), (24, 24), mode="bicubic")
    torch.testing.assert_close(plain[0, 1:], grid.flatten(2).transpose(1, 2)[0])
    smaller, theirs = resample_positions(positions, (14, 14), (7, 7)), resample_abs_pos_embed(positions, [7, 7], old_size=[14, 14])
    assert (smaller - theirs).norm() / theirs.norm() > 0.05
    assert torch.equal(resample_positions(positions, (14, 14), (14, 14)), positions)


def test_a_larger_image_size_changes_grid_and_spec(encoders: dict[str, str]) -> None:
    classifier = build_classifier(NetworkConfig(encoder=encoders["clip"], image_size=48), NAMES)
    assert classifier.network.pos_embed.shape == (1, 1 + 36, 48)
    assert classifier.spec.size == 48
    assert classifier.network(torch.randn(1, 3, 48, 48)).shape == (1, 4)
    with pytest.raises(ConfigError, match="50 is no multiple of the patch, 8 pixels"):
        build_classifier(NetworkConfig(encoder=encoders["clip"], image_size=50), NAMES)


def test_layer_scale_and_drop_path_are_added_on_request(encoders: dict[str, str]) -> None:
    network = network_of(encoders["clip"], layer_scale=1.0, drop_path=0.1)
    assert torch.equal(network.blocks[1].ls1.gamma, torch.ones(48))
    assert network.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    plain = network_of(encoders["clip"])
    images = torch.randn(2, 3, 32, 32)
    network.head.load_state_dict(plain.head.state_dict())
    torch.testing.assert_close(network.eval()(images), plain.eval()(images))


# ---- groups, schedule, freezing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["clip", "eva"])
def test_the_lr_of_each_layer_keeps_its_ratio_at_every_step(encoders: dict[str, str], form: str) -> None:
    network, decay, depth = network_of(encoders[form], freeze_patch_embed=False), 0.6, 3
    groups = param_groups(network, 6e-4, 0.05, layer_decay=decay)
    schedule = cosine_schedule(20, 5, 1e-6 / 6e-4, from_zero=True)
    peak = {id(parameter): group["initial_lr"] for group in groups for parameter in group["params"]}
    factor = {name: peak[id(parameter)] / 6e-4 for name, parameter in network.named_parameters()}
    for name, wanted in {
        "cls_token": decay ** (depth + 1), "pos_embed": decay ** (depth + 1), "patch_embed.proj.weight": decay ** (depth + 1),
        "blocks.0.norm1.weight": decay**depth, f"blocks.{depth - 1}.norm2.weight": decay, "norm.weight": 1.0, "head.weight": 1.0,
    }.items():  # fmt: skip
        assert factor[name] == pytest.approx(wanted), name
    if form == "clip":
        assert factor["norm_pre.weight"] == pytest.approx(decay ** (depth + 1))
    assert [schedule(step) for step in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule(20) * 6e-4 == pytest.approx(1e-6)


def test_each_trained_parameter_is_in_one_group_and_frozen_ones_in_none(encoders: dict[str, str]) -> None:
    network = network_of(encoders["clip"])
    groups = param_groups(network, 1.0, 0.05, layer_decay=0.6)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups)
    for name, parameter in network.named_parameters():
        assert (id(parameter) in decay) == (name != "patch_embed.proj.weight"), name
        if id(parameter) in decay:
            assert decay[id(parameter)] == (0.0 if parameter.ndim <= 1 or name in ("cls_token", "pos_embed") else 0.05), name


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_last_blocks_alone_are_trained(encoders: dict[str, str], count: int) -> None:
    network = network_of(encoders["clip"], train_blocks=count)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.AdamW(param_groups(network, 1e-2, 0.05, layer_decay=0.6))
    F.cross_entropy(network.train()(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    optimizer.step()
    free = (*(f"blocks.{number}." for number in range(3 - count, 3)), "norm.", "head.")
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == (parameter in optimizer.state) == name.startswith(free), name
        assert torch.equal(parameter, before[name]) != name.startswith(free), name
    assert not network.blocks[0].training or count == 3
    with pytest.raises(ConfigError, match="0 to 3"):
        network_of(encoders["clip"], train_blocks=4)


def test_scratch_with_a_frozen_part_is_refused(encoders: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="a frozen part would stay random"):
        network_of(encoders["clip"], scratch=True)


# ---- loss and mixing ----------------------------------------------------------------------------------------------------------------------


def test_label_smoothing_is_its_formula() -> None:
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    log_p = logits.log_softmax(dim=1)
    expected = (0.9 * -log_p.gather(1, labels[:, None])[:, 0] + 0.1 * -log_p.mean(dim=1)).mean()
    torch.testing.assert_close(classification_loss(logits, labels, 0.1), expected)
    shares = 0.9 * F.one_hot(labels, 5) + 0.1 / 5
    torch.testing.assert_close(classification_loss(logits, shares, 0.1), expected)  # smoothed once, not twice


def test_mixing_conserves_shares_also_of_an_odd_batch() -> None:
    images, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    seed_everything(1)
    mixed, targets = mix(images, labels, Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=4))
    assert mixed.shape == images.shape
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(5))
    assert mix(images, labels, None)[0] is images


# ---- folders and augmentation -------------------------------------------------------------------------------------------------------------


def write_images(root: Path, counts: dict[str, int]) -> Path:
    random = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(root / name / f"{number:03d}.png")
    return root


def test_a_held_out_share_is_even_seeded_and_leaves_every_class_an_image(tmp_path: Path) -> None:
    data = ClassFolders(tmp_path, ("a", "b", "c"), tuple(map(str, range(31))), (0,) * 20 + (1,) * 10 + (2,))
    kept, held = hold_out(data, 0.2, seed=0)
    assert sorted([*kept.paths, *held.paths], key=int) == list(data.paths)
    assert [held.labels.count(label) for label in range(3)] == [4, 2, 0]
    assert hold_out(data, 0.2, seed=0) == (kept, held)
    assert hold_out(data, 0.2, seed=1)[1] != held
    assert [hold_out(data, 0.99, seed=0)[0].labels.count(label) for label in range(3)] == [1, 1, 1]
    assert len(hold_out(data, 0.0, seed=0)[1]) == 0
    with pytest.raises(ConfigError, match="not one image"):
        hold_out(data, 0.01, seed=0)


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    train = read_class_folders(write_images(tmp_path / "train", {"a": 1, "b": 2, "c": 1}), "--data.train")
    test = read_class_folders(write_images(tmp_path / "test", {"b": 1, "c": 1}), "--data.test")
    assert match_classes(train, test, subset=True).labels == (1, 2)
    with pytest.raises(DataError, match=r"lacks 1 of 3 classes.*'a'.*--data.test_subset"):
        match_classes(train, test, subset=False)
    strange = read_class_folders(write_images(tmp_path / "other", {"a": 1, "z": 1}), "--data.test")
    with pytest.raises(DataError, match=r"1 of 2 class folders are no classes.*'z'"):
        match_classes(train, strange, subset=True)
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="class folder 'empty' holds no image"):
        read_class_folders(tmp_path / "train", "--data.train")
    assert spread(["a", "b", "c", "d"], 2) == ["a", "c"]


def test_an_augmented_item_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    data = read_class_folders(write_images(tmp_path / "train", {"a": 2, "b": 2}), "--data.train")
    transform = AugmentConfig(random_erase=1.0).transform(ImageSpec(size=32))
    plain, cached = LabelledImages(data, transform), LabelledImages(data, transform, cache=True)

    def item(dataset: LabelledImages, epoch: int, index: int) -> torch.Tensor:
        seed_everything(derive_seed(7, epoch, index))  # as mmkit.batches does
        found = dataset.get(epoch, index)
        assert found is not None
        return found["images"]

    item(cached, 0, 1)
    assert torch.equal(item(plain, 2, 1), item(cached, 2, 1))
    assert not torch.equal(item(plain, 2, 1), item(plain, 3, 1))


def test_the_default_augmentation_is_the_papers() -> None:
    names = [type(step).__name__ for step in AugmentConfig().transform(ImageSpec(size=32)).transforms]
    wanted = ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "MaybeToTensor", "Normalize", "RandomErasing"]
    assert names == wanted
    three = [type(step).__name__ for step in AugmentConfig(auto="3a", crop="rkrr").transform(ImageSpec(size=32)).transforms]
    assert "ColorJitter" in three
    assert "RandomOrCenterCrop" in three or "RandomCropOrPad" in three
    for settings in ({"auto": "randd"}, {"auto": "augmix-q9"}, {"scale": [0.5]}, {"mixup": -1.0}):
        with pytest.raises(ConfigError, match="augment"):
            AugmentConfig(**settings).validate()  # type: ignore[arg-type]


def test_evaluation_resizes_to_the_input_size_as_timm_does(encoders: dict[str, str]) -> None:
    classifier = build_classifier(NetworkConfig(encoder=encoders["clip"]), NAMES)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 64, 3), dtype=np.uint8))
    spec = classifier.spec
    assert spec.crop_pct == 1.0
    theirs = create_transform(32, interpolation="bicubic", mean=spec.mean, std=spec.std, crop_pct=1.0)
    torch.testing.assert_close(spec.transform(training=False)(image), theirs(image), rtol=0, atol=1e-5)


# ---- folders of classifiers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["clip", "eva", "siglip"])
def test_timm_loads_what_was_saved(encoders: dict[str, str], form: str, tmp_path: Path) -> None:
    classifier = build_classifier(NetworkConfig(encoder=encoders[form], head_scale=1.0, image_size=48), NAMES)
    tmp_path.joinpath("c").mkdir()
    save_classifier(classifier, classifier.network.state_dict(), tmp_path / "c")
    images = torch.randn(2, 3, 48, 48)
    expected = classifier.network.eval()(images)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'c'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(images), expected)
    again = load_classifier(tmp_path / "c")
    torch.testing.assert_close(again.network(images), expected)
    assert (again.class_names, again.spec) == (NAMES, classifier.spec)
    assert theirs.pretrained_cfg["crop_pct"] == 1.0
    assert json.loads((tmp_path / "c" / "config.json").read_text())["label_names"] == list(NAMES)
    (tmp_path / "c" / "mmkit.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_classifier(tmp_path / "c")
    (tmp_path / "x" / "classifier").mkdir(parents=True)
    with pytest.raises(DataError, match=f"Did you mean {tmp_path / 'x' / 'classifier'}"):
        load_classifier(tmp_path / "x")
