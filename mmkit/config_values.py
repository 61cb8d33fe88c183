"""Values of settings: what text and YAML mean for a type, and what does not fit it."""

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from mmkit.errors import ConfigError

NONE_WORDS = {"none", "null", "~"}


def coerce(value: Any, kind: Any, where: str, from_text: bool = False) -> Any:
    """Check a value against a type and convert what is surely meant ("3" for an int, 3 for a float, a list's items one by one).

    Args:
        value: From YAML, or text from the command line (`from_text`).
        kind: bool, int, float, str, Path, list[T], tuple[T, ...], dict[K, V], Literal, Optional, Union or Any.
        where: The setting and its source, for the message.

    Raises:
        ConfigError: The value does not fit.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return parse(value) if from_text else value
    if origin in (Union, types.UnionType):
        return _coerce_union(value, args, where, from_text)
    if origin is Literal:
        for choice in args:
            if (value == choice and type(value) is type(choice)) or (isinstance(value, str) and value == str(choice)):
                return choice
        raise ConfigError(f"{where} is {value!r}; it may be {', '.join(str(choice) for choice in args)}")
    if kind in (str, Path):
        if isinstance(value, str | Path):
            return str(value) if kind is str else Path(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and kind is str:
            return str(value)  # YAML reads an unquoted 224 as a number
        raise _wrong(value, kind, where)
    if kind is bool:
        return _coerce_bool(value, where)
    if kind in (int, float):
        return _coerce_number(value, kind, where)
    if kind in (list, tuple, dict) or origin in (list, tuple, dict):
        return _coerce_container(value, origin or kind, args, where, from_text)
    raise ConfigError(f"{where}: settings of type {kind} cannot be read from text")


def _coerce_union(value: Any, kinds: tuple[Any, ...], where: str, from_text: bool) -> Any:
    if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in NONE_WORDS)):
        return None
    parsed = parse(value) if from_text else value
    rest = [kind for kind in kinds if kind is not type(None)]
    for kind in rest:  # first the member that the value already is, so that {"a": 1} is a dict in dict | str
        plain = get_origin(kind) or kind
        if isinstance(plain, type) and type(parsed) is plain:
            return coerce(parsed, kind, where)
    for kind in rest:
        try:
            return coerce(value, kind, where, from_text)
        except ConfigError:
            continue
    raise ConfigError(f"{where} is {value!r}; it may be {' or '.join(_name(kind) for kind in kinds)}")


def _coerce_bool(value: Any, where: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise _wrong(value, bool, where)


def _coerce_number(value: Any, kind: Any, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _wrong(value, kind, where)
    try:
        number = float(value)  # also for text like 1e-3, which YAML 1.1 leaves as text
    except ValueError:
        raise _wrong(value, kind, where) from None
    if kind is float:
        return number
    if not number.is_integer():
        raise _wrong(value, kind, where)
    exact = isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdigit())
    return int(value) if exact else int(number)  # a float holds whole numbers up to 2^53 only


def _coerce_container(value: Any, kind: Any, args: tuple[Any, ...], where: str, from_text: bool) -> Any:
    if from_text:
        parsed = parse(value)
        if kind is not dict and not isinstance(parsed, list | tuple):  # a,b,c and a single item
            parsed = [] if value == "" else [parse(part.strip()) for part in str(value).split(",")]
        value = parsed
    if kind is dict:
        if not isinstance(value, dict):
            raise _wrong(value, kind, where)
        key_kind, item_kind = args or (Any, Any)
        return {coerce(key, key_kind, where): coerce(item, item_kind, f"{where}, at '{key}',") for key, item in value.items()}
    if not isinstance(value, list | tuple):
        raise _wrong(value, kind, where)
    if kind is tuple and args and Ellipsis not in args:
        if len(value) != len(args):
            raise ConfigError(f"{where} has {len(value)} items, {len(args)} are right: {value!r}")
        kinds: list[Any] = list(args)
    else:
        kinds = [args[0] if args else Any] * len(value)
    return kind(coerce(item, item_kind, f"{where}, item {i},") for i, (item, item_kind) in enumerate(zip(value, kinds, strict=True)))


def parse(text: Any) -> Any:
    """Read text from the command line as YAML would; what is no YAML is plain text."""
    if not isinstance(text, str):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value) if value and value[0] in "+-.0123456789" else value
        except ValueError:
            return value
    return value if isinstance(value, dict | list | int | float | bool) or value is None else text


def _wrong(value: Any, kind: Any, where: str) -> ConfigError:
    return ConfigError(f"{where} is {value!r}; it should be {_name(kind)}")


def _name(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path", list: "a list", dict: "a dict"}
    return words.get(kind, "none" if kind is type(None) else str(getattr(kind, "__name__", kind)))
