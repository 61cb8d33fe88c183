"""Train BLIP-2's second stage: a Q-Former learns to speak to a frozen language model, from captions, from questions, or from both.

    python llm_stage/train_blip2.py --recipe mini_blip2 --pretrained runs/qformer/model --output_dir runs/blip2
    torchrun --nproc_per_node 8 llm_stage/train_blip2.py --recipe blip2_stage2 --pretrained runs/qformer/model --llm facebook/opt-2.7b ...
    python llm_stage/train_blip2.py --recipe blip2_vqa --pretrained runs/blip2/model --questions Q.json --annotations A.json --images DIR ...

--pretrained is a Q-Former folder (stage 1; it brings its encoder) or a BLIP-2 folder, which goes on. Encoder and language model sleep.
RUN/model is a BLIP-2 folder (llm_stage/blip2_folder.py); `mmkit eval vqa --model RUN/model` and the demo take it.

Source: BLIP-2 (Li et al., 2023), section 3.3; numbers of the recipes from its appendix and from LAVIS.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from encoders.pair_sources import open_pairs, read_source
from llm_stage.blip2 import IGNORED, Blip2, Texts, from_stage1, text_loss
from llm_stage.blip2_data import AskedImages, ImageTexts, collate
from llm_stage.blip2_folder import Blip2Card, Blip2Parts, is_blip2, llm_hash, load_blip2, save_blip2
from llm_stage.blip2_held_out import CaptionCheck, KeepBest
from llm_stage.blip2_text import END, TextFormat
from llm_stage.llava_settings import DTYPES
from llm_stage.llms import llm_source, load_any_llm
from llm_stage.pair_features import FrozenPairConfig, features_of, keep_features
from llm_stage.qformer_folder import load_qformer
from mmkit.batches import derive_seed
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.launch import refuse_shares
from mmkit.optim import cosine_schedule, param_groups
from mmkit.run import Run, RunConfig
from mmkit.trainable import trainable_table, weights_hash

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class Blip2Settings:
    """Settings of stage 2."""

    pretrained: str = field(default="", metadata={"help": "a Q-Former folder of stage 1, with its encoder; or a BLIP-2 folder, to go on"})
    llm: str = field(default="", metadata={"help": "language model, causal or encoder-decoder; frozen"})
    weights: Literal["fp32", "bf16", "fp16"] = field(default="fp32", metadata={"help": "how the language model is held"})
    end: str = field(default=END, metadata={"help": "what ends a text of a causal language model; one token"})
    lead: str = field(default="", metadata={"help": "what stands in front of the image, as a chat template begins; the paper has nothing"})
    prompt: str = field(default="Question: {} Short answer:", metadata={"help": "what a question is put into"})
    caption_prompt: str = field(default="", metadata={"help": "what stands before a caption"})
    max_tokens: int = field(default=32, metadata={"help": "longest prompt and text together"})
    questions: str = field(default="", metadata={"help": "VQAv2-format questions to learn from"})
    annotations: str = field(default="", metadata={"help": "their annotations, ten answers each"})
    images: str = field(default="", metadata={"help": "folder of the questions' pictures"})
    center: int = field(
        default=0,
        metadata={"help": "pictures whose mean soft prompt a new projection begins by taking away, so that differences count; 0: none"},
    )
    lr: float = field(default=1e-4, metadata={"help": "peak learning rate"})
    final_lr: float = field(default=5e-5, metadata={"help": "that the cosine ends at"})
    warmup: float = field(default=2000, metadata={"help": "steps, or share of all steps if below 1"})
    weight_decay: float = field(default=0.05, metadata={"help": "of matrices"})
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98], metadata={"help": "AdamW's"})
    val_captions: str = field(default="", metadata={"help": "captions of held-out images: CIDEr is watched, and the best model kept"})
    val_images: str = field(default="", metadata={"help": "folder of those images"})
    val_every: int = field(default=1000, metadata={"help": "steps between such checks; after the last step there is one too"})
    val_count: int = field(default=500, metadata={"help": "held-out images that are captioned"})
    data: FrozenPairConfig = field(default_factory=lambda: FrozenPairConfig(source="", scale=[0.5, 1.0]))
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self) -> None:
        """Refuse what cannot be meant."""
        if len(self.betas) != 2:
            raise ConfigError(f"betas is {self.betas}; AdamW has two, as in [0.9, 0.98]")
        if self.center < 0:
            raise ConfigError(f"center is {self.center}; a number of pictures, or 0, is right")
        if self.prompt.count("{}") != 1:
            raise ConfigError(
                f"prompt is {self.prompt!r}; the question's place is marked by one {{}}, as in 'Question: {{}} Short answer:'"
            )
        if bool(self.val_captions) != bool(self.val_images):
            raise ConfigError("--val_captions and --val_images go together: give both or none")
        if self.val_every < 1 or self.val_count < 2:
            raise ConfigError(f"val_every {self.val_every} and val_count {self.val_count}: 1 and 2 are the least")
        if self.val_captions:
            refuse_shares(self.run.deepspeed)
        given = [name for name in ("questions", "annotations", "images") if getattr(self, name)]
        if given and len(given) < 3:
            raise ConfigError(f"--questions, --annotations and --images go together; only --{', --'.join(given)} was given")

    def require(self) -> None:
        """Refuse a run without what a recipe cannot know."""
        if not self.pretrained:
            raise ConfigError("--pretrained is missing: a Q-Former folder (mmkit train qformer makes one), or a BLIP-2 folder")
        if not self.llm and not is_blip2(self.pretrained):
            raise ConfigError("--llm is missing: the language model that the Q-Former is to speak to; `mmkit list llms` has names")
        if not self.data.source and not self.questions:
            raise ConfigError(
                "there is nothing to learn from: give captions (--data.source), questions (--questions, --annotations), or both"
            )


def build_parts(settings: Blip2Settings) -> Blip2Parts:
    """Load what is trained and what sleeps; before the run folder is made, as it may fail.

    Raises:
        ConfigError: A BLIP-2 folder was trained with another language model.
    """
    dtype = DTYPES[settings.weights]
    said: dict[str, Any] = {
        "weights": settings.weights,
        "end": settings.end,
        "lead": settings.lead,
        "max_tokens": settings.max_tokens,
        "prompt": settings.prompt,
        "caption_prompt": settings.caption_prompt,
    }
    if is_blip2(settings.pretrained):
        parts = load_blip2(settings.pretrained, dtype)
        if settings.llm and llm_source(settings.llm) != llm_source(parts.card.llm):
            raise ConfigError(
                f"{settings.pretrained} speaks to '{parts.card.llm}', not to '{settings.llm}': leave --llm out, or begin with a Q-Former"
            )
        text = TextFormat(parts.text.tokenizer, parts.model.writes_apart, settings.end, settings.lead, settings.max_tokens)
        parts.model.lead = text.lead_ids
        card = replace(parts.card, llm_hash=llm_hash(parts.model, settings.weights), **said)
        return Blip2Parts(parts.encoder, parts.model, text, card)
    stage1 = load_qformer(settings.pretrained)
    llm, tokenizer = load_any_llm(settings.llm, dtype)
    text = TextFormat(tokenizer, bool(llm.config.is_encoder_decoder), settings.end, settings.lead, settings.max_tokens)
    model = from_stage1(stage1.qformer, llm, text.lead_ids, derive_seed(settings.run.seed))
    before = stage1.card
    card = Blip2Card(before.encoder, settings.llm, before.encoder_hash, feature_layer=before.feature_layer, mode=before.mode)
    return Blip2Parts(stage1.encoder, model, text, replace(card, llm_hash=llm_hash(model, settings.weights), **said))


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and give the run folder."""
    settings = load_config(Blip2Settings, argv, recipe_dir=RECIPES)
    settings.require()
    source = read_source(settings.data) if settings.data.source else None
    parts = build_parts(settings)
    if settings.data.source == "minidata" and parts.spec.size != 96:
        raise ConfigError(f"the encoder takes {parts.spec.size} pixels, minidata draws 96; name files: --data.source")
    model: Blip2 = parts.model.train()
    optimizer = torch.optim.AdamW(param_groups(model, settings.lr, settings.weight_decay), betas=(settings.betas[0], settings.betas[1]))
    asked, best = open_questions(settings, parts), open_held_out(settings)
    run = Run(settings.run, name="blip-2", settings=settings)
    bad = run.folder / "bad_samples.jsonl"
    captions = open_pairs(settings.data, source, parts.spec, settings.run.seed, bad) if settings.data.source else None
    if asked is not None:
        asked.bad_list = bad
    dataset = ImageTexts(captions, asked, settings.prompt, settings.caption_prompt)
    named = {name: part for name, part in model.named_children() if name != "language_model"}
    table = torch.nn.ModuleDict({"encoder": parts.encoder, "blip2": model})
    new = "new" if not is_blip2(settings.pretrained) else settings.pretrained
    origins = {"encoder": parts.card.encoder, "language_model": parts.card.llm, "language_projection": new}
    origins = dict.fromkeys(["(rest)", *named], settings.pretrained) | origins
    run.print(trainable_table(table, {"encoder": parts.encoder, "language_model": model.language_model, **named}, origins))
    frozen = weights_hash(parts.encoder)
    parts.encoder.to(run.device)
    if settings.center and not is_blip2(settings.pretrained):
        center_projection(parts, dataset, settings.center, run)
    run.prepare(model, optimizer)
    keep_features(settings.data, parts, [captions, asked], run)
    if best:
        run.keep("best", best)
    run.set_schedule(cosine_schedule(run.plan(dataset), settings.warmup, settings.final_lr / settings.lr))
    for batch in run.batches(dataset, collate(parts.text), weigh=lambda batch: float((batch["labels"] != IGNORED).sum())):
        with run.accelerator.autocast():
            features = features_of(parts, batch["images"])  # [B, n, W], no graph
        loss = run.forward(text_loss, features, Texts(batch["ids"], batch["mask"], batch["labels"]))
        run.backward(loss)
        run.log(loss=loss)
        if best and best.check.due(run):
            best.look(run, parts)
    export(run, parts, settings, frozen, best)
    folder = run.finish()
    run.print(f"blip-2: the model is in {folder / 'model'}")
    return folder


