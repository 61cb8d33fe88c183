"""LLaVA's own folders, built here by hand from what its releases look like: the same logits, exact round trips, diffs for what is wrong."""

import json
import pickle

import pytest
import torch
from llava_tiny import logits, stock_tower, tiny_llm, tiny_tower, write_parts
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection

from llm_stage.export import export, open_source
from llm_stage.generate import ChatModel
from llm_stage.llava import build_llava
from llm_stage.llava_folder import LlavaCard, load_llava, load_projector, save_llava
from llm_stage.original_llava import projector_from_original
from llm_stage.train_llava import LlavaSettings, assemble
from mmkit.config import load_config
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec

MM = {
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad",
    "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_hidden_size": 32, "use_mm_proj": True,
}  # fmt: skip


@pytest.fixture(params=["mlp2x_gelu", "linear"])
def world(tmp_path, request):
    """A tiny LLaVA of stock parts, put together by transformers' names; its parts on disk; what LLaVA would write of it."""
    tower, (llm, tokenizer) = stock_tower(), tiny_llm(tie=False)
    spec = ImageSpec(size=32, resize="pad")
    model, processor = build_llava(tower, (llm, tokenizer), request.param, spec=spec)
    whole = CLIPVisionModelWithProjection(tower.config)  # as releases of CLIP have it
    own = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    whole.vision_model.load_state_dict(own)
    whole.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32}, "crop_size": 32}))
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    return model, processor, tmp_path


def mm_config(world, **changes):
    model, _, folder = world
    text = model.config.text_config.to_dict()
    kind = "linear" if model.config.projector_hidden_act == "linear" else "mlp2x_gelu"
    own = {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "_name_or_path": str(folder / "llm")}
    return {**text, **own, **MM, "mm_projector_type": kind, "mm_vision_tower": str(folder / "clip"), **changes}


def mm_projector(model, prefix="model.mm_projector."):
    layers = model.model.multi_modal_projector
    if model.config.projector_hidden_act == "linear":
        return {f"{prefix}weight": layers.linear_1.weight.detach(), f"{prefix}bias": layers.linear_1.bias.detach()}
    named = {"0": layers.linear_1, "2": layers.linear_2}
    return {f"{prefix}{number}.{part}": getattr(layer, part).detach() for number, layer in named.items() for part in ("weight", "bias")}


def write_whole(world, folder, spoil=lambda state: None, **changes):
    """A release of v1.5: two pickled shards, an index, config.json with mm_* keys, the tower inside."""
    model, processor, _ = world
    state = {}
    for name, tensor in model.model.language_model.state_dict().items():
        state[f"model.{name}"] = tensor
    state["lm_head.weight"] = model.lm_head.weight.detach()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)  # old releases have this table
    for name, tensor in model.model.vision_tower.state_dict().items():
        state[f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = tensor
    state |= mm_projector(model)
    spoil(state)
    folder.mkdir()
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, some in shards.items():
        torch.save({name: state[name].clone() for name in some}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in shards.items() for name in some}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(mm_config(world, **changes)))
    processor.tokenizer.save_pretrained(folder)
    return folder


def write_lora(world, folder, rank=2, alpha=6):
    """A LoRA release; gives the folder and the same model with W + alpha / rank B A worked out by hand."""
    _, _, parts = world
    folder.mkdir()
    adapter, generator = {}, torch.Generator().manual_seed(1)
    merged, _ = build_llava(
        stock_tower(), tiny_llm(tie=False), mm_config(world)["mm_projector_type"], spec=ImageSpec(size=32, resize="pad")
    )
    for number, layer in enumerate(merged.model.language_model.layers):
        for place, module in (("self_attn.q_proj", layer.self_attn.q_proj), ("mlp.up_proj", layer.mlp.up_proj)):
            a = torch.randn(rank, module.in_features, generator=generator) * 0.1
            b = torch.randn(module.out_features, rank, generator=generator) * 0.1
            adapter |= {f"base_model.model.model.layers.{number}.{place}.lora_{n}.weight": t for n, t in (("A", a), ("B", b))}
            module.weight.data += alpha / rank * b @ a
    projector = merged.model.multi_modal_projector
    for parameter in projector.linear_1.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    torch.save(adapter, folder / "adapter_model.bin")
    torch.save(mm_projector(merged, "base_model.model.model.mm_projector."), folder / "non_lora_trainables.bin")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.05, "bias": "none",
        "target_modules": ["q_proj", "up_proj"], "base_model_name_or_path": str(parts / "llm"), "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(mm_config(world)))
    return folder, merged


def test_a_whole_release_is_the_same_model(world, tmp_path):
    model, processor, _ = world
    again, its_processor, card = load_llava(write_whole(world, tmp_path / "release"))
    assert torch.equal(logits(again, its_processor), logits(model, processor))
    assert card.template == "vicuna_v1"
    assert ChatModel.load(tmp_path / "release").chat_format.name == "vicuna_v1"
    assert ChatModel.load(tmp_path / "release", template="own").chat_format.name == "own"


