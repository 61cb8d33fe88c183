"""Image towers of open_clip and transformers, put into timm's form. A conversion is kept only if it gives the source's own numbers."""

import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import get_model_config
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionModelWithProjection, SiglipVisionModel
from transformers.utils import logging as transformers_logging

from encoders.architectures import register_folder_entry  # the import registers mini-clip's tower too, by whose name open_clip builds it
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.text import quiet_open_clip
from mmkit.checkpoint import load_strict
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.images import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageSpec

TOLERANCE = 1e-4  # float32, tens of blocks, outputs of order one; a wrong activation or norm shows at 1e-2 and more
RESIZE_MODES = {"shortest": "crop", "squash": "squash", "longest": "pad"}


def from_open_clip(name: str, *, text_tower: str, origin: str, pretrained: bool = True) -> VisionEncoder:
    """Take the image tower out of an open_clip model.

    Args:
        name: "MODEL/TAG", "MODEL" (random weights), "MODEL/FILE", or a folder with open_clip_config.json.
        text_tower: The name under which `load_text_tower` gives the tower of the same model.
        origin: What the start-up table says about where the weights came from.
        pretrained: False ignores the tag.

    Raises:
        NameNotFound: open_clip does not know the model or the tag.
        DataError: The weights cannot be had.
        ConfigError: The tower cannot be expressed in timm's form.
    """
    with quiet_open_clip():
        model: Any = _open_clip_model(name, origin, pretrained)
    spec = _open_clip_spec(model)
    visual: Any = model.visual.eval()
    if isinstance(visual, TimmModel):
        encoder = _from_trunk(visual, spec, origin)
    elif isinstance(visual, OpenClipViT):
        encoder = _from_native(visual, spec, origin)
    else:
        raise ConfigError(
            f"'{origin}': its image tower is a {type(visual).__name__}; an encoder here gives tokens, so a vision transformer is needed"
        )
    encoder.config.text_tower = text_tower
    _assert_equal(encoder, lambda images: model.encode_image(images), origin)
    return encoder.eval()


def _open_clip_model(name: str, origin: str, pretrained: bool) -> nn.Module:
    if (Path(name) / "open_clip_config.json").is_file():
        try:
            register_folder_entry(Path(name))
            return open_clip.create_model(f"local-dir:{name}")
        except (ValueError, RuntimeError, OSError) as error:
            raise DataError(f"the open_clip folder of '{origin}' cannot be loaded: {error}") from error
    model, _, tag = name.partition("/")
    if Path(name).is_dir():
        raise DataError(f"'{origin}': the folder has no open_clip_config.json")
    if get_model_config(model) is None:
        near = get_close_matches(model, open_clip.list_models(), n=4, cutoff=0.3)
        raise NameNotFound(
            f"no encoder '{origin}': open_clip has no model '{model}'; nearest: {', '.join(f'openclip:{other}' for other in near)}"
        )
    if not tag or not pretrained:
        return open_clip.create_model(model)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags and not Path(tag).is_file():
        raise NameNotFound(
            f"no encoder '{origin}': open_clip has {model} with {', '.join(tags) or 'no weights'}; '{tag}' is none of them and no file"
        )
    try:
        return open_clip.create_model(model, pretrained=tag, require_pretrained=True)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"encoder '{origin}' has no weights here: {str(error).splitlines()[0]}. Fetch them where there is a network, or name a file"
        ) from error


def _open_clip_spec(model: nn.Module) -> ImageSpec:
    cfg: dict[str, Any] = open_clip.get_model_preprocess_cfg(model)
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    resize: Any = RESIZE_MODES[cfg.get("resize_mode") or "shortest"]
    return ImageSpec(
        size=size, mean=tuple(cfg["mean"]), std=tuple(cfg["std"]), interpolation=cfg.get("interpolation") or "bicubic", resize=resize
    )


