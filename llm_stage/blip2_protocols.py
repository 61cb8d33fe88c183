"""How BLIP-2 has been asked: prompts and decoding of LAVIS and of the paper, by name. A number of BLIP-2 means little without one of these.

Source: LAVIS, lavis/projects/blip2/eval/*.yaml ("lavis_*"); BLIP-2 (Li et al., 2023), section 4 ("paper_*").
"""

import json
from dataclasses import dataclass, replace
from typing import Any

from llm_stage.benchmarks import Benchmark
from llm_stage.blip2_folder import Blip2Card, is_blip2, read_blip2_file
from llm_stage.models import model_folder
from mmkit.errors import ConfigError, find

SHORT, LONG = "Question: {question} Short answer:", "Question: {question} Answer:"


@dataclass(frozen=True)
class Protocol:
    """Prompt and decoding.

    Attributes:
        prompt: With {question} where there is one; a caption's beginning, else.
        num_beams, length_penalty, min_new_tokens, max_new_tokens: Of transformers' GenerationConfig.
        note: For listings and summaries.
    """

    prompt: str
    num_beams: int = 5
    length_penalty: float = 0.0
    min_new_tokens: int = 1
    max_new_tokens: int = 10
    note: str = ""

    @property
    def decoding(self) -> dict[str, Any]:
        """What `generate` is given, besides the longest answer."""
        return {"num_beams": self.num_beams, "length_penalty": self.length_penalty, "min_new_tokens": self.min_new_tokens}


PROTOCOLS: dict[str, Protocol] = {
    "lavis_opt": Protocol(SHORT, length_penalty=0.0, note="VQAv2 val with OPT; LAVIS also cuts prompts at 32 tokens, this does not"),
    "lavis_t5": Protocol(SHORT, length_penalty=-1.0, note="VQAv2 val, OK-VQA test, GQA testdev with Flan-T5"),
    "paper_opt": Protocol(LONG, length_penalty=-1.0, note="the paper does not give the length of answers: LAVIS' 10"),
    "paper_t5": Protocol(SHORT, length_penalty=-1.0, note="the paper does not give the length of answers: LAVIS' 10"),
    "lavis_nocaps": Protocol("", 5, 1.0, 10, 80, "pre-trained weights; LAVIS' list of ids is the out-of-domain part alone"),
    "lavis_coco": Protocol("a photo of", 5, 1.0, 8, 30, "weights tuned on COCO, at 364 pixels"),
}


def blip2_row(row: Benchmark, model: str, prompt: str, protocol: str, captions: bool = False) -> Benchmark:
    """A benchmark as a BLIP-2 is asked it: in the words it was trained with, or in a protocol's; rows for other models stay as they are.

    Args:
        row: The benchmark, with a prompt that was asked for by name or in words.
        model: Folder or name of the model.
        prompt: What was asked for; it stays.
        protocol: A name of `PROTOCOLS`, or "".
        captions: The benchmark asks for captions.

    Raises:
        ConfigError: A protocol was named for another model, or beside a prompt.
        NameNotFound: There is no such protocol.
    """
    card = blip2_card(model)
    if protocol and (card is None or prompt):
        raise ConfigError(f"--protocol {protocol} holds BLIP-2's prompt and decoding: for a BLIP-2 folder, and without --prompt")
    if protocol:
        chosen = find("BLIP-2 protocol", PROTOCOLS, protocol)
        return replace(row, prompt=chosen.prompt, max_new_tokens=chosen.max_new_tokens)
    if card is not None and not prompt:
        return replace(row, prompt=card.caption_prompt if captions else card.prompt.replace("{}", "{question}"))
    return row


def blip2_card(model: str) -> Blip2Card | None:
    """How a BLIP-2 is asked, ours or transformers'; None for another model."""
    folder = model_folder(model)
    if is_blip2(folder):
        return read_blip2_file(folder)[0]
    file = folder / "config.json"
    stock = file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == "blip-2"
    return Blip2Card("", "") if stock else None


def decoding_of(protocol: str) -> dict[str, Any]:
    """What a protocol says of decoding; {} is greedy."""
    return PROTOCOLS[protocol].decoding if protocol else {}
