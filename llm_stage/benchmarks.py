"""The one table of benchmarks: which files, which words are asked, how long the answer may be, who scores it, what is uploaded.

Every row has three controls beside it: NAME_shuffled (each question before another question's picture), NAME_blank (before a grey one) and
NAME_text_only (before none). What a model still gets right there, it got right without looking.

A row of your own is a YAML file in place of a name:

    name: leaves                      # `reader`, `scorer`, `prompt` as in the table; the rest has defaults
    reader: vqa
    scorer: exact
    prompt: "{question}\\nName the plant in one word."
    questions: questions.json         # files are relative to the YAML
    annotations: annotations.json
    images: pictures
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llm_stage import benchmark_choice_files as choices
from llm_stage import benchmark_files as files
from llm_stage.benchmark_files import Found, Head, Source, VqaItem, people, picture_names, place, read_json
from llm_stage.benchmark_scores import SCORERS, Scorer
from mmkit.errors import ConfigError, DataError, find
from mmkit.scoring import most_common_answer

CONTROLS = ("shuffled", "blank", "text_only")
CONTROL_SUFFIX = "_shuffled"
SHORT_ANSWER = "Answer the question using a single word or phrase."  # LLaVA-1.5
LETTER = "Answer with the option's letter from the given choices directly."  # LLaVA-1.5
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."  # LLaVA-1.5 on VizWiz

# What is asked, by name; the picture comes first. A name's words never change: another wording is another name. `tests/golden/prompts`
# holds each as it is sent.
PROMPTS: dict[str, str] = {
    "llava_short": "{question}\n" + SHORT_ANSWER,
    "llava_letter": "{question}\n" + LETTER,
    "llava_vizwiz": "{question}\n" + UNANSWERABLE + "\n" + SHORT_ANSWER,
    "mini_short": "{question}\n"
    + SHORT_ANSWER.lower(),  # the embedded world speaks lower case; its questions bear the line in training too
    "mini_caption": "write a caption for the picture.",  # as in its training
    "bare": "{question}",
    "blip2_vqa": "Question: {question} Short answer:",
    "lmms_mme": "{question} Please answer yes or no.",  # MME's own words
    "lmms_okvqa": "{question}\n" + UNANSWERABLE + "\n" + SHORT_ANSWER,
    "lmms_caption": "Provide a one-sentence caption for the provided image.",
    "llava_caption": "Describe the image concisely.",
    "blip2_caption": "a photo of",
}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: As in `summary.json` and in folder names.
        prompt: What the model is asked, with "{question}" in it; the image comes first.
        max_new_tokens: Longest answer.
        scorer: A name of `benchmark_scores.SCORERS`; "captions" is scored by `mmkit eval captions`.
        reader: A name of `READERS`: which files it reads.
        upload: A name of `submissions.UPLOADS`: the file that the benchmark's own server takes; "" where there is none.
        split: Of files that hold several; also where the numbers of the literature come from.
        control_of: The benchmark this one is a control of.
        control: Which of `CONTROLS`.
        data_type: What the question file calls itself, where that alone tells the benchmark.
        files: The official files, for people: --questions, + --annotations, and the pictures' folder.
    """

    name: str
    prompt: str
    max_new_tokens: int = 16
    scorer: str = "vqa_2021"
    reader: str = "vqa"
    upload: str = "vqa"
    split: str = ""
    control_of: str = ""
    control: str = ""
    data_type: str = ""
    files: str = ""

    @property
    def shuffled(self) -> bool:
        """True for the control with other questions' pictures."""
        return self.control == "shuffled"

    @property
    def scoring(self) -> Scorer:
        """The scorer itself."""
        return find("scorer", SCORERS, self.scorer)

    @property
    def prompt_name(self) -> str:
        """The prompt's name in `PROMPTS`; "own" for other words."""
        return next((name for name, words in PROMPTS.items() if words == self.prompt), "own")

    def ask(self, question: str) -> str:
        """The words of the user's turn, without the image mark."""
        return self.prompt.replace("{question}", question.strip())

    def as_control(self, control: str) -> Benchmark:
        """One of this row's controls."""
        return replace(self, name=f"{self.name}_{control}", control_of=self.name, control=control, data_type="")


