"""`mmkit export`: the same model in another form, without mmkit where that is promised; cards that tell; whole or absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from llava_tiny import logits, picture, stock_tower, tiny_llm, tiny_tower, write_parts
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from apps import demo
from apps.listing import models as list_models
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from llm_stage import export as module
from llm_stage import models, parity
from llm_stage.adapters import round_like_quantized
from llm_stage.chat_format import Turn
from llm_stage.export import export, main, open_source
from llm_stage.generate import ChatModel, ChatRequest
from llm_stage.llava import build_llava
from llm_stage.llava_folder import CARD, LlavaCard, load_llava, read_card, save_adapter, save_llava, save_projector
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.trainable import weights_hash

TARGETS = r".*language_model.*\.(q|v|up)_proj"
FRESH = """
import sys, torch
stock, kept, inputs, out = sys.argv[1:]
from transformers import AutoProcessor, LlavaForConditionalGeneration
inputs = torch.load(inputs)
def logits(folder):
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model(**inputs).logits
found = [logits(stock)]
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
prompt = AutoProcessor.from_pretrained(stock).apply_chat_template(chat, add_generation_prompt=True)
sys.path.insert(0, kept)
import mmkit_encoder
found.append(logits(kept))
ours = [name for name in sys.modules if name.split(".")[0] in ("mmkit", "encoders", "llm_stage")]
torch.save({"logits": found, "prompt": prompt, "ours": ours}, out)
"""


def adapted(model, seed=0):
    """A LoRA with something in it, and the projector."""
    torch.manual_seed(seed)
    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=["multi_modal_projector"]))
    for name, parameter in made.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


@pytest.fixture
def lora(tmp_path):
    """An adapter folder, its model before saving, and its processor."""
    encoder, llm = write_parts(tmp_path)
    model, processor = build_llava(str(encoder), str(llm))
    card = LlavaCard(str(encoder), str(llm), weights_hash(model.model.vision_tower))
    made = adapted(model)
    save_adapter(made, processor, card, tmp_path / "lora")
    return tmp_path / "lora", made, processor


def eva_tower():
    """A tower with rotary positions, for which transformers has no form."""
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return VisionEncoder(VisionEncoderConfig(architecture="eva02_tiny_patch14_224", model_args=args, origin="tiny random")).eval()


# -- plain transformers --------------------------------------------------------------------------------------------------------------------


def test_a_fresh_process_without_mmkit_gives_the_same_logits(lora, tmp_path):
    folder, made, processor = lora
    main([str(folder), str(tmp_path / "stock")])
    kept, its_processor = build_llava(eva_tower(), tiny_llm(tie=False))
    save_llava(kept, its_processor, LlavaCard("eva", "b", "c"), tmp_path / "whole")
    main([str(tmp_path / "whole"), str(tmp_path / "kept")])
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "The vision tower stays mmkit's own" in card
    assert "import mmkit_encoder" in card
    inputs = processor(images=picture("red"), text="<image>\nwhat colour is it", return_tensors="pt")
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    paths = [str(tmp_path / name) for name in ("stock", "kept", "inputs.pt", "out.pt")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", FRESH, *paths], capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt")
    assert found["ours"] == []
    torch.testing.assert_close(found["logits"][0], logits(made, processor), rtol=0, atol=1e-5)  # merged, and ViT in place of timm's form
    assert torch.equal(found["logits"][1], kept(**inputs).logits)
    assert found["prompt"] == "<|im_start|>user\n<image>\nwhat<|im_end|><|im_start|>assistant\n"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_whole_models_are_written_in_the_asked_dtype(lora, tmp_path, dtype):
    folder, made, processor = lora
    proof = export(open_source(folder), tmp_path / "out", dtype=dtype)
    assert proof.conversion <= 1e-6
    assert proof.form <= 1e-5
    assert proof.rounding <= {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}[dtype]
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {module.DTYPES[dtype]}
    again, its_processor, card = load_llava(tmp_path / "out")
    assert float((logits(again, its_processor) - logits(made, processor)).abs().max()) <= max(1e-5, 2 * proof.rounding)
    assert card.template == "own"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.unlink(), r"model-00002-of-0000\d.safetensors is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), r"model-00002-of-0000\d.safetensors has [\d,]+ bytes.*cut off"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\7"),
            r"model-00002-of-0000\d.safetensors is not the file that was written",
        ),
    ],
    ids=["missing", "cut off", "changed"],
)
@pytest.mark.parametrize("stock", [False, True], ids=["ours", "without a card"])
def test_a_faulty_shard_is_named(lora, tmp_path, spoil, message, stock):
    out = main([str(lora[0]), str(tmp_path / "out"), "--max_shard_size", "100KB"])
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    load_llava(out)
    if stock:
        (out / CARD).unlink()
        if "not the file" in message:
            pytest.skip("without our card there are no hashes to compare with")
    spoil(shards[1])
    with pytest.raises(DataError, match=message):
        load_llava(out)


def test_an_export_that_is_another_model_is_refused(lora, tmp_path, monkeypatch):
    def broken(encoder, layers):
        tower = real(encoder, layers)
        with torch.no_grad():
            tower.embeddings.cls_token += 1
            tower.embeddings.position_embeddings += 1
        return tower

    real = module.stock_tower
    monkeypatch.setattr(module, "stock_tower", broken)
    with pytest.raises(
        DataError, match=r"not exported: merged and in its new form against the model before, the logits differ by .*; up to .* is right"
    ):
        main([str(lora[0]), str(tmp_path / "out")])
    monkeypatch.setattr(module, "stock_tower", real)
    monkeypatch.setattr(module, "save_llava", lambda model, *rest, **more: save_llava(shifted(model), *rest, **more))
    with pytest.raises(DataError, match=r"not exported: read back against what was to be written, the logits differ"):
        main([str(lora[0]), str(tmp_path / "out")])
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def shifted(model):
    model.lm_head.weight.data += 0.01
    return model


def test_a_processor_that_prepares_other_pictures_is_refused(lora, tmp_path, monkeypatch):
    _, _, processor = lora
    inputs = parity.probe(processor)
    with pytest.raises(DataError, match="makes other pixel_values"):
        parity.refuse_other_inputs(inputs, {**inputs, "pixel_values": inputs["pixel_values"] + 1e-3})


# -- parts ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini_chat(tmp_path_factory):
    """What the kit ships one day: an adapter in half precision on named parts."""
    folder = tmp_path_factory.mktemp("mini_chat")
    model, processor = build_llava("mini-clip", "mini-llm")
    card = LlavaCard("mini-clip", "mini-llm", weights_hash(model.model.vision_tower), feature_layer=-2)
    made = adapted(model)
    save_adapter(made, processor, card, folder / "lora")
    out = main([str(folder / "lora"), str(folder / "shipped"), "--format", "parts", "--dtype", "fp16"])
    return out, logits(made, processor), processor


def test_parts_refer_to_encoder_and_llm_by_name(mini_chat):
    out, expected, _ = mini_chat
    card = json.loads((out / CARD).read_text())
    assert (card["encoder"], card["llm"]) == ("mini-clip", "mini-llm")
    assert not {"encoder_folder", "llm_folder"} & set(card)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors", CARD]
    assert "/" + str(Path.cwd().parts[1]) not in "".join(path.read_text() for path in out.glob("*.json"))
    state = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert sum("multi_modal_projector" in name for name in state) == 4
    again, processor, _ = load_llava(out)
    torch.testing.assert_close(logits(again, processor), expected, rtol=0, atol=2e-2)  # half precision, logits of order one


def test_a_named_model_is_one_for_chat_demo_and_lists(mini_chat, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "QUICKSTART", tmp_path / "none")
    row = models.ChatModelRow("a test", "none", tmp_path / "absent", "mini-llm")
    monkeypatch.setattr(models, "MODELS", {"mini-chat": row})
    with pytest.raises(ConfigError, match="mmkit quickstart"):
        demo.quickstart_models()
    with pytest.raises(ConfigError, match="mini-chat: its weights are not in this installation"):
        ChatModel.load("mini-chat")
    assert list_models()[1] == [["mini-chat", "a test", "none", "mini-llm", "no"]]
    for table in (models.MODELS, sys.modules["llm_stage.generate"].MODELS):
        monkeypatch.setitem(table, "mini-chat", models.ChatModelRow("a test", "none", mini_chat[0], "mini-llm"))
    assert demo.quickstart_models() == ["mini-chat"]
    chat = ChatModel.load("mini-chat")
    assert chat.name == "mini-chat"
    assert isinstance(chat.generate([ChatRequest([Turn("user", "what is in the picture?")], [picture("red")])], 3)[0], str)
    with pytest.raises(NameNotFound, match="mini-chat"):
        ChatModel.load("mini-chatt")


def test_the_chat_model_that_ships_fits_the_package():
    """Rank 16 on all linear layers of SmolLM2-135M and a projector of two layers, in half precision: at most 12 MB."""
    width, hidden, keys, layers, encoder = 576, 1536, 192, 30, 192
    lora = 16 * layers * (2 * (width + width) + 2 * (width + keys) + 3 * (width + hidden))
    projector = encoder * width + width + width * width + width
    assert 2 * (lora + projector) < 12e6
    row = models.MODELS["mini-chat"]
    if row.present:
        assert sum(path.stat().st_size for path in row.folder.iterdir()) < 12e6


def test_another_name_for_the_encoder_has_to_lead_to_the_same_weights(tmp_path, lora):
    folder, _, _ = lora
    VisionEncoder.from_pretrained(tmp_path / "encoder").save_pretrained(tmp_path / "copy")
    tiny_tower(seed=1).save_pretrained(tmp_path / "other")
    main([str(folder), str(tmp_path / "out"), "--format", "parts", "--encoder", str(tmp_path / "copy")])
    assert Path(read_card(tmp_path / "out").encoder) == tmp_path / "copy"
    with pytest.raises(DataError, match="was trained with an encoder whose weights hash to"):
        main([str(folder), str(tmp_path / "out2"), "--format", "parts", "--encoder", str(tmp_path / "other")])


def test_a_whole_model_has_no_parts_to_name(tmp_path):
    model, processor = build_llava(stock_tower(), tiny_llm())
    save_llava(model, processor, None, tmp_path / "model")
    with pytest.raises(ConfigError, match="is a whole model, whose LLM was trained"):
        main([str(tmp_path / "model"), str(tmp_path / "out"), "--format", "parts"])
    with pytest.raises(ConfigError, match="does not say which encoder and LLM it was made of"):
        main([str(tmp_path / "model"), str(tmp_path / "out"), "--format", "mm_projector"])
    assert not (tmp_path / "out").exists()
    main([str(tmp_path / "model"), str(tmp_path / "out"), "--format", "mm_projector", "--encoder", "openai/clip", "--llm", "lmsys/vicuna"])
    state = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    assert torch.equal(state["model.mm_projector.2.bias"], model.model.multi_modal_projector.linear_2.bias)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mm_vision_tower"], config["_name_or_path"], config["mm_hidden_size"]) == ("openai/clip", "lmsys/vicuna", 32)


# -- 4 bit, hub --------------------------------------------------------------------------------------------------------------------------------


def test_adapters_of_four_bit_weights_merge_into_what_they_saw(tmp_path):
    """Unmerged: the layers of bitsandbytes themselves, float32 sums. Merged: their values in ordinary layers."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    encoder, llm = write_parts(tmp_path)
    model, processor = build_llava(str(encoder), str(llm))
    quantization = {"bits": 4, "type": "nf4", "double": True, "dtype": "fp32"}
    card = LlavaCard(str(encoder), str(llm), weights_hash(model.model.vision_tower), quantization=quantization)
    save_adapter(adapted(model), processor, card, tmp_path / "lora")
    trained, _ = build_llava(str(encoder), str(llm))
    for name, layer in list(trained.model.language_model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            packed.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
            packed.support_avx512bf16_for_cpu = False  # a kernel that sums in bfloat16, and only where rows come in 32s
            trained.model.language_model.set_submodule(name, packed.to("cpu"))
    expected = logits(adapted(trained), processor)
    merged, _, _ = load_llava(tmp_path / "lora")
    torch.testing.assert_close(logits(merged, processor), expected, rtol=0, atol=1e-4)  # the same values, summed in another order
    whole = LlavaCard(str(encoder), str(llm), card.encoder_hash)
    save_adapter(adapted(build_llava(str(encoder), str(llm))[0]), processor, whole, tmp_path / "other")
    other, _, _ = load_llava(tmp_path / "other")
    assert float((logits(other, processor) - expected).abs().max()) > 1e-3  # merging into the unrounded weights is another model
    with pytest.raises(ConfigError, match="8 bits; 4 is"):
        round_like_quantized(model, {"bits": 8})


class Hub:
    """The two calls of the hub's client, remembered."""

    calls: list = []  # noqa: RUF012

    def create_repo(self, repository, private, exist_ok):
        self.calls.append(("create", repository, private))
        return type("Url", (str,), {"repo_id": repository})(f"https://hub/{repository}")

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


class NoHub(Hub):
    def create_repo(self, *args, **kwargs):
        raise OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled.")


def test_a_push_uploads_the_finished_folder_and_offline_says_how_to_go_on(mini_chat, tmp_path, monkeypatch, capsys):
    words = [str(mini_chat[0]), str(tmp_path / "out"), "--format", "parts", "--push_to_hub", "me/model", "--private"]
    monkeypatch.setattr(module, "HfApi", NoHub)
    with pytest.raises(ConfigError, match=r"out is complete, and was not uploaded to me/model: Cannot reach(.|\n)*hf upload me/model"):
        main(words)
    load_llava(tmp_path / "out")
    monkeypatch.setattr(module, "HfApi", Hub)
    main([*words, "--overwrite"])
    assert Hub.calls[0] == ("create", "me/model", True)
    assert {"README.md", "adapter_model.safetensors", CARD} <= set(Hub.calls[1][2])
    assert "uploaded: https://hub/me/model" in capsys.readouterr().out


def test_a_projector_folder_exports_with_its_llm_whole(tmp_path):
    encoder, llm = write_parts(tmp_path, tie=False)
    model, processor = build_llava(str(encoder), str(llm), "linear")
    save_projector(
        model.state_dict(), processor, LlavaCard(str(encoder), str(llm), weights_hash(model.model.vision_tower), "linear"), tmp_path / "one"
    )
    main([str(tmp_path / "one"), str(tmp_path / "out")])
    again, its_processor, _ = load_llava(tmp_path / "out")
    torch.testing.assert_close(logits(again, its_processor), logits(model, processor), rtol=0, atol=1e-5)
