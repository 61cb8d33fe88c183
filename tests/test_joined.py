"""Several encoders as one tower: what each patch holds, what is refused, and LLaVA in front of it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from llava_tiny import picture, write_data, write_parts
from torch.testing import assert_close

from encoders.joined import JoinedEncoder
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.vision_towers import load_tower, parse, with_folders
from llm_stage.chat_format import Turn
from llm_stage.generate import ChatModel, ChatRequest
from llm_stage.llava import tower_geometry
from llm_stage.train_llava import main
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec, renormalise
from mmkit.trainable import weights_hash

SPECS = {
    "vit": ImageSpec(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)).to_dict(),
    "eva": ImageSpec(size=32).to_dict(),
    "siglip": ImageSpec(size=48, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash").to_dict(),
}


def tower(kind: str, seed: int = 0) -> VisionEncoder:
    """vit: CLS, 16 patches of 8 px, width 32. eva: CLS, rotary, width 24. siglip: no CLS, 48 px, 16 patches of 12 px, width 16."""
    torch.manual_seed(seed)
    shapes = {
        "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}),
        "eva": ("eva02_tiny_patch14_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}),
        "siglip": (
            "vit_base_patch16_siglip_224",
            {"img_size": 48, "patch_size": 12, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0},
        ),
    }
    name, args = shapes[kind]
    joint = 16 if kind == "siglip" else None
    config = VisionEncoderConfig(architecture=name, model_args=args, image_spec=SPECS[kind], origin=f"tiny {kind}", joint_width=joint)
    return VisionEncoder(config).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Encoder folders vit, eva and siglip, an LLM, data."""
    folder = tmp_path_factory.mktemp("joined")
    write_parts(folder)
    write_data(folder, rows=12, text_only_every=4)
    for kind in ("vit", "eva", "siglip"):
        tower(kind).save_pretrained(folder / kind)
    return folder


def images_for(joined: JoinedEncoder, count: int = 2) -> torch.Tensor:
    transform = joined.spec.transform()
    return torch.stack([transform(picture("red", (70, 50), seed)) for seed in range(count)])


# -- what a token holds ----------------------------------------------------------------------------------------------------------------


def test_channels_stand_side_by_side_and_each_part_sees_its_own_normalisation() -> None:
    a, b = tower("vit"), tower("eva")
    joined = JoinedEncoder.of([a, b])
    images = images_for(joined)
    out = joined(images, output_hidden_states=-2)
    assert (joined.width, joined.grid, joined.num_patches, joined.num_prefix_tokens) == (56, (4, 4), 16, 1)
    theirs = [a(images, output_hidden_states=True), b(renormalise(images, a.spec, b.spec), output_hidden_states=True)]
    assert_close(out.hidden_states[-2], torch.cat([each.hidden_states[-2] for each in theirs], dim=-1))
    assert_close(out.last_hidden_state, torch.cat([each.last_hidden_state for each in theirs], dim=-1))
    assert [state is None for state in out.hidden_states] == [True, True, False, True]  # as deep as the shallower, counted from the end


def test_tokens_follow_each_other_in_channels_of_their_own() -> None:
    a, b = tower("vit"), tower("siglip")
    joined = JoinedEncoder.of([a, b], "tokens")
    images = images_for(joined)
    assert images.shape == (2, 3, 48, 48)
    tokens = joined(images).last_hidden_state
    assert tokens.shape == (2, 32, 48)  # no CLS: siglip has none
    assert (joined.width, joined.num_patches, joined.num_prefix_tokens) == (48, 32, 0)
    assert not tokens[:, :16, 32:].any()
    assert not tokens[:, 16:, :32].any()
    assert_close(tokens[:, 16:, 32:], b(renormalise(images, joined.spec, b.spec)).last_hidden_state)


