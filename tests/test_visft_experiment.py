"""`mmkit experiment visft` and `quickstart --encoders visft`: the plan, the seeds put together, what is and what is no gain."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apps import sweep, visft_results
from apps.quickstart_plan import QuickstartConfig, Stage
from apps.quickstart_plan import plan as quickstart_plan
from apps.sweep_table import Table
from apps.visft import open_journal
from apps.visft_plan import ARMS, BEFORE, EVALUATIONS, PERMUTED, TRUE, VisftExperimentConfig, evaluation_of, plan, work_of
from apps.visft_results import Scores, verdict
from encoders.eval_goi import EvalGoiConfig
from encoders.eval_ocr import EvalOcrConfig
from encoders.eval_zeroshot import EvalZeroshotConfig
from encoders.visft_settings import VisftConfig
from encoders.word_data import read_words
from mmkit import report
from mmkit.config import load_config
from mmkit.errors import ConfigError, DataError
from mmkit.minidata import build, word_crops
from mmkit.minidata.build import MiniDataConfig
from mmkit.minidata.word_crops import WordCropsConfig

RECIPES = Path(sweep.ROOT) / "encoders" / "recipes"
SETTINGS: dict[str, Any] = {
    "data mini": MiniDataConfig,
    "train visft": VisftConfig,
    "eval zeroshot": EvalZeroshotConfig,
    "eval ocr": EvalOcrConfig,
    "eval goi": EvalGoiConfig,
}


def loads(stages: list[Stage]) -> int:
    """Load every command line of a plan; gives how many there are."""
    checked = 0
    for stage in stages:
        if stage.command in SETTINGS or stage.target == "mmkit.minidata.word_crops:main":
            recipes = stage.recipe.parent if stage.recipe is not None else None
            load_config(SETTINGS.get(stage.command, WordCropsConfig), [*stage.argv, *stage.resume], recipe_dir=recipes)
            checked += 1
    return checked


# ---- plans -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_every_command_line_of_the_experiment_is_understood(tmp_path: Path, scale: float) -> None:
    config = VisftExperimentConfig(out=str(tmp_path / "x"), seeds=[0, 1], scale=scale)
    stages = plan(config)
    # data, words, heads; stage 2 of both arms; zero-shot once before and for each arm and seed; two probes for all three and each seed
    assert loads(stages) == 2 + 3 + 4 + (1 + 4) + 2 * 6
    permuted = [stage for stage in stages if "--permute_annotations" in stage.argv]
    assert {stage.argv[stage.argv.index("--permute_annotations") + 1] for stage in permuted} == {"true", "false"}
    for first, second in zip(permuted[::2], permuted[1::2], strict=True):  # the arms of a seed differ in nothing but what they are named by
        kept = [{word for word in stage.argv if word not in ("true", "false", str(stage.folder))} for stage in (first, second)]
        assert kept[0] == kept[1]
    done = [stage.done for stage in stages]
    assert len(done) == len(set(done))


def test_the_probes_of_an_arm_have_the_seed_of_its_encoder(tmp_path: Path) -> None:
    for stage in plan(VisftExperimentConfig(out=str(tmp_path), seeds=[0, 7])):
        if stage.command in ("eval ocr", "eval goi") and "_7" in str(stage.folder):
            assert stage.argv[stage.argv.index("--seeds") + 1] == "7"


def test_the_quickstart_takes_any_subset_and_visft_only_when_asked(tmp_path: Path) -> None:
    def names(*encoders: str) -> list[str]:
        return [stage.name for stage in quickstart_plan(QuickstartConfig(out=str(tmp_path / "q"), encoders=list(encoders)))]

    assert QuickstartConfig().encoders == ["clip", "uta"]
    assert not any("isft" in name for name in names("clip", "uta"))
    stages = quickstart_plan(QuickstartConfig(out=str(tmp_path / "q"), encoders=["visft"], scale=0.02))
    published = [str(stage.publish[1].relative_to(tmp_path / "q")) for stage in stages if stage.publish]
    assert published == ["encoders/visft", "llava/visft"]
    assert loads(stages) == 1 + 3 + 1 + 1
    assert len(names("clip", "uta", "visft")) == len(names("clip", "uta")) + 3 + 1 + 1 + 4


def test_the_journal_names_the_command_that_goes_on(tmp_path: Path) -> None:
    journal = open_journal(VisftExperimentConfig(out=str(tmp_path), seeds=[0, 2], scale=0.5))
    assert journal.command == f"mmkit experiment visft --out {tmp_path} --seeds 0,2 --scale 0.5"
    with pytest.raises(ConfigError, match="no finished embedded data set"):
        VisftExperimentConfig(data=str(tmp_path)).validate()


# ---- what is a gain ----------------------------------------------------------------------------------------------------------------------


def scores(share: float, n: int = 400) -> Scores:
    """Three seeds with the first `share` of the items right."""
    names = tuple(map(str, range(n)))
    values = np.repeat((np.arange(n) < share * n)[None].astype(float), 3, axis=0)
    return Scores({name: {} for name in names}, values, names, names)


@pytest.mark.parametrize(
    ("true", "permuted", "good", "words"),
    [
        (0.7, 0.5, True, "beyond its control"),
        (0.7, 0.7, False, "a probe gain that the permuted control shows too is no gain"),
        (0.5, 0.4, None, "No gain shown"),
        (0.4, 0.4, False, "loses"),
    ],
)
def test_a_gain_that_the_control_shows_too_is_no_gain(true: float, permuted: float, good: bool | None, words: str) -> None:
    found = verdict("mini_ocr", {BEFORE: scores(0.5), TRUE: scores(true), PERMUTED: scores(permuted)})
    assert found["good"] is good
    assert words in found["headline"]
    assert "a probe gain that the permuted control shows too is no gain" in found["evidence"]
    assert f"true annotations {100 * (true - 0.5):+.2f}" in found["evidence"]


def test_a_gain_that_one_seed_does_not_show_is_no_claim() -> None:
    mixed = scores(0.7)
    mixed.values[2] = scores(0.4).values[2]
    found = verdict("goi_box", {BEFORE: scores(0.5), TRUE: mixed, PERMUTED: scores(0.5)})
    assert found["good"] is None
    assert "not with every seed" in found["headline"]


def finished(out: Path, seeds: tuple[int, ...]) -> None:
    """An experiment as its stages leave it: true arms fall and score, permuted ones do not."""

    def losses(folder: Path, last: float, *tasks: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"step": step, "task": task, "loss": loss, "batches": [loss]} for step, loss in ((0, 2.0), (10, last)) for task in tasks]
        (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for task in ("detection", "segmentation", "caption"):
        losses(out / "work" / f"visft_{task}", 1.0, task)
        name = "cider" if task == "caption" else "ap"
        worth = {
            when: {name: {"value": value, "ci95": [value - 1, value + 1], "n": 100}}
            for when, value in (("untrained", 1.5), ("trained", 20.5))
        }
        (out / "work" / f"visft_{task}" / "scores.json").write_text(json.dumps({"task": task, **worth}))
    for seed in seeds:
        for arm in ARMS:
            losses(work_of(out, arm, seed), {TRUE: 1.9, PERMUTED: 2.5}[arm], "detection", "segmentation", "caption")
        for arm in (BEFORE, *ARMS):
            for name in EVALUATIONS:
                folder = evaluation_of(out, arm, seed, name)
                folder.mkdir(parents=True, exist_ok=True)
                right = {BEFORE: 40, TRUE: 70, PERMUTED: 20}[arm]
                key = "top1" if name == "mini_zeroshot" else "score"
                rows = [
                    {"question_id": str(i), "image": f"{i}.png", "answer": "a", "label": "b", key: int(i < right + seed)}
                    for i in range(100)
                ]
                (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                (folder / "summary.json").write_text(json.dumps({"benchmark": name, "metrics": {}, "n": 100, "protocol": {"images": "."}}))


def test_seeds_become_arms_curves_and_sentences_in_the_report(tmp_path: Path) -> None:
    finished(tmp_path, (0, 1))
    visft_results.main(["--out", str(tmp_path), "--seeds", "0,1"])
    report.main([str(tmp_path / "results"), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "report.json").read_text())
    assert sorted(found["encoders"]) == ["before", "permuted", "visft"]
    values = {row["encoder"]: row["value"] for row in found["results"] if row["benchmark"] == "mini_ocr"}
    assert values == {"before": 40.5, "visft": 70.5, "permuted": 20.5}
    charts = {chart["title"].rsplit("/", 1)[-1]: [series["label"] for series in chart["series"]] for chart in found["curves"]}
    assert charts == {task: ["visft", "permuted"] for task in ("detection", "segmentation", "caption")}  # both curves
    page = (tmp_path / "report.html").read_text()
    assert "a probe gain that the permuted control shows too is no gain" in page
    assert "true +5.00, +5.00, permuted -25.00, -25.00" in page
    assert "box AP 1.50 untrained, 20.50 [19.50, 21.50] after (n 100)" in page
    assert "the held-out loss falls with true annotations, more than with permuted" in page


def test_seeds_that_share_no_item_are_named(tmp_path: Path) -> None:
    finished(tmp_path, (0, 1))
    path = evaluation_of(tmp_path, TRUE, 1, "mini_ocr") / "answers.jsonl"
    path.write_text('{"question_id": "other", "score": 1}\n')
    with pytest.raises(DataError, match="share no item of mini_ocr"):
        visft_results.main(["--out", str(tmp_path), "--seeds", "0,1"])


# ---- words cut out -----------------------------------------------------------------------------------------------------------------------


def test_words_are_cut_out_where_they_stand(tmp_path: Path) -> None:
    data = build.main(["--out", str(tmp_path / "data"), "--scale", "0.004", "--drawings", "10"])
    out = word_crops.main(["--data", str(data), "--out", str(tmp_path / "words")])
    words = read_words(str(out), "train")
    assert words.words == read_words(str(data / "words"), "train").words
    for name in words.names:
        cut, whole = report.open_image(out / name), np.asarray(report.open_image(data / "words" / name))
        assert cut.width < 96
        ink = np.asarray(cut).astype(int)
        assert np.ptp(ink, axis=(0, 1)).max() > 60  # the word is in it, and the rest of the picture has no ink of this word
        assert whole.shape == (96, 96, 3)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["settings"]["seed"] = 5
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="draw the data anew"):
        word_crops.main(["--data", str(data), "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


# ---- ablations ---------------------------------------------------------------------------------------------------------------------------

SWEEPS = sorted(path for folder in sweep.FOLDERS for path in folder.glob("visft_*.yaml"))


def test_all_four_ablations_are_found() -> None:
    assert [path.stem for path in SWEEPS] == ["visft_data_share", "visft_head_lr", "visft_rank", "visft_tasks"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_row_and_evaluation_of_an_ablation_is_understood(path: Path, tmp_path: Path) -> None:
    config = load_config(sweep.SweepConfig, ["--sweep", str(path), "--out", str(tmp_path)], recipe_dir=path.parent, recipe_flag="sweep")
    kinds: dict[str, Any] = {"train": VisftConfig, "zeroshot": EvalZeroshotConfig, "ocr": EvalOcrConfig, "goi": EvalGoiConfig}
    read: dict[tuple[str, int, str], Any] = {
        (job.row, job.seed, job.name): load_config(kinds[job.name], job.argv, recipe_dir=RECIPES) for job in sweep.plan(config)
    }
    trained = {row: read[row, 0, "train"] for row in config.rows}
    told_apart = {repr((one.lora, one.data_share, one.permute_annotations, one.head_lr, one.tasks)) for one in trained.values()}
    assert len(told_apart) == len(config.rows)
    assert "permuted" in config.rows  # the control
    assert all(read[row, seed, "ocr"].seeds == [seed] for row in config.rows for seed in config.seeds)
    assert any("Contamination" in note for note in config.notes)
    for name, entry in config.prepare.items():
        if entry["script"] == "encoders/train_visft.py":
            flags = sweep.flags_of({key: value for key, value in entry.items() if key != "script"}, {"data": "D", "out": str(tmp_path)})
            head = load_config(VisftConfig, flags, recipe_dir=RECIPES)
            assert f"{head.run.output_dir}/head" in trained[config.baseline].heads
            assert head.task == name


def test_the_notes_of_a_sweep_stand_below_its_table() -> None:
    table = Table("visft", {"a": {}}, [0], notes=["Contamination: some."])
    assert "\n\nContamination: some.\n" in table.markdown()
    assert table.as_dict()["notes"] == ["Contamination: some."]
