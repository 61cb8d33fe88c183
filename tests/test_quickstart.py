"""The quickstart: its plan, its journal, and the whole job at a tiny scale, interrupted once and gone on with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from apps import quickstart, quickstart_plan
from apps.quickstart import open_journal
from apps.quickstart_plan import QuickstartConfig, Stage, plan
from apps.stages import Stopped, run_all, run_stage
from mmkit.config import load_config
from mmkit.errors import ConfigError, NameNotFound

ROOT = Path(__file__).resolve().parent.parent


def config(tmp_path: Path, **settings: object) -> QuickstartConfig:
    """Settings for a folder of the test's own."""
    return QuickstartConfig(out=str(tmp_path / "quick"), **settings)  # type: ignore[arg-type]


def fake_stage(tmp_path: Path, function: str, publish: bool = False) -> Stage:
    """A training that is one of the functions below."""
    work = tmp_path / "quick" / "work" / "fake"
    target = (work / "model", tmp_path / "quick" / "llava" / "fake") if publish else None
    return Stage(
        "fake", "train llava", f"{__name__}:{function}", (str(work),), work, work / "manifest.json", ("--run.resume",), None, target
    )


SEEN: list[list[str]] = []


def finishes(argv: list[str]) -> None:
    """A training that comes to its end."""
    SEEN.append([*argv, *sys.argv[:3]])
    (Path(argv[0]) / "model").mkdir(parents=True, exist_ok=True)
    (Path(argv[0]) / "model" / "config.json").write_text("{}")
    (Path(argv[0]) / "manifest.json").write_text(json.dumps({"state": "finished"}))


def is_interrupted(argv: list[str]) -> None:
    """A training that is stopped by Ctrl-C after it has saved, as `Run` does it."""
    Path(argv[0]).mkdir(parents=True)
    (Path(argv[0]) / "manifest.json").write_text(json.dumps({"state": "interrupted"}))
    raise SystemExit(130)


def breaks(argv: list[str]) -> None:
    """A training that cannot start."""
    raise ValueError("the projector takes width 192")


def test_the_plan_leads_from_data_to_the_report_for_each_encoder(tmp_path: Path) -> None:
    stages = plan(config(tmp_path))
    assert [stage.command for stage in stages] == [
        "data mini", "quickstart", "train uta", "eval zeroshot", "eval zeroshot",
        *["train llava", "train llava", "eval vqa", "eval vqa"] * 2, "report",
    ]  # fmt: skip
    published = {str(stage.publish[1].relative_to(tmp_path / "quick")) for stage in stages if stage.publish}
    assert published == {"encoders/uta", "llava/clip", "llava/uta"}
    summaries = {str(stage.done.relative_to(tmp_path / "quick")) for stage in stages if stage.done.name == "summary.json"}
    places = [place for place, _ in quickstart.RESULTS["llava"].values()]
    assert summaries == {f"eval/{place.format(encoder)}/summary.json" for encoder in ("clip", "uta") for place in places}


def test_every_stage_of_the_plan_has_a_command_line_its_script_understands(tmp_path: Path) -> None:
    """The recipes of all trainings load with the flags they are given: no stage can fail on its command line an hour later."""
    from encoders.eval_zeroshot import EvalZeroshotConfig
    from encoders.eval_zeroshot_retrieval import EvalRetrievalConfig
    from encoders.train_uta import UTAConfig
    from llm_stage.eval_captions import EvalCaptionsConfig
    from llm_stage.eval_retrieval import EvalConfig
    from llm_stage.eval_vqa import EvalVqaConfig
    from llm_stage.train_blip2 import Blip2Settings
    from llm_stage.train_llava import LlavaSettings
    from llm_stage.train_qformer import QFormerSettings
    from mmkit.minidata.build import MiniDataConfig

    (tmp_path / "quick" / "data" / "images").mkdir(parents=True)
    known = {
        "data mini": MiniDataConfig,
        "train uta": UTAConfig,
        "train llava": LlavaSettings,
        "eval zeroshot": EvalZeroshotConfig,
        "eval vqa": EvalVqaConfig,
        "train qformer": QFormerSettings,
        "train blip2": Blip2Settings,
        "eval retrieval": EvalRetrievalConfig,
        "eval qformer-retrieval": EvalConfig,
        "eval captions": EvalCaptionsConfig,
    }
    checked = 0
    for name in ("clip", "uta"):  # which kind of model it is, a model's folder says
        (tmp_path / "quick" / "llava" / name).mkdir(parents=True)
        (tmp_path / "quick" / "blip2" / name).mkdir(parents=True)
    (tmp_path / "quick" / "data" / "images" / "test").mkdir()
    for stage in plan(config(tmp_path, scale=0.1, downstream=["llava", "blip2"])):
        if stage.command in known:
            recipes = stage.recipe.parent if stage.recipe is not None else None
            load_config(
                known[stage.command], [*stage.argv, *(stage.resume if stage.command.startswith("train") else ())], recipe_dir=recipes
            )
            checked += 1
    assert checked == 12 + 16