def test_a_smaller_part_sees_the_same_picture_scaled_down() -> None:
    a, b = tower("vit"), tower("siglip")
    joined = JoinedEncoder.of([a, b])
    assert joined.spec == ImageSpec.from_dict({**SPECS["vit"], "size": 48})  # framed and normalised as the first says
    large = picture("green", (48, 48))
    seen = joined._for_part(joined.spec.transform()(large).unsqueeze(0), a)[0]
    assert_close(seen, a.spec.transform()(large), atol=3 / 255 / 0.2, rtol=0)  # two ways to scale: some grey levels
    assert_close(seen.mean(), a.spec.transform()(large).mean(), atol=0.01, rtol=0)


def test_fixed_layers_are_each_parts_own() -> None:
    a, b = tower("vit"), tower("eva")
    joined = JoinedEncoder.of([a, b], layers=[-3, -1])
    images = images_for(joined)
    expected = [
        a(images, output_hidden_states=True).hidden_states[-3],
        b(renormalise(images, a.spec, b.spec), output_hidden_states=True).hidden_states[-1],
    ]
    out = joined(images, output_hidden_states=-1)
    assert_close(out.hidden_states[-1], torch.cat(expected, dim=-1))
    assert_close(out.last_hidden_state, out.hidden_states[-1])
    with pytest.raises(ConfigError, match=r"are fixed \(\[-3, -1\]\).*--feature_layer -1"):
        joined(images, output_hidden_states=-2)


# -- names and folders -----------------------------------------------------------------------------------------------------------------


def test_a_name_loads_what_its_parts_are(world) -> None:
    joined = load_tower(f"{world / 'vit'}+{world / 'eva'}")
    assert isinstance(joined, JoinedEncoder)
    assert joined.config.join == "channels"
    assert weights_hash(joined.parts[1]) == weights_hash(tower("eva"))
    fixed = load_tower(f"tokens:{world / 'vit'}@64px@-2+{world / 'siglip'}@-1")
    assert (fixed.config.join, fixed.config.layers, fixed.num_patches, fixed.spec.size) == ("tokens", [-2, -1], 64 + 16, 64)
    assert load_tower(f"{world / 'vit'}@64px").grid == (8, 8)
    assert load_tower(f"{world / 'vit'}@32px").config.origin == "tiny vit"


def test_a_joined_folder_loads_in_a_fresh_process_with_the_same_numbers(world, tmp_path, child_environment) -> None:
    joined = JoinedEncoder.of([tower("vit"), tower("eva")], "tokens", [-2, -2])
    joined.save_pretrained(tmp_path / "joined")
    images = images_for(joined)
    assert_close(load_tower(tmp_path / "joined")(images).last_hidden_state, joined(images).last_hidden_state, atol=0, rtol=0)
    torch.save((images, joined(images).last_hidden_state), tmp_path / "expected.pt")
    code = (
        "import sys, torch, encoders.joined; from transformers import AutoModel\n"
        "images, expected = torch.load(sys.argv[2]); model = AutoModel.from_pretrained(sys.argv[1]).eval()\n"
        "assert torch.equal(model(images).last_hidden_state, expected), (model(images).last_hidden_state - expected).abs().max()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "joined"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("{vit}@64px+{eva}", ConfigError, r"has 8 x 8 patches, 'tiny eva' has 4 x 4: channels are joined patch by patch.*SOURCE@64px"),
        ("{vit}@-2+{eva}", ConfigError, "says a layer for 1 of 2 encoders; say it for '.*/eva' too"),
        ("{vit}+", ConfigError, "names 2 encoder.s., one without a name"),
        ("tokens:{vit}", ConfigError, "names 1 encoder"),
        ("{vit}@-2", ConfigError, "--feature_layer -2"),
        ("{vit}+{vit}/nothing", LookupError, "no encoder"),
        ("{vit}@-9+{eva}@-1", ValueError, "hidden state -9 was asked for"),
    ],
)
def test_what_does_not_fit_is_refused(world, name, kind, message) -> None:
    with pytest.raises(kind, match=message):
        load_tower(name.format(vit=world / "vit", eva=world / "eva"))


