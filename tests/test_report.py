"""The report says what the files say: figures, pairs, controls, pictures; it claims only what stands, and asks the network for nothing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmkit import report, report_charts, stats
from mmkit.agreement import cohens_kappa
from mmkit.errors import ConfigError, DataError
from mmkit.report_data import command_line, read_runs

COLOURS = ("red", "green", "blue", "orange", "purple", "gray")
WORDS = {
    "colour": COLOURS,
    "count": ("1", "2", "3", "4"),
    "presence": ("yes", "no"),
    "object": ("cat", "dog", "kite", "tree"),
    "word": ("lamp", "moon", "gate"),
}
SKILL = {"clip": {"colour": 0.95, "count": 0.75, "presence": 0.8, "object": 0.6, "word": 0.35}}
SKILL["uta"] = {kind: skill - 0.12 for kind, skill in SKILL["clip"].items()}


def save(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def save_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def metric(values: list[float], images: list[str]) -> dict[str, Any]:
    ours = stats.mean_interval(values, images, draws=500).scaled(100)
    return {"value": round(ours.value, 2), "ci95": [round(ours.low, 2), round(ours.high, 2)], "n": ours.n}


def build_run(root: Path, n_images: int = 40, encoders: tuple[str, ...] = ("clip", "uta")) -> Path:
    """A run folder as the quickstart leaves it, drawn and answered at random, the same at every call."""
    rng = np.random.default_rng(11)
    questions = []
    for index in range(n_images):
        name, colour = f"test/{index:06d}.png", COLOURS[index % len(COLOURS)]
        image = Image.new("RGB", (96, 96), colour)
        box = [int(v) for v in rng.integers(8, 40, 2)]
        ImageDraw.Draw(image).ellipse([*box, *(v + 44 for v in box)], fill="white", outline="black", width=3)
        path = root / "data" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        for kind in rng.permutation(list(WORDS))[:3]:
            answer = colour if kind == "colour" else str(rng.choice(WORDS[kind]))
            text = {"colour": "what color is the background?", "count": "how many balls are there?", "object": "what is left of the ball?"}
            text |= {"presence": "is there a ball in the picture?", "word": "what word is written?"}
            questions.append({"question_id": len(questions), "image": name, "question": text[kind], "kind": str(kind), "reference": answer})
    luck = rng.random(len(questions))  # how easy each question is: shared by the encoders, as in life
    for encoder in encoders:
        evaluate(root, encoder, questions, luck, rng)
        zeroshot(root, encoder, n_images, rng)
        train(root, encoder, rng)
    return root


def evaluate(root: Path, encoder: str, questions: list[dict[str, Any]], luck: np.ndarray, rng: np.random.Generator) -> None:
    skills = SKILL.get(encoder, SKILL["uta"])
    for benchmark in ("mini_vqa", "mini_vqa_shuffled"):
        folder = root / "eval" / encoder / benchmark
        answers, scores = [], []
        for question, chance in zip(questions, luck, strict=True):
            kind, shuffled = question["kind"], benchmark.endswith("shuffled")
            skill = 1 / len(WORDS[kind]) if shuffled else skills[kind]
            right = 0.7 * chance + 0.3 * rng.random() < skill
            others = [word for word in WORDS[kind] if word != question["reference"]]
            answer = question["reference"] if right else str(rng.choice(others))
            shown = questions[(question["question_id"] + 7) % len(questions)]["image"] if shuffled else question["image"]
            answers.append(
                {**{k: question[k] for k in ("question_id", "question", "kind")}, "image": shown, "answer": answer, "seconds": 0.03}
            )
            scores.append({"question_id": question["question_id"], "score": float(right), "kind": kind, "image": question["image"]})
            scores[-1] |= {"reference": question["reference"], "answer": answer}
        save_lines(folder / "answers.jsonl", answers)
        save_lines(folder / "scores.jsonl", scores)
        metrics = {}
        for kind in ("", *WORDS):
            rows = [row for row in scores if kind in ("", row["kind"])]
            suffix, images = (f"/{kind}" if kind else ""), [row["image"] for row in rows]
            metrics[f"vqa_accuracy{suffix}"] = metric([row["score"] for row in rows], images)
            guess = [float(row["reference"] == WORDS[row["kind"]][0]) for row in rows]
            metrics[f"most_frequent_answer{suffix}"] = metric(guess, images)
        summary = {"benchmark": benchmark, "model": f"llava-{encoder}", "n": len(scores), "metrics": metrics, "seconds": 14.2, "missing": 0}
        summary["protocol"] = {"prompt": "<image>\n{question}", "scorer": "vqa_2021", "images": "../../../data/images"}
        summary["encoder"] = {"architecture": "vit_mini_patch16_96", "parameters": 3_700_000, "width": 192, "tokens_per_image": 36}
        save(folder / "summary.json", summary)
        save(folder / "manifest.json", manifest(["llm_stage/eval_vqa.py", "--out", f"eval/{encoder}/{benchmark}"], 14.9))


def zeroshot(root: Path, encoder: str, n_images: int, rng: np.random.Generator) -> None:
    folder, skill = root / "eval" / encoder / "mini_zeroshot", 0.61 if encoder == "clip" else 0.44
    rows = []
    for index in range(n_images * 3):
        right = bool(rng.random() < skill)
        rows.append({"image": f"cat/{index}.png", "label": "cat", "prediction": "cat" if right else "lion", "correct": right})
    save_lines(folder / "answers.jsonl", rows)
    values, images = [float(row["correct"]) for row in rows], [row["image"] for row in rows]
    five = [max(value, float(rng.random() < 0.6)) for value in values]
    metrics = {"top1": metric(values, images), "top5": metric(five, images)}
    summary = {"benchmark": "mini_zeroshot", "model": encoder, "protocol": "80 prompts a class", "n": len(rows), "metrics": metrics}
    save(folder / "summary.json", {**summary, "seconds": 6.1, "missing": 0})


def train(root: Path, encoder: str, rng: np.random.Generator) -> None:
    for stage, start, end, steps in (("stage1", 5.2, 1.9, 300), ("stage2", 2.4, 0.8, 600)):
        rows = []
        for step in range(5, steps + 1, 5):
            loss = end + (start - end) * math.exp(-5 * step / steps) + rng.normal(0, 0.07) + (0.15 if encoder == "uta" else 0)
            rows.append({"step": step, "samples_seen": 32 * step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "seconds": 0.2 * step})
        save_lines(root / "work" / f"llava_{stage}_{encoder}" / "metrics.jsonl", rows)
        command = ["llm_stage/train_llava.py", "--recipe", f"mini_{stage}", "--encoder", f"encoders/{encoder}"]
        save(root / "work" / f"llava_{stage}_{encoder}" / "manifest.json", manifest(command, 0.2 * steps))
    if encoder == "uta":
        rows = []
        for step in range(10, 801, 10):
            cls, patches = 0.2 + 0.7 * math.exp(-step / 200) + rng.normal(0, 0.01), 0.3 + 0.6 * math.exp(-step / 300) + rng.normal(0, 0.01)
            rows.append({"step": step, "loss": (cls + 36 * patches) / 37, "cls": cls, "patches": patches, "lr": 1e-3})
        save_lines(root / "work" / "uta" / "metrics.jsonl", rows)
    spec = {"size": 96, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
    config = {
        "architecture": "vit_mini_patch16_96",
        "image_spec": spec,
        "joint_width": 256,
        "origin": "mini-clip",
        "training": {"method": encoder},
    }
    save(root / "encoders" / encoder / "config.json", config)


def manifest(command: list[str], seconds: float) -> dict[str, Any]:
    facts = {"command": command, "state": "finished", "seed": 0, "seconds": seconds, "peak_memory_mb": 1432, "commit": "0123abc"}
    return {**facts, "versions": {"python": "3.11.9", "torch": "2.8.0"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def made(run: Path) -> tuple[dict[str, Any], str, str]:
    folder = report.main([str(run)])
    assert folder == run
    return json.loads((run / "report.json").read_text()), (run / "report.md").read_text(), (run / "report.html").read_text()


def test_every_figure_is_the_summarys(run: Path, made: tuple[dict[str, Any], str, str]) -> None:
    content, markdown, page = made
    assert len(content["results"]) == 6
    for row in content["results"]:
        summary = json.loads((run / "eval" / row["encoder"] / row["benchmark"] / "summary.json").read_text())
        assert row["metrics"] == summary["metrics"]
        for name, value in summary["metrics"].items():
            if "/" not in name:
                assert f"{value['value']:.2f}" in markdown
                assert f"{value['value']:.2f}" in page


def test_encoders_are_compared_on_the_same_questions(run: Path, made: tuple[dict[str, Any], str, str]) -> None:
    rows = {row["benchmark"]: row for row in made[0]["comparisons"]}
    assert set(rows) == {"mini_vqa", "mini_zeroshot"}  # controls are no contest
    row = rows["mini_vqa"]
    scores = {name: [r["score"] for r in lines(run / "eval" / name / "mini_vqa" / "scores.jsonl")] for name in ("clip", "uta")}
    assert row["difference"] == pytest.approx(100 * (np.mean(scores[row["first"]]) - np.mean(scores[row["second"]])))
    only = sum(x > y for x, y in zip(scores[row["first"]], scores[row["second"]], strict=True))
    assert row["only_first"] == only
    assert row["p_holm"] >= row["p"]
    assert row["ci95"][0] < row["difference"] < row["ci95"][1]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_order_of_the_answer_file_does_not_matter(run: Path, tmp_path: Path, made: tuple[dict[str, Any], str, str]) -> None:
    other = build_run(tmp_path / "quickstart")
    for name in ("answers.jsonl", "scores.jsonl"):
        path = other / "eval" / "uta" / "mini_vqa" / name
        save_lines(path, lines(path)[::-1])
    report.main([str(other)])
    assert json.loads((other / "report.json").read_text())["comparisons"] == made[0]["comparisons"]


def test_identical_answers_make_no_claim(tmp_path: Path) -> None:
    root = build_run(tmp_path / "run")
    for name in ("answers.jsonl", "scores.jsonl"):
        (root / "eval" / "uta" / "mini_vqa" / name).write_text((root / "eval" / "clip" / "mini_vqa" / name).read_text())
    report.main([str(root)])
    row = next(row for row in json.loads((root / "report.json").read_text())["comparisons"] if row["benchmark"] == "mini_vqa")
    assert (row["difference"], row["p"], row["stands"]) == (0.0, 1.0, False)
    assert "score the same" in row["sentence"]
    assert "better" not in row["sentence"]


def test_a_gap_that_chance_explains_is_not_called_better(tmp_path: Path) -> None:
    root = build_run(tmp_path / "run", n_images=4)
    report.main([str(root)])
    rows = [row for row in json.loads((root / "report.json").read_text())["comparisons"] if row["ci95"][0] <= 0 <= row["ci95"][1]]
    assert rows
    assert all(not row["stands"] and "No claim" in row["sentence"] for row in rows)


def test_the_control_is_subtracted_on_the_same_questions(made: tuple[dict[str, Any], str, str]) -> None:
    rows = made[0]["controls"]
    assert [row["encoder"] for row in rows] == ["clip", "uta"]
    for row in rows:
        assert row["difference"] == pytest.approx(row["score"]["value"] - row["control"]["value"], abs=0.02)
        assert row["apart"] == (row["score"]["ci95"][0] > row["control"]["ci95"][1])
        assert ("looks at the picture" in row["sentence"] and "not shown" not in row["sentence"]) == row["apart"]


def test_kinds_carry_control_and_baseline(made: tuple[dict[str, Any], str, str]) -> None:
    (table,) = made[0]["kinds"]
    assert {row["kind"] for row in table["rows"]} == set(WORDS)
    for row in table["rows"]:
        assert row["baseline"]["n"] == row["n"] == row["cells"]["clip"]["n"] == row["cells"]["uta"]["control"]["n"]


def test_agreement_counts_questions_on_which_both_are_right_or_both_wrong(run: Path, made: tuple[dict[str, Any], str, str]) -> None:
    right = {}
    for encoder in ("clip", "uta"):
        rows = [json.loads(line) for line in (run / f"eval/{encoder}/mini_vqa/scores.jsonl").read_text().splitlines()]
        right[encoder] = np.array([row["score"] >= 0.5 for row in sorted(rows, key=lambda row: row["question_id"])])
    table = next(table for table in made[0]["agreements"] if table["benchmark"] == "mini_vqa")
    assert [table["benchmark"].endswith("shuffled") for table in made[0]["agreements"]] == [False] * len(made[0]["agreements"])
    place = {name: number for number, name in enumerate(table["encoders"])}
    cell = table["rows"][place["clip"]]["cells"][place["uta"]]
    assert cell["agree"] == pytest.approx((right["clip"] == right["uta"]).mean())
    assert table["rows"][place["clip"]]["cells"][place["clip"]]["right"] == pytest.approx(right["clip"].mean())
    assert f"{100 * cell['agree']:.1f} %" in made[1]
    assert f"{100 * cell['agree']:.1f} %" in made[2]


def test_kappa_is_nought_by_chance_and_one_where_all_agree() -> None:
    assert cohens_kappa([True, True, False, False], [True, False, True, False]) == 0
    assert cohens_kappa([True, False, True], [True, False, True]) == 1
    assert cohens_kappa([True, True], [True, True]) is None
    assert cohens_kappa([True] * 45 + [False] * 15 + [True] * 25 + [False] * 15, [True] * 60 + [False] * 40) == pytest.approx(
        0.1304, abs=1e-4
    )


def test_examples_show_disagreement_first_with_every_models_words(made: tuple[dict[str, Any], str, str]) -> None:
    content, _, page = made
    rows = content["examples"]
    agree = [row["agree"] for row in rows]
    assert agree == sorted(agree)
    assert len(set(agree)) == 2
    assert len({row["kind"] for row in rows[:5]}) >= 4
    assert page.count('<img src="data:image/png;base64,') == len(rows)
    for row in rows:
        assert [answer["encoder"] for answer in row["answers"]] == ["clip", "uta"]
        assert all(answer["right"] == (answer["text"] == row["reference"]) for answer in row["answers"])


def test_loss_curves_of_both_encoders_share_a_chart(made: tuple[dict[str, Any], str, str]) -> None:
    content, _, page = made
    charts = {chart["title"]: [line["label"] for line in chart["series"]] for chart in content["curves"]}
    assert charts == {
        "work/llava_stage1_…": ["clip", "uta"],
        "work/llava_stage2_…": ["clip", "uta"],
        "work/uta": ["loss", "cls", "patches"],
    }
    assert page.count("<svg") == 3


def test_commands_times_versions_and_cards_are_in_it(made: tuple[dict[str, Any], str, str]) -> None:
    _, markdown, page = made
    for text in ("python llm_stage/train_llava.py --recipe mini_stage1", "2 min 0 s", "2.8.0", "vit_mini_patch16_96", "1,432 MB"):
        assert text in page, text
        assert text in markdown, text


class Outside(HTMLParser):
    """Collects every address that a page would fetch, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]
        if tag not in ("meta", "link", "img", "br", "input", "hr") and self.get_starttag_text() is not None:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_the_network_for_nothing(made: tuple[dict[str, Any], str, str]) -> None:
    page = made[2]
    parser = Outside()
    parser.feed(page)
    assert parser.open == []
    assert all(address.startswith(("data:", "#")) for address in parser.addresses)
    assert not re.search(r"https?://|@import|url\((?!#)|fetch\(|XMLHttpRequest", page)
    assert "prefers-color-scheme: dark" in page


