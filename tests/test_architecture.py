"""The house rules that a reader relies on: arrows point down, scripts stay scripts, file names shadow nobody, every recipe loads."""

import ast
import importlib
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from apps.cli import COMMANDS
from mmkit.config import load_config

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ["mmkit", "encoders", "llm_stage", "apps"]  # a level may import itself and those before it
SOURCES = sorted(path for level in LEVELS for path in (ROOT / level).rglob("*.py"))
RECIPES = sorted(path for level in LEVELS for path in (ROOT / level / "recipes").rglob("*.yaml"))
# Which script a recipe is for stands in its head: "# run  ... encoders/train_uta.py ..." or "# run  mmkit train uta ...".
UTA_ROWS = {  # of the paper's Tables 6 to 9
    "uta_tab6_": ("fd", "mim", "uta", "uta_mim"),
    "uta_tab7_": ("mim", "mim_no_pe", "uta", "uta_no_pe"),
    "uta_tab8_": ("clip_l14", "eva_g14"),
    "uta_tab9_": ("ratio_0", "ratio_04", "ratio_05", "ratio_07", "block", "block_reversed", "random"),
}
UTA_RECIPES = {"mini_uta", "mini_uta_quick", "uta_ablation_b14", "uta_vit_b14", "uta_vit_g14", "uta_vit_l14"}
UTA_RECIPES |= {table + row for table, rows in UTA_ROWS.items() for row in rows}
LLAVA_LLMS = ("", "llama3_", "qwen_", "smollm2_")  # Vicuna first
LLAVA_RECIPES = {
    f"llava_{version}_{llm}{stage}"
    for version in ("v1", "v15")
    for llm in LLAVA_LLMS
    for stage in ("stage1", "stage2", "stage2_lora", "stage2_qlora")
}
EXPECTED_RECIPES = {
    "encoders": UTA_RECIPES
    | {"contrastive_uta_b16", "contrastive_uta_g14", "contrastive_uta_l14", "mini_clip", "mini_contrastive_uta"}
    | {"ftclip_b16_224", "ftclip_b16_384", "ftclip_l14_224", "ftclip_l14_336", "mini_ftclip"}
    | {f"{prefix}visft_{part}" for prefix in ("", "mini_") for part in ("detection", "segmentation", "panoptic", "pose", "caption")}
    | {"mini_visft_lora", "visft_lora_e", "visft_lora_g"},
    "llm_stage": LLAVA_RECIPES
    | {"llava_v15_stage2_tiles"}
    | {"mini_llm", "mini_stage1", "mini_stage2", "smollm2_stage1", "smollm2_stage2"}
    | {"mini_qformer", "qformer_stage1", "qformer_calibrate", "mini_blip2", "smollm2_blip2", "blip2_stage2", "blip2_vqa"},
}


def module_of(path: Path) -> str:
    """`mmkit/minidata/build.py` -> `mmkit.minidata.build`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_script(module: str) -> bool:
    """Scripts are `train_*` and `eval_*`."""
    return module.rsplit(".", 1)[-1].startswith(("train_", "eval_"))


def imports(path: Path, everywhere: bool = True) -> Iterator[tuple[str, int]]:
    """Modules that a file imports, with the line: also inside functions, where most cheating happens.

    `from package import name` counts as `package` and as `package.name`, since name may be a module.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; scripts run as files have no parent package"
            assert node.module is not None
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def violations(path: Path, module: str) -> list[str]:
    """What a file imports that it must not."""
    level, found = LEVELS.index(module.split(".")[0]), []
    for name, line in imports(path):
        top = name.split(".")[0]
        if top not in LEVELS:
            if top == "tests":
                found.append(f"{path}:{line}: imports the tests")
            continue
        if LEVELS.index(top) > level:
            found.append(f"{path}:{line}: {LEVELS[level]} imports {name}, and arrows go down")
        parent, leaf = name.rpartition(".")[0], name.rsplit(".", 1)[-1]
        script = is_script(name) and (ROOT / (name.replace(".", "/") + ".py")).is_file() and bool(leaf) and bool(parent)
        if script and LEVELS[level] != "apps":
            found.append(f"{path}:{line}: imports the script {name}; what two scripts share belongs in a library file")
    return found


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 30
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(LEVELS)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_arrows_go_down_and_nobody_imports_a_script(path: Path) -> None:
    assert violations(path, module_of(path)) == []


