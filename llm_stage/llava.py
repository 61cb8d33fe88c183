"""LLaVA from parts: an encoder, a projector and an LLM, put together as transformers' own `LlavaForConditionalGeneration`.

Nothing is subclassed: LLaVA-v1's single linear projector is the stock two-layer projector with an identity activation and a frozen
identity second layer. What is saved is therefore an ordinary Hugging Face LLaVA folder.

Shape letters: B rows, L tokens, V vocabulary, N image tokens per image, D width of the encoder, H width of the LLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from encoders.vision_towers import load_tower
from llm_stage.chat_format import IGNORE_INDEX, IMAGE_MARK
from llm_stage.llms import load_llm
from mmkit.errors import ConfigError, DataError, find
from mmkit.images import ImageSpec
from mmkit.trainable import freeze

PROJECTORS: dict[str, str] = {"mlp2x_gelu": "gelu", "linear": "linear"}
"""Projector name -> activation of the stock projector. "linear" (LLaVA-v1) has an identity second layer besides."""

Select = Literal["default", "full"]


@dataclass(frozen=True)
class TowerGeometry:
    """What LLaVA has to know of a vision tower.

    Attributes:
        spec: How a picture becomes its input.
        num_patches: N patch tokens per image.
        num_prefix_tokens: CLS and registers in front of them.
        patch_size: Pixels per patch; what LlavaProcessor computes the token count from.
        beyond_grid: How many of the N are outside of the square grid that the processor counts: those of further encoders.
    """

    spec: ImageSpec
    num_patches: int
    num_prefix_tokens: int
    patch_size: int
    beyond_grid: int = 0

    def image_tokens(self, select: Select) -> int:
        """How many tokens of one image reach the LLM: stock LLaVA drops exactly one under "default", none under "full"."""
        return self.num_patches + self.num_prefix_tokens - (1 if select == "default" else 0)


_STOCK_PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0}


def tower_geometry(tower: PreTrainedModel, spec: ImageSpec | None = None) -> TowerGeometry:
    """Read a tower's geometry: from mmkit's VisionEncoder or JoinedEncoder, or from a stock CLIP or SigLIP vision model.

    Args:
        tower: The vision tower.
        spec: Its preprocessing, where the tower does not carry it (stock towers). None takes CLIP's means at the tower's own size.

    Raises:
        ConfigError: The tower is of another kind, or its grid is not what its size and patch size say.
    """
    config, beyond = tower.config, 0
    if hasattr(tower, "num_prefix_tokens") and hasattr(tower, "spec"):
        spec, patches, prefix = tower.spec, int(tower.grid[0]) * int(tower.grid[1]), int(tower.num_prefix_tokens)
        patch, beyond = spec.size // int(tower.grid[0]), int(tower.num_patches) - patches
    elif config.model_type in _STOCK_PREFIX:
        spec = spec or ImageSpec(size=config.image_size)
        patch, prefix = config.patch_size, _STOCK_PREFIX[config.model_type]
        patches = (config.image_size // patch) ** 2
    else:
        raise ConfigError(
            f"a vision tower of type {type(tower).__name__} cannot be plugged into LLaVA: give an encoder that "
            f"encoders.vision_towers.load_tower returns, or a stock {' or '.join(_STOCK_PREFIX)}"
        )
    if (spec.size // patch) ** 2 != patches:
        raise ConfigError(
            f"the tower gives {patches} patch tokens where {spec.size} px and patches of {patch} px make {(spec.size // patch) ** 2}: "
            "LLaVA's processor counts a square grid; take an encoder with one"
        )
    return TowerGeometry(spec, patches + beyond, prefix, patch, beyond)


def with_resize(tower: PreTrainedModel, resize: str) -> PreTrainedModel:
    """Let a VisionEncoder's pictures become square in another way than its own: "crop", "squash" or "pad"; "own" changes nothing.

    Raises:
        ConfigError: The tower carries no image spec.
    """
    if resize != "own":
        if not getattr(tower.config, "image_spec", None):
            raise ConfigError(f"resize {resize}: a {type(tower).__name__} has no image spec of its own to change; leave --resize own")
        tower.config.image_spec = {**tower.config.image_spec, "resize": resize}
    return tower


def choose_select(geometry: TowerGeometry, select: Literal["auto", "default", "full"], source: str) -> Select:
    """Settle which tower tokens are used, and refuse the choices that lose patches or keep registers silently.

    Args:
        geometry: The tower's.
        select: "default" drops the CLS token, "full" keeps every token, "auto" drops a CLS where there is one.
        source: The encoder's name, for the message.

    Raises:
        ConfigError: "default" would drop a patch, or leave registers among the patches.
    """
    prefix = geometry.num_prefix_tokens
    if select == "auto":
        select = "default" if prefix else "full"
    if select == "default" and prefix != 1:
        lost = "a patch, as there is no CLS token" if prefix == 0 else f"one of {prefix} prefix tokens and leave the others"
        raise ConfigError(f"feature select 'default' drops the first token; with encoder {source} that would be {lost}. Set --select full")
    return select


def build_llava(
    encoder: str | PreTrainedModel,
    llm: str | tuple[PreTrainedModel, Any],
    projector: str = "mlp2x_gelu",
    feature_layer: int = -2,
    select: Literal["auto", "default", "full"] = "auto",
    *,
    spec: ImageSpec | None = None,
    stop_ids: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Put an encoder, a fresh projector and an LLM together.

    Args:
        encoder: A name or folder for `load_tower`, or a loaded tower.
        llm: A name or folder for `load_llm`, or a loaded causal LM with its tokenizer, which must know `<image>`.
        projector: "mlp2x_gelu" (v1.5) or "linear" (v1).
        feature_layer: Hidden state of the tower that is read; -1 is the last, -2 the one before.
        select: Which tokens of it are used, see `choose_select`.
        spec: Preprocessing of a stock tower.
        stop_ids: Ids that end an answer; None is the tokenizer's end token.
        dtype: Of all weights.
        seed: Of the projector's first weights, whatever was drawn before.

    Returns:
        The model in eval mode, with its processor; as many placeholders as features on a real image.

    Raises:
        NameNotFound: No such encoder, LLM or projector.
        ConfigError: The parts do not fit.
    """
    activation = find("projector", PROJECTORS, projector)
    tower_name = encoder if isinstance(encoder, str) else type(encoder).__name__
    tower = load_tower(encoder) if isinstance(encoder, str) else encoder
    language, tokenizer = load_llm(llm, dtype) if isinstance(llm, str) else llm
    geometry = tower_geometry(tower, spec)
    strategy = choose_select(geometry, select, tower_name)
    attention = language.config._attn_implementation
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=_image_token_id(tokenizer, language),
        image_seq_length=geometry.image_tokens(strategy),
        projector_hidden_act=activation,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=bool(language.config.tie_word_embeddings),
    )
    model = _assemble(config, tower, language, seed).to(dtype).eval()
    model.model.language_model.set_attn_implementation(attention)  # LlavaConfig forgets it, and the model then takes its own choice
    model.generation_config = _generation_config(tokenizer, stop_ids)
    processor = LlavaProcessor(
        image_processor=geometry.spec.image_processor(),
        tokenizer=tokenizer,
        patch_size=geometry.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=geometry.num_prefix_tokens + geometry.beyond_grid,
        chat_template=tokenizer.chat_template,
    )
    check_image_tokens(model, processor)
    return model, processor


