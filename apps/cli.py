"""`mmkit ...`: one table, command -> "module:main"; a module is imported when its command is chosen, so that help costs nothing.

Exit codes: 0 done; 2 the command line, a setting or a file is not right (one line says what to do; `MMKIT_TRACEBACK=1` adds where);
130 interrupted; 1 anything else, with its traceback, because it is a fault of the kit's.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import metadata
from typing import Any, NamedTuple

from mmkit.config import cli_entry
from mmkit.errors import NameNotFound

HELP = ("-h", "--help", "help")


class Command(NamedTuple):
    """Where a command lives and what it is for."""

    target: str
    help: str


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "apps.quickstart:main", "from nothing to a report: data, encoders, LLaVA behind each, evaluation (about 20 minutes)"
    ),
    "experiment visft": Command(
        "apps.visft:main", "ViSFT on the embedded data: heads, LoRA, its permuted control, probes before and after, and a report"
    ),
    "serve": Command("apps.serve:main", "OpenAI-compatible chat completions with images, streams and batches, from your models"),
    "demo": Command("apps.demo:main", "ask one to four models about an image, side by side, in the browser"),
    "data mini": Command("mmkit.minidata.build:main", "draw the embedded data set and write it in the formats of COCO, LLaVA and VQAv2"),
    "data check": Command(
        "llm_stage.check_data:main", "what a LLaVA training would meet in a JSON: bad rows, tokens, labels, padding, steps, memory"
    ),
    "train contrastive": Command("encoders.train_contrastive:main", "train an image and a text tower on pairs (CLIP)"),
    "train uta": Command("encoders.train_uta:main", "train an encoder on the tokens of a frozen CLIP teacher (unmasked token alignment)"),
    "train classifier": Command(
        "encoders.train_classifier:main", "fine-tune an encoder to classify (FT-CLIP), its last blocks, or a head alone"
    ),
    "train visft": Command(
        "encoders.train_visft:main",
        "detection, segmentation, panoptic, pose and caption heads on a frozen encoder, then LoRA in it under the frozen heads",
    ),
    "train llava": Command(
        "llm_stage.train_llava:main", "put a frozen encoder before a language model: stage 1 projector, stage 2 instructions"
    ),
    "train qformer": Command(
        "llm_stage.train_qformer:main", "train BLIP-2's Q-Former before a frozen encoder: contrast, matching, captions"
    ),
    "train blip2": Command(
        "llm_stage.train_blip2:main", "let a trained Q-Former speak to a frozen language model: stage 2 of BLIP-2, captions and VQA"
    ),
    "train text": Command("llm_stage.train_text:main", "train a small language model on the language of the embedded world"),
    "eval zeroshot": Command("encoders.eval_zeroshot:main", "name images by their nearest class name; ImageNet's six sets and others"),
    "eval retrieval": Command("encoders.eval_zeroshot_retrieval:main", "find captions for images and images for captions; R@1, 5, 10"),
    "eval classifier": Command("encoders.eval_classifier:main", "top-1 and top-5 of a fine-tuned classifier on any folder of its classes"),
    "eval ocr": Command("encoders.eval_ocr:main", "read words off a frozen encoder's patch tokens: a small head, word accuracy per set"),
    "eval goi": Command(
        "encoders.eval_goi:main", "name the object of a region from a frozen encoder's CLS: a linear probe, top-1 and top-5"
    ),
    "eval heads": Command("encoders.eval_heads:main", "AP of boxes or masks, CIDEr of captions, of a ViSFT head on a COCO-format set"),
    "eval vqa": Command(
        "llm_stage.eval_vqa:main",
        "answer a benchmark's questions (VQAv2, GQA, POPE, ... or your own); --control shuffled, blank, text_only",
    ),
    "eval captions": Command(
        "llm_stage.eval_captions:main", "caption COCO, NoCaps, Flickr30k or your own images: CIDEr, BLEU, ROUGE-L, METEOR"
    ),
    "score": Command(
        "llm_stage.score:main", "score answers that any other model made: mmkit score gqa --answers A.jsonl --questions Q --out DIR"
    ),
    "lmms-task": Command(
        "llm_stage.lmms_task:main", "a benchmark as a task of lmms-eval, whose --model mmkit answers through the same path"
    ),
    "eval qformer-retrieval": Command("llm_stage.eval_retrieval:main", "retrieval with a Q-Former: by contrast, and re-ranked by matching"),
    "eval llava-bench": Command(
        "llm_stage.eval_llava_bench:main", "long answers scored by a judge at any OpenAI-compatible endpoint; or recorded reviews"
    ),
    "eval mir": Command("llm_stage.eval_mir:main", "how far image tokens lie from text tokens inside the LLM, without any tuning (MIR)"),
    "sweep": Command(
        "apps.sweep:main", "train and evaluate rows of settings over seeds -> one table: mmkit sweep uta_objectives --out runs/sweep"
    ),
    "export": Command(
        "llm_stage.export:main", "a LLaVA folder -> plain transformers, LLaVA's own layout, mm_projector.bin; model card, proof of equality"
    ),
    "convert uta": Command("encoders.convert:uta", "the authors' UTA checkpoint -> encoder folder with image and text tower"),
    "convert eva": Command("encoders.convert:eva", "an EVA-CLIP checkpoint, or LAVIS's eva_vit_g.pth -> encoder folder"),
    "convert open-clip": Command("encoders.convert:open_clip", "an encoder and its text tower -> an open_clip model"),
    "convert timm": Command("encoders.convert:plain_timm", "an encoder -> a plain timm checkpoint"),
    "convert resize": Command("encoders.convert:resize", "an encoder -> the same at another patch or image size"),
    "convert visft-lora": Command(
        "encoders.convert_visft:lora", "ViSFT's LoRA -> merged into an encoder or BLIP-2; an adapter; the authors' file"
    ),
    "convert visft-heads": Command("encoders.convert_visft:heads", "a head file of ViSFT's authors -> a head folder"),
    "convert lavis-blip2": Command("llm_stage.convert_blip2:lavis", "a BLIP-2 checkpoint of LAVIS -> a Q-Former folder or a BLIP-2 folder"),
    "convert blip2-from-hf": Command("llm_stage.convert_blip2:from_hf", "a BLIP-2 folder of transformers -> one of this kit"),
    "convert blip2-to-hf": Command("llm_stage.convert_blip2:to_hf", "a BLIP-2 or Q-Former folder -> one of transformers (EVA towers)"),
    "convert blip2-swap": Command(
        "llm_stage.convert_blip2:swap", "other weights of the same encoder behind a finished Q-Former or BLIP-2, nothing trained"
    ),
    "inspect": Command("encoders.inspection:main", "attention maps and patch-text maps of an encoder, as PNG"),
    "scorecard": Command(
        "apps.scorecard:main", "the same measures for any encoders: zero-shot, probes, LLaVA, BLIP-2, one table and report"
    ),
    "compare": Command("mmkit.compare:main", "two models on the same questions: intervals, tests, by kind, over seeds, and a sentence"),
    "report": Command("mmkit.report:main", "one run folder or many -> report.json, report.md, report.html"),
    "list": Command("apps.listing:main", "what there is: list encoders | llms | models | benchmarks | recipes | sweeps"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `mmkit`; None takes them from the command line.

    Returns:
        The exit code (see the top of this file).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in HELP:
        print(help_text())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"mmkit {metadata.version('mmkit')}")
        return 0
    group = [name for name in COMMANDS if name.startswith(words[0] + " ")]
    if group and (len(words) == 1 or words[1] in HELP):
        print(help_text(group))
        return 0 if len(words) > 1 else 2
    return run(dispatch, words)


def run(entry: Callable[..., Any], *arguments: Any) -> int:
    """Call an entry with `cli_entry`'s manners (one line for a wrong setting or file, no traceback); give its exit code back."""
    try:
        cli_entry(lambda: entry(*arguments))
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def dispatch(words: list[str]) -> None:
    """Import the module of the command that `words` begins with and hand it the rest."""
    name, rest = resolve(words)
    module, function = COMMANDS[name].target.split(":")
    getattr(importlib.import_module(module), function)(rest)


