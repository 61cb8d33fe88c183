"""`mmkit export`: any LLaVA folder into the form that others read, with a model card and a proof that it is still the same model.

    mmkit export RUN/model OUT                                   plain transformers: LoRA merged, safetensors, no mmkit needed to load it
    mmkit export RUN/checkpoints/step_N OUT                      the same of any checkpoint of a run
    mmkit export RUN/model OUT --format parts --dtype fp16       adapter or projector alone; encoder and LLM by reference
    mmkit export RUN/model OUT --format mm_projector             LLaVA's mm_projector.bin
    mmkit export RUN/model OUT --format original                 LLaVA's own layout; original_lora: adapter and non_lora_trainables.bin

MODEL may be in any of these forms itself. OUT is whole or absent.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from peft import PeftModel, get_peft_model_state_dict
from transformers import LlavaProcessor

import encoders.modeling
from encoders.catalog import load_encoder
from encoders.joined import JoinedEncoder
from encoders.modeling import VisionEncoder
from encoders.stock_towers import stock_tower
from llm_stage import parity
from llm_stage.adapters import DTYPES, put_adapter
from llm_stage.llava_card import LlavaCard
from llm_stage.llava_folder import PROJECTOR, finished, load_llava, load_projector, save_adapter, save_llava, save_projector
from llm_stage.model_card import CardFacts, model_card
from llm_stage.models import model_folder
from llm_stage.original_export import (
    inner,
    projector_kind,
    projector_state,
    spec_of,
    write_mm_projector,
    write_original,
    write_original_lora,
)
from llm_stage.original_llava import PROJECTOR_BIN
from llm_stage.portable_template import portable_template, same_ids
from llm_stage.run_checkpoint import is_checkpoint, load_checkpoint
from mmkit.checkpoint import atomic_folder, atomic_write
from mmkit.config import cli_entry
from mmkit.errors import ConfigError, DataError, find
from mmkit.trainable import weights_hash

ENCODER_FILE = "mmkit_encoder.py"


@dataclass
class Source:
    """A model to be exported.

    Attributes:
        folder: Where it is.
        model: In float32; an adapter is still around it.
        processor: Its processor.
        card: How it was made; None for other people's folders.
        projector_only: Nothing but the projector was trained.
        encoder, llm: What they are called, where no card says it.
        notes: What the exported folder's user has to know; filled on the way.
    """

    folder: Path
    model: Any
    processor: LlavaProcessor
    card: LlavaCard | None
    projector_only: bool
    encoder: str = ""
    llm: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def adapter(self) -> bool:
        """Whether a LoRA was trained."""
        return isinstance(self.model, PeftModel)

    def known(self) -> LlavaCard:
        """The card; of other people's folders, one with what their config.json tells of the parts.

        Raises:
            ConfigError: It does not tell.
        """
        if self.card is None:
            config = inner(self.model).config
            encoder, llm = (name or str(getattr(part, "_name_or_path", "")) for name, part in self._named(config))
            if not (encoder and llm):
                raise ConfigError(
                    f"{self.folder} does not say which encoder and LLM it was made of, and this format names them: --encoder NAME --llm NAME"
                )
            projector = projector_kind(self.model)
            layer, select = config.vision_feature_layer, config.vision_feature_select_strategy
            tower = weights_hash(inner(self.model).model.vision_tower)
            self.card = LlavaCard(encoder, llm, tower, projector, layer, select, "vicuna_v1", stage=2)
        return self.card

    def _named(self, config: Any) -> list[tuple[str, Any]]:
        return [(self.encoder, config.vision_config), (self.llm, config.text_config)]


@dataclass(frozen=True)
class Format:
    """A form of an exported model.

    Attributes:
        about: One line for `--help`.
        prepare: Brings the model into the form that is written.
        write: (source, work, out, dtype, max_shard_size): fills the folder `work`, whose final place is `out`.
        loading: Python that loads the folder.
        read: Gives the model back from the folder, for the proof.
    """

    about: str
    prepare: Callable[[Source], None]
    write: Callable[[Source, Path, Path, torch.dtype, str], None]
    loading: str
    read: Callable[[Source, Path], tuple[Any, LlavaProcessor]] = lambda source, work: load_llava(work, merge=False)[:2]


# -- whole models --------------------------------------------------------------------------------------------------------------------------


def make_whole(source: Source) -> None:
    """Merge the adapter, and give the tower the form that transformers has for it, if there is one."""
    source.model = finished(source.model, merge=True)
    tower = source.model.model.vision_tower
    if isinstance(tower, JoinedEncoder):
        source.notes.append(
            "The vision tower is several encoders in one, for which transformers has no form: it loads where mmkit is installed."
        )
    if not isinstance(tower, VisionEncoder):
        return
    layer = source.model.config.vision_feature_layer
    try:
        stock = stock_tower(tower, [layer] if isinstance(layer, int) else list(layer))
    except ConfigError as error:
        source.notes.append(
            f"The vision tower stays mmkit's own: {error}. `{ENCODER_FILE}` in this folder registers it (it needs torch, timm and "
            "transformers); import it first, as below, or install mmkit and `import mmkit`."
        )
        return
    source.model.model.vision_tower = stock
    source.model.config.vision_config = stock.config


def write_transformers(source: Source, work: Path, out: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write an ordinary Hugging Face LLaVA."""
    model = source.model.to(dtype)
    model.config.dtype = dtype
    give_template(source)
    save_llava(model, source.processor, source.card, work, overwrite=True, max_shard_size=max_shard_size)
    if isinstance(model.model.vision_tower, VisionEncoder):
        shutil.copyfile(encoders.modeling.__file__, work / ENCODER_FILE)


