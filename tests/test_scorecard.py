"""`mmkit scorecard`: which stages it has for which encoders, what it refuses, and one small one from end to end."""

import json
import shutil
from pathlib import Path

import pytest

from apps import scorecard
from apps.scorecard import ScorecardConfig, plan, short_name
from encoders.catalog import load_encoder
from llm_stage.train_blip2 import RECIPES, Blip2Settings
from mmkit.config import load_config
from mmkit.errors import ConfigError, MMKitError, NameNotFound


def test_an_encoder_is_called_by_its_run_or_its_name(tmp_path: Path) -> None:
    (tmp_path / "uta_long" / "encoder").mkdir(parents=True)
    assert short_name(str(tmp_path / "uta_long" / "encoder")) == "uta_long"
    assert short_name(str(tmp_path / "uta_long")) == "uta_long"
    assert short_name("openclip:ViT-B-16/laion400m") == "openclip-ViT-B-16-laion400m"


def test_the_plan_measures_every_encoder_alike(tmp_path: Path) -> None:
    config = ScorecardConfig(encoders=["mini-clip", "mini-uta"], out=str(tmp_path / "out"), downstream=["llava", "blip2"])
    stages = plan(config)
    by_encoder = [[stage.command for stage in stages if name in stage.name] for name in ("mini-clip", "mini-uta")]
    assert by_encoder[0] == by_encoder[1]
    assert {"eval zeroshot", "eval ocr", "eval goi", "train llava", "eval vqa", "train qformer", "train blip2", "eval captions"} <= set(
        by_encoder[0]
    )
    assert len({str(stage.folder) for stage in stages if stage.command.startswith("train")}) == 8
    bare = plan(ScorecardConfig(encoders=["mini-clip"], out=str(tmp_path / "out"), downstream=["none"], zeroshot=False))
    assert [stage.command for stage in bare] == ["data mini", "scorecard", "eval ocr", "eval goi", "report"]


def test_another_language_model_is_another_recipe(tmp_path: Path) -> None:
    stages = plan(ScorecardConfig(encoders=["mini-clip"], out=str(tmp_path), llm="smollm2", probes=False, downstream=["llava", "blip2"]))
    assert [stage.recipe.stem for stage in stages if stage.recipe] == ["smollm2_stage1", "smollm2_stage2", "mini_qformer", "smollm2_blip2"]
    flags = stages[[stage.command for stage in stages].index("train blip2")].argv
    assert load_config(Blip2Settings, list(flags), recipe_dir=RECIPES).llm == "smollm2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which encoders"),
        (["a/x", "b/x", "--encoders", "a/x,a/x"], "two encoders would both be called 'a-x'"),
        (["mini-clip", "--llm", "gpt"], "no language model of a scorecard named 'gpt'"),
        (["mini-clip", "--downstream", "blip3"], "no downstream named 'blip3'"),
        (["mini-clip", "--scale", "0"], "above 0 is right"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(MMKitError, match=message):
        scorecard.main([*words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_encoder_folder_is_taken_whole_and_one_that_does_not_load_is_not(tmp_path: Path) -> None:
    load_encoder("mini-clip").save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    scorecard.take_encoder([str(tmp_path / "mine"), str(tmp_path / "out")])
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    (tmp_path / "mine" / "model.safetensors").unlink()
    with pytest.raises((ConfigError, NameNotFound, ValueError, OSError)):
        scorecard.take_encoder([str(tmp_path / "mine"), str(tmp_path / "broken")])
    assert not (tmp_path / "broken").exists()


@pytest.mark.slow
def test_a_small_scorecard_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_encoder("mini-clip").save_pretrained(tmp_path / "mine" / "encoder")
    out = tmp_path / "out"
    words = [str(tmp_path / "mine" / "encoder"), "--out", str(out), "--scale", "0.01", "--probes", "false", "--threads", "1"]
    scorecard.main(words)
    shown = " ".join(capsys.readouterr().out.split())
    assert "mini_vqa vqa_accuracy" in shown
    assert set(json.loads((out / "report.json").read_text())["encoders"]) == {"mine"}
    scorecard.main(words)
    assert "complete, kept" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="was made with other settings"):
        scorecard.main([*words, "--seed", "5"])
    shutil.rmtree(out)
    assert load_config(ScorecardConfig, ["--encoders", "mini-clip"]).encoders == ["mini-clip"]
