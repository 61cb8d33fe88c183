"""Settings: a dataclass, over it a YAML recipe, over that the command line. Nothing is ignored.

    python encoders/train_uta.py --recipe mini_uta --run.steps 300 --lr=1e-3 --run.resume

A key is the path of a field (`run.steps`), or the field's own name where only one field in the whole tree bears it (`steps`). A field that
holds a dict takes longer paths (`run.deepspeed.zero_optimization.stage 2`).

A recipe may begin with `base: NAME`: another recipe beside it (or its path), which it changes. What a recipe says of a dict replaces the
base's dict; `model_args.depth: 4` changes one entry of it.
"""

import atexit
import dataclasses
import os
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from mmkit.config_values import coerce, parse
from mmkit.errors import ConfigError, MMKitError

C = TypeVar("C")
LAUNCHER_FLAGS = {"local_rank"}  # the deepspeed launcher puts --local_rank=N before our own flags


@dataclass
class Leaf:
    """One setting: where it sits, what it may be, what it is now and who said so."""

    path: str
    kind: Any
    value: Any
    help: str
    source: str = "default"


def load_config(cls: type[C], argv: Sequence[str] | None = None, *, recipe_dir: Path | None = None, recipe_flag: str = "recipe") -> C:
    """Build the settings of a script from defaults, `--recipe` and flags, in this order.

    Args:
        cls: A dataclass; fields may be dataclasses themselves. Every field has a default. `field(metadata={"help": ...})` documents one.
        argv: The command line without the program's name. None is `sys.argv[1:]`.
        recipe_dir: Where `--recipe NAME` looks for `NAME.yaml`.
        recipe_flag: The flag that names the recipe's file, where "recipe" is a setting itself.

    Returns:
        An instance of `cls`. Its `validate()`, and that of every dataclass inside, has been called, inner ones first.

    Raises:
        ConfigError: An unknown key, a value of the wrong type, an unreadable recipe; the message names the source.
        SystemExit: `--help` was asked for (code 0).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    leaves = _leaves(cls)
    if any(word in ("--help", "-h") for word in argv):
        print(_help(cls, leaves, recipe_dir, recipe_flag))
        raise SystemExit(0)
    flags = _read_flags(argv, cls, leaves, recipe_flag)
    for recipe in [value for key, value in flags if key == recipe_flag and recipe_flag not in leaves]:
        for path, data in read_recipe(find_recipe(str(recipe), recipe_dir), with_base="base" not in leaves):
            for key, value in _flatten(data, leaves, cls, path.name):
                _set(cls, leaves, key, value, path.name)
    for key, value in flags:
        if key != recipe_flag or recipe_flag in leaves:
            _set(cls, leaves, key, value, "command line", from_text=True)
    config = _build(cls, leaves, "")
    _validate(config)
    return config


def find_recipe(name: str, recipe_dir: Path | None) -> Path:
    """Give the file of a recipe, named by its path or by its bare name in `recipe_dir`.

    Raises:
        ConfigError: There is no such file; the message names the nearest recipes.
    """
    candidates = [Path(name)]
    known: list[str] = []
    if recipe_dir is not None:
        candidates += [recipe_dir / name, recipe_dir / f"{name}.yaml"]
        known = sorted(path.stem for path in recipe_dir.glob("*.yaml"))
    for path in candidates:
        if path.is_file():
            return path
    near = get_close_matches(Path(name).stem, known, n=3, cutoff=0.4) or known
    raise ConfigError(f"--recipe {name}: no such file, and no recipe of that name; nearest: {', '.join(near) or 'none'}")


def read_recipe(path: Path, with_base: bool = True) -> list[tuple[Path, dict[str, Any]]]:
    """Read a recipe and those that it is based on, each as (file, its own settings), the base of all first.

    Args:
        path: The recipe's file.
        with_base: Follow `base`; False takes it for a setting like others.

    Raises:
        ConfigError: A file is no YAML, a base is missing, or recipes are based on each other in a circle.
    """
    chain: list[tuple[Path, dict[str, Any]]] = []
    seen: list[Path] = []
    following: Path | None = path
    while following is not None:
        if following.resolve() in seen:
            raise ConfigError(f"recipe {path}: its bases form a circle, {' -> '.join(file.name for file in [*seen, following])}")
        seen.append(following.resolve())
        data = _read_yaml(following)
        base = data.pop("base", None) if with_base else None
        chain.insert(0, (following, data))
        if base is None:
            return chain
        if not isinstance(base, str):
            raise ConfigError(f"recipe {following}: base is {base!r}; the name or the path of one recipe is right")
        try:
            following = find_recipe(base, following.parent)
        except ConfigError as error:
            raise ConfigError(f"recipe {following}: its base is not there: {str(error).replace('--recipe ', '')}") from error
    return chain


def to_dict(config: Any) -> dict[str, Any]:
    """Turn settings into plain dicts, lists and scalars, as YAML and JSON can hold them."""
    return {item.name: _plain(getattr(config, item.name)) for item in dataclasses.fields(config)}


def save_config(config: Any, path: Path | str) -> None:
    """Write settings as YAML, defaults included, so that `--recipe PATH` gives the same settings again."""
    from mmkit.checkpoint import atomic_write

    atomic_write(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def cli_entry(main: Callable[[], Any]) -> NoReturn:
    """Run a script's `main` and leave the process: 0, 130 after Ctrl-C, or 2 with `error: ...` for what a user can put right.

    Set `MMKIT_TRACEBACK=1` to see where an error came from. Other exceptions are bugs and keep their traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        _leave(130)
    except (MMKitError, ValueError, LookupError, OSError) as error:
        if os.environ.get("MMKIT_TRACEBACK", "") not in ("", "0"):
            traceback.print_exc()
        # A bare KeyError says only 'x'; its type is the better half of the message.
        name = f"{type(error).__name__}: " if isinstance(error, KeyError | IndexError) else ""
        print(f"error: {name}{error}", *getattr(error, "__notes__", ()), sep="\n  ", file=sys.stderr)
        _leave(2)
    _leave(0)