def _assemble(config: LlavaConfig, tower: PreTrainedModel, language: PreTrainedModel, seed: int) -> LlavaForConditionalGeneration:
    """The stock model with its parts put in place: built on the meta device, so that no weight is made twice."""
    head = language.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        what = "no output head" if head is None else "a bias on its output head"
        raise ConfigError(f"{type(language).__name__} has {what}: transformers' LLaVA takes a causal LM with a head without bias")
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    for name, given in (("vision_tower", tower), ("language_model", language.base_model)):
        expected = type(getattr(model.model, name))
        if type(given) is not expected:
            raise ConfigError(f"{type(given).__name__} as {name}, but its config says {expected.__name__}, which a saved folder would load")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)  # nn.Linear's own initialisation, as LLaVA
    model.model.vision_tower = tower
    model.model.language_model = language.base_model
    model.model.multi_modal_projector = projector
    model.lm_head = head
    if config.tie_word_embeddings:
        model.tie_weights()
    if config.projector_hidden_act == "linear":
        make_second_layer_identity(projector)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ConfigError(f"{type(language).__name__}: no weights for {', '.join(left[:5])}; its layout is not the one of its config")
    return model


def make_second_layer_identity(projector: nn.Module) -> None:
    """Make the stock projector's second layer the identity, which leaves one linear layer."""
    second: Any = projector.linear_2
    with torch.no_grad():
        nn.init.eye_(second.weight)
        if second.bias is not None:
            second.bias.zero_()