_LONG = 128  # LLaVA's limit for short answers
_CAPTIONS: dict[str, Any] = {"scorer": "captions", "reader": "captions", "upload": "captions", "max_new_tokens": 64}
_ROWS = (
    Benchmark("mini_vqa", PROMPTS["mini_short"], data_type="mmkit_mini",
              files="vqa/questions_test.json + vqa/annotations_test.json, images/ of `mmkit data mini`"),
    Benchmark("mini_captions", PROMPTS["mini_caption"], split="test", **_CAPTIONS,
              files="coco/captions_test.json, images/test/ of `mmkit data mini`"),
    Benchmark("vqav2", PROMPTS["llava_short"], _LONG, split="val2014",
              files="v2_OpenEnded_mscoco_val2014_questions.json + v2_mscoco_val2014_annotations.json, val2014/"),
    # references: the field `answer` (stemmed), which published numbers use; `raw_answer` is not read
    Benchmark("okvqa", PROMPTS["llava_short"], _LONG, split="val2014",
              files="OpenEnded_mscoco_val2014_questions.json + mscoco_val2014_annotations.json, val2014/"),
    Benchmark("gqa", PROMPTS["llava_short"], _LONG, "gqa", "gqa", "gqa", "testdev_balanced",
              files="testdev_balanced_questions.json, images/"),
    Benchmark("textvqa", PROMPTS["llava_short"], _LONG, "m4c", "textvqa", "vqa", "val",
              files="TextVQA_0.5.1_val.json, train_images/"),
    # LLaVA-1.5's 58.2 is with OCR words in the prompt; without them its users report about 46
    Benchmark("textvqa_ocr", PROMPTS["llava_short"], _LONG, "m4c", "textvqa_ocr", "vqa", "val",
              files="TextVQA_0.5.1_val.json, --ocr TextVQA_Rosetta_OCR_v0.2_val.json, train_images/"),
    # scored by the API's rule on the model's own words; the upload has them in m4c's normal form, as LLaVA's has
    Benchmark("vizwiz", PROMPTS["llava_vizwiz"], _LONG, "vizwiz", "vizwiz", "vizwiz", "val",
              files="val.json, val/"),
    Benchmark("scienceqa", PROMPTS["llava_letter"], 1024, "scienceqa", "scienceqa", "scienceqa", "test",
              files="problems.json (pid_splits.json beside it), images/"),
    Benchmark("scienceqa_img", PROMPTS["llava_letter"], 1024, "scienceqa", "scienceqa_img", "scienceqa", "test",
              files="problems.json (pid_splits.json beside it), images/"),
    Benchmark("pope", PROMPTS["llava_short"], _LONG, "pope", "pope", "pope",
              files="the folder of coco_pope_random.json, ..._popular, ..._adversarial; val2014/"),
    Benchmark("mme", PROMPTS["llava_short"], _LONG, "mme", "mme", "mme",
              files="MME_Benchmark_release_version/ for both"),
    Benchmark("mmbench", PROMPTS["llava_letter"], _LONG, "letter", "mmbench", "mmbench", "dev",
              files="mmbench_dev_20230712.tsv; its pictures are unpacked into --images"),
    Benchmark("seed_image", PROMPTS["llava_letter"], _LONG, "exact_letter", "seed", "seed",
              files="SEED-Bench.json, SEED-Bench-image/"),
    Benchmark("nocaps", PROMPTS["lmms_caption"], split="val", **_CAPTIONS,
              files="nocaps_val_4500_captions.json, validation/"),
    Benchmark("coco_captions", PROMPTS["lmms_caption"], split="test", **_CAPTIONS,
              files="captions_val2014.json, or Karpathy's dataset_coco.json; the pictures' folder"),
    Benchmark("flickr30k", PROMPTS["lmms_caption"], split="test", **_CAPTIONS,
              files="dataset_flickr30k.json, or results_20130124.token; flickr30k-images/"),
    Benchmark("own_vqa", PROMPTS["llava_short"], 64,
              files="any questions + annotations in VQAv2's format"),
)  # fmt: skip
BENCHMARKS: dict[str, Benchmark] = {
    row.name: row for plain in _ROWS for row in (plain, *(plain.as_control(control) for control in CONTROLS))
}
READERS: dict[str, Callable[[Source], tuple[Found, Head]]] = {
    "vqa": files.read_vqa,
    "gqa": files.read_gqa,
    "textvqa": files.read_textvqa,
    "textvqa_ocr": partial(files.read_textvqa, with_ocr=True),
    "vizwiz": files.read_vizwiz,
    "captions": files.read_caption_items,
    "scienceqa": choices.read_scienceqa,
    "scienceqa_img": partial(choices.read_scienceqa, only_with_image=True),
    "pope": choices.read_pope,
    "mme": choices.read_mme,
    "mmbench": choices.read_mmbench,
    "seed": choices.read_seed,
}
TWO_FILES = ("vqa",)  # readers whose answers lie in another file than the questions


