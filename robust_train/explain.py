"""Errors in one readable line: what is wrong, where, and the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import Container, DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

# errors of programs, whose text alone says little
BARE = (KeyError, IndexError, TypeError, AttributeError, AssertionError, ImportError, OSError)


def in_one_line(error: object) -> str:
    """An error's text, with its kind where the text alone says little."""
    text = " ".join(re.sub(r"^\s*(full_key|object_type|reference_type)[:=].*$", "", str(error), flags=re.M).split())
    if isinstance(error, BARE):
        return f"{type(error).__name__}: {text}".removesuffix(": ")
    return text or type(error).__name__


def shortened(text: str, most: int = 500) -> str:
    """A message of at most ``most`` characters; of a long one first the long words lose their middle."""
    if len(text) > most:
        text = re.sub(r"\S{80,}", lambda found: f"{found[0][:40]}…{found[0][-20:]}", text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def hint(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest of the known names, or nothing."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def explained(error: HydraException | OmegaConfBaseException, keys: Callable[[], Iterable[str]] = lambda: ()) -> str:
    """Why Hydra could not compose a config, in one line with the key, the value and the nearest valid name.

    Args:
        error: what Hydra or OmegaConf raised.
        keys: gives the dotted keys that there are; called only where one was not found.
    """
    text = str(error)
    if isinstance(error, MissingConfigException) and (found := re.search(r"Could not find '(.*?)'", text)):
        group, _, option = found[1].rpartition("/")
        options = list(error.options or [])
        listed = f"; available: {', '.join(options)}" if options else ""
        return f"{group or 'config'}: there is no {option!r}{hint(option, options)}{listed}"
    if found := re.search(r"Could not (?:override|delete from config|delete)[. ]*'([^']*)'", text):
        key = found[1]
        reason = in_one_line(error.__cause__) if error.__cause__ is not None else ""
        if reason and "is not in struct" not in reason and "No match in the defaults list" not in text:
            return f"{key}: {reason}"
        key = getattr(error.__cause__, "full_key", None) or key  # of a group of settings, the one that is not there
        known = list(keys())
        if key in known:
            return f"{key}: cannot be changed or left out in this way; set what is in it, or write ++{key}=…"
        return f"{key}: there is no such setting{hint(key, known)}; to add one that is missing here write +{key}=…"
    if isinstance(error, OverrideParseException):
        return not_an_override(error.override)
    if found := re.search(r"Error parsing override '(.*?)'\n", text, re.DOTALL):
        return not_an_override(found[1])
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {in_one_line(error)}"
    return in_one_line(error)


def not_an_override(word: str) -> str:
    """What to say of a word that is no override."""
    return f"{in_one_line(word)}: not of the form key=value; quote what has spaces, commas or brackets in it"


def dotted_keys(node: Container, prefix: str = "") -> list[str]:
    """The names of all settings below a config node, such as ``threat.eps``."""
    if isinstance(node, ListConfig) or not isinstance(node, DictConfig) or node._is_none() or node._is_interpolation():
        return []
    found: list[str] = []
    for name in node:
        key = f"{prefix}{name}"
        found.append(key)
        child = node._get_node(name)
        if isinstance(child, DictConfig):
            found += dotted_keys(child, f"{key}.")
    return found
