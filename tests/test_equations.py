"""The paper's equations: each that the library names is in the book under its number, and leads to code that names it.

Each rule is a function that returns a list of complaints, so that it is asked twice: of the repository, where
the list must be empty, and of a bad example, where it must not be.
"""

import importlib
import importlib.util
import re

import pytest

from repository import ROOT, name_of, named

SPEC = importlib.util.spec_from_file_location("library_reference", ROOT / "book/_ext/library_reference.py")
extension = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(extension)

PAGE = (ROOT / "book" / "equations.md").read_text()
LABEL = re.compile(r"\(eq-paper-(\d+)\)")
ROLE = re.compile(r"\{py:(?:class|func|mod)\}`~?(softvq_lib[\w.]+)`")


def named_equations(text: str) -> set[int]:
    """Numbers of the paper's equations that a text names."""
    return {int(n) for match in extension.EQUATION.finditer(text) for n in match.groups()[::2] if n}


def page_problems(page: str, needed: set[int]) -> list[str]:
    """What keeps a page of equations from having the paper's numbers: order, gaps, numbers that are needed."""
    labels = [int(n) for n in LABEL.findall(page)]
    found = [] if labels == list(range(1, len(labels) + 1)) else [f"labels {labels} are not 1, 2, 3 ..."]
    return found + [f"Eq. {n} is named by the library and missing" for n in sorted(needed - set(labels))]


def docstrings_of(name: str) -> str:
    """The docstrings of what a full name stands for, and of its module."""
    try:
        return importlib.import_module(name).__doc__
    except ModuleNotFoundError:
        module, _, thing = name.rpartition(".")
        found = importlib.import_module(module)
        return f"{found.__doc__}\n{getattr(found, thing).__doc__}"


def link_problems(page: str) -> list[str]:
    """Equations that lead to no code, and code whose docstrings do not lead back."""
    parts = re.split(r"^\$\$ \(eq-paper-(\d+)\)$", page, flags=re.M)[1:]
    found = []
    for number, text in zip(parts[::2], parts[1::2], strict=True):
        text = text.partition("\n$$\n")[0]
        names = ROLE.findall(text)
        found += [] if names else [f"Eq. {number} names no code"]
        for name in names:
            if int(number) not in named_equations(docstrings_of(name)):
                found.append(f"Eq. {number} leads to {name}, which does not name it")
    return found


def test_every_equation_that_the_library_names_is_in_the_book():
    needed = {n for path in named(".py", "softvq_lib") for n in named_equations(path.read_text())}
    assert needed == set(range(1, 8))
    assert not page_problems(PAGE, needed)


def test_every_equation_leads_to_code_that_names_it():
    assert not link_problems(PAGE)


def test_no_other_page_has_the_papers_numbers():
    others = [path for path in [*named(".md", "book"), *named(".ipynb", "book")] if path.name != "equations.md"]
    assert not [name_of(path) for path in others if LABEL.search(path.read_text())]


def test_a_bad_page_is_noticed():
    assert page_problems("$$ (eq-paper-2)\n", {1, 2}) == [
        "labels [2] are not 1, 2, 3 ...",
        "Eq. 1 is named by the library and missing",
    ]
    page = PAGE.replace("~softvq_lib.tokenizers.kl.KL", "~softvq_lib.tokenizers.ae.AE")
    assert link_problems(page) == ["Eq. 1 leads to softvq_lib.tokenizers.ae.AE, which does not name it"]
    assert "Eq. 3 names no code" in link_problems(re.sub(r"\{py:class\}`~softvq_lib.generators[^`]*`", "", PAGE))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("(Eq. 4, Sec. 3.2)", {4}),
        ("Sec. 3.3, Eq. 5-6", {5, 6}),
        ("spread (Eq. 5, 6) over", {5, 6}),
        ("Eq. 7 has λ1 to λ4", {7}),
        ("(Wang et al. 2004, Eq. 13)", set()),
        ("(Steiger 1980, Eq. 3)", set()),
        ("Eq. 4.", {4}),
    ],
)
def test_what_counts_as_an_equation_of_the_paper(text, numbers):
    assert named_equations(text) == numbers


def test_docstrings_and_prose_get_links():
    assert extension.linked_equations("as in Eq. 5-6.") == "as in :eq:`eq-paper-5`-:eq:`eq-paper-6`."
    prose = "# Eq. 4\n\nBy Eq. 4, `Eq. 4` and\n\n```python\nEq. 4\n```\n\n$$\n\\text{Eq. 4}\n$$\n"
    assert extension.linked_prose(prose) == prose.replace("By Eq. 4", "By {eq}`eq-paper-4`")


def test_docstrings_become_restructured_text():
    from softvq_lib.losses import alignment

    lines = ["Spread |z| over n_, see `alignment_loss` and `rule`.", "", "| a | b |", "|---|---|", "", "Returns:"]
    lines += ["    one: First,", "        with more.", "    two: Second."]
    assert extension.as_rst(lines, alignment) == [
        "Spread \\|z\\| over n\\_, see \\ :py:obj:`alignment_loss <softvq_lib.losses.alignment.alignment_loss>`\\  "
        "and \\ ``rule``\\ .",
        "",
        "",
        "::",
        "",
        "    | a | b |",
        "    |---|---|",
        "",
        "",
        "Returns:",
        "    These, by name.",
        "",
        "    - one: First,",
        "      with more.",
        "    - two: Second.",
    ]


def api_problems(pages: dict[str, str], modules: set[str]) -> list[str]:
    """Modules that are on no page of the reference, on several, or not there."""
    listed = [name for text in pages.values() for name in re.findall(r"automodule:: (\S+)", text)]
    found = [f"{name}: on no page of book/api" for name in sorted(modules - set(listed))]
    found += [f"{name}: there is no such module" for name in sorted(set(listed) - modules)]
    return found + [f"{name}: {listed.count(name)} times" for name in sorted(set(listed)) if listed.count(name) > 1]


def test_every_module_has_its_place_in_the_reference():
    pages = {path.name: path.read_text() for path in named(".md", "book") if path.parent.name == "api"}
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in named(".py", "softvq_lib")
        if path.stem != "__init__"
    }
    assert not api_problems(pages, modules)
    contents = (ROOT / "book" / "_toc.yml").read_text()
    assert not [name for name in pages if f"file: api/{name.removesuffix('.md')}\n" not in contents]


def test_a_module_without_a_place_is_noticed():
    pages = {"a.md": ".. automodule:: x.a\n.. automodule:: x.b\n", "b.md": ".. automodule:: x.b\n"}
    assert api_problems(pages, {"x.b", "x.c"}) == [
        "x.c: on no page of book/api",
        "x.a: there is no such module",
        "x.b: 2 times",
    ]
