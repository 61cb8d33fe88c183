"""Let a LLaVA model caption the images of COCO, NoCaps, Flickr30k or your own, and score it by CIDEr-D, BLEU, ROUGE-L and METEOR.

    python llm_stage/eval_captions.py --model DIR --benchmark nocaps --annotations nocaps_val_4500_captions.json --images DIR --out DIR
    ... --benchmark coco_captions --annotations dataset_coco.json      Karpathy's test split; COCO's own captions_val2014.json works too

In the output folder: `answers.jsonl`, `scores.jsonl` (CIDEr-D an image), `summary.json`, `submission.json` (what COCO's and NoCaps's servers
take), `manifest.json`. A second start goes on where the first stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from llm_stage.asking import request_for
from llm_stage.benchmark_files import VqaItem
from llm_stage.benchmarks import Benchmark, choose, controlled, own_row, prompt_words, read_items
from llm_stage.blip2_protocols import PROTOCOLS, blip2_row, decoding_of
from llm_stage.caption_scores import check_java_metrics, choose_tokeniser, cut, summarise_captions
from llm_stage.chat_models import Chat, load_chat
from llm_stage.generate import ChatRequest
from llm_stage.grounding import beside, grounding
from llm_stage.models import fingerprint, model_folder
from llm_stage.submissions import write_submission
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError
from mmkit.evaluation import EvaluationFolder, Ranks, merge_parts, part_records, relative
from mmkit.images import ImageError
from mmkit.stats import DRAWS

_NO_PICTURES = ("blank", "text_only")


@dataclass
class EvalCaptionsConfig:
    """Settings of one evaluation by captions."""

    model: str = field(default="", metadata={"help": "folder of a trained LLaVA or BLIP-2, or a name of `mmkit list models`"})
    benchmark: str = field(default="coco_captions", metadata={"help": "coco_captions, nocaps, flickr30k, or a YAML file with your own row"})
    annotations: str = field(
        default="", metadata={"help": "caption file: COCO's and NoCaps's JSON, Karpathy's splits, a list, Flickr's text files"}
    )
    images: str = field(default="", metadata={"help": "folder the pictures' names are relative to"})
    split: str = field(default="", metadata={"help": "of Karpathy's files; empty is test"})
    out: str = field(default="", metadata={"help": "folder for answers.jsonl, scores.jsonl, summary.json, manifest.json"})
    prompt: str = field(default="", metadata={"help": "another prompt than the row's: llava_caption, blip2_caption, ..., or own words"})
    protocol: str = field(default="", metadata={"help": f"BLIP-2's prompt and decoding by name: {', '.join(PROTOCOLS)}"})
    control: Literal["", "shuffled", "blank", "text_only"] = field(
        default="", metadata={"help": "another picture, a grey one, or none: what is still right needs no picture"}
    )
    against: str = field(default="", metadata={"help": "a control: the evaluation with its own pictures; empty looks beside --out"})
    shuffle_seed: int = field(default=0, metadata={"help": "which shuffle; the same for all models that are compared"})
    tokeniser: Literal["auto", "ptb_java", "ptb_python"] = field(
        default="auto", metadata={"help": "what cuts captions into words; auto is CoreNLP's own where Java and pycocoevalcap are"}
    )
    java_metrics: list[str] = field(default_factory=lambda: ["auto"], metadata={"help": "[meteor], [meteor, spice], [none]"})
    unlabelled: bool = field(default=False, metadata={"help": "a test split without public captions: only the submission is written"})
    batch_size: int = field(default=8, metadata={"help": "images captioned at once"})
    max_new_tokens: int = field(default=0, metadata={"help": "longest caption; 0 is the benchmark's own limit"})
    limit: int = field(default=0, metadata={"help": "only the first so many images; 0 is all"})
    on_bad_sample: Literal["error", "skip"] = field(
        default="error", metadata={"help": "an unreadable picture: stop, or count it as missing"}
    )
    overwrite: bool = field(default=False, metadata={"help": "throw earlier captions in --out away"})

    def validate(self) -> None:
        """Refuse a run without input or output; take the files that a row of one's own names.

        Raises:
            ConfigError: The message names the flag.
        """
        if self.benchmark.endswith((".yaml", ".yml")):
            for name, path in own_row(self.benchmark)[1].items():
                name = "annotations" if name == "questions" else name
                setattr(self, name, getattr(self, name, "") or path)
        for name in ("model", "annotations", *([] if self.control in _NO_PICTURES else ["images"]), "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing; --help lists all settings")
        if self.batch_size < 1:
            raise ConfigError(f"--batch_size is {self.batch_size}; at least 1 is right")


def main(argv: Sequence[str] | None = None) -> Path:
    """Evaluate one model on one benchmark of captions.

    Args:
        argv: Command line; None is the process's own.

    Returns:
        The output folder.
    """
    config = load_config(EvalCaptionsConfig, argv)
    row = row_for(config)
    folder = EvaluationFolder(config.out, "eval_captions", resume=True, overwrite=config.overwrite, own=("scores.jsonl", "submission.json"))
    folder.refuse()
    tokeniser, java = choose_tokeniser(config.tokeniser), check_java_metrics(config.java_metrics)
    items, head = read_items(
        config.annotations, config.annotations, config.images or None, config.limit, row, split=config.split, unlabelled=config.unlabelled
    )
    items = controlled(items, row, config.shuffle_seed)
    identity = identify(config, row, head)
    ranks = Ranks()
    model = load_chat(config.model, device=ranks.device, verbatim=True)
    folder.open(identity, ranks)
    answers = caption_all(model, row, items, config, folder.path, ranks)
    if ranks.first:
        if not row.control_of:
            write_submission(row.upload, items, answers, folder.path)
        if config.unlabelled:
            folder.close()
            print(f"{row.name} · {model.name}: {len(items)} images without public captions; what the server takes is in {folder.path}")
        else:
            finish(config, row, head, items, answers, folder, model, tokeniser, java)
    ranks.wait()
    return folder.path


def row_for(config: EvalCaptionsConfig) -> Benchmark:
    """The benchmark's row with the prompt and the control that were asked for.

    Raises:
        ConfigError: It is no benchmark of captions.
    """
    row = choose(config.benchmark, config.control, "")
    if row.scorer != "captions":
        raise ConfigError(f"{row.name} is a benchmark of questions: mmkit eval vqa --benchmark {row.name}")
    words = config.prompt and (prompt_words(config.prompt) if " " not in config.prompt else config.prompt)
    return blip2_row(replace(row, prompt=words or row.prompt), config.model, config.prompt, config.protocol, captions=True)


def identify(config: EvalCaptionsConfig, row: Benchmark, head: Mapping[str, Any]) -> dict[str, Any]:
    """All that a caption depends on."""
    return {
        "benchmark": row.name,
        "model": config.model,
        "model_fingerprint": fingerprint(model_folder(config.model)),
        "prompt": row.prompt,
        "max_new_tokens": config.max_new_tokens or row.max_new_tokens,
        "questions_sha256": head["sha256"],
        "split": config.split,
        "shuffle_seed": config.shuffle_seed if row.shuffled else None,
        "limit": config.limit,
        **({"decoding": decoding_of(config.protocol)} if config.protocol else {}),
    }


def caption_all(
    model: Chat, row: Benchmark, items: Sequence[VqaItem], config: EvalCaptionsConfig, out: Path, ranks: Ranks
) -> dict[Any, dict[str, Any]]:
    """Caption what has no caption yet, a batch at a time, each flushed to disk.

    Returns:
        Rows by image id; a row without "answer" has "missing", the reason.
    """
    limit = config.max_new_tokens or row.max_new_tokens
    with part_records(out, ranks) as (records, done):
        todo = ranks.share([item for item in items if item.question_id not in done])
        steps = range(0, len(todo), config.batch_size)
        for start in tqdm(steps, desc=f"{row.name} · {model.name}", unit="batch", disable=not ranks.first):
            asked: list[tuple[VqaItem, ChatRequest]] = []
            for item in todo[start : start + config.batch_size]:
                try:
                    asked.append((item, request_for(item, row, config.images, f"image {item.question_id} of {config.annotations}")))
                except ImageError as error:
                    if config.on_bad_sample == "error":
                        raise
                    records.append({**_line(item), "missing": str(error)})
            began = time.monotonic()
            requests, how = [request for _, request in asked], decoding_of(config.protocol)
            texts = model.generate(requests, max_new_tokens=limit, batch_size=config.batch_size, **how) if asked else []
            seconds = round((time.monotonic() - began) / max(1, len(asked)), 4)
            for (item, _), text in zip(asked, texts, strict=True):
                records.append({**_line(item), "answer": text.strip(), "seconds": seconds})
    return {line["question_id"]: line for line in merge_parts(out, [item.question_id for item in items], ranks)}


def _line(item: VqaItem) -> dict[str, Any]:
    line: dict[str, Any] = {"question_id": item.question_id, "image": item.image, "kind": item.kind}
    return line if item.image == item.own_image else {**line, "own_image": item.own_image}


def finish(
    config: EvalCaptionsConfig,
    row: Benchmark,
    head: Mapping[str, Any],
    items: Sequence[VqaItem],
    answers: Mapping[Any, Mapping[str, Any]],
    folder: EvaluationFolder,
    model: Chat,
    tokeniser: str,
    java: Sequence[str],
) -> None:
    """Score the captions and write what came out."""
    parts, rows = summarise_captions(items, answers, cut(items, answers, tokeniser), java)
    atomic_write(folder.path / "scores.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows))
    protocol = {
        "prompt": ("" if row.control == "text_only" else "<image>\n") + row.prompt,
        "prompt_name": row.prompt_name,
        "decoding": decoding_of(config.protocol) or "greedy",
        "protocol": config.protocol or None,
        "max_new_tokens": config.max_new_tokens or row.max_new_tokens,
        "scorer": "cider_d, weights of the references of the scored images",
        "tokeniser": tokeniser,
        "batch_size": config.batch_size,
        "questions": Path(config.annotations).name,
        "questions_sha256": head["sha256"],
        "split": config.split or row.split or None,
        "images": relative(config.images or ".", config.out),
        "control": row.control or None,
        "limit": config.limit or None,
        "interval": f"95 % percentile bootstrap, {DRAWS} draws, resampled by image, CIDEr's weights held",
    }
    summary: dict[str, Any] = {"benchmark": row.name, "model": model.name, "protocol": protocol, **parts, "encoder": model.encoder_card()}
    real = Path(config.against) if config.against else beside(folder.path, row.control_of, folder.identity) if row.control_of else None
    if real is not None:
        summary["grounding"] = grounding(real, row.control_of, row.control, rows, folder.path)
    folder.finish(summary)
    print(as_text(summary))


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary for the terminal."""
    lines = [f"{summary['benchmark']} · {summary['model']}: {summary['n']} captions, {summary['missing']} missing"]
    for name, value in summary["metrics"].items():
        low, high = value["ci95"]
        lines.append(f"  {name:28s} {value['value']:6.2f}  [{low:.2f}, {high:.2f}]  n {value['n']:5d}")
    lines += [f"  {name:28s} {100 * value:6.2f}" for name, value in summary["official"].items() if name.startswith(("METEOR", "SPICE"))]
    return "\n".join([*lines, *([f"  {summary['grounding']['sentence']}"] if "grounding" in summary else [])])


if __name__ == "__main__":
    cli_entry(main)