def _leave(code: int) -> NoReturn:
    """End the process. A rank under gloo does so in order and at once: what is left of its threads may abort it (SIGABRT) while the
    interpreter is taken down, when all is done and written. NCCL's group would wait for collectives that never come, and is left alone.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
        atexit._run_exitfuncs()  # what libraries want done at the end (trackers, temporary folders) still is
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# ---- the tree of fields ------------------------------------------------------------------------------------------------------------------


def _leaves(cls: Any, prefix: str = "", defaults: Any = None) -> dict[str, Leaf]:
    """List all settings of a dataclass by path; `defaults` is the instance that a default_factory of the parent made."""
    hints = get_type_hints(cls)
    defaults = cls() if defaults is None else defaults
    leaves: dict[str, Leaf] = {}
    for item in dataclasses.fields(cls):
        path, value, kind = prefix + item.name, getattr(defaults, item.name), hints[item.name]
        if dataclasses.is_dataclass(kind):
            leaves.update(_leaves(kind, path + ".", value))
        else:
            leaves[path] = Leaf(path, kind, value, str(item.metadata.get("help", "")))
    return leaves


def _build(cls: Any, leaves: Mapping[str, Leaf], prefix: str) -> Any:
    hints = get_type_hints(cls)
    return cls(
        **{
            item.name: _build(hints[item.name], leaves, f"{prefix}{item.name}.")
            if dataclasses.is_dataclass(hints[item.name])
            else leaves[prefix + item.name].value
            for item in dataclasses.fields(cls)
        }
    )


def _validate(config: Any) -> None:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            _validate(value)
    if hasattr(config, "validate"):
        config.validate()


def _resolve(cls: Any, leaves: Mapping[str, Leaf], key: str, source: str) -> tuple[Leaf, list[str]]:
    """Find the field that a key means, and what of the key reaches into that field's dict.

    Raises:
        ConfigError: No field, or more than one.
    """
    key = key.replace("-", "_") if key.replace("-", "_") in leaves or "." not in key else key
    if key in leaves:
        return leaves[key], []
    same = [leaf for path, leaf in leaves.items() if path.rsplit(".", 1)[-1] == key]
    if len(same) == 1:
        return same[0], []
    if same:
        raise ConfigError(f"'{key}' ({source}) may mean {' or '.join(leaf.path for leaf in same)}: write the whole path")
    parts = key.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:cut])
        inner = [leaf for path, leaf in leaves.items() if (path == head or path.rsplit(".", 1)[-1] == head) and _holds_dict(leaf.kind)]
        if len(inner) == 1:
            return inner[0], parts[cut:]
    names = {path: leaf for path, leaf in leaves.items()} | {path.rsplit(".", 1)[-1]: leaf for path, leaf in leaves.items()}
    near = get_close_matches(key, names, n=1, cutoff=0.5) or get_close_matches(parts[-1], names, n=1, cutoff=0.5)
    hint = "--help shows all"
    if near:
        leaf = names[near[0]]
        hint = f"nearest: {leaf.path}, now {leaf.value!r} ({leaf.source})"
    raise ConfigError(f"{cls.__name__} has no '{key}' ({source}); {hint}")


def _holds_dict(kind: Any) -> bool:
    return (
        kind is dict
        or get_origin(kind) is dict
        or any(_holds_dict(part) for part in get_args(kind) if get_origin(kind) in (Union, types.UnionType))
    )


def _set(cls: Any, leaves: dict[str, Leaf], key: str, value: Any, source: str, from_text: bool = False) -> None:
    leaf, inside = _resolve(cls, leaves, key, source)
    if inside:
        merged: dict[str, Any] = _plain(leaf.value) if isinstance(leaf.value, dict) else {}
        place = merged
        for part in inside[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"'{key}' ({source}): {leaf.path} holds {place!r} at '{part}', which has no parts")
        place[inside[-1]] = parse(value) if from_text else value
        leaf.value = merged
    else:
        leaf.value = coerce(value, leaf.kind, f"{leaf.path} ({source})", from_text)
    leaf.source = source


# ---- sources -----------------------------------------------------------------------------------------------------------------------------


def _read_flags(argv: Sequence[str], cls: Any, leaves: Mapping[str, Leaf], recipe_flag: str) -> list[tuple[str, Any]]:
    """Split `--key value`, `--key=value` and bare `--flag` into pairs; values stay text."""
    flags: list[tuple[str, Any]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"'{word}' (command line) belongs to no flag: settings are given as --key value; --help shows all")
        key, equals, value = word[2:].partition("=")
        if key.replace("-", "_") in LAUNCHER_FLAGS:
            if not equals and words:
                words.pop(0)
            continue
        if not equals:
            bool_flag = key != recipe_flag and _takes_bool(key, cls, leaves)
            follows = bool(words) and not words[0].startswith("--")
            if bool_flag and not (follows and words[0].lower() in ("true", "false", "1", "0", "yes", "no")):
                value = "true"
            elif follows:
                value = words.pop(0)
            elif bool_flag is None:
                value = "true"
            else:
                raise ConfigError(f"--{key} (command line) has no value")
        flags.append((key, value))
    return flags


def _takes_bool(key: str, cls: Any, leaves: Mapping[str, Leaf]) -> bool | None:
    """Tell whether a flag may stand alone. None is an unknown key: `_set` refuses it, when the recipe has been read too."""
    try:
        leaf, inside = _resolve(cls, leaves, key, "command line")
    except ConfigError:
        return None
    return not inside and (leaf.kind is bool or bool in get_args(leaf.kind))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {path} holds a {type(data).__name__}, not `key: value` lines")
    return data


def _flatten(data: Mapping[Any, Any], leaves: Mapping[str, Leaf], cls: Any, source: str, prefix: str = "") -> list[tuple[str, Any]]:
    """Turn nested YAML into (path, value) pairs; a dict that belongs to one field stays whole."""
    pairs: list[tuple[str, Any]] = []
    for key, value in data.items():
        path = f"{prefix}{key}"
        if any(known.startswith(path + ".") for known in leaves):
            if not isinstance(value, dict):
                raise ConfigError(f"'{path}' ({source}) is a group of settings, not the value {value!r}")
            pairs += _flatten(value, leaves, cls, source, path + ".")
        else:
            pairs.append((path, value))
    return pairs


# ---- out again --------------------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key) if isinstance(key, Path) else key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _help(cls: Any, leaves: Mapping[str, Leaf], recipe_dir: Path | None, recipe_flag: str) -> str:
    lines = [(cls.__doc__ or cls.__name__).strip(), "", f"  --{recipe_flag} FILE_OR_NAME"]
    if recipe_dir is not None and recipe_dir.is_dir():
        lines.append(f"      a YAML file with any of these; here: {', '.join(sorted(path.stem for path in recipe_dir.glob('*.yaml')))}")
    for leaf in leaves.values():
        kind = getattr(leaf.kind, "__name__", str(leaf.kind)) if not get_args(leaf.kind) else str(leaf.kind)
        lines.append(f"  --{leaf.path} {kind.replace('typing.', '')} = {leaf.value!r}")
        if leaf.help:
            lines.append(f"      {leaf.help}")
    return "\n".join(lines)
