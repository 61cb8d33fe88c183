"""Train a language model on chats: mini-llm on the language of the embedded world, or any causal LM on chat files.

    python llm_stage/train_text.py --recipe mini_llm --output_dir runs/mini_llm
    python llm_stage/train_text.py --data.json chats.json --model.llm smollm2 --template own --steps 500 --lr 2e-5 --output_dir runs/chat

The loss is on the assistant's words and end tokens only. RUN/model/ is an ordinary Hugging Face folder; `load_llm` takes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llm_stage.chat_format import IGNORE_INDEX, ChatFormat
from llm_stage.conversations import ConversationDataset
from llm_stage.llms import load_llm
from llm_stage.world_text import SHARES, WorldText, build_tokenizer
from mmkit.checkpoint import atomic_folder, atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError
from mmkit.optim import cosine_schedule, param_groups
from mmkit.run import Run, RunConfig
from mmkit.trainable import trainable_table

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class DataConfig:
    """Where the chats come from: exactly one of `world` and `json`."""

    world: int = field(default=0, metadata={"help": "chats in an epoch about the embedded world, drawn on the fly"})
    world_shares: list[float] = field(
        default_factory=lambda: list(SHARES),
        metadata={"help": "how often a chat is of each form: cells, loose, describe, facts, read, repeat"},
    )
    heard: float = field(default=0.5, metadata={"help": "share of the world's chats in which the user's words are supervised too"})
    json: str = field(default="", metadata={"help": "a LLaVA JSON or JSONL file of text-only chats"})
    max_length: int = field(default=1024, metadata={"help": "tokens; whole rounds beyond it are left out"})
    on_bad_sample: Literal["error", "skip"] = field(default="error", metadata={"help": "skip counts and lists bad rows"})


@dataclass
class ModelConfig:
    """A model to go on from, or the size of a new one."""

    llm: str = field(default="", metadata={"help": "mini-llm, smollm2, a folder or a hub name; empty makes a new Llama"})
    vocab_size: int = field(default=2048, metadata={"help": "of a new model's tokenizer, trained on the same texts"})
    hidden_size: int = 256
    layers: int = 5
    heads: int = 4
    intermediate_size: int = 704
    mimetic: bool = field(default=True, metadata={"help": "a new model's attention begins as finding and copying the same word"})


@dataclass
class TextConfig:
    """Settings of train_text.py."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    run: RunConfig = field(default_factory=RunConfig)
    template: str = field(default="own", metadata={"help": "chat template: own, vicuna_v1, llama_2, llama_3, chatml"})
    lr: float = 2e-3
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    warmup: int = field(default=100, metadata={"help": "steps from lr 0 to lr"})
    cell_noise: float = field(default=0.2, metadata={"help": "noise on stand-in image tokens, in standard deviations of the embedding"})
    held_out: int = field(default=300, metadata={"help": "held-out scenes to answer questions about at the end; 0 is none"})
    weights: Literal["fp32", "fp16", "bf16"] = field(default="fp16", metadata={"help": "precision of the saved model"})

    def validate(self) -> None:
        """Refuse settings that do not say what to train on."""
        if bool(self.data.world) == bool(self.data.json):
            raise ConfigError(
                f"data.world is {self.data.world} and data.json is '{self.data.json}': give one of them, "
                "--data.json FILE for chats of your own or --recipe mini_llm for the embedded world"
            )
        if self.data.json and not self.model.llm:
            raise ConfigError("data.json needs a model to go on from: --model.llm mini-llm, smollm2, a folder or a hub name")


def new_model(config: ModelConfig, seed: int) -> tuple[PreTrainedModel, Any]:
    """A Llama with random weights, and a tokenizer trained on the language of the embedded world."""
    from mmkit.minidata.language import all_text_sources  # needs the extra `minidata`, which other models do without

    tokenizer = build_tokenizer(all_text_sources(), config.vocab_size)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if config.mimetic:
        mimetic_init(model)
    return model, tokenizer