@torch.no_grad()
def center_projection(parts: Blip2Parts, dataset: ImageTexts, pictures: int, run: Run) -> None:
    """Let the projection's bias begin as minus the mean soft prompt of some pictures.

    A Q-Former's query states are alike from picture to picture (of their square sum in the embedded data, under two hundredths tell pictures
    apart), and a new projection hands the language model what they have in common, which it then has to look past. All ranks take the same
    pictures, spread over the set, and find the same mean; a resumed run loads its weights over it.
    """
    model, sums = parts.model, []
    chosen = range(0, len(dataset), max(1, len(dataset) // pictures))[:pictures]
    for start in range(0, len(chosen), run.config.micro_batch_size):
        images = torch.stack([dataset.get(0, index)[0] for index in chosen[start:][: run.config.micro_batch_size]])
        soft = model.soft_prompt(features_of(parts, images.to(run.device)).to(model.device))  # [b, Q, d]
        sums.append(soft.double().sum(dim=(0, 1)))
    mean = torch.stack(sums).sum(dim=0) / (len(chosen) * model.config.queries)
    model.language_projection.bias.sub_(mean.float())


def open_questions(settings: Blip2Settings, parts: Blip2Parts) -> AskedImages | None:
    """Read the questions, if any were named; bad files are seen before the run folder is made."""
    if not settings.questions:
        return None
    low, high = settings.data.scale
    return AskedImages(
        settings.questions, settings.annotations, settings.images, parts.spec, settings.run.seed,
        on_bad_sample=settings.data.on_bad_sample, scale=(low, high),
    )  # fmt: skip


def open_held_out(settings: Blip2Settings) -> KeepBest | None:
    """Read the held-out captions, if any were named."""
    if not settings.val_captions:
        return None
    batch = settings.run.micro_batch_size
    return KeepBest(CaptionCheck.read(settings.val_captions, settings.val_images, settings.val_count, settings.val_every, batch))


def export(run: Run, parts: Blip2Parts, settings: Blip2Settings, frozen: str, best: KeepBest | None) -> None:
    """Write RUN/model; all ranks take part.

    Raises:
        DataError: The encoder or the language model changed during the training.
    """
    state = run.weights()
    if not run.is_main or state is None:
        return
    kept: Any = {name: tensor.cpu() for name, tensor in state.items()}
    parts.to(torch.device("cpu"))
    if weights_hash(parts.encoder) != frozen or llm_hash(parts.model, parts.card.weights) != parts.card.llm_hash:
        raise DataError("encoder or language model changed during a training in which both sleep: not saved; the checkpoints are there")
    data = [Path(name).name for name in (settings.data.source, settings.questions) if name]
    training = {"data": data, "steps": run.step, "seed": settings.run.seed, "pretrained": settings.pretrained}
    if best:
        training |= {f"best_{name}": value for name, value in best.best.items()}
        kept = best.weights(run) or kept
    parts.card = replace(parts.card, training=training)
    save_blip2(parts, run.folder / "model", state=kept, overwrite=True)
    if best:
        best.clear(run)


if __name__ == "__main__":
    cli_entry(main)
