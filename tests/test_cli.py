"""`mmkit ...`: help is quick and complete, a typo is answered with the nearest command, exit codes tell what happened."""

import subprocess
import sys
from pathlib import Path

import pytest

from apps import cli

ROOT = Path(__file__).resolve().parent.parent


def test_help_names_every_command_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "quickstart" in capsys.readouterr().out


def test_help_of_a_group_names_its_commands_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "train uta" in shown
    assert "eval vqa" not in shown


def test_a_group_without_its_command_shows_the_choice_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval"]) == 2
    assert "eval zeroshot" in capsys.readouterr().out


def test_help_imports_neither_torch_nor_gradio() -> None:
    code = "import sys; from apps.cli import main; main(['--help']); sys.exit(sum(name in sys.modules for name in ('torch', 'gradio', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["quickstrt"], "quickstart"),
        (["train", "utta"], "train uta"),
        (["trian", "uta"], "train uta"),
        (["vqa"], "eval vqa"),
        (["dmeo", "--port", "1"], "demo"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_command(typed: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(typed) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: mmkit has no command")
    assert f"`mmkit {meant}`" in said
    assert "Traceback" not in said


def test_the_words_after_a_command_reach_its_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text("seen = []\ndef main(argv):\n    seen.extend(argv)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "train told", cli.Command("told:main", ""))
    assert cli.main(["train", "told", "--steps", "3", "--lr=1e-3"]) == 0
    import told  # type: ignore[import-not-found]

    assert told.seen == ["--steps", "3", "--lr=1e-3"]


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("ValueError('the scale is 0')", 2, "error: the scale is 0"),
        ("FileNotFoundError(2, 'no such file', 'a.json')", 2, "a.json"),
        ("KeyboardInterrupt()", 130, ""),
        ("SystemExit(130)", 130, ""),
        ("SystemExit(3)", 3, ""),
    ],
)
def test_exit_codes(
    raised: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"raises_{abs(hash(raised))}"
    (tmp_path / f"{name}.py").write_text(f"def main(argv):\n    raise {raised}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "raises", cli.Command(f"{name}:main", ""))
    assert cli.main(["raises"]) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


def test_a_fault_of_the_kit_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text("def main(argv):\n    raise RuntimeError('ours')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "faulty", cli.Command("faulty:main", ""))
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["faulty"])


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mmkit ")


@pytest.mark.parametrize(
    ("what", "expected"), [("encoders", "mini-clip"), ("llms", "mini-llm"), ("recipes", "mini_stage1"), ("benchmarks", "textvqa_ocr")]
)
def test_lists_show_what_can_be_named(what: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", what]) == 0
    assert expected in capsys.readouterr().out


def test_a_list_that_is_not_there_names_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "encoder"]) == 2
    assert "encoders" in capsys.readouterr().err


def test_every_listed_recipe_says_what_it_is_for_and_not_how_it_is_started() -> None:
    """A list of recipes is read to choose one; the command to start it stands in its file."""
    from apps.listing import HEAD_WORDS, from_files

    rows = from_files("recipes")[1] + from_files("sweeps")[1]
    assert len(rows) > 60
    assert [name for name, text in rows if len(text) < 20 or text.split()[0] in HEAD_WORDS] == []