@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")], ids=["desktop, light", "phone, dark"])
def test_a_browser_shows_all_of_it_and_asks_for_nothing(
    run: Path, made: tuple[dict[str, Any], str, str], chromium: Any, width: int, scheme: Any
) -> None:
    requests: list[str] = []
    complaints: list[str] = []
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((run / "report.html").resolve().as_uri())

    pictures = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert pictures
    assert min(pictures) > 0
    curves = page.evaluate("[...document.querySelectorAll('svg path, svg polyline')].map(line => line.getBoundingClientRect().width)")
    assert max(curves) > 100  # loss curves are drawn, not only there
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out sideways
    text = page.inner_text("body")
    for row in made[0]["results"]:
        for value in (row["metrics"][name]["value"] for name in ("vqa_accuracy", "top1") if name in row["metrics"]):
            assert f"{value:.1f}" in text
    every = page.locator("#examples figure:visible").count()
    kind = page.eval_on_selector("#kind-filter", "choice => choice.options[1].value")
    page.select_option("#kind-filter", kind)
    shown = page.locator("#examples figure:visible")
    assert 0 < shown.count() < every
    assert {shown.nth(number).get_attribute("data-kind") for number in range(shown.count())} == {kind}
    assert page.inner_text("#filter-count") == f"{shown.count()} of {every} shown"
    page.select_option("#kind-filter", "")
    assert page.locator("#examples figure:visible").count() == every
    ground, ink = page.evaluate("(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))")
    brightness = [sum(int(part) for part in re.findall(r"\d+", colour)[:3]) for colour in (ground, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert complaints == []
    page.close()


def test_words_of_models_and_files_are_text_never_markup(tmp_path: Path) -> None:
    root, evil = build_run(tmp_path / "run", n_images=6), '<script>alert("x")</script> | `'
    for encoder in ("clip", "uta"):
        folder = root / "eval" / encoder / "mini_vqa"
        save_lines(folder / "answers.jsonl", [{**row, "answer": evil, "question": evil} for row in lines(folder / "answers.jsonl")])
        save_lines(folder / "scores.jsonl", [{**row, "answer": evil, "reference": evil} for row in lines(folder / "scores.jsonl")])
    (root / "work" / "uta").rename(root / "work" / "<b>uta")
    report.main([str(root)])
    page, markdown = (root / "report.html").read_text(), (root / "report.md").read_text()
    assert "<script>alert" not in page
    assert "<script>alert" not in markdown
    assert "<b>uta" not in page
    table = [line for line in markdown.splitlines() if "alert" in line]
    assert table
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {7}


def test_runs_apart_are_reported_together_under_their_own_names(tmp_path: Path) -> None:
    first, second = build_run(tmp_path / "a", 6, ("clip",)), build_run(tmp_path / "b", 6, ("clip",))
    report.main([str(first), str(second), "--out", str(tmp_path / "both")])
    assert json.loads((tmp_path / "both" / "report.json").read_text())["encoders"] == ["a/clip", "b/clip"]
    third = build_run(tmp_path / "c", 6, ("uta",))
    report.main([str(first), str(third), "--out", str(tmp_path / "apart")])
    assert json.loads((tmp_path / "apart" / "report.json").read_text())["encoders"] == ["clip", "uta"]
    with pytest.raises(ConfigError, match="--out DIR"):
        report.main([str(first), str(second)])


def test_a_run_without_evaluations_or_pictures_still_reports_what_it_has(tmp_path: Path) -> None:
    root = build_run(tmp_path / "run", 6)
    for path in (root / "data").rglob("*.png"):
        path.unlink()
    report.main([str(root)])
    assert any("no example pictures for mini_vqa" in note for note in json.loads((root / "report.json").read_text())["notes"])
    report.main([str(root / "work"), "--out", str(tmp_path / "only_training")])
    assert "<svg" in (tmp_path / "only_training" / "report.html").read_text()
    report.main([str(root / "eval" / "clip" / "mini_vqa"), "--out", str(tmp_path / "one")])
    assert json.loads((tmp_path / "one" / "report.json").read_text())["encoders"] == ["llava-clip"]


def test_missing_answers_are_shown(tmp_path: Path) -> None:
    root = build_run(tmp_path / "run", 6)
    path = root / "eval" / "uta" / "mini_vqa" / "summary.json"
    save(path, {**json.loads(path.read_text()), "missing": 3})
    save_lines(path.parent / "scores.jsonl", lines(path.parent / "scores.jsonl")[3:])
    save_lines(path.parent / "answers.jsonl", lines(path.parent / "answers.jsonl")[3:])
    report.main([str(root)])
    content = json.loads((root / "report.json").read_text())
    row = next(row for row in content["comparisons"] if row["benchmark"] == "mini_vqa")
    assert (row["n"], row["left_out"]) == (15, 3)
    assert '<span class="tag bad">3</span>' in (root / "report.html").read_text()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda root: (root / "eval/clip/mini_vqa/summary.json").write_text("{"), "summary.json is no JSON"),
        (lambda root: save(root / "eval/clip/mini_vqa/summary.json", {"n": 3}), "lacks benchmark, metrics"),
        (lambda root: save(root / "eval/clip/mini_vqa/summary.json", {"benchmark": "b", "n": 1, "metrics": {"m": 50}}), "metric 'm' is 50"),
        (lambda root: (root / "eval/clip/mini_vqa/scores.jsonl").write_text("{}\n{\n"), "scores.jsonl, line 2, is no JSON"),
        (lambda root: save(root / "eval/clip/twice/summary.json", summary_of(root)), "both hold mini_vqa of clip"),
    ],
)
def test_a_broken_file_is_named_and_no_report_is_written(tmp_path: Path, edit: Any, message: str) -> None:
    root = build_run(tmp_path / "run", 4)
    edit(root)
    with pytest.raises(DataError, match=message):
        report.main([str(root)])
    assert not list(root.glob("report.*"))