def test_a_release_without_a_tower_takes_the_one_it_names(world, tmp_path):
    model, processor, _ = world
    folder = write_whole(world, tmp_path / "release", lambda state: [state.pop(name) for name in list(state) if "vision_tower" in name])
    again, its_processor, _ = load_llava(folder)
    assert torch.equal(logits(again, its_processor), logits(model, processor))


def test_a_lora_release_is_w_plus_ba(world, tmp_path):
    folder, expected = write_lora(world, tmp_path / "release")
    merged, processor, _ = load_llava(folder)
    loose, _, _ = load_llava(folder, merge=False)
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged, processor), logits(expected, processor), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(loose, processor), logits(expected, processor), rtol=0, atol=1e-5)


def test_a_lora_release_becomes_an_adapter_of_ours_and_plain_transformers(world, tmp_path):
    folder, expected = write_lora(world, tmp_path / "release")
    for form in ("parts", "transformers"):
        export(open_source(folder), tmp_path / form, form)
        model, processor, card = load_llava(tmp_path / form)
        torch.testing.assert_close(logits(model, processor), logits(expected, processor), rtol=0, atol=1e-5)
        assert card.template == "vicuna_v1"
    assert sum("multi_modal_projector" in name for name in load_file(tmp_path / "parts" / "adapter_model.safetensors")) == 4


def test_folders_for_the_parts_may_be_given(world, tmp_path):
    folder, expected = write_lora(world, tmp_path / "release")
    (tmp_path / "llm").rename(tmp_path / "vicuna")
    (tmp_path / "clip").rename(tmp_path / "tower")
    with pytest.raises(DataError, match=r"names the vision tower '.*clip', which is not here.*\n.*--encoder FOLDER"):
        load_llava(folder)
    model, processor, _ = load_llava(folder, encoder=str(tmp_path / "tower"), llm=str(tmp_path / "vicuna"))
    torch.testing.assert_close(logits(model, processor), logits(expected, processor), rtol=0, atol=1e-5)


def test_stage_two_begins_with_a_projector_of_llavas(world, tmp_path):
    model, _, _ = world
    encoder, llm = write_parts(tmp_path / "ours")
    torch.save(mm_projector(model), tmp_path / "mm_projector.bin")
    kind = mm_config(world)["mm_projector_type"]
    words = ["--stage", "2", "--pretrained", str(tmp_path / "mm_projector.bin"), "--projector", kind, "--json", "x", "--steps", "1"]
    with pytest.raises(ConfigError, match="say its --encoder and --llm as well"):
        assemble(load_config(LlavaSettings, words))
    parts = assemble(load_config(LlavaSettings, [*words, "--encoder", str(encoder), "--llm", str(llm)]))
    own = parts.model.model.multi_modal_projector.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in model.model.multi_modal_projector.state_dict().items())


@pytest.mark.parametrize("form", ["original", "original_lora", "mm_projector"])
def test_round_trips_are_exact(world, tmp_path, form):
    if form == "original":
        first, files = write_whole(world, tmp_path / "release"), ()
    elif form == "original_lora":
        (first, _), files = write_lora(world, tmp_path / "release"), ("adapter_model.bin", "non_lora_trainables.bin")
    else:
        first, files = tmp_path / "release", ("mm_projector.bin",)
        first.mkdir()
        torch.save(mm_projector(world[0]), first / "mm_projector.bin")
        (first / "config.json").write_text(json.dumps(mm_config(world)))
    before, processor, _ = load_llava(first, merge=False)
    proof = export(open_source(first), tmp_path / "out", form)
    assert proof.conversion == proof.rounding == 0
    after, its_processor, _ = load_llava(tmp_path / "out", merge=False)
    assert torch.equal(logits(before, processor), logits(after, its_processor))
    for name in files:
        given, written = torch.load(first / name, weights_only=True), read(tmp_path / "out" / name)
        assert given.keys() == written.keys()
        assert all(torch.equal(given[key], written[key]) for key in given)
    if form == "original":
        written = load_file(tmp_path / "out" / "model.safetensors")
        given = {k: v for path in first.glob("*.bin") for k, v in torch.load(path, weights_only=True).items() if "inv_freq" not in k}
        assert given.keys() == written.keys()
        assert all(torch.equal(given[key], written[key]) for key in given)


def read(path):
    return torch.load(path, weights_only=True) if path.is_file() else load_file(path.with_suffix(".safetensors"))


