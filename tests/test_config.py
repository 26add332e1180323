"""Strict configuration: unknown keys, types, and names near to a misspelt one."""

from dataclasses import dataclass

import pytest

from softvq_lib.config import at_least, fields_of, fingerprint, nearest, one_of, split, strict


@dataclass(frozen=True)
class Model:
    tokens: int = 4
    rate: float = 0.1
    name: str | None = None
    fast: bool = False


@dataclass(frozen=True)
class Data:
    folder: str = "here"


def test_split_distributes_and_keeps_defaults():
    assert split({"tokens": 8, "folder": "there"}, Model, Data) == (Model(tokens=8), Data("there"))
    assert fields_of(Model) == {"tokens": 4, "rate": 0.1, "name": None, "fast": False}


def test_whole_numbers_pass_as_floats_only():
    assert strict(Model, {"rate": 1}).rate == 1.0
    for bad in ({"tokens": 1.0}, {"tokens": True}, {"rate": True}, {"fast": 1}, {"name": 3}, {"tokens": None}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            strict(Model, bad)


def test_unknown_key_offers_the_nearest():
    with pytest.raises(ValueError, match="'foldr', did you mean 'folder'"):
        split({"foldr": "x"}, Model, Data)


def test_yaml_number_that_became_text_is_explained():
    with pytest.raises(ValueError, match=r"rate='1e-4'.*1\.0e-4"):
        strict(Model, {"rate": "1e-4"})


def test_helpers():
    assert nearest("TOKEN", ["tokens", "dim"]) == ", did you mean 'tokens'?"
    assert nearest("zzz", ["tokens", "dim"]) == ""
    with pytest.raises(ValueError, match="mode='a'.*'b', 'c'"):
        one_of("mode", "a", ["b", "c"])
    at_least("x", None, 1)
    at_least("x", 1, 1)
    for bad in (0, float("nan"), float("inf"), -1):
        with pytest.raises(ValueError, match="x="):
            at_least("x", bad, 1)
    with pytest.raises(ValueError, match="above 0"):
        at_least("x", 0, 0, above=True)


def test_fingerprint_ignores_the_order_of_keys():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
    assert len(fingerprint({})) == 64