def test_a_damaged_joined_folder_is_named(tmp_path) -> None:
    JoinedEncoder.of([tower("vit"), tower("eva")]).save_pretrained(tmp_path / "joined")
    config = json.loads((tmp_path / "joined" / "config.json").read_text())
    (tmp_path / "joined" / "config.json").write_text(json.dumps({**config, "parts": config["parts"][:1]}))
    with pytest.raises(DataError, match="two parts or more, here 1"):
        load_tower(tmp_path / "joined")


def test_folders_in_a_name_are_found_again(world) -> None:
    name = f"tokens:{world / 'vit'}@64px@-2+timm:vit_tiny_patch16_224@-1"
    assert with_folders(name, lambda folder: folder.upper()) == f"tokens:{str(world / 'vit').upper()}@64px@-2+timm:vit_tiny_patch16_224@-1"
    assert parse("openclip:ViT-B-16/openai")[0] is None


# -- LLaVA -----------------------------------------------------------------------------------------------------------------------------


def arguments(world, encoder, output, *more):
    words = ["--stage", 1, "--encoder", encoder, "--llm", world / "llm", "--json", world / "data.json", "--images", world / "images"]
    words += ["--steps", 2, "--micro_batch_size", 4, "--log_every", 1, "--output_dir", output]
    return [str(word) for word in [*words, *more]]


def home_of(world, folder):
    """The encoders and the LLM in a folder that can be moved."""
    for kind in ("vit", "eva", "siglip", "llm"):
        shutil.copytree(world / kind, folder / kind)
    return folder


REQUESTS = [ChatRequest([Turn("user", "what colour is it")], [picture("red")])]


@pytest.mark.parametrize(
    "name, more, tokens",
    [("{vit}+{eva}", ["--select", "full"], 17), ("{vit}", ["--image_size", "64"], 64)],
    ids=["channels with CLS", "resized"],
)
def test_llava_trains_and_answers_behind_it(world, tmp_path, name, more, tokens) -> None:
    home = home_of(world, tmp_path / "home")
    folder = main(arguments(world, name.format(vit=home / "vit", eva=home / "eva"), home / "stage1", *more, "--check_saving", "false"))
    answers = ChatModel.load(folder / "model").generate(REQUESTS, 4)
    home.rename(tmp_path / "moved")  # the card's folders are relative to it
    moved = ChatModel.load(tmp_path / "moved" / "stage1" / "model")
    assert moved.generate(REQUESTS, 4) == answers
    assert moved.tokens_per_image == tokens


def test_both_stages_behind_joined_tokens_with_cached_features(world, tmp_path) -> None:
    name, layer = f"tokens:{world / 'vit'}@-2+{world / 'siglip'}@-1", ["--feature_layer", "-1"]
    cache = ["--feature_cache", tmp_path / "features"]
    first = main(arguments(world, name, tmp_path / "stage1", *layer, *cache))
    plain = main(arguments(world, name, tmp_path / "plain", *layer, "--check_saving", "false"))
    assert losses(first) == losses(plain)
    second = main(arguments(world, "", tmp_path / "stage2", *layer, *cache, "--stage", 2, "--pretrained", first / "model"))
    chat = ChatModel.load(second / "model")  # a whole LLaVA, its tower inside
    assert chat.tokens_per_image == 32
    assert chat.encoder_card()["model_type"] == "mmkit_joined_encoder"
    assert weights_hash(chat.model.model.vision_tower) == weights_hash(load_tower(name))


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_geometry_counts_the_tokens_beyond_the_grid() -> None:
    joined = JoinedEncoder.of([tower("vit"), tower("siglip")], "tokens")
    geometry = tower_geometry(joined)
    assert (geometry.num_patches, geometry.beyond_grid, geometry.num_prefix_tokens, geometry.patch_size) == (32, 16, 0, 12)
