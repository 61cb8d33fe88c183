"""mmkit inside lmms-eval: the plug-in answers as `generate` does, a benchmark becomes a task with the same score, logged samples are read.

Where lmms-eval is not installed, a stand-in has the three names of it that the plug-in touches; the rest of it is not mmkit's to test.
"""

import importlib
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llava_tiny import picture, tiny_llm, tiny_tower

from llm_stage import lmms_task
from llm_stage.answer_files import read_answers
from llm_stage.benchmarks import BENCHMARKS, read_items
from llm_stage.chat_format import ChatFormat, Turn
from llm_stage.generate import ChatModel, ChatRequest
from llm_stage.llava import build_llava
from mmkit.errors import ConfigError, DataError

INSTALLED = util.find_spec("lmms_eval") is not None
QUESTIONS = [("what colour is it", "red", "colour"), ("how many", "2", "count"), ("is it red", "yes", "presence")]


class StandIn:
    """`lmms_eval.api.model.lmms`, as far as a model sees it."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}  # type: ignore[var-annotated]


@dataclass
class Manifest:
    """`lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    chat_class_path: str | None = None


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plug-in's module, over lmms-eval or the stand-in."""
    if not INSTALLED:
        held = {"api.model": {"lmms": StandIn}, "models.registry_v2": {"ModelManifest": Manifest}}
        for name in ("", ".api", ".models"):
            monkeypatch.setitem(sys.modules, f"lmms_eval{name}", types.ModuleType(f"lmms_eval{name}"))
        for name, values in held.items():
            module = types.ModuleType(f"lmms_eval.{name}")
            module.__dict__.update(values)
            monkeypatch.setitem(sys.modules, f"lmms_eval.{name}", module)
    yield importlib.import_module("llm_stage.lmms_eval_model")
    sys.modules.pop("llm_stage.lmms_eval_model", None)


@pytest.fixture(scope="module")
def chat() -> ChatModel:
    llm, tokenizer = tiny_llm(tie=False)
    model, processor = build_llava(tiny_tower(), (llm, tokenizer))
    return ChatModel(model.eval(), processor, ChatFormat(processor.tokenizer, "own"), "tiny")


def files(root: Path) -> tuple[Path, Path, Path]:
    """A set in VQA's format: questions, annotations, pictures."""
    (root / "images").mkdir(parents=True)
    asked, right = [], []
    for number, (question, answer, kind) in enumerate(QUESTIONS):
        picture(("red", "green", "blue")[number]).save(root / f"images/{number}.png")
        asked.append({"question_id": 10 + number, "image": f"{number}.png", "question": question, "kind": kind})
        answers = [{"answer": answer, "answer_id": n + 1} for n in range(10)]
        right.append({"question_id": 10 + number, "answers": answers, "multiple_choice_answer": answer, "answer_type": "other"})
    (root / "q.json").write_text(json.dumps({"data_type": "mmkit_mini", "questions": asked}))
    (root / "a.json").write_text(json.dumps({"annotations": right}))
    return root / "q.json", root / "a.json", root / "images"


def make_task(root: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A task's folder and its documents."""
    questions, annotations, images = files(root)
    flags = ["--questions", str(questions), "--annotations", str(annotations), "--images", str(images), "--out", str(root / "task")]
    folder = lmms_task.main(["mini_vqa", *flags])
    return folder, [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """As lmms-eval makes them of `doc_to_visual` and `doc_to_text`."""
    parts = [{"type": "image", "url": image} for image in lmms_task.doc_to_visual(doc)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": lmms_task.doc_to_text(doc)}]}]


def instances(docs: list[dict[str, Any]], **settings: Any) -> list[Any]:
    """Requests of lmms-eval's for some documents."""
    how = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, **settings}
    return [SimpleNamespace(args=("", messages, how, number, "task", "test")) for number in range(len(docs))]


def model_of(plugin: Any, chat: ChatModel, docs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(plugin, "load_chat", lambda *_, **__: chat)
    model = plugin.MMKitChat("tiny", batch_size="2")
    model.task_dict = {"task": {"test": docs}}
    return model


def test_the_plug_in_answers_as_the_evaluation_does(plugin: Any, chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, docs = make_task(tmp_path)
    model = model_of(plugin, chat, docs, monkeypatch)
    row = BENCHMARKS["mini_vqa"]
    requests = [
        ChatRequest([Turn("user", f"<image>\n{row.ask(question)}")], [tmp_path / f"images/{number}.png"])
        for number, (question, _, _) in enumerate(QUESTIONS)
    ]
    wanted = chat.generate(requests, max_new_tokens=6)
    assert model.generate_until(instances(docs)) == wanted
    mixed = instances(docs)
    mixed[1].args[2].update(max_new_tokens=6, until=["\n\n"])  # other settings, another batch; the order stays
    assert model.generate_until(mixed) == wanted
    assert (model.rank, model.world_size, model.is_simple, str(model.device)) == (0, 1, False, "cpu")


def test_stop_words_and_sampling_are_honoured(plugin: Any, chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, docs = make_task(tmp_path)
    model = model_of(plugin, chat, docs, monkeypatch)
    asked: list[dict[str, Any]] = []

    def generate(requests: Any, **how: Any) -> list[str]:
        asked.append(how)
        return ["red ASSISTANT: blue"] * len(requests)

    monkeypatch.setattr(chat, "generate", generate)
    assert model.generate_until(instances(docs, until=["ASSISTANT:"])) == ["red"] * 3
    assert "temperature" not in asked[0]
    model.generate_until(instances(docs, temperature=0.7, top_p=0.9, do_sample=True))
    assert (asked[1]["temperature"], asked[1]["top_p"]) == (0.7, 0.9)
    model.generate_until(instances(docs, temperature=0.7, do_sample=False))
    assert "temperature" not in asked[2]


def test_what_is_not_answered_is_refused_by_name(plugin: Any, chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(plugin, chat, [], monkeypatch)
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="rounds"):
        model.generate_until_multi_round([])
    with pytest.raises(DataError, match="task, document 3 holds video"):
        plugin.read_messages([{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}], "task, document 3")
    model.clean()
    assert model.chat is chat
    assert plugin.manifest().chat_class_path == "llm_stage.lmms_eval_model.MMKitChat"


def test_lmms_eval_finds_the_plug_in_by_its_entry_point() -> None:
    (found,) = metadata.entry_points(group="lmms_eval.models", name="mmkit")
    assert found.value == "llm_stage.lmms_eval_model:manifest"


@pytest.mark.skipif(INSTALLED, reason="lmms-eval is installed")
def test_without_lmms_eval_the_error_names_the_extra() -> None:
    with pytest.raises(ConfigError, match=r"mmkit\[lmms-eval\]"):
        importlib.import_module("llm_stage.lmms_eval_model")


def test_a_task_scores_as_the_benchmark_does(tmp_path: Path) -> None:
    folder, docs = make_task(tmp_path)
    given = ["red", "three", "yes, it is"]
    results = [lmms_task.process_results(doc, [answer])["vqa_accuracy"] for doc, answer in zip(docs, given, strict=True)]
    assert [row["question_id"] for row in results] == [10, 11, 12]
    items, _ = read_items(tmp_path / "q.json", tmp_path / "a.json", tmp_path / "images", 0, BENCHMARKS["mini_vqa"])
    wanted = [BENCHMARKS["mini_vqa"].scoring.score(item, answer) for item, answer in zip(items, given, strict=True)]
    assert [row["score"] for row in results] == wanted
    assert lmms_task.mean_percent(results) == pytest.approx(100 * sum(wanted) / 3)
    assert "task: mmkit_mini_vqa" in (folder / "mmkit_mini_vqa.yaml").read_text()
    assert "do_sample: false" in (folder / "mmkit_mini_vqa.yaml").read_text()
    with pytest.raises(ConfigError, match="exists already"):
        make_task_again(tmp_path)
    with pytest.raises(ConfigError, match="captions"):
        lmms_task.main(["mini_captions", "--questions", "q", "--images", str(tmp_path), "--out", str(tmp_path / "x")])


def make_task_again(root: Path) -> None:
    lmms_task.main(["mini_vqa", "--questions", str(root / "q.json"), "--images", str(root / "images"), "--out", str(root / "task")])


def samples(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_logged_samples_are_read_by_id_or_by_a_place_that_fits(tmp_path: Path) -> None:
    questions, annotations, images = files(tmp_path)
    items, _ = read_items(questions, annotations, images, 0, BENCHMARKS["mini_vqa"])
    named = [
        {"doc_id": 2 - n, "target": "?", "filtered_resps": [[f"a{n}"]], "vqa_accuracy": {"question_id": 10 + n, "score": 0.0}}
        for n in range(3)
    ]
    assert {name: row["answer"] for name, row in read_answers(samples(tmp_path / "s.jsonl", named), items).rows.items()} == {
        10: "a0", 11: "a1", 12: "a2",
    }  # fmt: skip
    placed = [{"doc_id": n, "target": QUESTIONS[n][1], "filtered_resps": f"a{n}", "exact_match": 0.0} for n in (1, 0, 2)]
    assert read_answers(samples(tmp_path / "s.jsonl", placed), items).rows[11]["answer"] == "a1"
    placed[0]["doc_id"] = 2
    with pytest.raises(DataError, match="not in the order"):
        read_answers(samples(tmp_path / "s.jsonl", placed), items)
    with pytest.raises(DataError, match="has 3 questions"):
        read_answers(samples(tmp_path / "s.jsonl", [{**placed[0], "doc_id": 9}]), items)
