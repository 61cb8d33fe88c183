"""BLIP-2 from LAVIS, from and to transformers, and with another encoder: every number stays, every misfit is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_qformer import GOLDEN, close, load_golden
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from encoders import convert
from encoders.catalog import load_encoder
from llm_stage.blip2_folder import load_blip2
from llm_stage.convert_blip2 import from_hf, lavis, swap, to_hf
from llm_stage.qformer_folder import load_qformer
from mmkit.errors import ConfigError, DataError

SIZES = {"img_size": 42, "patch_size": 14, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 279 / 64}
SHAPE = '{"heads": 4, "encoder_heads": 4}'


def words_folder(folder: Path, special: dict[str, int], size: int, begin: str = "") -> Path:
    """A tokenizer of `size` words, w0 w1 ..., some of them special."""
    vocabulary = {name: place for name, place in special.items()}
    vocabulary |= {f"w{place}": place for place in range(size) if place not in special.values()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=f"w{size - 1}"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, special[begin])])
    names = {"[PAD]": "pad_token", "[CLS]": "cls_token", "[SEP]": "sep_token", "<pad>": "pad_token", "</s>": "eos_token"}
    known = {names[name]: name for name in special if name in names}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=f"w{size - 1}", **known).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAVIS's tiny files as LAVIS writes them, the encoder as this kit does, tokenizers, and OPT as transformers does."""
    folder = tmp_path_factory.mktemp("lavis")
    golden = load_golden()
    torch.save({"model": golden["state_dict"], "epoch": 3}, folder / "stage1.pth")
    eva = load_file(GOLDEN / "eva_vit.safetensors")
    torch.save({"model": golden["state_dict"] | tuned(eva)}, folder / "coco.pth")
    convert.eva([str(GOLDEN / "eva_vit.safetensors"), str(folder / "vit"), "--model", "eva_vit_g", "--model_args", json.dumps(SIZES)])
    words_folder(folder / "bert", {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2}, 119)
    second = load_file(GOLDEN / "stage2.safetensors")
    path = {
        key: value
        for key, value in golden["state_dict"].items()
        if not key.startswith(("Qformer.cls", "vision_proj", "text_proj", "itm", "temp"))
    }
    path = {key: value for key, value in path.items() if ".embeddings.word" not in key and ".embeddings.pos" not in key}
    projection = {key: value for key, value in second.items() if key.startswith("opt_proj")}
    torch.save({"model": path | projection}, folder / "stage2.pth")
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 80}
    ids = {"max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    llm = OPTForCausalLM(OPTConfig(**sizes, **ids, word_embed_proj_dim=40, dropout=0.0))
    llm.load_state_dict(
        {key.removeprefix("opt_model."): value for key, value in second.items() if key.startswith("opt_model.")}, strict=False
    )
    llm.save_pretrained(folder / "opt")
    words_folder(folder / "opt", {"<pad>": 1, "</s>": 2, "\n": 5}, 63, begin="</s>")
    return folder


def tuned(eva: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tower as the tuned checkpoints hold it: two blocks, no norm, no head."""
    return {f"visual_encoder.{key}": value for key, value in eva.items() if not key.startswith(("blocks.2.", "norm.", "head."))}


@pytest.fixture(scope="module")
def stage1(world: Path) -> Path:
    words = [str(world / "stage1.pth"), str(world / "stage1"), "--encoder", str(world / "vit"), "--tokenizer", str(world / "bert")]
    return lavis([*words, "--config", SHAPE])


@pytest.fixture(scope="module")
def stage2(world: Path) -> Path:
    words = [str(world / "stage2.pth"), str(world / "stage2"), "--encoder", str(world / "vit"), "--llm", str(world / "opt")]
    return lavis([*words, "--config", SHAPE])


def test_a_stage_1_checkpoint_gives_lavis_own_numbers_from_pixels(stage1: Path) -> None:
    golden, parts = load_golden(), load_qformer(stage1)
    pixels = golden["inputs"]["pixel_values"]
    with torch.no_grad():
        close(parts.features(pixels), golden["outputs"]["image_embeds_raw"])
        queries = parts.qformer.queries(parts.qformer.image_states(parts.features(pixels)))
        close(queries, golden["outputs"]["query_output"])
    assert float(parts.qformer.temp) == pytest.approx(float(golden["state_dict"]["temp"]))


def test_a_tuned_checkpoint_brings_its_own_encoder(world: Path) -> None:
    words = [str(world / "coco.pth"), str(world / "coco"), "--tokenizer", str(world / "bert"), "--config", SHAPE]
    golden, parts = load_golden(), load_qformer(lavis(words))
    close(parts.features(golden["inputs"]["pixel_values"]), golden["outputs"]["image_embeds_raw"])
    assert parts.card.feature_layer == -1
    assert parts.spec.resize == "squash"
    with pytest.raises(ConfigError, match="brings its own encoder"):
        lavis([*words[:1], str(world / "no"), *words[2:], "--encoder", str(world / "vit")])


def test_a_stage_2_checkpoint_gives_lavis_own_numbers(stage2: Path) -> None:
    golden, theirs, parts = load_golden(), load_file(GOLDEN / "stage2.safetensors"), load_blip2(stage2)
    with torch.no_grad():
        close(parts.model.soft_prompt(parts.features(golden["inputs"]["pixel_values"][:3])), theirs["out/query_embeds_llm"])
    assert parts.text.tokenizer("w7 w8").input_ids == [2, 7, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--encoder="], "holds no encoder: name the one"),
        (["--encoder", "mini-clip"], "reads tokens of width 64, mini-clip gives 192"),
        (["--tokenizer", "opt"], "words, the tokenizer .* with .DEC.: another one|tokenizer is of BERT's kind"),
        (["--config", "{"], "no valid JSON"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(world: Path, tmp_path: Path, change: list[str], message: str) -> None:
    words = [str(world / "stage1.pth"), str(tmp_path / "out"), "--encoder", str(world / "vit"), "--tokenizer", str(world / "bert")]
    change = [str(world / "opt") if word == "opt" else word for word in change]
    with pytest.raises((ConfigError, DataError), match=message):
        lavis([*words, "--config", SHAPE, *change])
    assert not (tmp_path / "out").exists()


def test_a_second_stage_needs_its_language_model(world: Path, tmp_path: Path) -> None:
    words = [str(world / "stage2.pth"), str(tmp_path / "out"), "--encoder", str(world / "vit"), "--config", SHAPE]
    with pytest.raises(ConfigError, match=r"is of the second stage .opt_proj.: name its language model"):
        lavis(words)
    with pytest.raises(DataError, match="projects to width 40, mini-llm has 256"):
        lavis([*words, "--llm", "mini-llm"])
    torch.save({"model": {"nonsense": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(DataError, match="'nonsense' is no weight of a BLIP-2"):
        lavis([str(tmp_path / "other.pth"), *words[1:]])


# ---- transformers --------------------------------------------------------------------------------------------------------------------


def test_a_q_former_goes_to_transformers_and_back_bit_for_bit(stage1: Path, tmp_path: Path) -> None:
    golden, ours = load_golden(), load_qformer(stage1)
    folder = to_hf([str(stage1), str(tmp_path / "hf")])
    theirs: Any = Blip2ForImageTextRetrieval.from_pretrained(folder)
    theirs.vision_model.post_layernorm.eps = 1e-5  # what its configuration cannot say
    ids, mask = golden["inputs"]["input_ids"], golden["inputs"]["attention_mask"]
    pixels = golden["inputs"]["pixel_values"]
    with torch.no_grad():
        cosines = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits_per_image
        close(cosines, golden["outputs"]["sim_cos"])
    again = load_qformer(from_hf([str(folder), str(tmp_path / "back")]))
    for key, tensor in ours.qformer.state_dict().items():
        assert torch.equal(tensor, again.qformer.state_dict()[key]), key
    with torch.no_grad():
        close(again.features(pixels), golden["outputs"]["image_embeds_raw"])
    (folder / "mmkit_stage1.safetensors").unlink()
    fresh = load_qformer(from_hf([str(folder), str(tmp_path / "fresh")]))
    assert float(fresh.qformer.temp) == pytest.approx(0.07)


def test_a_blip_2_goes_to_transformers_and_back(stage2: Path, tmp_path: Path) -> None:
    golden, ours = load_golden(), load_blip2(stage2)
    wanted = load_file(GOLDEN / "stage2.safetensors")
    folder = to_hf([str(stage2), str(tmp_path / "hf")])
    theirs: Any = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    theirs.vision_model.post_layernorm.eps = 1e-5
    ids = torch.cat([torch.full((3, 8), theirs.config.image_token_index), wanted["in/input_ids"]], dim=1)
    mask = torch.cat([torch.ones(3, 8, dtype=torch.long), wanted["in/attention_mask"]], dim=1)
    with torch.no_grad():
        logits = theirs(pixel_values=golden["inputs"]["pixel_values"][:3], input_ids=ids, attention_mask=mask).logits
        close(logits[mask.bool()][:, :64], wanted["out/logits"][mask.bool()])
    again = load_blip2(from_hf([str(folder), str(tmp_path / "back")]))
    assert (tmp_path / "back" / "llm" / "config.json").is_file()
    for key, tensor in ours.model.trained_state().items():
        assert torch.equal(tensor, again.model.trained_state()[key]), key
    moved = (tmp_path / "back").rename(tmp_path / "moved")
    assert load_blip2(moved).card.llm == str((moved / "llm").resolve())


def test_transformers_has_one_kind_of_tower_and_puts_the_image_first(tmp_path: Path, stage2: Path) -> None:
    content = json.loads((stage2 / "blip2.json").read_text())
    other = tmp_path / "lead"
    __import__("shutil").copytree(stage2, other)
    (other / "blip2.json").write_text(json.dumps({**content, "lead": "w7 w8"}))
    with pytest.raises(ConfigError, match="in front of the image; transformers' puts the image first"):
        to_hf([str(other), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="is no BLIP-2 folder of transformers"):
        from_hf([str(tmp_path), str(tmp_path / "out")])


# ---- swap ----------------------------------------------------------------------------------------------------------------------------


def test_other_weights_of_the_same_network_are_swapped_in(world: Path, stage1: Path, tmp_path: Path) -> None:
    encoder = load_encoder(str(world / "vit"))
    with torch.no_grad():
        encoder.network.blocks[0].attn.proj.weight.add_(0.01)
    encoder.save_pretrained(tmp_path / "new")
    parts = load_qformer(swap([str(stage1), str(tmp_path / "swapped"), "--encoder", str(tmp_path / "new")]))
    assert parts.card.mode == "swap"
    assert 0.5 < parts.card.training["drift"] < 1
    pixels = load_golden()["inputs"]["pixel_values"]
    assert not torch.equal(parts.features(pixels), load_qformer(stage1).features(pixels))
    same = load_qformer(swap([str(stage1), str(tmp_path / "same"), "--encoder", str(world / "vit")]))
    assert same.card.training["drift"] == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        close(same.features(pixels), load_golden()["outputs"]["image_embeds_raw"])


def test_another_network_is_refused_with_both_shapes(world: Path, stage1: Path, stage2: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"is .*\[1, \d+, 192\].* there, \[1, 10, 64\] here|is not there there|is \[1, 1, 192\] there, \[1, 1, 64\] here"
    ):
        swap([str(stage1), str(tmp_path / "out"), "--encoder", "mini-clip"])
    eva = load_file(GOLDEN / "eva_vit.safetensors")
    save_file({key: value for key, value in eva.items() if not key.startswith("blocks.2.")}, tmp_path / "two.safetensors")
    sizes = json.dumps({**SIZES, "depth": 2})
    convert.eva([str(tmp_path / "two.safetensors"), str(tmp_path / "two"), "--model", "eva_vit_g", "--model_args", sizes])
    kept = load_blip2(swap([str(stage2), str(tmp_path / "out2"), "--encoder", str(tmp_path / "two")]))  # BLIP-2 reads two of three blocks
    assert kept.card.feature_layer == 2
    save_file({key: value for key, value in eva.items() if not key.startswith(("blocks.1.", "blocks.2."))}, tmp_path / "one.safetensors")
    sizes = json.dumps({**SIZES, "depth": 1})
    convert.eva([str(tmp_path / "one.safetensors"), str(tmp_path / "one"), "--model", "eva_vit_g", "--model_args", sizes])
    with pytest.raises(DataError, match=r"blocks\.1\.\S+ is not there there"):
        swap([str(stage2), str(tmp_path / "out3"), "--encoder", str(tmp_path / "one")])
    assert not (tmp_path / "out3").exists()