def _encoder(architecture: str, args: dict[str, Any], joint: int, spec: ImageSpec, origin: str) -> VisionEncoder:
    config = VisionEncoderConfig(architecture=architecture, model_args=args, joint_width=joint, image_spec=spec.to_dict(), origin=origin)
    return VisionEncoder(config).eval()


def _from_trunk(visual: TimmModel, spec: ImageSpec, origin: str) -> VisionEncoder:
    """A timm trunk already; open_clip's own linear projection, if there is one, becomes the head."""
    trunk: Any = visual.trunk
    if not hasattr(trunk, "patch_embed") or not hasattr(trunk, "blocks"):
        raise ConfigError(
            f"'{origin}': its image tower is a {type(trunk).__name__}; an encoder here gives tokens, so a vision transformer is needed"
        )
    state = dict(trunk.state_dict())
    projection = getattr(visual.head, "proj", None)
    if hasattr(visual.head, "mlp") or (len(visual.head) and projection is None):
        raise ConfigError(f"'{origin}': its projection is no single linear layer, which timm's head is")
    if projection is not None:
        state["head.weight"] = projection.weight
        state["head.bias"] = projection.bias if projection.bias is not None else torch.zeros(projection.out_features)
    args = network_args(trunk)
    joint = projection.out_features if projection is not None else trunk.num_classes or trunk.embed_dim
    if projection is None and not trunk.num_classes:
        args["num_classes"] = 0  # SigLIP: attention pooling ends in the joint space, without a head
    encoder = _encoder(trunk.pretrained_cfg["architecture"], args, joint, spec, origin)
    load_strict(encoder.network, state, origin)
    return encoder


def network_args(network: Any) -> dict[str, Any]:
    """Read off a timm network the arguments with which its own entry builds it again."""
    block = network.blocks[0]
    hidden = next(module.weight.shape[0] for name, module in block.mlp.named_modules() if name in ("fc1", "fc1_x"))
    gated = hasattr(block.mlp, "fc1") and block.mlp.fc2.weight.shape[1] * 2 == hidden  # packed SwiGLU holds both halves in fc1
    hidden = hidden // 2 if gated else hidden
    args: dict[str, Any] = {
        "img_size": network.patch_embed.img_size[0],
        "patch_size": network.patch_embed.patch_size[0],
        "embed_dim": network.embed_dim,
        "depth": len(network.blocks),
        "num_heads": block.attn.num_heads,
        "global_pool": network.global_pool,
    }
    ratio = hidden / network.embed_dim
    # timm takes int(dim x ratio): a ratio that lost its last bit would cost one channel
    args["mlp_ratio"] = ratio if int(network.embed_dim * ratio) == hidden else (hidden + 0.5) / network.embed_dim
    return args


def _from_native(visual: OpenClipViT, spec: ImageSpec, origin: str) -> VisionEncoder:
    """open_clip's (and OpenAI's) own vision transformer, under timm's names."""
    odd = [name for name in ("attn_pool",) if getattr(visual, name, None) is not None]
    odd += ["final_ln_after_pool"] if visual.final_ln_after_pool else []
    odd += [f"pooling '{visual.pool_type}'"] if visual.pool_type != "tok" else []
    if odd:
        raise ConfigError(f"'{origin}': timm has no form for {', '.join(odd)}, and single tokens would have no place in its joint space")
    block: Any = visual.transformer.resblocks[0]
    quick = type(block.mlp.gelu).__name__ == "QuickGELU"
    width = visual.conv1.out_channels
    args: dict[str, Any] = {
        "img_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        "embed_dim": width,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / width,
        "pre_norm": not isinstance(visual.ln_pre, nn.Identity),
        "global_pool": "token",
    }
    if not args["pre_norm"]:
        raise ConfigError(f"'{origin}': a tower without its first norm has a patch embedding that timm cannot express")
    entry = "vit_base_patch16_clip_quickgelu_224" if quick else "vit_base_patch16_clip_224"
    encoder = _encoder(entry, args, visual.output_dim, spec, origin)
    state = checkpoint_filter_fn({f"visual.{key}": value for key, value in visual.state_dict().items()}, encoder.network)
    load_strict(encoder.network, state, origin)
    return encoder