def test_the_scale_shortens_the_trainings_and_one_leaves_them_alone(tmp_path: Path) -> None:
    def steps(scale: float) -> list[str]:
        stage = next(stage for stage in plan(config(tmp_path, scale=scale)) if stage.command == "train llava")
        return [stage.argv[place + 1] for place, word in enumerate(stage.argv) if word == "--run.steps"]

    assert steps(1.0) == []
    assert steps(0.1) == [str(round(quickstart_plan.recipe_steps(quickstart_plan.RECIPES["llm_stage"] / "mini_stage1.yaml") * 0.1))]
    assert steps(1e-6) == [str(quickstart_plan.LEAST_STEPS)]


def test_a_finished_stage_is_complete_once_its_result_is_in_its_place(tmp_path: Path) -> None:
    stage = fake_stage(tmp_path, "finishes", publish=True)
    journal = open_journal(config(tmp_path))
    assert not stage.complete
    SEEN.clear()
    run_stage(stage, journal, 1, 1)
    assert [[str(stage.folder), "mmkit", "train", "llava"]] == SEEN  # the manifest of a stage names the command for this stage alone
    assert stage.complete
    assert (tmp_path / "quick" / "llava" / "fake" / "config.json").is_file()

    (tmp_path / "quick" / "llava" / "fake" / "config.json").unlink()
    (tmp_path / "quick" / "llava" / "fake").rmdir()  # killed between the training and the copy: only the copy is made again
    run_stage(stage, journal, 1, 1)
    assert len(SEEN) == 1
    assert stage.complete


def test_an_interrupted_stage_is_not_complete_says_how_to_go_on_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = open_journal(config(tmp_path))
    stage = fake_stage(tmp_path, "is_interrupted")
    with pytest.raises(Stopped) as stop:
        run_all(Console(), [stage], journal)
    assert stop.value.code == 130
    assert (
        f"stopped in stage 1 of 1 (fake); this goes on with it:\n  mmkit quickstart --out {tmp_path / 'quick'}" in capsys.readouterr().err
    )
    assert not stage.complete
    SEEN.clear()
    run_stage(fake_stage(tmp_path, "finishes"), journal, 3, 9)
    assert SEEN[0][:2] == [str(stage.folder), "--run.resume"]


def test_a_stage_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="width 192"):
        run_stage(fake_stage(tmp_path, "breaks"), open_journal(config(tmp_path)), 3, 9)
    assert "stage 3 of 9 (fake) failed" in capsys.readouterr().err


def begun(tmp_path: Path, **settings: object) -> list[Stage]:
    """A quickstart that has begun its UTA training."""
    settings_now = config(tmp_path, **settings)
    stages = plan(settings_now)
    journal = open_journal(settings_now)
    stage = next(stage for stage in stages if stage.command == "train uta")
    journal.begin(stage)
    stage.folder.mkdir(parents=True)
    return stages


def test_the_same_settings_go_on(tmp_path: Path) -> None:
    stages = begun(tmp_path)
    open_journal(config(tmp_path)).check(stages)
    fewer = config(tmp_path, encoders=["clip"])  # the encoders share nothing but the data: fewer or more of them later is no contradiction
    open_journal(fewer).check(plan(fewer))


def test_other_settings_in_the_same_folder_are_refused_with_advice(tmp_path: Path) -> None:
    begun(tmp_path)
    changed = config(tmp_path, scale=0.5)
    with pytest.raises(ConfigError, match=r"made with other settings: scale 1.0 \(now 0.5\).*--out .*rm -r"):
        open_journal(changed).check(plan(changed))


