"""`mmkit compare`: intervals that cover, seeds that widen them, nothing found where nothing is, and input that cannot be compared."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from mmkit import compare, report, stats
from mmkit.errors import ConfigError, DataError


def write(
    folder: Path, scores: Mapping[str, float], kinds: Sequence[str] = ("all",), benchmark: str = "vqa", metric: str = "vqa_accuracy"
) -> Path:
    """An evaluation folder, EVAL/MODEL/BENCHMARK; four questions to a picture."""
    folder.mkdir(parents=True)
    rows = [
        {"question_id": name, "score": score, "image": f"{number // 4}.png", "kind": kinds[number % len(kinds)]}
        for number, (name, score) in enumerate(scores.items())
    ]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mean = 100 * float(np.mean(list(scores.values())))
    summary = {"benchmark": benchmark, "n": len(rows), "metrics": {metric: {"value": mean, "ci95": [0, 100], "n": len(rows)}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def drawn(seed: int, n: int = 200, share: float = 0.5) -> dict[str, float]:
    return {f"q{i}": float(right) for i, right in enumerate(np.random.default_rng(seed).random(n) < share)}


def test_intervals_cover_nineteen_of_twenty_made_up_truths() -> None:
    """1,000 pairs of models on 60 pictures of 4 questions that fail together; the true difference is known. At least 93 % must cover it."""
    generator = np.random.default_rng(0)
    clusters = [str(i // 4) for i in range(240)]
    covered = 0
    for _ in range(1000):
        ability, gain = generator.uniform(0.3, 0.6), generator.uniform(-0.1, 0.2)
        hard = np.repeat(generator.uniform(-0.25, 0.25, 60), 4)  # a picture is hard for both
        luck = generator.random(240)  # and a question asks both for the same luck, half of the time
        own = np.where(generator.random(240) < 0.5, luck, generator.random(240))
        x, y = luck < ability + hard, own < np.clip(ability + hard + gain, 0, 1)
        truth = float(np.mean([np.clip(ability + h + gain, 0, 1) - np.clip(ability + h, 0, 1) for h in np.linspace(-0.25, 0.25, 2001)]))
        found = stats.paired_bootstrap(y.astype(float), x.astype(float), clusters, draws=400, seed=int(generator.integers(1 << 30)))
        covered += found.low <= truth <= found.high
    assert covered >= 930


def test_a_run_and_itself_are_not_told_apart(tmp_path: Path) -> None:
    scores = drawn(1)
    for name in ("a", "b"):
        write(tmp_path / name / "m" / "vqa", scores)
    (row,) = json.loads(compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out.json")]).read_text())
    assert (row["difference"], row["ci95"], row["p"], row["stands"]) == (0.0, [0.0, 0.0], 1.0, False)
    assert "score the same" in row["sentence"]


def test_a_real_difference_stands_by_kind_and_in_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worse = drawn(2, share=0.4)
    better = {name: 1.0 if number % 3 else score for number, (name, score) in enumerate(worse.items())}
    write(tmp_path / "run" / "eval" / "good" / "vqa", better, kinds=("colour", "count"))
    write(tmp_path / "run" / "eval" / "bad" / "vqa", worse, kinds=("colour", "count"))
    compare.main([str(tmp_path / "run"), "--out", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["kind"] for row in rows] == ["", "colour", "count"]
    assert all(row["stands"] for row in rows)
    assert rows[0]["only_first"] == 0  # "bad" comes first in the folder: it has nothing right that "good" has wrong
    assert "good is better than bad on vqa" in " ".join(capsys.readouterr().out.split())


def test_questions_that_only_one_has_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = drawn(3)
    write(tmp_path / "a" / "m" / "vqa", scores)
    write(tmp_path / "b" / "m" / "vqa", dict(list(scores.items())[:150]))
    compare.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "50 that not all have are left out" in " ".join(capsys.readouterr().out.split())


def test_many_benchmarks_are_paid_for(tmp_path: Path) -> None:
    """One in twenty of equal models' benchmarks looks different by chance; after Holm none of twenty may."""
    for number in range(20):
        for side in range(2):
            write(tmp_path / f"{side}" / "m" / f"b{number}", drawn(100 * number + side), benchmark=f"b{number}")
    sides = compare.read_sides([str(tmp_path / "0"), str(tmp_path / "1")])
    rows = compare.compare(*sides)
    compare.adjust(rows)
    assert min(row["p"] for row in rows) < 0.2
    assert not any(row["stands"] for row in rows)
    assert all(row["p_holm"] >= row["p"] for row in rows)


