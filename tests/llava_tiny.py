"""Tiny random parts for the LLaVA tests: an encoder folder, an LLM folder, LLaVA JSON with pictures. Seconds on one core."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlavaProcessor, PreTrainedTokenizerFast

from encoders.modeling import VisionEncoder, VisionEncoderConfig

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


def tiny_tower(seed: int = 0, size: int = 32) -> VisionEncoder:
    """A ViT of 4 blocks, width 32, 16 px patches of 8 px: 16 patches and a CLS."""
    torch.manual_seed(seed)
    args = {"img_size": size, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return VisionEncoder(VisionEncoderConfig(architecture="vit_tiny_patch16_224", model_args=args, origin="tiny random")).eval()


def stock_tower(seed: int = 0) -> CLIPVisionModel:
    """A stock CLIP vision model of the same size."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=16)).eval()


def tiny_tokenizer(*marks: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the marks of chatml and `<image>`, and further ones."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>", *marks]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = ["what colour is it", "it is red green blue white", "user assistant", "how many pictures are there"]
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>", "<image>", *marks]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_llm(seed: int = 0, tie: bool = True) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama of 2 layers, width 48."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=tie, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def write_parts(folder: Path, tie: bool = True) -> tuple[Path, Path]:
    """An encoder folder and an LLM folder."""
    encoder, llm = folder / "encoder", folder / "llm"
    tiny_tower().save_pretrained(encoder)
    model, tokenizer = tiny_llm(tie=tie)
    model.save_pretrained(llm)
    tokenizer.save_pretrained(llm)
    return encoder, llm


def picture(colour: str, size: tuple[int, int] = (40, 36), seed: int = 0) -> Image.Image:
    """A nearly plain picture: some noise, so that no two are the same."""
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def write_data(folder: Path, rows: int = 24, text_only_every: int = 0) -> tuple[Path, Path]:
    """LLaVA JSON and its image folder: what colour is it.

    Args:
        folder: Where to write.
        rows: How many.
        text_only_every: Every n-th row has no image; 0 is none.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    names = list(COLOURS)
    records = []
    for index in range(rows):
        colour = names[index % len(names)]
        if text_only_every and index % text_only_every == 0:
            turns = [("human", "say " + colour), ("gpt", colour)]
            records.append({"id": f"text{index}", "conversations": [{"from": who, "value": value} for who, value in turns]})
            continue
        picture(colour, seed=index).save(images / f"{index:03d}.png")
        turns = [("human", "<image>\nwhat colour is it"), ("gpt", "it is " + colour)]
        if index % 3 == 0:
            turns += [("human", "how many pictures are there"), ("gpt", "one")]
        conversations = [{"from": who, "value": value} for who, value in turns]
        records.append({"id": f"row{index}", "image": f"{index:03d}.png", "conversations": conversations})
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path, images


def logits(model: torch.nn.Module, processor: LlavaProcessor) -> torch.Tensor:
    """Logits [1, L, V] of a model for a red picture and a question."""
    inputs = processor(images=picture("red"), text="<image>\nwhat colour is it", return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits
