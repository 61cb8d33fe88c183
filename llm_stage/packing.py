"""Packing: the examples of a micro-batch one behind the other in few rows, instead of one row each, filled up with padding.

Which samples are in which step does not change, nor what is learned: positions restart with each example, attention never crosses a border,
and the first token of an example is not predicted. transformers keeps the examples apart by the restarting positions, under three
conditions that this module sees to: no attention mask, no cache, and under flash attention a single row (it ignores positions otherwise).

Source: the fact that stock attention separates examples under these conditions, and silently does not under others, is transformers'
(`find_packed_sequence_indices` in masking_utils.py, `_is_packed_sequence` in modeling_flash_attention_utils.py).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm_stage.chat_format import IGNORE_INDEX
from llm_stage.conversations import collate
from mmkit.errors import ConfigError

MASKED = ("sdpa", "eager", "flex_attention")
"""Attention of transformers that gets a block-diagonal mask made from the positions; any number of rows."""


WITHOUT_END = 2**62
"""The budget of a single row."""
ATTENTION_SPAN = 5
"""Widths of the model: the length of a row at which masked attention costs as much as all else (measured with models of width 256 and 576)."""


def plan_rows(lengths: Sequence[int], budget: int, width: int = 0) -> list[list[int]]:
    """Deal examples evenly to as many rows as cost least: few are padded little, short ones save attention.

    Args:
        lengths: Tokens of each example.
        budget: Tokens that a row may hold; `WITHOUT_END` makes one row. An example that is longer still makes a row, and then so may others.
        width: Of the model, where attention goes over whole rows under a mask: its cost grows with the square of a row's length. 0 counts
            padding alone.

    Returns:
        For each row the examples in it, in their order; a function of the arguments alone. Rows are padded to the fullest one.
    """
    if budget >= WITHOUT_END:
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    budget = max(budget, max(lengths))
    plans = [_first_fit(order, lengths, budget)]
    plans += [_evenly(order, lengths, count) for count in range(math.ceil(sum(lengths) / budget), len(lengths) + 1)]

    def cost(plan: Sequence[Sequence[int]]) -> float:
        longest = max(sum(lengths[index] for index in row) for row in plan)
        if longest > budget:
            return math.inf
        attention = longest / (ATTENTION_SPAN * width) if width else 0.0
        return len(plan) * longest * (1 + attention)

    return sorted(sorted(row) for row in min(plans, key=cost))


def _first_fit(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    rows: list[list[int]] = []
    left: list[int] = []
    for index in order:
        row = next((row for row, free in enumerate(left) if free >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(budget)
        rows[row].append(index)
        left[row] -= lengths[index]
    return rows


def _evenly(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Longest first, each to the emptiest row (Graham, 1969)."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for index in order:
        row = filled.index(min(filled))
        rows[row].append(index)
        filled[row] += lengths[index]
    return rows


def pack(items: Sequence[Mapping[str, Any]], budget: int, width: int = 0) -> list[dict[str, Any]]:
    """Join examples into rows.

    Args:
        items: "input_ids", "labels" (lists), "images" (a list), as `ConversationDataset` gives them.
        budget, width: See `plan_rows`.

    Returns:
        Rows of the same form with "position_ids", which start from 0 with each example; no label where an example begins.
    """
    rows = []
    for indices in plan_rows([len(item["input_ids"]) for item in items], budget, width):
        row: dict[str, Any] = {"input_ids": [], "labels": [], "position_ids": [], "images": []}
        for item in (items[index] for index in indices):
            row["input_ids"] += item["input_ids"]
            row["labels"] += [IGNORE_INDEX, *item["labels"][1:]]
            row["position_ids"] += range(len(item["input_ids"]))
            row["images"] += item.get("images", [])
        rows.append(row)
    return rows


def packed_batch(
    items: Sequence[Mapping[str, Any]],
    pad_id: int,
    image_token_id: int,
    tokens_per_image: int,
    image_size: int,
    budget: int,
    width: int = 0,
) -> dict[str, Any]:
    """Make a packed micro-batch. One without any image gets an example of a zero image and no label, for the same reason as
    `with_dummy_row` gives one: ranks must not differ in whether they run the tower.

    Args:
        items: Examples of `ConversationDataset`.
        pad_id: Fills up the rows.
        image_token_id: Of the placeholders.
        tokens_per_image: Placeholders per image.
        image_size: Pixels of the tower's input.
        budget: Tokens of a row, from `row_budget`.
        width: Of the language model; see `plan_rows`.

    Returns:
        What `collate` gives, with "position_ids" [B, L], and None for "attention_mask".
    """
    if not any(item.get("images") for item in items):
        ids = [image_token_id] * tokens_per_image
        dummy = {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids), "images": [torch.zeros(3, image_size, image_size)]}
        items = [*items, dummy]
    return collate(pack(items, budget, width), pad_id, image_token_id, tokens_per_image)


def real_tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch, packed or not, are no padding."""
    mask = batch.get("attention_mask")
    return int(batch["real_tokens"]) if mask is None else int(mask.sum())