def test_seeds_that_differ_widen_the_interval(tmp_path: Path) -> None:
    def side(name: str, shares: Sequence[float]) -> str:
        folders = [
            write(tmp_path / name / str(seed) / "m" / "vqa", drawn(10 * seed, 400, share)).parent for seed, share in enumerate(shares)
        ]
        return ",".join(map(str, folders))

    calm = compare.compare(*compare.read_sides([side("a", (0.60, 0.60, 0.60)), side("b", (0.5, 0.5, 0.5))]))[0]
    wild = compare.compare(*compare.read_sides([side("c", (0.50, 0.60, 0.70)), side("d", (0.4, 0.5, 0.6))]))[0]
    assert wild["difference"] == pytest.approx(calm["difference"], abs=3)
    assert wild["ci95"][1] - wild["ci95"][0] > 2 * (calm["ci95"][1] - calm["ci95"][0])
    assert wild["sd"][0] > 3 * calm["sd"][0]
    assert wild["seeds"] == [3, 3]


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    write(tmp_path / "one" / "m" / "vqa", drawn(1))
    write(tmp_path / "two" / "m" / "pope", drawn(1), benchmark="pope")
    write(tmp_path / "three" / "m" / "vqa", {f"other{i}": 1.0 for i in range(8)})
    write(tmp_path / "four" / "m" / "vqa", drawn(1), metric="m4c")
    with pytest.raises(ConfigError, match=r"holds the evaluations of 1 encoder\(s\)"):
        compare.main([str(tmp_path / "one")])
    with pytest.raises(DataError, match=r"no benchmark in common \(one: vqa; two: pope\)"):
        compare.main([str(tmp_path / "one"), str(tmp_path / "two")])
    with pytest.raises(DataError, match="share no scored question of vqa"):
        compare.main([str(tmp_path / "one"), str(tmp_path / "three")])
    with pytest.raises(DataError, match="vqa is scored by different metrics"):
        compare.main([str(tmp_path / "one"), str(tmp_path / "four")])
    with pytest.raises(DataError, match="one side has several seeds and another a single run"):
        compare.main([f"{tmp_path / 'one'},{tmp_path / 'one'}", str(tmp_path / "one")])
    with pytest.raises(DataError, match="no run folder"):
        compare.main([str(tmp_path / "one"), str(tmp_path / "five")])


# ---- figures that are no means of questions ----------------------------------------------------------------------------------------------


def write_ratios(folder: Path, reference: Sequence[float], candidate: Sequence[float]) -> Path:
    """LLaVA-Bench's folder: scores of both on every question, three questions to a picture."""
    folder.mkdir(parents=True)
    rows = [
        {"question_id": n, "kind": ("conv", "detail")[n % 2], "image": f"{n // 3}.png", "reference_score": r, "candidate_score": c}
        for n, (r, c) in enumerate(zip(reference, candidate, strict=True))
    ]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metric = {"value": 100 * sum(candidate) / sum(reference), "ci95": [0, 200], "n": len(rows)}
    summary = {"benchmark": "llava_bench_coco", "n": len(rows), "unit": "100 x mean(candidate) / mean(reference)"}
    (folder / "summary.json").write_text(json.dumps({**summary, "metrics": {"relative": metric}}))
    return folder


