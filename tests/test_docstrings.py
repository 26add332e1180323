"""Docstrings of the library's public names: that they exist, and that what they say is what the code has.

Sentences, sections and their form are ruff's (`D` in pyproject.toml). Here is what ruff does not see: a method that
inherits its docstring, arguments of a class, fields of a dataclass, shapes of tensors and arrays, ranges of images.

Each rule is a function that returns a list of complaints, so that it is asked twice: of the library, where the list
must be empty, and of a bad example, where it must not be.
"""

import ast
import importlib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import is_dataclass

import pytest

from repository import ROOT, named

PACKAGE = "softvq_lib"
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in named(".py", PACKAGE)
]
ARRAYS = re.compile(r"\b(?:Tensor|ndarray)\b")
# (b, l, d), (n,), (...) and the like, or words where shapes are not fixed or there is none.
SHAPE = re.compile(r"\((?:[\w.*/+ -]+,)+[\w.*/+ `-]*\)|\(\.\.\.\)|\bscalars?\b|\bshapes?\b", re.I)
RANGE = re.compile(r"\[-1, 1\]|\[0, 1\]|\buint8\b|\bany range\b|`open_pixels`")


def behind(member: object) -> object:
    """The function behind a property, a cached property, a class method or a static method."""
    for name in ("fget", "func", "__func__"):
        member = getattr(member, name, None) or member
    return inspect.unwrap(member) if callable(member) else member


def public(module: types.ModuleType) -> Iterator[tuple[str, object, type | None]]:
    """Functions and classes that a module defines, and their methods with the class; none that begins with _."""
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if isinstance(thing, type):
            yield name, thing, None
            for member, value in vars(thing).items():
                if (not member.startswith("_") or member == "__call__") and inspect.isfunction(behind(value)):
                    yield f"{name}.{member}", behind(value), thing
        elif inspect.isfunction(behind(thing)):
            yield name, behind(thing), None


def text_of(thing: object, owner: type | None) -> str:
    """A docstring; of a method without one, that of the library's method in whose place it stands."""
    chain = (
        [behind(vars(base)[thing.__name__]) for base in owner.__mro__ if thing.__name__ in vars(base)] if owner else []
    )
    ours = [
        method for method in chain if getattr(method, "__module__", "").split(".")[0] == thing.__module__.split(".")[0]
    ]
    text = next((method.__doc__ for method in [thing, *ours] if method.__doc__), "")
    made = isinstance(thing, type) and is_dataclass(thing) and text.startswith(f"{thing.__name__}(")  # by dataclass
    return "" if made else inspect.cleandoc(text)


def documented(text: str, title: str) -> list[str] | None:
    """Names in a section of a docstring in Google's style, None without that section."""
    found = re.search(rf"^{title}:\n((?: .*\n?|\n(?= ))*)", text, re.M)
    lines = re.findall(r"^    (\S[^:\n]*):", found[1], re.M) if found else []
    return [name.strip().lstrip("*") for line in lines for name in line.split(",")] if found else None


def differing(title: str, names: list[str] | None, there: list[str], also: list[str] = ()) -> list[str]:
    """Names that a section lacks, has twice, or has beside those that are there. No section is fine."""
    names = there if names is None else names
    found = [f"{title}: {name} is missing" for name in there if name not in names]
    found += [f"{title}: there is no {name}" for name in names if name not in (*there, *also)]
    return found + [f"{title}: {name} twice" for name in sorted(set(names)) if names.count(name) > 1]


def raises(function: object, error: str = "ValueError") -> bool:
    """Whether a function raises an error itself, where nothing in it catches it; functions inside do not count."""
    todo = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and node.exc and ast.unparse(node.exc).startswith(error):
            return True
        inside = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Try) and any(h.type and error in ast.unparse(h.type) for h in node.handlers):
            inside = [child for child in inside if child not in node.body]
        todo = todo + inside
    return False