def summary_of(root: Path) -> Any:
    return json.loads((root / "eval/clip/mini_vqa/summary.json").read_text())


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to report"):
        report.main([str(tmp_path)])
    with pytest.raises(DataError, match="no run folder"):
        read_runs([tmp_path / "gone"])


def test_commands_bear_no_machines_paths() -> None:
    here = Path.cwd()
    assert command_line([f"{here}/llm_stage/eval_vqa.py", "--out", f"{here}/runs/x y"]) == "python llm_stage/eval_vqa.py --out 'runs/x y'"
    assert command_line(["/some/venv/bin/mmkit", "quickstart"]) == "mmkit quickstart"
    assert command_line(["mmkit", "report", "/data/runs/a/eval"], Path("/data/runs/a")) == "mmkit report a/eval"
    assert command_line(None) == ""


def test_ticks_are_round_and_cover_the_range() -> None:
    assert report_charts.nice_ticks(0.83, 5.1) == [0, 2, 4, 6]
    for low, high in ((0.0, 0.003), (5.0, 5.0), (-3.0, 120.0)):
        ticks = report_charts.nice_ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert len(ticks) <= 7


def test_a_single_logged_step_can_be_drawn(tmp_path: Path) -> None:
    save_lines(tmp_path / "work" / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    report.main([str(tmp_path)])
    assert "nan" not in (tmp_path / "report.html").read_text().split("<svg", 1)[1].split("</svg>", 1)[0].lower()
