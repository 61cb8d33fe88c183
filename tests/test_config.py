from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.config import cli_entry, load_config, save_config, to_dict
from mmkit.errors import ConfigError, DataError, NameNotFound, find


@dataclass
class Inner:
    """A group."""

    size: int = 224
    rate: float = 0.5
    kind: Literal["crop", "pad"] = "crop"
    flip: bool = False


@dataclass
class Outer:
    """What this script does."""

    keep_ratio: float = field(default=0.6, metadata={"help": "share of patches kept"})
    name: str = ""
    folder: Path = Path("data")
    data: Inner = field(default_factory=Inner)
    validation: Inner = field(default_factory=lambda: Inner(size=448))
    table: dict[str, Any] = field(default_factory=dict)
    block: dict[str, Any] | str = field(default_factory=dict)
    limit: int | None = None
    words: list[str] = field(default_factory=list)
    sizes: tuple[int, int] = (3, 4)
    steps: int = 10

    def validate(self) -> None:
        if self.keep_ratio > 1:
            raise ConfigError(f"keep_ratio is {self.keep_ratio}; at most 1 is right")


def test_flags_go_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("keep_ratio: 0.4\ndata: {size: 96, rate: 1e-3}\nsteps: 7\n")
    config = load_config(Outer, ["--recipe", "small", "--data.size", "64", "--name=x=y"], recipe_dir=tmp_path)
    assert (config.keep_ratio, config.data.size, config.data.rate, config.steps, config.name) == (0.4, 64, 0.001, 7, "x=y")
    assert config.validation.size == 448