def give_template(source: Source) -> None:
    """Put the chat template of the training where transformers' processors look for it, if it can be told in their language."""
    if source.card is None:
        return
    template = portable_template(source.card, source.processor.tokenizer)
    source.processor.chat_template = template
    if template is None:
        source.notes.append(f"There is no chat template in this folder: the model was trained with `{source.card.template}`.")
    elif not same_ids(source.card, source.processor, int(source.model.config.image_seq_length)):
        source.notes.append(
            f"The chat template in this folder is close to that of the training (`{source.card.template}`), and not the same token for token: "
            "mmkit's `ChatModel` writes the prompts as they were."
        )


def write_originals(source: Source, work: Path, out: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write LLaVA's own layout, whole."""
    write_original(source.model, source.processor, source.known(), work, out, dtype, max_shard_size=max_shard_size)


# -- parts ---------------------------------------------------------------------------------------------------------------------------------


def make_parts(source: Source) -> None:
    """See that only parts were trained, that the encoder's name leads to the weights, and that the adapter carries the projector."""
    if not source.adapter and not source.projector_only:
        raise ConfigError(
            f"{source.folder} is a whole model, whose LLM was trained: its parts are not those of its names. Take transformers"
        )
    card = source.known()
    if not isinstance(inner(source.model).model.vision_tower, VisionEncoder | JoinedEncoder):  # loaded in this kit's form from now on
        name = f"hf:{card.encoder.removeprefix('hf:')}"
        tower, found = load_encoder(name), spec_of(source.model, source.processor).resize
        resize = "own" if found == tower.spec.resize else found
        source.card = replace(card, encoder=name, encoder_hash=weights_hash(tower), resize=resize)
    if source.adapter:
        carry_projector(source)


def carry_projector(source: Source) -> None:
    """LLaVA's adapters leave the projector to another file; ours hold it."""
    config = source.model.peft_config["default"]
    if config.modules_to_save:
        return
    projector = projector_state(source.model)
    state = get_peft_model_state_dict(source.model, save_embedding_layers=False)
    state |= {f"base_model.model.model.multi_modal_projector.{name}": tensor.clone() for name, tensor in projector.items()}
    base = source.model.unload()
    source.model = put_adapter(base, replace(config, modules_to_save=["multi_modal_projector"]), state, str(source.folder))


def make_original_lora(source: Source) -> None:
    """See that there is an adapter."""
    source.known()
    if not source.adapter:
        raise ConfigError(f"{source.folder} has no adapter: take --format original (the whole model) or mm_projector")


def keep(source: Source) -> None:
    """mm_projector.bin is taken out of any model; the rest is left."""
    source.known()
    if source.adapter:
        source.model = source.model.unload() if not source.model.peft_config["default"].modules_to_save else _without_lora(source.model)


def _without_lora(model: PeftModel) -> Any:
    projector = {name: tensor.clone() for name, tensor in projector_state(model).items()}
    base: Any = model.unload()
    base.model.multi_modal_projector.load_state_dict(projector)
    return base.eval()


def read_projector(source: Source, work: Path) -> tuple[Any, LlavaProcessor]:
    """The model with its projector emptied and filled from the file: the LLM behind a projector may have been trained on since."""
    with torch.no_grad():
        for parameter in source.model.model.multi_modal_projector.parameters():
            parameter.zero_()
    load_projector(source.model, work)
    return source.model, source.processor


def write_parts(source: Source, work: Path, out: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write what was trained; processor and tokenizer come again with encoder and LLM."""
    card = source.known()
    for name, parameter in source.model.named_parameters():
        if is_part(name):
            parameter.data = parameter.data.to(dtype)
    if source.adapter:
        save_adapter(source.model, None, card, work, overwrite=True)
    else:
        save_projector(source.model.state_dict(), None, card, work, overwrite=True)


def is_part(name: str) -> bool:
    """Whether a parameter belongs to what stage 1 or a LoRA trains."""
    return "lora_" in name or "multi_modal_projector" in name


CHAT = 'from llm_stage.generate import ChatModel\n\nchat = ChatModel.load("{out}")'
STOCK = """from transformers import AutoProcessor, LlavaForConditionalGeneration

{first}model = LlavaForConditionalGeneration.from_pretrained("{out}")
processor = AutoProcessor.from_pretrained("{out}")"""
FORMATS: dict[str, Format] = {
    "transformers": Format("a plain transformers LLaVA: LoRA merged, tower in transformers' own form", make_whole, write_transformers, STOCK),
    "parts": Format("adapter or projector alone; encoder and LLM by name or folder", make_parts, write_parts, CHAT),
    "mm_projector": Format(
        "LLaVA's mm_projector.bin", keep, lambda s, work, out, dtype, _: write_mm_projector(s.model, s.processor, s.known(), work, out, dtype),
        CHAT, read_projector,
    ),
    "original": Format("LLaVA's own layout, whole: LoRA merged, CLIP tower inside", make_whole, write_originals, CHAT),
    "original_lora": Format(
        "LLaVA's own layout of a LoRA: adapter and non_lora_trainables.bin", make_original_lora,
        lambda s, work, out, dtype, _: write_original_lora(s.model, s.processor, s.known(), work, out, dtype), CHAT,
    ),
}  # fmt: skip
PARTIAL = ("parts", "mm_projector", "original_lora")


# -- the export ----------------------------------------------------------------------------------------------------------------------------


def open_source(folder: Path, encoder: str = "", llm: str = "", from_zero: bool = False) -> Source:
    """Load what is to be exported, in float32, its adapter not merged."""
    if is_checkpoint(folder):
        model, processor, card = load_checkpoint(folder, from_zero=from_zero)
        return Source(folder, model, processor, card, card.stage == 1)
    if from_zero:
        raise ConfigError(f"--from_zero is for a checkpoint (RUN/checkpoints/step_N); {folder} is none")
    model, processor, found = load_llava(folder, merge=False, encoder=encoder, llm=llm)
    return Source(folder, model, processor, found, any((folder / name).is_file() for name in (PROJECTOR, PROJECTOR_BIN)), encoder, llm)


def export(
    source: Source, out: Path, format_name: str = "transformers", dtype: str = "fp32", *, max_shard_size: str = "5GB",
    evaluations: Sequence[Path] = (), overwrite: bool = False,
) -> parity.Parity:  # fmt: skip
    """Write a model in another form.

    Args:
        source: The model; it is changed.
        out: The folder to make.
        format_name: A name of `FORMATS`.
        dtype: Of the written weights: fp32, fp16 or bf16.
        max_shard_size: Largest weight file of a whole model, as transformers writes sizes.
        evaluations: Folders whose summary.json goes into the card.
        overwrite: Replace a folder of this name.

    Returns:
        The proof, which is also in the card.

    Raises:
        ConfigError: The model cannot be put into this form.
        DataError: What was written is not the same model; nothing of it stays.
    """
    row, kind = find("format", FORMATS, format_name), find("dtype", DTYPES, dtype)
    inputs = parity.probe(source.processor)
    before = parity.logits(source.model, inputs)
    row.prepare(source)
    if format_name == "mm_projector":  # without its adapter it is another model: the one that stage 1 left
        before = parity.logits(source.model, inputs)
    formed = parity.logits(source.model, inputs)
    round_weights(source.model, kind, partial=format_name in PARTIAL)
    expected = formed if dtype == "fp32" else parity.logits(source.model, inputs)
    with atomic_folder(out, overwrite=overwrite) as work:
        row.write(source, work, out, kind, max_shard_size)
        again, its_processor = row.read(source, work)
        parity.refuse_other_inputs(inputs, parity.probe(its_processor))
        proof = parity.compare(before, formed, expected, parity.logits(again, inputs), dtype)
        proof.refuse()
        first = f"import {Path(ENCODER_FILE).stem}  # with this folder on sys.path\n\n" if (work / ENCODER_FILE).is_file() else ""
        first = "import mmkit\n\n" if isinstance(inner(source.model).model.vision_tower, JoinedEncoder) else first
        facts = CardFacts(
            out.name, source.folder, format_name, row.loading.format(out=out.name, first=first), source.card, proof,
            type(inner(source.model).model.vision_tower).__name__, source.notes, evaluations,
        )  # fmt: skip
        atomic_write(work / "README.md", model_card(facts))
    return proof


def round_weights(model: Any, dtype: torch.dtype, partial: bool) -> None:
    """Give a float32 model the values that it will have when written in `dtype`, all or only the parts that are written."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_part(name) or not partial:
                parameter.copy_(parameter.to(dtype).to(parameter.dtype))


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload an exported folder to the Hugging Face hub.

    Returns:
        The repository's address.

    Raises:
        ConfigError: There is no network, or the hub refuses; the folder stays as it is, and the message says how to go on.
    """
    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=str(folder), commit_message="Upload a LLaVA exported by mmkit")
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{folder} is complete, and was not uploaded to {repository}: {said[0]}\n  Where there is a network, and after `hf auth login`: "
            f"hf upload {repository} {folder}"
        ) from error
    return str(made)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    formats = "; ".join(f"{name}: {row.about}" for name, row in FORMATS.items())
    made = argparse.ArgumentParser(prog="mmkit export", description="a LLaVA folder -> the form that others read, with a model card")
    made.add_argument(
        "model", metavar="MODEL", help="RUN/model, RUN/checkpoints/step_N, any LLaVA folder, or a name of `mmkit list models`"
    )
    made.add_argument("out", metavar="OUT", help="the folder to write; whole or absent")
    made.add_argument("--format", default="transformers", choices=list(FORMATS), help=formats)
    made.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of the written weights")
    made.add_argument("--max_shard_size", default="5GB", help="largest weight file of a whole model")
    made.add_argument("--encoder", default="", help="where the encoder is, for a folder that only refers to it; named so in OUT")
    made.add_argument("--llm", default="", help="where the language model is, likewise")
    made.add_argument("--eval", action="append", default=[], metavar="FOLDER", help="an evaluation (summary.json) for the card; repeatable")
    made.add_argument("--from_zero", action="store_true", help="of a DeepSpeed checkpoint: float32 weights out of its ZeRO files (pickles)")
    made.add_argument("--push_to_hub", default="", metavar="ORG/NAME", help="upload OUT afterwards")
    made.add_argument("--private", action="store_true", help="make the repository a private one")
    made.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return made


def main(argv: Sequence[str] | None = None) -> Path:
    """Export a model.

    Args:
        argv: The command line; None is the process's own.

    Returns:
        The folder.
    """
    args = parser().parse_args(argv)
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists already; name another folder, or add --overwrite")
    evaluations = [Path(folder) for folder in args.eval]
    absent = [folder for folder in evaluations if not folder.is_file() and not (folder / "summary.json").is_file()]
    if absent:
        raise DataError(f"--eval {absent[0]}: there is no summary.json; give the folder that `mmkit eval ...` wrote")
    source = open_source(model_folder(args.model), args.encoder, args.llm, args.from_zero)
    proof = export(
        source, out, args.format, args.dtype, max_shard_size=args.max_shard_size, evaluations=evaluations, overwrite=args.overwrite
    )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(
        f"{out}: {args.format}, {args.dtype}, {size / 1e6:,.1f} MB; logits read back differ by {proof.conversion:.1e} from what was to be "
        f"written, by {proof.rounding:.1e} from the model before (largest logit {proof.largest:.3g}); README.md has a licence to be filled in"
    )
    for note in source.notes:
        print(f"note: {note}")
    if args.push_to_hub:
        print(f"uploaded: {push(out, args.push_to_hub, args.private)}")
    return out


if __name__ == "__main__":
    cli_entry(main)