def resolve(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split the words of a command line into a command of the table and what is for it.

    Raises:
        NameNotFound: There is no such command; the nearest ones are named.
    """
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return name, list(words[length:])
    typed = " ".join(word for word in words[:2] if not word.startswith("-"))
    raise NameNotFound(f"mmkit has no command '{typed}'; {nearest(typed)}`mmkit --help` shows all {len(COMMANDS)}")


def nearest(typed: str) -> str:
    """Commands that look like the typed one: by both words, by the second (`mmkit vqa`), by the first."""
    by_word = {word: name for name in COMMANDS for word in name.split()}
    close = get_close_matches(typed, COMMANDS, n=3, cutoff=0.55)
    close += [by_word[word] for part in typed.split() for word in get_close_matches(part, by_word, n=2, cutoff=0.7)]
    unique = list(dict.fromkeys(close))[:3]
    return f"did you mean `mmkit {'` or `mmkit '.join(unique)}`? " if unique else ""


def help_text(names: Sequence[str] | None = None) -> str:
    """The commands (all of them, or those of one group) with a line for each."""
    shown = {name: COMMANDS[name] for name in names or COMMANDS}
    width = max(map(len, shown))
    lines = ["mmkit COMMAND [--key value ...]", ""]
    if names is None:
        lines = ["mmkit: does this vision encoder make a better multimodal model?", "", *lines]
    lines += [f"  {name:<{width}}  {command.help}" for name, command in shown.items()]
    lines += ["", "`mmkit COMMAND --help` lists the settings of a command; recipes bundle them (`mmkit list recipes`)."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