def _image_token_id(tokenizer: Any, language: PreTrainedModel) -> int:
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    rows = language.get_input_embeddings().weight.shape[0]
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise ConfigError(f"the tokenizer has no {IMAGE_MARK} token: load it with llm_stage.llms.load_llm, or add it as a special token")
    if token_id >= rows:
        raise ConfigError(
            f"{IMAGE_MARK} is token {token_id}, the LLM's embedding has {rows} rows: placeholders are embedded before the image replaces "
            f"them. Call model.resize_token_embeddings({token_id + 1}), or load the LLM with llm_stage.llms.load_llm"
        )
    return int(token_id)


def _generation_config(tokenizer: Any, stop_ids: list[int] | None) -> GenerationConfig:
    """Greedy, with the ids that end an answer. The LLM's own is left out: sampling values in it fail at save time."""
    stops = stop_ids or [tokenizer.eos_token_id]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    return GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=pad, bos_token_id=tokenizer.bos_token_id)


def check_image_tokens(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> int:
    """Run one image through processor and tower and compare the counts, which nothing in transformers does.

    Returns:
        Tokens per image.

    Raises:
        ConfigError: Placeholders and features differ.
    """
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))
    inputs = processor(images=picture, text=processor.image_token, return_tensors="pt")
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    parameter = model.model.multi_modal_projector.linear_1.weight
    with torch.no_grad():
        pixels = inputs["pixel_values"].to(parameter.device, parameter.dtype)
        features = len(model.get_image_features(pixels, return_dict=True).pooler_output[0])
    if not placeholders == features == model.config.image_seq_length:
        raise ConfigError(
            f"the processor writes {placeholders} image tokens, the tower gives {features}, the config says "
            f"{model.config.image_seq_length}: patch_size {processor.patch_size}, num_additional_image_tokens "
            f"{processor.num_additional_image_tokens} and feature select {processor.vision_feature_select_strategy!r} of the processor "
            "have to fit the tower"
        )
    return features


