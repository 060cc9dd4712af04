"""Checks of settings that several callbacks share."""

from __future__ import annotations

from typing import Any

LARGEST = 2**63 - 1


def check_places(callback: str, **settings: Any) -> None:
    """Refuse what says of no part of a batch where it is.

    Args:
        callback: the callback's name in messages.
        settings: by name: an index, a name or a dotted path, or None.

    Raises:
        ValueError: one is something else.
    """
    for name, value in settings.items():
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            continue
        if not isinstance(value, str) or not value:
            raise ValueError(f"{callback}.{name} must be an index, a name or a dotted path, or null, got {value!r}")


def check_one_place(callback: str, inputs: Any, layer: Any) -> None:
    """Refuse two answers to the question what is attacked.

    Raises:
        ValueError: both are given.
    """
    if inputs is not None and layer is not None:
        raise ValueError(
            f"{callback}.inputs and {callback}.layer: either a part of the batch is attacked or the output of a layer; "
            "leave one of them out"
        )


def check_name(callback: str, name: Any) -> None:
    """Refuse what is no text, which may be empty.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(name, str):
        raise ValueError(f"{callback}.name must be a text, got {name!r}")


def check_texts(callback: str, **settings: Any) -> None:
    """Refuse what is neither None nor a text that is not empty, such as the name of a submodule or a file's path.

    Raises:
        ValueError: one is something else.
    """
    for name, value in settings.items():
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError(f"{callback}.{name} must be a name or path, or null, got {value!r}")


def check_switches(callback: str, **settings: Any) -> None:
    """Refuse what is neither True nor False: a text such as "no" would count as True.

    Raises:
        ValueError: one is something else.
    """
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise ValueError(f"{callback}.{name} must be true or false, got {value!r}")


def check_counts(callback: str, least: int, **settings: Any) -> None:
    """Refuse what is no whole number >= ``least``.

    Raises:
        ValueError: one is something else.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise ValueError(f"{callback}.{name} must be a whole number >= {least}, got {value!r}")


def refuse_beside(trainer: Any, other: str, who: str, why: str) -> None:
    """Refuse a callback of ours in the same Trainer.

    Args:
        trainer: whose callbacks.
        other: the other one's class, by name, so that nothing has to be imported for it.
        who: the one that refuses.
        why: what is wrong, and what to do instead.

    Raises:
        ValueError: it is there.
    """
    if any(cls.__name__ == other for callback in trainer.callbacks for cls in type(callback).__mro__):
        raise ValueError(f"{who} cannot stand beside {other}: {why}")