def test_ratios_of_sums_are_compared_on_the_same_questions(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    reference = generator.integers(6, 11, 60).astype(float)
    weak, strong = generator.integers(2, 6, 60).astype(float), generator.integers(5, 10, 60).astype(float)
    write_ratios(tmp_path / "a/m/llava_bench_coco", reference, strong)
    write_ratios(tmp_path / "b/m/llava_bench_coco", reference, weak)
    rows = json.loads(compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out.json")]).read_text())
    assert [row["kind"] for row in rows] == ["", "conv", "detail"]
    assert rows[0]["means"] == pytest.approx([100 * strong.sum() / reference.sum(), 100 * weak.sum() / reference.sum()])
    assert rows[0]["difference"] == pytest.approx(rows[0]["means"][0] - rows[0]["means"][1])
    assert rows[0]["stands"]
    assert "better than" in rows[0]["sentence"]
    write_ratios(tmp_path / "c/m/llava_bench_coco", reference, strong)
    (same, *_) = json.loads(compare.main([str(tmp_path / "a"), str(tmp_path / "c"), "--out", str(tmp_path / "out.json")]).read_text())
    assert (same["difference"], same["ci95"], same["p"], same["stands"]) == (0.0, [0.0, 0.0], 1.0, False)


def test_intervals_of_ratios_cover_nineteen_of_twenty_made_up_truths() -> None:
    """500 pairs on 90 questions, judged 1 to 10, with a shared difficulty; at least 93 % of the intervals must cover the true difference."""
    generator = np.random.default_rng(5)
    clusters, covered = [str(n // 3) for n in range(90)], 0
    for _ in range(500):
        level, gain = generator.uniform(4, 6), generator.uniform(-1, 1.5)
        hard = np.repeat(generator.normal(0, 1, 30), 3)
        one = np.stack([8 + 0.5 * hard + generator.normal(0, 0.7, 90), level + hard + generator.normal(0, 1, 90)], axis=1)
        two = np.stack([8 + 0.5 * hard + generator.normal(0, 0.7, 90), level + gain + hard + generator.normal(0, 1, 90)], axis=1)
        row = compare.statistic_difference(two[None], one[None], compare._ratio, clusters)
        covered += row["ci95"][0] <= 100 * gain / 8 <= row["ci95"][1]
    assert covered >= 465


def test_f1_is_compared_beside_the_accuracy_of_yes_and_no(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    yes = generator.random(200) < 0.5
    for name, says_yes in (("a", generator.random(200) < np.where(yes, 0.9, 0.1)), ("b", generator.random(200) < np.where(yes, 0.6, 0.5))):
        folder = write(
            tmp_path / name / "m/pope", {str(n): float(says_yes[n] == yes[n]) for n in range(200)}, benchmark="pope", metric="accuracy"
        )
        rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "reference": "yes" if yes[int(row["question_id"])] else "no"}) for row in rows]
        (folder / "scores.jsonl").write_text("\n".join(lines) + "\n")
    rows = json.loads(compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out.json")]).read_text())
    f1 = next(row for row in rows if row["kind"] == "F1")
    hit, wrong = (says_yes & yes).sum(), (says_yes != yes).sum()  # of b, the last
    assert f1["means"][1] == pytest.approx(200 * hit / (2 * hit + wrong))
    assert f1["stands"]


def test_cider_is_compared_image_by_image(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    one, luck = generator.random(80) * 1.5, generator.normal(0, 0.05, 80)
    for name, scores in (("a", one + 0.2 + luck), ("b", one)):
        write(tmp_path / name / "m/coco", {str(n): float(s) for n, s in enumerate(scores)}, benchmark="coco", metric="cider_ptb_python")
    (row,) = json.loads(compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out.json")]).read_text())
    assert row["difference"] == pytest.approx(100 * (0.2 + luck.mean()))
    assert (row["p_is"], row["stands"]) == ("normal", True)


def test_a_caption_is_not_right_or_wrong_and_a_gain_of_all_of_them_stands(tmp_path: Path) -> None:
    """Two models whose captions all score below what counts as right elsewhere: McNemar would see nothing in any number of them."""
    low = {name: 0.05 + 0.1 * value for name, value in drawn(5).items()}
    for name, more in (("a", 0.0), ("b", 0.05)):
        write(tmp_path / "run" / "eval" / name / "cap", {key: value + more for key, value in low.items()}, benchmark="cap", metric="cider")
    compare.main([str(tmp_path / "run"), "--out", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert (row["p_is"], row["stands"]) == ("normal", True)
    report.main([str(tmp_path / "run"), "--out", str(tmp_path / "report")])
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    (claimed,) = found["comparisons"]
    assert (claimed["first"], claimed["only_first"], claimed["stands"]) == ("b", None, True)
    assert claimed["difference"] == pytest.approx(5.0)
    assert "normal p < 0.001" in claimed["evidence"]
    assert found["agreements"] == []


def test_columns_of_different_downstreams_are_not_taken_for_encoders(tmp_path: Path) -> None:
    for place, name in enumerate(("clip", "clip_blip2", "uta", "uta_blip2")):
        write(tmp_path / "run" / "eval" / name / "vqa", drawn(place))
    compare.main([str(tmp_path / "run"), "--out", str(tmp_path / "out.json")])
    compared = [(row["first"], row["second"]) for row in json.loads((tmp_path / "out.json").read_text())]
    assert compared == [("clip", "uta"), ("clip_blip2", "uta_blip2")]
    report.main([str(tmp_path / "run"), "--out", str(tmp_path / "report")])
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {frozenset((row["first"], row["second"])) for row in found["comparisons"]} == {frozenset(pair) for pair in compared}
    assert found["encoder_names"] == ["clip", "uta"]
    assert "2 encoders (clip, uta)" in (tmp_path / "report" / "report.html").read_text()
    one, other = (str(tmp_path / "run" / "eval" / name) for name in ("clip", "clip_blip2"))
    compare.main([one, other])  # asked for by name, they are
    for name in ("uta", "uta_blip2"):
        (tmp_path / "run" / "eval" / name).rename(tmp_path / name)
    with pytest.raises(ConfigError, match="clip and clip_blip2 are not of one downstream"):
        compare.main([str(tmp_path / "run")])