def test_an_arrow_that_climbs_is_seen(tmp_path: Path) -> None:
    climbing = tmp_path / "climbing.py"
    climbing.write_text("def f():\n    from encoders.modeling import VisionEncoder\n    import llm_stage.train_llava\n")
    assert len(violations(climbing, "mmkit.climbing")) == 4  # both names of the first import, and the second one for arrow and script
    assert violations(climbing, "llm_stage.climbing") == [
        f"{climbing}:3: imports the script llm_stage.train_llava; what two scripts share belongs in a library file"
    ]


def test_apps_import_scripts_only_when_asked() -> None:
    eager = [
        name for path in SOURCES if module_of(path).startswith("apps") for name, _ in imports(path, everywhere=False) if is_script(name)
    ]
    assert eager == []


def test_no_file_of_ours_bears_the_name_of_an_installed_package() -> None:
    """`deepspeed llm_stage/train_llava.py` puts llm_stage/ first on sys.path: a `datasets.py` there would be everybody's `import datasets`."""
    ours = {path.stem if path.name != "__init__.py" else path.parent.name for path in SOURCES if path.parent.name in LEVELS} - {
        "__init__",
        *LEVELS,
    }
    taken = (
        set(metadata.packages_distributions()) | set(sys.stdlib_module_names) | {"datasets", "tokenizers", "evaluate", "accelerate", "peft"}
    )
    assert sorted(ours & taken) == []


def test_every_script_has_a_main_and_does_nothing_on_import() -> None:
    scripts = [path for path in SOURCES if is_script(module_of(path))]
    assert len(scripts) >= 6
    for path in scripts:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        assert len(mains) == 1, f"{path} has no main"
        assert ast.unparse(mains[0].returns or ast.Constant(None)) == "Path", f"{path}: main gives its folder back"
        work = [node for node in tree.body if isinstance(node, ast.For | ast.While | ast.With)]
        work += [
            node
            for node in tree.body
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not ast.unparse(node).startswith("sys.path")
        ]
        assert work == [], f"{path}: line {work[0].lineno} runs on import"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_leads_to_a_function(name: str) -> None:
    module, function = COMMANDS[name].target.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_recipe_is_found() -> None:
    """Counted by name: a moved folder fails here instead of testing nothing."""
    found = {level: {path.stem for path in RECIPES if path.relative_to(ROOT).parts[0] == level} for level in EXPECTED_RECIPES}
    assert found == EXPECTED_RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_into_the_settings_of_the_script_it_names(path: Path) -> None:
    head = path.read_text(encoding="utf-8")
    level = path.relative_to(ROOT).parts[0]
    named = {
        script.stem
        for script in (ROOT / level).glob("train_*.py")
        if script.name in head or f"mmkit train {script.stem.removeprefix('train_')}" in head
    }
    assert len(named) == 1, f"the head of {path.name} should name the one script it is for, on its `run` line; found {sorted(named)}"
    module = importlib.import_module(f"{level}.{named.pop()}")
    settings = [
        value
        for value in vars(module).values()
        if is_dataclass(value) and isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "run")
    ]
    settings = settings or [
        value for value in vars(module).values() if is_dataclass(value) and "run" in getattr(value, "__dataclass_fields__", {})
    ]
    assert len(settings) == 1, f"{module.__name__} has {len(settings)} dataclasses with a `run` field"
    load_config(settings[0], ["--recipe", str(path)])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_the_command_that_runs_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert any(line.startswith("# run") for line in text.splitlines()), f"{path.name}: a recipe's head is its manual"
    assert isinstance(yaml.safe_load(text), dict)