def test_our_own_model_goes_to_llavas_layout_and_back(tmp_path):
    """A tower of timm's, with a preprocessing of its own, as the LoRA's and the projector's reference."""
    model, processor = build_llava(tiny_tower(), tiny_llm())
    save_llava(model, processor, LlavaCard("a", "b", "c"), tmp_path / "model")
    with pytest.raises(ConfigError, match="reads CLIP vision towers only, this model has a ViTModel"):
        export(open_source(tmp_path / "model"), tmp_path / "out", "original")
    with pytest.raises(ConfigError, match="has no adapter"):
        export(open_source(tmp_path / "model"), tmp_path / "out", "original_lora")
    assert not (tmp_path / "out").exists()


def test_a_projector_of_other_widths_names_both(tmp_path):
    model, _ = build_llava(tiny_tower(), tiny_llm())
    shapes = {"0.weight": (64, 24), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    torch.save({f"model.mm_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "mm_projector.bin")
    with pytest.raises(ConfigError, match=r"leads from width 24 to width 64; here it would have to lead from 32 .* to 48"):
        load_projector(model, tmp_path / "mm_projector.bin")
    torch.save({"model.mm_projector.weight": torch.zeros(48, 32), "model.mm_projector.bias": torch.zeros(48)}, tmp_path / "linear.bin")
    with pytest.raises(ConfigError, match=r"of kind linear, the model's of kind mlp2x_gelu: set --projector linear"):
        load_projector(model, tmp_path / "linear.bin")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("model.mm_projector.2.bias"), r"1 of 4 tensors missing: 2\.bias"),
        (lambda state: state.update({"model.embed_tokens.weight": torch.zeros(3, 48)}), r"1 of 5 tensors unexpected: model\.embed_tokens"),
        (lambda state: state.update({"model.mm_projector.4.weight": torch.zeros(3, 48)}), r"1 of 5 tensors unexpected: 4\.weight"),
    ],
)
def test_what_does_not_belong_to_a_projector_is_a_diff(change, message):
    shapes = {"0.weight": (48, 32), "0.bias": (48,), "2.weight": (48, 48), "2.bias": (48,)}
    state = {f"model.mm_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    change(state)
    with pytest.raises(DataError, match=message):
        projector_from_original(state, "mm_projector.bin")


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.fixture
def plain(tmp_path):
    """A release of v1.5 and what it was made of, without the variants."""
    model, processor = build_llava(stock_tower(), tiny_llm(tie=False), spec=ImageSpec(size=32, resize="pad"))
    stock_tower().save_pretrained(tmp_path / "clip")
    return write_whole((model, processor, tmp_path), tmp_path / "release")


def test_a_file_with_code_in_it_is_refused(plain, capsys):
    (plain / "pytorch_model-00002-of-00002.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil()}))
    with pytest.raises(DataError, match=r"pytorch_model-00002-of-00002.bin is no whole weight file"):
        load_llava(plain)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("mm_projector_type", "mlp3x_gelu", "mm_projector_type 'mlp3x_gelu'; what can be loaded here is mlp2x_gelu or linear"),
        ("image_aspect_ratio", "anyres", "LLaVA-NeXT"),
        ("mm_use_im_start_end", True, "mm_use_im_start_end True"),
        ("mm_vision_select_feature", "cls", "patch or cls_patch"),
        ("model_type", "llava_mpt", "model_type 'llava_mpt'"),
    ],
)
def test_what_transformers_cannot_express_is_refused(plain, key, value, message):
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ConfigError, match=message):
        load_llava(plain)


@pytest.mark.parametrize(
    "drop, add, message",
    [
        ("model.norm.weight", None, r"1 missing \(model.norm.weight\)"),
        (None, "model.layers.7.mlp.up_proj.weight", r"1 unexpected \(model.layers.7"),
        ("model.mm_projector.0.bias", None, r"1 of 4 tensors missing: 0\.bias"),
        ("model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias", None, "the vision tower in .*(.|\n)*1 of .* missing"),
    ],
)
def test_missing_and_superfluous_tensors_are_named(plain, drop, add, message):
    for path in sorted(plain.glob("*.bin")):
        state = torch.load(path, weights_only=True)
        state.pop(drop, None)
        torch.save({**state, **({add: torch.zeros(2)} if add else {})}, path)
    with pytest.raises(DataError, match=message):
        load_llava(plain)


def test_a_missing_shard_is_named(plain):
    (plain / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(DataError, match=r"pytorch_model-00001-of-00002.bin is missing, one of 2 shards"):
        load_llava(plain)


def test_a_lora_tensor_too_few_or_too_many_is_named(world, tmp_path):
    folder, _ = write_lora(world, tmp_path / "release")
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    state["base_model.model.lm_head.lora_A.weight"] = state.pop(name)
    (folder / "adapter_model.bin").unlink()
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(
        DataError, match=r"1 of 8 tensors missing: .*language_model.layers.1.mlp.up_proj.lora_B(.|\n)*1 of 8 .*unexpected.*lm_head"
    ):
        load_llava(folder)
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(DataError, match=r"non_lora_trainables.bin is missing"):
        load_llava(folder)
