"""Strict configuration: frozen dataclasses built from flat parameters, where an unknown key is an error."""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the valid name nearest to `name`, or "" when none is near."""
    names = list(valid)
    lower = {candidate.lower(): candidate for candidate in names}
    match = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.6)
    return f", did you mean '{lower[match[0]]}'?" if match else ""


def some(names: Iterable[str], most: int = 12) -> str:
    """List names for a message, separated by commas: the first `most`, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_of(name: str, value: object, valid: Iterable[object]) -> None:
    """Raise ValueError unless `value` is one of `valid`; the message offers the nearest."""
    options = list(valid)
    if value not in options:
        hint = nearest(str(value), [str(option) for option in options])
        raise ValueError(f"{name}={value!r} is not known{hint} Allowed: {', '.join(map(repr, options))}.")


def at_least(name: str, value: float | None, minimum: float, *, above: bool = False) -> None:
    """Raise ValueError unless `value` >= minimum (> when `above`); None, "not given", passes."""
    if value is None:
        return
    if not math.isfinite(value) or value < minimum or (above and value == minimum):
        raise ValueError(
            f"{name}={value!r} is not allowed: give a number {'above' if above else 'of at least'} {minimum}."
        )


def fields_of(cls: type) -> dict[str, object]:
    """Map each field of a dataclass to its default."""
    return {field.name: field.default for field in dataclasses.fields(cls)}


def strict(cls: type, values: Mapping[str, object]):
    """Build dataclass `cls` from a flat mapping.

    Raises:
        ValueError: for a key that is no field (the nearest field is offered) or a value of another type.
    """
    return split(values, cls)[0]


def split(values: Mapping[str, object], *classes: type) -> tuple:
    """Distribute one flat mapping over several dataclasses whose field names do not overlap.

    Raises:
        ValueError: for a key that is a field of none of them, or a value of another type.
    """
    owner = {name: cls for cls in classes for name in fields_of(cls)}
    assert len(owner) == sum(len(fields_of(cls)) for cls in classes), "field names overlap"
    for key in values:
        if key not in owner:
            raise ValueError(f"unknown parameter {key!r}{nearest(key, owner)} Known: {', '.join(sorted(owner))}.")
    built = []
    for cls in classes:
        hints = typing.get_type_hints(cls)
        mine = {key: _typed(key, value, hints[key]) for key, value in values.items() if owner[key] is cls}
        built.append(cls(**mine))
    return tuple(built)


def _typed(name: str, value: object, hint: object) -> object:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    allowed = typing.get_args(hint) if union else (hint,)
    if value is None and type(None) in allowed:
        return None
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool):
        fits = bool in allowed
    else:
        fits = isinstance(value, tuple(kind for kind in allowed if kind is not bool))
    if fits:
        return value
    kinds = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
    hint_text = ""
    if isinstance(value, str) and str not in allowed:
        try:
            float(value)
            hint_text = " (YAML reads 1e-4 as text: write 1.0e-4)"
        except ValueError:
            pass
    raise ValueError(f"{name}={value!r} is of type {type(value).__name__}, but {kinds} is wanted{hint_text}.")


def fingerprint(value: object) -> str:
    """Return the sha256 (hex) of a JSON-able value in canonical form: keys sorted, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