@torch.no_grad()
def mimetic_init(model: LlamaForCausalLM) -> None:
    """Let attention begin as "find the same word and pass it on": keys equal queries, and value then output is a small identity.

    Answering about a scene is finding and copying words, which random weights learn only after many millions of tokens.

    Source: Mimetic Initialization of Self-Attention Layers (Trockman and Kolter, 2023). Their value-output product is a negative identity,
    for classification; copying with tied embeddings wants a positive one.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        torch.nn.init.normal_(attention.q_proj.weight, std=0.04)  # the same word scores about 3 above others, before position turns it
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        torch.nn.init.orthogonal_(attention.v_proj.weight, gain=0.3)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)


class Collate:
    """Pad chats to a batch, on the right: ids, labels, mask, and the words of each image placeholder.

    Args:
        pad_id: Fills up the ids.
        image_id: Id of the placeholder.
    """

    def __init__(self, pad_id: int, image_id: int) -> None:
        self.pad_id, self.image_id = pad_id, image_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Give "input_ids", "labels", "attention_mask" [B, T], and "cell_ids", "cell_weights" [P, W], P placeholders in all."""
        length = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), length), self.pad_id)
        labels = torch.full((len(items), length), IGNORE_INDEX)
        mask = torch.zeros((len(items), length), dtype=torch.long)
        for row, item in enumerate(items):
            n = len(item["input_ids"])
            ids[row, :n], labels[row, :n], mask[row, :n] = torch.tensor(item["input_ids"]), torch.tensor(item["labels"]), 1
        cells = [cell for item in items for cell in item.get("cells", [])]
        width = max((len(cell) for cell in cells), default=1)
        cell_ids = torch.zeros((len(cells), width), dtype=torch.long)
        weights = torch.zeros((len(cells), width))
        for row, cell in enumerate(cells):
            cell_ids[row, : len(cell)] = torch.tensor([token for token, _ in cell])
            weights[row, : len(cell)] = torch.tensor([weight for _, weight in cell])
        places = ids == self.image_id
        return {"input_ids": ids, "labels": labels, "attention_mask": mask, "places": places, "cell_ids": cell_ids, "cell_weights": weights}


def embed(model: PreTrainedModel, batch: dict[str, Tensor], noise: float = 0.0) -> Tensor:
    """Embeddings [B, T, D], the placeholders holding the weighted mean of their words', as a projector would write them."""
    table: Any = model.get_input_embeddings()
    embedded = table(batch["input_ids"])
    if len(batch["cell_ids"]) == 0:
        return embedded
    weights = batch["cell_weights"] / batch["cell_weights"].sum(1, keepdim=True)
    cells = (table(batch["cell_ids"]) * weights[..., None]).sum(1)  # [P, D]
    if noise:
        cells = cells + torch.randn_like(cells) * noise * table.weight.detach().std()
    return embedded.masked_scatter(batch["places"][..., None], cells.to(embedded.dtype))