def test_a_recipe_that_changed_in_between_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path)
    copies = tmp_path / "recipes"
    copies.mkdir()
    for path in quickstart_plan.RECIPES["encoders"].glob("*.yaml"):
        (copies / path.name).write_text(path.read_text() + ("\npaper: none\n" if path.stem == "mini_uta_quick" else ""))
    monkeypatch.setitem(quickstart_plan.RECIPES, "encoders", copies)
    with pytest.raises(ConfigError, match=r"the recipe mini_uta_quick.yaml has changed"):
        open_journal(config(tmp_path)).check(plan(config(tmp_path)))


def test_a_training_that_no_quickstart_has_made_is_refused(tmp_path: Path) -> None:
    stages = plan(config(tmp_path))
    next(stage for stage in stages if stage.command == "train uta").folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match="no quickstart has made it"):
        open_journal(config(tmp_path)).check(stages)


def test_wrong_settings_name_what_is_right() -> None:
    with pytest.raises(NameNotFound, match="no quickstart encoder named 'cilp'; nearest: clip"):
        load_config(QuickstartConfig, ["--encoders", "cilp"])
    with pytest.raises(ConfigError, match="--scale is 0"):
        load_config(QuickstartConfig, ["--scale", "0"])
    with pytest.raises(ConfigError, match="clip,clip"):
        load_config(QuickstartConfig, ["--encoders", "clip,clip"])


# The command line with Ctrl-C pressed after the fourth step of stage 2: waiting for it from outside came too late on a busy machine.
# It is pressed in the parent; the lanes' processes import this file, too.
CTRL_C_IN_STAGE_2 = """
import os, signal, sys
from apps.cli import main
from mmkit.run import Run

end_step = Run._end_step

def end_step_and_press_ctrl_c(self, progress):
    end_step(self, progress)
    if self.folder.name == "llava_clip_stage2" and self.step == 4:
        os.kill(os.getppid(), signal.SIGINT)

Run._end_step = end_step_and_press_ctrl_c
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_job_interrupted_by_ctrl_c_goes_on_where_it_was(tmp_path: Path, child_environment: dict[str, str]) -> None:
    out = tmp_path / "quick"
    command = [
        sys.executable,
        "-m",
        "apps.cli",
        "quickstart",
        "--out",
        str(out),
        "--scale",
        "0.015",
    ]  # nine steps of stage 2
    environment = {**child_environment, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)

    script = tmp_path / "ctrl_c.py"
    script.write_text(CTRL_C_IN_STAGE_2)
    ctrl_c = [sys.executable, str(script), *command[3:], "--threads", "2"]
    stopped = subprocess.run(ctrl_c, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200)
    said = stopped.stdout
    assert stopped.returncode == 130, said[-3000:]
    assert "this goes on with it:\n  mmkit quickstart --out" in said
    assert not (out / "llava" / "clip").exists()
    before = {path: path.stat().st_mtime_ns for path in (out / "data" / "manifest.json", out / "encoders" / "uta" / "config.json")}

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kept = [line for line in done.stdout.splitlines() if "complete, kept" in line]
    # the other lane may be further or less far
    for stage in ("draw the embedded data", "encoder: clip", "encoder: uta", "zero-shot: clip", "LLaVA stage 1: clip"):
        assert any(stage in line for line in kept), done.stdout
    assert "goes on" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for encoder in ("clip", "uta"):
        assert (out / "llava" / encoder / "config.json").is_file()
        for place, metric in quickstart.RESULTS["llava"].values():
            summary = json.loads((out / "eval" / place.format(encoder) / "summary.json").read_text())
            assert summary["benchmark"] == place.split("/")[1]
            assert summary["metrics"][metric]["n"] > 0
    assert "<html" in (out / "report.html").read_text().lower()
    for encoder in ("clip", "uta"):
        rows = (out / "work" / f"llava_{encoder}_stage2" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in rows]
        assert steps == sorted(set(steps))  # resumed, not begun again

    refused = subprocess.run([*command[:-1], "0.016"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert "was made with other settings: scale 0.015 (now 0.016)" in refused.stderr
