"""Attention and patch-text maps, their PNG sheets, and their place in the report (encoders/maps.py, inspection.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from encoders.inspection import chosen_layers, main
from encoders.map_pictures import heat, wrapped
from encoders.maps import attention_maps, text_maps
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from mmkit import report
from mmkit.errors import ConfigError, DataError

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


def build(architecture: str, **more: Any) -> VisionEncoder:
    torch.manual_seed(2)
    encoder = VisionEncoder(VisionEncoderConfig(architecture=architecture, model_args={**SIZES, **more}, joint_width=48)).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder


@pytest.mark.parametrize("architecture", ["eva02_base_patch14_224", "eva_giant_patch14_clip_224", "vit_base_patch16_clip_224"])
def test_attention_is_the_one_the_network_used(architecture: str) -> None:
    encoder, images = build(architecture, global_pool="token"), torch.randn(2, 3, 32, 32)
    before = encoder(images).pooler_output
    maps = attention_maps(encoder, images)
    assert list(maps) == ["layer 1", "layer 2", "layer 3"]
    for rows in maps.values():
        assert rows.shape == (2, 3, 4, 4)
        assert rows.min() >= 0
        assert rows.sum(dim=(-1, -2)).max() < 1  # the rest is CLS's own
    assert torch.equal(encoder(images).pooler_output, before)  # nothing of the looking stays behind
    assert all(block.attn.fused_attn for block in encoder.network.blocks)
    # oracle: hide the patch that layer 1 looks at most from attention, and the others share what it had
    first = maps["layer 1"][0].mean(dim=0).flatten()
    visible = torch.ones(1, 1, 1, 17, dtype=torch.bool)
    visible[..., 1 + first.argmax()] = False
    seen: list[torch.Tensor] = []
    attention = encoder.network.blocks[0].attn
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder.network.forward_features(images[:1], attn_mask=visible)
    handle.remove()
    hidden = seen[0][0, :, 0, 1:]  # [A, N]
    whole = maps["layer 1"][0].flatten(1)
    share = whole[:, first.argmax()]
    expected = whole / (1 - share[:, None])  # softmax without one entry: the others grow alike
    expected[:, first.argmax()] = 0
    assert_close(hidden, expected, rtol=0, atol=1e-5)


def test_a_tower_without_cls_shows_its_poolings_query_too() -> None:
    encoder, images = build("vit_base_patch16_siglip_224", num_classes=0), torch.randn(1, 3, 32, 32)
    maps = attention_maps(encoder, images, [3])
    assert list(maps) == ["layer 3", "pooling"]
    for rows in maps.values():
        assert_close(rows.sum(dim=(-1, -2)), torch.ones(1, 3))
    # the pooled output is the mean of the values under these shares, projected
    pool, features = encoder.network.attn_pool, encoder(images).last_hidden_state
    values = pool.kv(features).reshape(1, 16, 2, 3, 16)[:, :, 1].transpose(1, 2)  # [B, A, N, 16]
    mixed = (maps["pooling"].flatten(2).unsqueeze(2) @ values).transpose(1, 2).flatten(1)
    mixed = pool.proj(mixed)
    assert_close((mixed + pool.mlp(pool.norm(mixed))), encoder(images).pooler_output, rtol=0, atol=1e-4)


def test_text_maps_are_cosines_of_the_tokens() -> None:
    encoder, images, texts = build("eva02_base_patch14_224", global_pool="token"), torch.randn(2, 3, 32, 32), torch.randn(5, 48)
    maps, whole = text_maps(encoder, images, texts)
    tokens = encoder.tokens(images).detach()
    assert maps.shape == (2, 5, 4, 4)
    assert float(maps[1, 3, 2, 1]) == pytest.approx(float(torch.cosine_similarity(tokens[1, 1 + 9], texts[3], dim=0)), abs=1e-5)
    assert float(whole[0, 4]) == pytest.approx(float(torch.cosine_similarity(tokens[0, 0], texts[4], dim=0)), abs=1e-5)
    with pytest.raises(ConfigError, match="joint width 48, the text tower 24"):
        text_maps(encoder, images, torch.randn(5, 24))


def test_brighter_is_more() -> None:
    ramp = heat(torch.linspace(0, 1, 64).view(8, 8), 0.0, 1.0).reshape(-1, 3).astype(int) @ [299, 587, 114]
    assert (ramp[1:] >= ramp[:-1]).all()
    flat = heat(torch.full((2, 2), 0.3), 0.3, 0.3)
    assert (flat == flat[0, 0]).all()
    assert wrapped("a very long text of many words that will never fit", 100).endswith("...")
    assert wrapped("a cat", 100) == "a cat"


def test_layers_are_chosen_by_words_or_numbers() -> None:
    assert chosen_layers("auto", 24) == [4, 8, 12, 16, 20, 24]
    assert chosen_layers("auto", 3) == [1, 2, 3]
    assert chosen_layers("all", 2) == [1, 2]
    assert chosen_layers("1,12", 12) == [1, 12]
    with pytest.raises(ConfigError, match="numbers from 1 to 12"):
        chosen_layers("last", 12)
    with pytest.raises(ConfigError, match=r"layer 9 was asked for; .* has layers 1 to 3"):
        attention_maps(build("eva02_base_patch14_224"), torch.randn(1, 3, 32, 32), [9])


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspected")
    (root / "photos").mkdir()
    for name, colour in (("red", (200, 30, 30)), ("blue sky", (40, 60, 200))):
        Image.new("RGB", (120, 80), colour).save(root / "photos" / f"{name}.png")
    words = ["--text", "a red square", "blue", "--layers", "1,8"]
    return main(["mini-clip", "--images", str(root / "photos"), *words, "--out", str(root / "run" / "maps")])


def test_inspecting_writes_a_sheet_a_picture_and_kind(inspected: Path) -> None:
    listed = json.loads((inspected / "maps.json").read_text())
    assert listed["encoder"] == "mini-clip"
    assert [row["file"] for row in listed["pictures"]] == [
        "01_blue_sky_attention.png", "01_blue_sky_text.png", "02_red_attention.png", "02_red_text.png",
    ]  # fmt: skip
    with Image.open(inspected / "02_red_attention.png") as sheet:
        assert sheet.width > 4 * 96  # the picture, the mean and three heads
        assert sheet.height > 2 * 96  # two layers
        assert len(sheet.convert("RGB").getcolors(1 << 20) or []) > 50
    assert json.loads((inspected / "manifest.json").read_text())["state"] == "finished"


def test_the_report_shows_the_sheets_of_a_run_folder(inspected: Path) -> None:
    out = report.main([str(inspected.parent)])
    page = (out / "report.html").read_text()
    assert "What the encoder looks at" in page
    assert page.count('<details class="sheet"') == 4
    assert page.count("data:image/png;base64,") >= 4
    assert "a red square" in page
    assert "http" not in page.split('id="maps"')[1].split("</section>")[0]
    assert "| mini-clip | text | red.png | maps/02_red_text.png |" in (out / "report.md").read_text()
    listed = json.loads((out / "report.json").read_text())["maps"]
    assert [row["kind"] for row in listed] == ["attention", "text"] * 2


def test_a_list_of_maps_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "maps.json").write_text('{"pictures": [{"path": "x.png"}]}')
    with pytest.raises(DataError, match=r"maps.json is no list of maps"):
        report.main([str(tmp_path)])
    (tmp_path / "maps.json").write_text('{"encoder": "e", "pictures": [{"file": "../../gone.png", "caption": "x"}]}')
    page = (report.main([str(tmp_path)]) / "report.html").read_text()
    assert "a sheet of maps cannot be shown" in page


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("no picture")
    with pytest.raises(DataError, match=r"note.png' is not an image"):
        main(["mini-clip", "--images", str(tmp_path / "note.png"), "--out", str(tmp_path / "maps")])
    with pytest.raises(DataError, match="there is no such folder"):
        main(["mini-clip", "--images", str(tmp_path / "nowhere"), "--out", str(tmp_path / "maps")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["note.png"]
    with pytest.raises(ConfigError, match="exists already"):
        main(["mini-clip", "--images", str(tmp_path / "note.png"), "--out", str(tmp_path)])