def predictions(model: PreTrainedModel, batch: dict[str, Tensor], noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits [L, V] that predict the supervised tokens, and those tokens [L]; no logits are made for the rest."""
    keep = batch["labels"][:, 1:] != IGNORE_INDEX
    embedded = embed(model, batch, noise)
    hidden = model.base_model(
        inputs_embeds=embedded, use_cache=False
    ).last_hidden_state  # right padding: no mask needed, the future is hidden
    head: Any = model.get_output_embeddings()
    return head(hidden[:, :-1][keep]), batch["labels"][:, 1:][keep]


def answer_loss(model: PreTrainedModel, batch: dict[str, Tensor], noise: float = 0.0) -> Tensor:
    """Mean cross entropy over the supervised tokens, []."""
    logits, labels = predictions(model, batch, noise)
    return F.cross_entropy(logits.float(), labels)


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, world: WorldText, collate: Collate, n_scenes: int, form: str, seed: int = 10**6
) -> dict[str, dict[str, Any]]:
    """Answer the questions on held-out scenes greedily, by kind.

    A question is right when every token of its answer, end token included, is the most probable one: exactly when greedy decoding gives
    that answer. Earlier questions of a chat stand before it with their true answers.

    Args:
        model: In eval mode.
        world: Chats.
        collate: Makes the batches.
        n_scenes: How many.
        form: Of `FORMS`.
        seed: Keeps them apart from every training chat (those use the run's seed).

    Returns:
        kind -> {"right": percent, "n": how many}; captions, which have many right answers, are left out.
    """
    found: dict[str, list[bool]] = {}
    device = next(model.parameters()).device
    for start in range(0, n_scenes, 32):
        chats = [world.chat(np.random.default_rng((seed, index)), form) for index in range(start, min(n_scenes, start + 32))]
        batch = {name: tensor.to(device) for name, tensor in collate([world.encode(chat) for chat in chats]).items()}
        logits, labels = predictions(model, batch)
        right = (logits.argmax(-1) == labels).tolist()
        supervised = (batch["labels"][:, 1:] != IGNORE_INDEX).tolist()
        position = 0
        for chat, row in zip(chats, supervised, strict=True):
            answers: list[bool] = []
            for before, now in zip([False, *row], row, strict=False):
                if now:
                    answers = [*answers[:-1], answers[-1] and right[position]] if before else [*answers, right[position]]
                    position += 1
            for kind, ok in zip(chat.kinds, answers, strict=True):
                found.setdefault(kind, []).append(ok)
    found.pop("caption", None)
    found["all"] = [ok for answers in found.values() for ok in answers]
    return {kind: {"right": round(100 * sum(answers) / len(answers), 1), "n": len(answers)} for kind, answers in found.items()}


def save_model(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write an ordinary Hugging Face folder at once, weights in `dtype`."""
    head = "lm_head.weight" if model.config.tie_word_embeddings else None  # the embedding's own tensor: once in the file is enough
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if name != head}
    with atomic_folder(folder, overwrite=True) as work:
        model.config.dtype = dtype
        model.save_pretrained(work, state_dict=state)
        tokenizer.save_pretrained(work)


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, measure on held-out scenes, save; gives the run folder."""
    settings = load_config(TextConfig, argv, recipe_dir=RECIPES)
    if settings.model.llm:
        model, tokenizer = load_llm(settings.model.llm)
    else:
        model, tokenizer = new_model(settings.model, settings.run.seed)
    chat_format = ChatFormat(tokenizer, settings.template)
    world = (
        WorldText(chat_format, settings.data.world, settings.run.seed, settings.data.world_shares, settings.data.heard)
        if settings.data.world
        else None
    )
    dataset: Any = world or ConversationDataset(
        settings.data.json, None, chat_format, max_length=settings.data.max_length, on_bad_sample=settings.data.on_bad_sample
    )
    collate = Collate(tokenizer.pad_token_id, chat_format.image_token_id if chat_format.image_token_id is not None else -1)

    run = Run(settings.run, name="text", settings=settings)
    run.print(trainable_table(model, {"language model": model}, {"language model": settings.model.llm or "new, random"}))
    beta1, beta2 = settings.betas
    optimizer = torch.optim.AdamW(param_groups(model, settings.lr, settings.weight_decay), lr=settings.lr, betas=(beta1, beta2))
    model, optimizer = run.prepare(model.train(), optimizer)
    run.set_schedule(cosine_schedule(run.plan(dataset), settings.warmup, final=0.02))
    for batch in run.batches(dataset, collate, weigh=lambda batch: int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())):
        loss = run.forward(answer_loss, batch, settings.cell_noise)
        run.backward(loss)
        run.log(loss=loss)

    trained = run.unwrap().eval()
    if run.is_main:
        save_model(
            trained,
            tokenizer,
            run.folder / "model",
            {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.weights],
        )
        if world is not None and settings.held_out:
            table = {form: accuracy(trained, world, collate, settings.held_out, form) for form in ("cells", "describe", "loose")}
            atomic_write(run.folder / "held_out.json", json.dumps(table, indent=1))
            run.print(accuracy_text(table))
    return run.finish()


def accuracy_text(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One line a form: how many questions of each kind were answered right."""
    return "\n".join(
        f"{form:9s}" + "  ".join(f"{kind} {row['right']} % ({row['n']})" for kind, row in kinds.items()) for form, kinds in table.items()
    )


if __name__ == "__main__":
    cli_entry(main)