def padding_share(batch: Mapping[str, Any]) -> float:
    """Share of padding in a batch, packed or not, from 0 to 1."""
    return 1 - real_tokens(batch) / batch["input_ids"].numel()


# -- whether the model keeps packed examples apart -------------------------------------------------------------------------------------


def row_budget(llm: Any, length: int) -> int:
    """Tokens of a packed row: `length`, or without end where the attention separates examples in a single row only.

    Args:
        llm: The language model inside LLaVA; its attention implementation decides.
        length: What the user wants.

    Raises:
        ConfigError: Under this attention the examples would see each other.
    """
    attention = str(llm.config._attn_implementation)
    if attention in MASKED:
        return length
    if attention.startswith("flash_attention") or "flash-attn" in attention:
        return WITHOUT_END  # its variable-length kernel reads borders from the positions of one row, and there is nothing to pad in one
    raise ConfigError(
        f"data.pack with attention {attention!r}: it is not known to keep packed examples apart ({', '.join(MASKED)} and flash_attention_2 "
        "are); take one of these, or set data.pack false"
    )


def check_packing(llm: nn.Module) -> None:
    """Try on a few tokens that a packed example is neither changed by the one before it nor by standing behind it.

    What an attention implementation promises, an architecture may break: state-space and linear-attention layers carry their state over
    borders, and some models make their positions themselves. Weights that DeepSpeed ZeRO-3 has dealt out are not tried.

    Args:
        llm: The language model (the part without a head), on its device. It must give "last_hidden_state" for "input_ids".

    Raises:
        ConfigError: The examples see each other, or positions do not restart.
    """
    if any(hasattr(parameter, "ds_id") for parameter in llm.parameters()):
        return
    device, name = next(llm.parameters()).device, type(llm).__name__
    parameters = inspect.signature(llm.forward).parameters.values()
    if not any(parameter.name == "position_ids" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ConfigError(f"data.pack: {name} takes no position_ids, so it cannot tell packed examples apart: set data.pack false")
    modes = {module: module.training for module in llm.modules()}
    llm.eval()
    try:
        one, other, example = (torch.tensor(ids, device=device) for ids in ((1, 2, 3, 4, 5), (7, 5, 6, 8, 9), (3, 1, 4, 2)))
        behind_one, behind_other = (_hidden(llm, before, example)[len(before) :] for before in (one, other))
        alone = _hidden(llm, example)
    finally:
        for module, mode in modes.items():
            module.training = mode
    half = behind_one.dtype != torch.float32 or torch.is_autocast_enabled(device.type)
    scale = float(alone.float().abs().max())
    # masked attention adds exact zeros; mixtures of experts may still add in another order
    leak = float((behind_one.float() - behind_other.float()).abs().max()) / scale
    shift = float((behind_one.float() - alone.float()).abs().max()) / scale
    for found, least, fault in (
        (leak, 3e-2 if half else 1e-6, "see each other"),
        (shift, 5e-2 if half else 1e-4, "do not begin from position 0"),
    ):
        if not found <= least:
            raise ConfigError(
                f"data.pack: packed examples {fault} in {name} (hidden states differ by {found:.1e}, at most {least:.0e} is rounding): "
                "set data.pack false; run.group_by_length saves padding too"
            )


def _hidden(llm: nn.Module, *examples: Tensor) -> Tensor:
    """Hidden states [L, H] of examples packed into one row."""
    positions = torch.cat([torch.arange(len(example), device=example.device) for example in examples])
    with torch.no_grad():
        output = llm(input_ids=torch.cat(examples)[None], position_ids=positions[None], attention_mask=None, use_cache=False)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden
