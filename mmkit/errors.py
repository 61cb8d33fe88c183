"""The errors that mmkit raises for its users, and the one way to look up a name.

Each message says what was given and where it came from, what would be right, and what to do. Scripts print them without a traceback
(`mmkit.config.cli_entry`).
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class MMKitError(Exception):
    """Anything a user can put right: settings, data, files, names."""


class DataError(MMKitError, ValueError):
    """A record, an image or a weight file is not what it should be."""


class ConfigError(MMKitError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class TrainingError(MMKitError, ValueError):
    """The training cannot go on: a loss, a term or a gradient is not finite."""


class NameNotFound(MMKitError, LookupError):
    """A name is in no table. A LookupError, since KeyError prints its message in quotes."""


def find(kind: str, table: Mapping[str, T], name: str) -> T:
    """Look a name up exactly; a miss names its nearest neighbours.

    Args:
        kind: What the table holds, in the singular, for the message ("encoder", "benchmark").
        table: The names and what they stand for.
        name: The name asked for.

    Raises:
        NameNotFound: The table has no such name.
    """
    if name in table:
        return table[name]
    near = get_close_matches(name, table, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(sorted(table)[:12])}{', ...' if len(table) > 12 else ''}"
    raise NameNotFound(f"no {kind} named '{name}'; {hint} ({len(table)} in all)")