def choose(name: str, control: str | bool, data_type: str) -> Benchmark:
    """Find the row for a run.

    Args:
        name: A benchmark's name, or the path of a YAML file with a row of one's own; "" goes by what the question file says of itself,
            else own_vqa.
        control: Take this control of the row; True is "shuffled", "" and False none.
        data_type: "data_type" of the question file.

    Raises:
        NameNotFound: There is no such benchmark or control; the nearest are named.
        ConfigError: A YAML file is no row.
    """
    control = "shuffled" if control is True else control or ""
    if control:
        find("control", {name: name for name in CONTROLS}, control)
    if name.endswith((".yaml", ".yml")):
        row = own_row(name)[0]
    else:
        if not name:
            name = next((row.name for row in BENCHMARKS.values() if row.data_type and row.data_type == data_type), "own_vqa")
        row = find("benchmark", BENCHMARKS, name)
    if row.control_of and control and row.control != control:
        raise ConfigError(f"{row.name} is a control itself, and --control {control} asks for another one: name {row.control_of}")
    return row if row.control_of or not control else row.as_control(control)


def own_row(path: Path | str) -> tuple[Benchmark, dict[str, str]]:
    """Read a row of the user's own from a YAML file.

    Returns:
        The row, and its files (questions, annotations, images, ocr), as paths.

    Raises:
        ConfigError: It does not exist, or has an unknown or no usable entry; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--benchmark {path}: no such file; a benchmark's name, or a YAML file with a row of your own is right")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    known = {item.name for item in fields(Benchmark)} - {"control", "control_of", "data_type", "files"}
    places = ("questions", "annotations", "images", "ocr")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no `key: value` lines; a row has {', '.join(sorted(known))} and {', '.join(places)}")
    for key in content:
        find(f"entry of a benchmark ({path})", {**dict.fromkeys(known), **dict.fromkeys(places)}, str(key))
    row = {"name": path.stem, "prompt": "llava_short", **{key: value for key, value in content.items() if key in known}}
    row["prompt"] = prompt_words(str(row["prompt"]))
    wrong = [key for key, value in row.items() if not isinstance(value, int if key == "max_new_tokens" else str) or value == 0]
    if wrong:
        raise ConfigError(
            f"{path}: {wrong[0]} is {row[wrong[0]]!r}; {'a number of tokens' if wrong[0] == 'max_new_tokens' else 'text'} is right"
        )
    benchmark = Benchmark(**row)
    find("reader", READERS, benchmark.reader)
    find("scorer", {**SCORERS, "captions": None}, benchmark.scorer)
    return benchmark, {key: str(path.parent / str(content[key])) for key in places if content.get(key)}


def prompt_words(prompt: str) -> str:
    """The words of a prompt, named or written out.

    Raises:
        NameNotFound: It is neither a name of `PROMPTS` nor has the place {question}.
    """
    return prompt if "{question}" in prompt else find("prompt (or write it out, with {question} in it)", PROMPTS, prompt)


# ---- reading -------------------------------------------------------------------------------------------------------------------------


def read_items(
    questions: Path | str,
    annotations: Path | str | None,
    images: Path | str | None,
    limit: int = 0,
    benchmark: Benchmark | None = None,
    **more: Any,
) -> tuple[list[VqaItem], Head]:
    """Join a benchmark's questions, answers and pictures by question id.

    Args:
        questions: Question file (or folder).
        annotations: File of the answers, where it is another one; it may hold more.
        images: Folder that picture names are relative to; None does not look for pictures.
        limit: Take the first so many questions; 0 takes all.
        benchmark: The row; None reads VQAv2's format.
        more: `ocr`, `split`, `unlabelled` of `Source`.

    Returns:
        The items in the file's order, and the question file's head (`sha256` and whatever it says of itself).

    Raises:
        DataError: A file is not what it should be; ids come twice; questions without answers; pictures that do not exist.
    """
    benchmark = benchmark or BENCHMARKS["own_vqa"]
    source = Source(
        Path(questions),
        Path(annotations) if annotations else None,
        Path(images) if images else None,
        people=benchmark.scoring.people if benchmark.scorer in SCORERS else 0,
        limit=limit,
        **more,
    )
    if benchmark.reader in TWO_FILES and source.annotations is None and not source.unlabelled:
        raise ConfigError(
            f"--annotations is missing: {benchmark.name} has its answers in a file of their own (--unlabelled if there are none)"
        )
    if source.unlabelled and benchmark.reader in TWO_FILES:
        source = replace(source, annotations=None)
    found, head = find("reader", READERS, benchmark.reader)(source)
    items = place(found, source)
    names = Counter(str(item.question_id) for item in items)
    doubled = [name for name, count in names.items() if count > 1]
    if doubled:
        raise DataError(f"{questions}: {len(doubled)} ids come twice, {doubled[0]} for one; answers could not be told apart")
    return items, head


def data_type_of(questions: Path | str) -> str:
    """What a question file in VQAv2's format calls itself; "" for others."""
    path = Path(questions)
    if path.suffix != ".json" or not path.is_file():
        return ""
    return str(read_json(path, "questions").get("data_type", ""))


