"""Errors in one readable line: what is wrong, where, and the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches

from hydra.errors import HydraException, MissingConfigException
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
        if not reason or "is not in struct" in reason or "No match in the defaults list" in text:
            return f"{key}: there is no such setting{hint(key, keys())}; to add one that is missing here write +{key}=…"
        return f"{key}: {reason}"
    if found := re.search(r"Error parsing override '(.*?)'\n", text, re.DOTALL):
        return f"{in_one_line(found[1])}: not of the form key=value; quote what has spaces, commas or brackets in it"
    return in_one_line(error)


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
