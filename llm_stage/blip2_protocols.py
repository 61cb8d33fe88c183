"""How BLIP-2 has been asked: prompts and decoding of LAVIS and of the paper, by name. A number of BLIP-2 means little without one of these.

Source: LAVIS, lavis/projects/blip2/eval/*.yaml ("lavis_*"); BLIP-2 (Li et al., 2023), section 4 ("paper_*").
"""

from dataclasses import dataclass
from typing import Any

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