def _without_graph(tower: nn.Module, config: LlavaConfig, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A frozen tower's forward; features [n, N, C] that it gave before (mmkit/feature_cache.py) pass as if they came out of it."""
    if pixel_values.dim() == 3:
        dropped = 1 if config.vision_feature_select_strategy == "default" else 0  # LLaVA takes off the first token, which is not stored
        return BaseModelOutputWithPooling(hidden_states={config.vision_feature_layer: F.pad(pixel_values, (0, 0, dropped, 0))})
    with torch.no_grad():
        return type(tower).forward(tower, pixel_values, *args, **kwargs)


def freeze_tower(model: LlavaForConditionalGeneration) -> nn.Module:
    """Freeze the vision tower three ways: no gradient, no waking up, no graph.

    The third is needed because peft and gradient checkpointing hook the tower's first layer, and a frozen tower then builds a graph.
    """
    tower = freeze(model.model.vision_tower)
    tower.forward = partial(_without_graph, tower, model.config)  # a partial survives deepcopy and pickle; save_pretrained never sees it
    return tower


def set_stage(model: LlavaForConditionalGeneration, train_llm: bool) -> None:
    """Freeze what a stage does not train: the tower always, the LLM in stage 1; a linear projector's second layer stays the identity."""
    model.requires_grad_(False)
    freeze_tower(model)
    model.model.multi_modal_projector.requires_grad_(True)
    if model.config.projector_hidden_act == "linear":
        model.model.multi_modal_projector.linear_2.requires_grad_(False)
    for part in (model.model.language_model, model.lm_head):
        if train_llm:
            for parameter in part.parameters():
                parameter.requires_grad_(parameter.is_floating_point())  # 4-bit weights take no gradient
        else:
            freeze(part)


def label_tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch are predicted: what its mean loss is a mean over."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def supervised_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Mean cross-entropy over the supervised tokens; logits exist nowhere else.

    Args:
        model: The LLaVA, bare or wrapped (peft, DDP, DeepSpeed).
        batch: input_ids, attention_mask, labels [B, L]; pixel_values [images, 3, h, w], or features [images, N, D] that the frozen tower
            gave before, or None. Labels are not shifted. A packed batch brings position_ids [B, L] and None for attention_mask (see
            packing.py).

    Returns:
        The loss [], and how many tokens it is the mean of.

    Raises:
        DataError: A row's placeholders are not whole images, their sum is not the images given, or no token is supervised.
    """
    labels = batch["labels"]
    keep = torch.zeros_like(labels, dtype=torch.bool)  # [B, L]: position i predicts label i + 1
    keep[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    count = int(keep.sum())
    if not count:
        raise DataError(
            "a micro-batch without any supervised token has no loss; --data.on_bad_sample skip leaves such rows out and lists them"
        )
    check_placeholders(extract_model_from_parallel(model).config, batch)
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch.get("position_ids"),
        pixel_values=batch.get("pixel_values"),
        logits_to_keep=keep,
        use_cache=False,  # with a cache, packed examples would see each other
    )
    return F.cross_entropy(output.logits.float(), labels[:, 1:][keep[:, :-1]]), count  # logits [count, V]


def check_placeholders(config: LlavaConfig, batch: Mapping[str, Any]) -> None:
    """Compare placeholders and images row by row. transformers compares the sums only, so rows could swap features unnoticed.

    Raises:
        DataError: The counts differ.
    """
    per_row = (batch["input_ids"] == config.image_token_id).sum(dim=1)
    images = 0 if batch.get("pixel_values") is None else len(batch["pixel_values"])
    tokens = config.image_seq_length
    for row, count in enumerate(per_row.tolist()):
        if count % tokens:
            raise DataError(f"row {row} of the micro-batch has {count} image placeholders, not a multiple of the {tokens} of one image")
    if int(per_row.sum()) != images * tokens:
        raise DataError(f"the micro-batch has placeholders for {int(per_row.sum()) / tokens:g} image(s) and brings {images}")


def with_dummy_row(batch: dict[str, Any], config: LlavaConfig, image_size: int, pad_token_id: int) -> dict[str, Any]:
    """Give a text-only micro-batch one more row: placeholders of a zero image, no label. Batches with images stay as they are.

    Ranks whose micro-batch skips tower and projector issue other collectives than the rest: ZeRO-3 hangs, ZeRO-2 trains on wrong
    gradients without a word. In stage 1 such a batch would have no gradient at all. The loss is the same with and without the row.

    Args:
        batch: input_ids, attention_mask, labels [B, L]; pixel_values or None.
        config: The model's.
        image_size: Pixels of the tower's input.
        pad_token_id: Of the tokenizer.
    """
    if batch.get("pixel_values") is not None:
        return batch
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    tokens = config.image_seq_length
    lack = max(0, tokens - ids.shape[1])
    ids, mask, labels = F.pad(ids, (0, lack), value=pad_token_id), F.pad(mask, (0, lack)), F.pad(labels, (0, lack), value=IGNORE_INDEX)
    row = torch.full_like(ids[:1], pad_token_id)
    row[:, :tokens] = config.image_token_id
    row_mask = torch.zeros_like(mask[:1])
    row_mask[:, :tokens] = 1
    return {
        **batch,
        "input_ids": torch.cat([ids, row]),
        "attention_mask": torch.cat([mask, row_mask]),
        "labels": torch.cat([labels, torch.full_like(row, IGNORE_INDEX)]),
        "pixel_values": torch.zeros(1, 3, image_size, image_size),
    }