def find_image(question: Mapping[str, Any], root: Path, split: str) -> tuple[str | None, list[str]]:
    """Find a question's picture: its own "image", else COCO's names for its image_id.

    Returns:
        The name relative to the folder (None if there is no such file), and all names tried.
    """
    names = picture_names(question, split)
    return next((name for name in names if (root / name).is_file()), None), names


# ---- controls ------------------------------------------------------------------------------------------------------------------------


def controlled(items: Sequence[VqaItem], benchmark: Benchmark, seed: int) -> list[VqaItem]:
    """The items as a control asks them; the same items for a benchmark itself.

    Blank pictures keep their names, since the answering looks at `benchmark.control`; without pictures `image` is "".
    """
    if benchmark.control == "shuffled":
        return shuffle_images(items, seed)
    if benchmark.control == "text_only":
        return [replace(item, image="") for item in items]
    return list(items)


def shuffle_images(items: Sequence[VqaItem], seed: int) -> list[VqaItem]:
    """Give every question another question's picture; none keeps its own, and one without a picture stays without.

    The pictures are put in a random circle and each question takes the next one, so that all questions of a picture go to the same other
    picture, and equal seeds shuffle alike for every model.

    Raises:
        DataError: There is only one picture.
    """
    names = sorted({item.own_image for item in items if item.own_image})
    if len(names) < 2:
        raise DataError(f"{len(items)} questions about {len(names)} picture cannot change pictures; at least two are needed")
    circle = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    following = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    return [replace(item, image=following[item.own_image]) if item.own_image else item for item in items]


# ---- the baseline --------------------------------------------------------------------------------------------------------------------


def most_frequent(annotations: Sequence[Mapping[str, Any]], path: Path | str) -> dict[str, str]:
    """The most frequent answer of each question kind, and under "" that of all: what one can say without image or question.

    Args:
        annotations: Rows with `question_type`, and `multiple_choice_answer` or answers.
        path: Where they came from, for the message.
    """
    pairs = []
    for row in annotations:
        answer = row.get("multiple_choice_answer")
        answer = str(answer) if answer is not None else most_common_answer(people(row, path, 0))
        pairs.append((str(row.get("question_type") or "all"), answer))
    return most_frequent_of(pairs)


def most_frequent_of(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The same, from (kind, answer)."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, answer in pairs:
        for name in (kind, ""):
            counts[name][answer] += 1
    # ties by the alphabet, so that the order of the file does not matter
    return {kind: min(count, key=lambda answer: (-count[answer], answer)) for kind, count in counts.items()}