def class_problems(kind: type, text: str) -> list[str]:
    """What a class's docstring says of its arguments or fields, against what it has."""
    if is_dataclass(kind):
        own = [name for name in vars(kind).get("__annotations__", {}) if not name.startswith("_")]
        inherited = [name for name in kind.__dataclass_fields__ if name not in own]
        arrays = [name for name in own if ARRAYS.search(str(kind.__annotations__[name]))]
        found = [f"no shape of {', '.join(arrays)}"] if arrays and not SHAPE.search(text) else []
        return found + differing("Attributes", documented(text, "Attributes"), own, inherited)
    if inspect.isfunction(vars(kind).get("__init__")):
        return differing("Args", documented(text, "Args"), list(inspect.signature(kind.__init__).parameters)[1:])
    return []


def function_problems(function: object, text: str) -> list[str]:
    """What a function's docstring says of its arguments, shapes and errors, against what it has."""
    there = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    found = differing("Args", documented(text, "Args"), there) if function.__doc__ else []
    arrays = [name for name, kind in function.__annotations__.items() if ARRAYS.search(str(kind))]
    if arrays and not SHAPE.search(text):
        found.append(f"no shape of {', '.join(arrays)}")
    if "images" in arrays and not RANGE.search(text):
        found.append("no range of images")
    if raises(function) and "ValueError" not in text:
        found.append("raises ValueError and does not say so")
    return found


def problems(module: types.ModuleType) -> list[str]:
    """What the docstrings of a module's public names lack."""
    found = []
    for name, thing, owner in public(module):
        text = text_of(thing, owner)
        judged = class_problems(thing, text) if isinstance(thing, type) else function_problems(thing, text)
        found += [f"{name}: {problem}" for problem in (judged if text else ["no docstring"])]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented_as_they_are(module):
    assert not problems(importlib.import_module(module))


EXAMPLE = '''
from dataclasses import dataclass
from torch import Tensor

class Base:
    """A layer."""
    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, c) to (b, d)."""

class Good(Base):
    """A map.

    Args:
        width: c.
    """
    def __init__(self, width): ...
    def forward(self, x: Tensor) -> Tensor: ...

class Bad(Base):
    """A map.

    Args:
        height: Of what.
        depth: Of what.
    """
    def __init__(self, width, depth): ...
    def backward(self, x: Tensor) -> Tensor:
        """Go back."""
    @property
    def size(self): ...

@dataclass
class Fields:
    """Some.

    Attributes:
        here: A number.
        images: Pictures.
    """
    here: int
    gone: int
    images: Tensor

@dataclass
class Silent:
    here: int

def caught(x):
    """Try."""
    try:
        raise ValueError
    except ValueError:
        pass

def raising(images: Tensor, *rest, **options):
    """Take images (b, 3, height, width).

    Args:
        images: (b, 3, height, width).
        rest: More.
        rest, options: Still more.
    """
    if rest:
        raise ValueError("no")

def _private(x): ...
'''


@pytest.fixture
def example(tmp_path, monkeypatch):
    (tmp_path / "example_of_docstrings.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("example_of_docstrings")


def test_bad_docstrings_are_noticed_and_good_ones_not(example):
    assert problems(example) == [
        "Bad: Args: width is missing",
        "Bad: Args: there is no height",
        "Bad.backward: no shape of x, return",
        "Bad.size: no docstring",
        "Fields: no shape of images",
        "Fields: Attributes: gone is missing",
        "Silent: no docstring",
        "raising: Args: rest twice",
        "raising: no range of images",
        "raising: raises ValueError and does not say so",
    ]


def test_every_module_is_looked_at():
    assert len(MODULES) > 100 and {"softvq_lib", "softvq_lib.tokenizers.softvq", "softvq_lib.losses"} <= set(MODULES)
    names = [name for name, _, _ in public(importlib.import_module("softvq_lib.tokenizers.tokenizer"))]
    assert {"Tokenizer", "Tokenizer.encode", "Tokenizer.from_preset", "Code.posterior"} <= set(names)
