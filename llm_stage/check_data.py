"""`mmkit data check FILE`: what a LLaVA training would meet in a conversations file, before it costs anything.

    mmkit data check instruct.json --images images --llm lmsys/vicuna-7b-v1.5 --template vicuna_v1 --tokens_per_image 576
    mmkit data check instruct.json --images images --llm mini-llm --clean good.json --report check.json
    mmkit data check instruct.json --llm mini-llm --show 17

Rows, images (by their headers, or whole with --decode), tokens, labels, padding, steps, memory. Exit code 0 if every row can be trained on, 2
if one cannot.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llm_stage.chat_format import ChatFormat
from llm_stage.chat_templates import TEMPLATES
from llm_stage.conversations import encode_within
from llm_stage.preflight import (
    FORMULA,
    Examiner,
    Lengths,
    RowFacts,
    Sizes,
    llm_sizes,
    load_tokenizer,
    memory,
    padding,
    projector_size,
    quantile,
)  # fmt: skip
from llm_stage.rows import parse_row, read_rows
from llm_stage.tiles import Tiles
from mmkit.batches import Layout
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec

CLIP_L_336, CLIP_L_SIZE = 576, 336  # LLaVA-1.5's


def main(argv: Sequence[str] | None = None) -> Path:
    """Check a conversations file, or show a row of it.

    Args:
        argv: The command line; None is the process's own.

    Returns:
        The report, the cleaned file, or else the file itself.

    Raises:
        DataError: A row cannot be trained on; everything asked for was written before.
    """
    args = parser().parse_args(argv)
    check_arguments(args)
    path = Path(args.json)
    rows = read_rows(path)
    chat_format = ChatFormat(load_tokenizer(args.llm), args.template, system=args.system) if args.llm else None
    tower = geometry(args.encoder) if args.encoder else {}
    tokens = args.tokens_per_image or tower.get("tokens", CLIP_L_336)
    if args.show is not None:
        show(rows, args.show, path, chat_format, tokens, args.max_length)
        return path
    root = Path(args.images) if args.images else None
    tiles = Tiles(args.tiles, ImageSpec(tower.get("image_size", CLIP_L_SIZE))) if args.tiles else None
    examiner = Examiner(rows, str(path), root, chat_format, tokens, args.max_length, args.decode, args.strict, tiles)
    found = list(tqdm(examiner.examine(args.num_workers), total=len(rows), desc="rows", unit=" rows", disable=None, smoothing=0.05))
    report = summarise(found, args, tokens, tower)
    print(render(report))
    bad = [index for index, facts in enumerate(found) if facts.reason]
    if args.report:
        atomic_write(Path(args.report), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(f"report: {args.report}")
    if args.clean:
        write_clean(path, Path(args.clean), set(bad))
        print(f"cleaned: {args.clean}, {len(rows) - len(bad):,} rows")
    if bad:
        raise DataError(
            f"{len(bad):,} of {len(rows):,} rows of {path} cannot be trained on, see above{' and ' + args.report if args.report else ''}: "
            + (f"train on {args.clean}" if args.clean else "mend them, or let --clean OUT.json write the others")
        )
    return Path(args.report or args.clean or path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="mmkit data check",
        description="check LLaVA JSON (or JSON Lines, or rows of messages) before a training",
        epilog="Exit code: 0 if every row can be trained on, 2 if one cannot (also with --clean), so that scripts can stop.",
    )
    add = made.add_argument
    add("json", metavar="FILE", help="LLaVA JSON or JSONL; rows with messages and images are read too")
    add("--images", default="", help="folder that image paths are relative to; without it pictures are left alone")
    add("--llm", default="", help="language model (only its tokenizer and config are read); without it tokens are left out")
    add("--encoder", default="", help="encoder, for the tokens per image and its size; its weights are loaded")
    add("--tokens_per_image", type=int, default=0, help=f"instead of --encoder; default {CLIP_L_336}, as CLIP-L/14 at 336 px")
    add("--tiles", type=int, default=0, help="tiles of a large picture at most, as in the training; needs --images")
    add("--template", default="own", help=f"{', '.join(TEMPLATES)}, or own: the tokenizer's")
    add("--system", default=None, help="system prompt in place of the template's")
    add("--max_length", type=int, default=2048, help="tokens of a row; whole rounds at its end are cut, images never")
    add("--decode", action="store_true", help="read every picture whole, not its header alone")
    add("--strict", action="store_true", help="pictures whose name says another format (a GIF named .jpg) make their rows bad")
    add("--micro_batch_size", type=int, default=16, help="for the padding")
    add("--global_batch_size", type=int, default=128, help="for the steps")
    add("--epochs", type=float, default=1.0, help="for the steps")
    add("--group_by_length", type=int, default=8, help="steps sorted together, for the padding")
    add("--pack_length", type=int, default=0, help="tokens of a packed row, for the padding; default max_length")
    add("--lora_rank", type=int, default=128, help="for the memory")
    add("--ranks", type=int, default=8, help="processes, for the memory")
    add("--clean", default="", metavar="OUT", help="write the good rows, each as it stands in FILE")
    add("--report", default="", metavar="OUT", help="write everything as JSON, with all bad rows")
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    add("--show", type=int, default=None, metavar="N", help="print row N (from 0) with its supervised text between 【 and 】, and stop")
    add("--list", type=int, default=20, help="bad rows to print")
    add("--num_workers", type=int, default=0, help="processes that look at rows")
    return made


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant.

    Raises:
        ConfigError: The message names the flag.
    """
    for name in ("max_length", "micro_batch_size", "global_batch_size", "group_by_length", "lora_rank", "ranks"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; 1 or more is right")
    for name in ("tokens_per_image", "pack_length", "num_workers", "list", "epochs"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name} is {getattr(args, name)}; 0 or more is right")
    if args.show is not None and not args.llm:
        raise ConfigError("--show needs a tokenizer: --llm NAME_OR_FOLDER")
    for name in ("clean", "report"):
        out = getattr(args, name)
        if out and Path(out).resolve() == Path(args.json).resolve():
            raise ConfigError(f"--{name} {out} is the file that is checked: name another")
        if out and Path(out).exists() and not args.overwrite:
            raise ConfigError(f"--{name} {out} exists: name another, or add --overwrite")
    if args.tiles and not args.images:
        raise ConfigError("--tiles needs --images: how often a picture is cut depends on its size")
    if args.images and not Path(args.images).is_dir():
        raise ConfigError(f"--images {args.images} is no folder: give the one that the rows' image paths are relative to")


def geometry(name: str) -> dict[str, int]:
    """Tokens per image, size, width and parameters of an encoder."""
    from encoders.catalog import load_encoder
    from llm_stage.llava import choose_select, tower_geometry

    encoder = load_encoder(name)
    known = tower_geometry(encoder)
    return {
        "tokens": known.image_tokens(choose_select(known, "auto", name)),
        "image_size": known.spec.size,
        "width": int(encoder.config.hidden_size or 0),
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
    }


def show(rows: list[Any], index: int, path: Path, chat_format: ChatFormat | None, tokens: int, max_length: int) -> None:
    """Print a row as the model gets it, what it learns between brackets.

    Raises:
        DataError: There is no such row, or it cannot be trained on.
    """
    if not 0 <= index < len(rows):
        raise DataError(f"{path} has the rows 0 to {len(rows) - 1:,}; there is no row {index}")
    assert chat_format is not None
    item = parse_row(rows[index], f"{path}, row {index}")
    encoded, rounds = encode_within(item, chat_format, tokens, max_length)
    print(
        f"{item.where}: {len(encoded)} tokens, {encoded.n_labels} supervised, {rounds} of {len(item.turns) // 2} rounds within {max_length}"
    )
    print(*(f"image  {name}" for name in item.images), chat_format.show(encoded), sep="\n")


# -- the summary -----------------------------------------------------------------------------------------------------------------------


def summarise(found: list[RowFacts], args: argparse.Namespace, tokens_per_image: int, tower: dict[str, int]) -> dict[str, Any]:
    """Everything as JSON values; `render` makes text of it."""
    good = [facts for facts in found if not facts.reason]
    bad = [{"row": index, "id": f.id, "reason": f.reason, "message": f.message} for index, f in enumerate(found) if f.reason]
    ids = Counter(facts.id for facts in found if facts.id)
    contents = Counter(facts.content for facts in good)
    remarks = [image.remark for facts in good for image in facts.images if image.remark]
    report: dict[str, Any] = {
        "file": args.json,
        "rows": len(found),
        "image_rows": sum(facts.n_images > 0 for facts in good),
        "text_rows": sum(facts.n_images == 0 for facts in good),
        "images": sum(facts.n_images for facts in good),
        "rounds": sum(facts.rounds for facts in good),
        "empty_answers": sum(facts.empty_answers for facts in good),
        "duplicate_ids": {key: count for key, count in ids.items() if count > 1},
        "identical_rows": sum(count - 1 for count in contents.values()),
        "bad_rows": len(bad),
        "bad_reasons": dict(Counter(entry["reason"] for entry in bad).most_common()),
        "bad": bad,
        "listed": args.list,
        "remarks": remarks,
        "steps": math.ceil(len(good) * args.epochs / args.global_batch_size),
        "batch": {"micro": args.micro_batch_size, "global": args.global_batch_size, "epochs": args.epochs},
    }
    pictures = [image for facts in good for image in facts.images]
    if pictures:
        report["pictures"] = picture_summary(pictures, tower.get("image_size", 0))
    if args.llm and good:
        report["tokens"] = token_summary(good, tokens_per_image, args.max_length)
        report["padding"] = padding_summary(good, tokens_per_image, args)
        report["memory"] = memory_summary(args, tower, report["tokens"])
    return report


def picture_summary(pictures: list[Any], image_size: int) -> dict[str, Any]:
    """Sizes and formats."""
    widths, heights = [image.width for image in pictures], [image.height for image in pictures]
    found = {
        name: [quantile(edge, share) for edge in (widths, heights)] for name, share in (("smallest", 0), ("median", 0.5), ("largest", 1))
    }
    small = sum(min(image.width, image.height) < image_size for image in pictures)
    return {**found, "formats": dict(Counter(i.format for i in pictures).most_common()), "encoder_size": image_size, "smaller": small}


def token_summary(good: list[RowFacts], tokens_per_image: int, max_length: int) -> dict[str, Any]:
    """Lengths before max_length, and what it leaves."""
    lengths = [facts.tokens for facts in good]
    edges = [0, *(2**power for power in range(5, 32) if 2 ** (power - 1) < max(lengths))]
    bins = {f"{low + 1} to {high}": sum(low < n <= high for n in lengths) for low, high in pairwise(edges)}
    kept, labels = sum(facts.kept_tokens for facts in good), sum(facts.label_tokens for facts in good)
    return {
        "per_image": tokens_per_image,
        "max_length": max_length,
        "longer_rows": sum(n > max_length for n in lengths),
        "lost_rounds": sum(facts.lost_rounds for facts in good),
        "median": quantile(lengths, 0.5), "p95": quantile(lengths, 0.95), "p99": quantile(lengths, 0.99), "longest": max(lengths),
        "histogram": bins, "total": kept, "supervised": labels, "supervised_share": labels / kept,
    }  # fmt: skip


def padding_summary(good: list[RowFacts], tokens_per_image: int, args: argparse.Namespace) -> dict[str, float]:
    """Shares of padding by the ways to batch."""
    rows = Lengths([f.words for f in good], [f.n_images > 0 for f in good], [f.kept_tokens for f in good])
    micro = min(args.micro_batch_size, args.global_batch_size)
    layout = Layout(micro, max(1, args.global_batch_size // micro), 1, 0)
    budget, group = args.pack_length or args.max_length, args.group_by_length
    ways: dict[str, dict[str, Any]] = {
        "as it comes": {},
        f"run.group_by_length {group}": {"group": group},
        "run.group_by_modality": {"by_modality": True},
        "run.group_by_modality and length": {"by_modality": True, "group": group},
        f"data.pack into {budget}": {"budget": budget},
    }
    return {name: padding(rows, layout, tokens_per_image, **way)[0] for name, way in ways.items()}


def memory_summary(args: argparse.Namespace, tower: dict[str, int], tokens: dict[str, Any]) -> dict[str, Any]:
    """Bytes by stage, and of the logits."""
    sizes: Sizes = llm_sizes(args.llm)
    sizes.tower = tower.get("parameters", 0)
    sizes.projector = projector_size(tower.get("width", 1024), sizes.hidden)
    row = tokens["total"] / max(1, sum(tokens["histogram"].values()))
    whole = args.micro_batch_size * row * sizes.vocabulary * 4
    return {
        "parameters": asdict(sizes),
        "bytes": memory(sizes, args.lora_rank, args.ranks),
        "logits": {"supervised positions": whole * tokens["supervised_share"], "all positions": whole},
        "formula": FORMULA,
    }


# -- as text ---------------------------------------------------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    """The summary as lines for a terminal."""
    r = report
    lines = [
        f"{r['file']}: {r['rows']:,} rows, {r['bad_rows']:,} bad",
        f"  {r['image_rows']:,} with {r['images']:,} images, {r['text_rows']:,} text-only, {r['rounds']:,} rounds, "
        f"{r['empty_answers']:,} answers without a word",
    ]
    if r["duplicate_ids"]:
        some = ", ".join(f"'{key}' x{count}" for key, count in list(r["duplicate_ids"].items())[:3])
        lines.append(f"  {len(r['duplicate_ids']):,} ids occur more than once ({some}); no harm, training does not use them")
    if r["identical_rows"]:
        lines.append(f"  {r['identical_rows']:,} rows repeat another word for word, on the same image")
    if "pictures" in r:
        p = r["pictures"]
        sizes = ", ".join(f"{name} {p[name][0]} x {p[name][1]}" for name in ("smallest", "median", "largest"))
        lines.append(f"  pictures (each edge by itself): {sizes}; {', '.join(f'{k} {n:,}' for k, n in p['formats'].items())}")
        if p["encoder_size"] and p["smaller"]:
            lines.append(f"  {p['smaller']:,} pictures are smaller than the encoder's {p['encoder_size']} px")
    lines += _token_lines(r) if "tokens" in r else ["  tokens, labels, padding, memory: with --llm NAME_OR_FOLDER"]
    b = r["batch"]
    lines.append(f"  steps: {r['steps']:,} ({b['epochs']:g} epoch(s) of {r['rows'] - r['bad_rows']:,} rows, {b['global']} a step)")
    lines += _memory_lines(r["memory"]) if "memory" in r else []
    return "\n".join([*lines, *_bad_lines(r)])


def _token_lines(report: dict[str, Any]) -> list[str]:
    t = report["tokens"]
    lines = [
        f"  tokens, {t['per_image']} of each image: median {t['median']:,}, 95 % {t['p95']:,}, 99 % {t['p99']:,}, longest {t['longest']:,}; "
        f"{t['total']:,} in all, {t['supervised_share']:.1%} supervised"
    ]
    most = max(t["histogram"].values())
    for name, count in t["histogram"].items():
        lines.append(f"    {name:>14}  {count:>9,}  {'#' * math.ceil(40 * count / most)}")
    if t["longer_rows"]:
        lines.append(f"  {t['longer_rows']:,} rows are longer than {t['max_length']:,}: {t['lost_rounds']:,} rounds at their ends are cut")
    lines.append(f"  padding in micro-batches of {report['batch']['micro']}:")
    return lines + [f"    {name:<34} {share:6.1%}" for name, share in report["padding"].items()]


def _memory_lines(found: dict[str, Any]) -> list[str]:
    p = found["parameters"]
    parts = f"LLM {p['llm'] / 1e6:,.1f} M, projector {p['projector'] / 1e6:,.1f} M, encoder {p['tower'] / 1e6:,.1f} M"
    lines = [f"  memory of weights and optimizer states, an estimate ({parts}{'' if p['tower'] else ': name one with --encoder'}):"]
    for stage, sizes in found["bytes"].items():
        lines.append(f"    {stage:<24} " + ", ".join(f"{where} {_gigabytes(size)}" for where, size in sizes.items()))
    logits = ", ".join(f"{where} {_gigabytes(size)}" for where, size in found["logits"].items())
    return [*lines, f"    {'logits of a micro-batch':<24} {logits}; the first are made", *(f"    {line}" for line in found["formula"])]


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def _bad_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    if report["remarks"]:
        lines.append(f"  {len(report['remarks']):,} pictures of another format than their name says (--strict makes their rows bad):")
        lines += [f"    {remark}" for remark in report["remarks"][: report["listed"]]]
    if report["bad"]:
        lines.append("  bad rows: " + ", ".join(f"{reason} {count:,}" for reason, count in report["bad_reasons"].items()))
        lines += [f"    [{entry['reason']}] {entry['message']}" for entry in report["bad"][: report["listed"]]]
        left = len(report["bad"]) - report["listed"]
        lines += [f"    ... and {left:,} more (--list {len(report['bad'])}, or --report OUT.json)"] if left > 0 else []
    return lines


# -- the cleaned file ------------------------------------------------------------------------------------------------------------------


def row_texts(path: Path) -> tuple[list[str], bool]:
    """Each row's own text, cut out of a file that `read_rows` has read, and whether the file is a list (else JSON Lines)."""
    text = path.read_bytes().decode("utf-8-sig")
    if text.lstrip()[:1] != "[":
        return [line.rstrip("\r") for line in text.split("\n") if line.strip()], False
    texts: list[str] = []
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,]*")
    place = text.index("[") + 1
    while True:
        between = blank.match(text, place)
        begin = between.end() if between else place
        if text[begin] == "]":
            return texts, True
        _, place = decoder.raw_decode(text, begin)
        texts.append(text[begin:place])


def write_clean(path: Path, out: Path, bad: set[int]) -> None:
    """Write the rows that are not bad, each with the very characters that it has in the file, in the file's own form.

    Raises:
        DataError: No row is left.
    """
    texts, is_list = row_texts(path)
    good = [text for index, text in enumerate(texts) if index not in bad]
    if not good:
        raise DataError(f"not one of the {len(texts)} rows of {path} can be trained on: nothing was written to {out}")
    atomic_write(out, "[\n" + ",\n".join(good) + "\n]\n" if is_list else "\n".join(good) + "\n")


if __name__ == "__main__":
    cli_entry(main)