@torch.no_grad()
def _assert_equal(encoder: VisionEncoder, reference: Callable[[Tensor], Tensor], origin: str) -> None:
    """Refuse a conversion whose embedding of noise differs from the source's own.

    Raises:
        ConfigError: It does; the message says by how much.
    """
    size = encoder.spec.size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = reference(images)
    difference = float((encoder(images).pooler_output - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise ConfigError(
            f"'{origin}' does not convert to timm's {encoder.config.architecture}: the embeddings differ by {difference:.1e} of their "
            "largest value. The tower has a part that this kit does not know; please report it"
        )


def from_hf(name: str, *, origin: str) -> VisionEncoder:
    """Take the vision tower of a CLIP or SigLIP of transformers, from the hub's name (its local copy) or a folder.

    Raises:
        DataError: It cannot be had, or holds no projection to the joint space where it should.
        ConfigError: It is of another kind.
    """
    try:
        config: Any = AutoConfig.from_pretrained(name)
        spec_values = hf_spec(name, config)
        kind = config.model_type
        vision: Any = getattr(config, "vision_config", config)
        if kind in ("clip", "clip_vision_model"):
            vision.projection_dim = (
                config.projection_dim
            )  # a whole CLIP says it at the top; its vision part keeps a default that may be wrong
            model = load_hf(CLIPVisionModelWithProjection, name, vision, origin)
        elif kind in ("siglip", "siglip_vision_model"):
            model = load_hf(SiglipVisionModel, name, vision, origin)
        else:
            raise ConfigError(f"'{origin}' is a '{kind}'; of transformers' models, CLIP and SigLIP vision towers are taken")
    except OSError as error:
        raise DataError(
            f"encoder '{origin}' cannot be had: {str(error).splitlines()[0]}. Give a folder, or fetch it where there is a network"
        ) from error
    spec = ImageSpec(size=vision.image_size, **spec_values)
    encoder = _hf_clip(model, vision, spec, origin) if kind.startswith("clip") else _hf_siglip(model, vision, spec, origin)
    encoder.config.text_tower = origin if kind in ("clip", "siglip") else None  # a whole model has its text tower beside it
    _assert_equal(encoder, lambda images: _hf_embedding(model, images), origin)
    return encoder


def load_hf(kind: Any, name: str, config: Any, origin: str) -> Any:
    """Load a transformers model whole: it would fill tensors that the file lacks, or has in another shape, with random numbers.

    Raises:
        DataError: There are such tensors; the message names them.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # it warns of every tensor of the text tower, which is not asked for
    try:
        model, found = kind.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        transformers_logging.set_verbosity(level)
    missing = sorted(found["missing_keys"])
    other = [f"{key} is {list(has)}, should be {list(wants)}" for key, has, wants in sorted(found["mismatched_keys"])]
    if missing or other:
        lines = [f"{len(missing)} tensors are missing: {', '.join(missing[:4])}"] * bool(missing)
        lines += [f"{len(other)} have another shape: {', '.join(other[:4])}"] * bool(other)
        raise DataError(f"'{origin}' does not hold a whole {kind.__name__}: {'; '.join(lines)}")
    return model.eval()


def _hf_embedding(model: Any, images: Tensor) -> Tensor:
    out = model(pixel_values=images)
    embedding: Tensor = out.image_embeds if getattr(out, "image_embeds", None) is not None else out.pooler_output
    return embedding


def hf_spec(name: str, config: Any) -> dict[str, Any]:
    """Read mean, std and the way to resize from preprocessor_config.json beside the weights of a CLIP or SigLIP; without one they are the family's own."""
    siglip = config.model_type.startswith("siglip")
    values: dict[str, Any] = (
        {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize": "squash"} if siglip else {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}
    )
    file = Path(name) / "preprocessor_config.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        values["mean"], values["std"] = tuple(found.get("image_mean", values["mean"])), tuple(found.get("image_std", values["std"]))
        if "size" in found:
            values["resize"] = "crop" if isinstance(found["size"], int) or "shortest_edge" in found["size"] else "squash"
    return values


HF_NAMES = [  # transformers -> timm, in this order
    ("encoder.layers.", "blocks."),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("pre_layrnorm", "norm_pre"),
    ("post_layernorm", "norm"),
    ("layer_norm", "norm"),
    ("self_attn.out_proj", "attn.proj"),
]


def _hf_blocks(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Rename a tower's tensors to timm's and pack q, k and v into one."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for old, new in HF_NAMES:
            name = name.replace(old, new)
        out[name] = tensor
    for layer in range(depth):
        for part in ("weight", "bias"):
            out[f"blocks.{layer}.attn.qkv.{part}"] = torch.cat([out.pop(f"blocks.{layer}.self_attn.{x}_proj.{part}") for x in "qkv"])
    return out


def _hf_state(model: Any) -> dict[str, Tensor]:
    return {name.removeprefix("vision_model."): tensor for name, tensor in model.state_dict().items()}


def _hf_args(vision: Any) -> dict[str, Any]:
    return {
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embed_dim": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
    }


def _hf_clip(model: Any, vision: Any, spec: ImageSpec, origin: str) -> VisionEncoder:
    entries = {"quick_gelu": "vit_base_patch16_clip_quickgelu_224", "gelu": "vit_base_patch16_clip_224"}
    if vision.hidden_act not in entries:
        raise ConfigError(f"'{origin}': activation '{vision.hidden_act}' has no timm entry; known are {', '.join(entries)}")
    joint = model.visual_projection.out_features
    encoder = _encoder(entries[vision.hidden_act], {**_hf_args(vision), "global_pool": "token"}, joint, spec, origin)
    state = _hf_blocks(_hf_state(model), vision.num_hidden_layers)
    state["cls_token"] = state.pop("embeddings.class_embedding").view(1, 1, -1)
    state["pos_embed"] = state.pop("embeddings.position_embedding.weight").unsqueeze(0)
    state["head.weight"], state["head.bias"] = state.pop("visual_projection.weight"), torch.zeros(joint)
    load_strict(encoder.network, state, origin)
    return encoder


def _hf_siglip(model: Any, vision: Any, spec: ImageSpec, origin: str) -> VisionEncoder:
    activations = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
    if vision.hidden_act not in activations:
        raise ConfigError(
            f"'{origin}': activation '{vision.hidden_act}' is not known to this conversion; known are {', '.join(activations)}"
        )
    args = {**_hf_args(vision), "num_classes": 0, "act_layer": activations[vision.hidden_act]}
    encoder = _encoder("vit_base_patch16_siglip_224", args, vision.hidden_size, spec, origin)
    state = _hf_blocks(_hf_state(model), vision.num_hidden_layers)
    state["pos_embed"] = state.pop("embeddings.position_embedding.weight").unsqueeze(0)
    head = {name.removeprefix("head."): state.pop(name) for name in list(state) if name.startswith("head.")}
    weight, bias = head.pop("attention.in_proj_weight"), head.pop("attention.in_proj_bias")
    width = vision.hidden_size
    state["attn_pool.latent"] = head.pop("probe")
    state["attn_pool.q.weight"], state["attn_pool.kv.weight"] = weight[:width], weight[width:]
    state["attn_pool.q.bias"], state["attn_pool.kv.bias"] = bias[:width], bias[width:]
    for part in ("weight", "bias"):
        state[f"attn_pool.proj.{part}"] = head.pop(f"attention.out_proj.{part}")
        state[f"attn_pool.norm.{part}"] = head.pop(f"layernorm.{part}")
        state[f"attn_pool.mlp.fc1.{part}"], state[f"attn_pool.mlp.fc2.{part}"] = head.pop(f"mlp.fc1.{part}"), head.pop(f"mlp.fc2.{part}")
    load_strict(encoder.network, {**state, **head}, origin)
    return encoder