def test_a_name_that_is_unique_needs_no_path() -> None:
    assert load_config(Outer, ["--steps", "3"]).steps == 3
    with pytest.raises(ConfigError, match=r"may mean data.size or validation.size"):
        load_config(Outer, ["--size", "3"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep_ration", "0.5"], r"Outer has no 'keep_ration' \(command line\); nearest: keep_ratio, now 0.6 \(default\)"),
        (["--data.siz", "3"], r"no 'data.siz' \(command line\); nearest: data.size, now 224"),
        (["--steps", "many"], r"steps \(command line\) is 'many'; it should be a whole number"),
        (["--steps", "3.5"], "should be a whole number"),
        (["--data.kind", "squash"], r"data.kind \(command line\) is 'squash'; it may be crop, pad"),
        (["--data.flip", "maybe"], "belongs to no flag|should be true or false"),
        (["--steps"], "--steps .* has no value"),
        (["loose"], "'loose' .* belongs to no flag"),
        (["--sizes", "[1, 2, 3]"], "has 3 items, 2 are right"),
        (["--keep_ratio", "2"], "keep_ratio is 2.0; at most 1 is right"),
        (["--recipe", "smal"], "nearest: small"),
    ],
)
def test_a_wrong_flag_names_itself_and_what_is_right(tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "small.yaml").write_text("steps: 7\n")
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, flags, recipe_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep_ration: 1", r"no 'keep_ration' \(r.yaml\)"),
        ("steps: true", r"steps \(r.yaml\) is True"),
        ("data: 3", r"'data' \(r.yaml\) is a group of settings"),
        ("- a", "holds a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_recipe_names_its_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, ["--recipe", str(tmp_path / "r.yaml")])


def test_a_nearest_key_shows_the_value_and_source_of_now(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("keep_ratio: 0.3")
    with pytest.raises(ConfigError, match=r"keep_ratio, now 0.3 \(r.yaml\)"):
        load_config(Outer, ["--recipe", str(tmp_path / "r.yaml"), "--keep_ration", "1"])


def test_bools_stand_alone_or_with_a_word() -> None:
    assert load_config(Outer, ["--data.flip", "--steps", "2"]).data.flip
    assert not load_config(Outer, ["--data.flip", "False"]).data.flip
    assert load_config(Outer, ["--validation.flip=true"]).validation.flip


def test_launchers_may_add_their_flag() -> None:
    assert load_config(Outer, ["--local_rank=1", "--steps", "2"]).steps == 2
    assert load_config(Outer, ["--local-rank", "0", "--steps", "2"]).steps == 2


def test_containers_come_from_text() -> None:
    config = load_config(
        Outer, ["--words", "a,b", "--sizes", "[5, 6]", "--table.a.b", "1e-3", "--limit", "none", "--block", '{"stage": 2}']
    )
    assert (config.words, config.sizes, config.table, config.limit, config.block) == (
        ["a", "b"],
        (5, 6),
        {"a": {"b": 0.001}},
        None,
        {"stage": 2},
    )
    assert load_config(Outer, ["--block", "zero2.json", "--limit", "-4"]).block == "zero2.json"
    assert load_config(Outer, ["--name", "224"]).name == "224"


def test_parts_of_a_dict_add_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("block: {zero: {stage: 2}, clip: 1}")
    assert load_config(Outer, ["--recipe", str(tmp_path / "r.yaml"), "--block.zero.stage", "3"]).block == {"zero": {"stage": 3}, "clip": 1}


def test_saved_settings_load_as_a_recipe(tmp_path: Path) -> None:
    config = load_config(Outer, ["--words", "a,b", "--table.x", "1", "--data.size", "5", "--folder", "/a/b"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(Outer, ["--recipe", str(tmp_path / "config.yaml")]) == config


@settings(max_examples=25, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False, max_value=1), st.integers(), st.lists(st.text("abcdefg", min_size=1)))
def test_numbers_and_lists_survive_yaml(ratio: float, steps: int, words: list[str]) -> None:
    import tempfile

    config = Outer(keep_ratio=ratio, steps=steps, words=words)
    with tempfile.TemporaryDirectory() as folder:
        save_config(config, f"{folder}/c.yaml")
        assert to_dict(load_config(Outer, ["--recipe", f"{folder}/c.yaml"])) == to_dict(config)


def test_large_whole_numbers_are_exact() -> None:
    assert load_config(Outer, ["--steps", str(2**53 + 1)]).steps == 2**53 + 1


def test_help_lists_fields_defaults_and_their_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_config(Outer, ["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "What this script does." in printed
    assert "--keep_ratio float = 0.6" in printed
    assert "share of patches kept" in printed
    assert "--data.kind Literal['crop', 'pad'] = 'crop'" in printed


def test_cli_entry_prints_the_message_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise DataError("cat.png is truncated")

    with pytest.raises(SystemExit) as stopped:
        cli_entry(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: cat.png is truncated\n"


def test_cli_entry_shows_the_traceback_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMKIT_TRACEBACK", "1")

    def main() -> None:
        raise KeyError("x")

    with pytest.raises(SystemExit):
        cli_entry(main)
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "error: KeyError: 'x'" in printed


def test_cli_entry_leaves_bugs_alone() -> None:
    def main() -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        cli_entry(main)


def test_find_names_the_nearest() -> None:
    with pytest.raises(NameNotFound, match=r"no encoder named 'vit_smal'; nearest: vit_small"):
        find("encoder", {"vit_small": 1, "resnet": 2}, "vit_smal")
    assert find("encoder", {"a": 1}, "a") == 1


# ---- recipes based on recipes -----------------------------------------------------------------------------------------------------------


def write(folder: Path, **recipes: str) -> None:
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_recipe_changes_its_base_and_flags_change_both(tmp_path: Path) -> None:
    write(
        tmp_path,
        first="name: first\ntable: {depth: 2, width: 8}\ndata: {rate: 0.1, size: 5}\n",
        second="base: first\nname: second\ntable.depth: 4\ndata: {size: 6}\n",
        third="base: second\ndata: {size: 7}\n",
        replaces="base: first\ntable: {heads: 3}\n",
    )
    third = load_config(Outer, ["--recipe", "third", "--data.rate", "0.3"], recipe_dir=tmp_path)
    assert (third.name, third.table, third.data) == ("second", {"depth": 4, "width": 8}, Inner(size=7, rate=0.3))
    assert load_config(Outer, ["--recipe", str(tmp_path / "replaces.yaml")]).table == {"heads": 3}


def test_a_base_that_cannot_be_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a="base: b\n", b="base: a\n", lost="base: lostt\n", two="base: [a, b]\n", wrong="base: typo\n", typo="nam: x\n")
    cases = {
        "a": r"a circle, a.yaml -> b.yaml -> a.yaml",
        "lost": r"lost.yaml: its base is not there: lostt: no such file, and no recipe of that name; nearest: lost",
        "two": r"base is \['a', 'b'\]; the name or the path of one recipe",
        "wrong": r"has no 'nam' \(typo.yaml\)",  # the file that says it
    }
    for name, words in cases.items():
        with pytest.raises(ConfigError, match=words):
            load_config(Outer, ["--recipe", name], recipe_dir=tmp_path)
