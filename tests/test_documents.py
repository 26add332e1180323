"""Changelog, citation, licence and contributing guide: of one version, in their forms, and naming only what exists."""

import datetime
import re
from importlib import metadata

import pytest
import yaml

import softvq_lib

from repository import ROOT, pyproject

KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # of Keep a Changelog


def releases(changelog: str) -> list[tuple[str, str]]:
    """(version, date) of each section of a changelog, the newest first; no date for what is not released."""
    return [tuple((line.split(" - ") + [""])[:2]) for line in re.findall(r"^## (.+)$", changelog, re.M)]


def changelog_problems(changelog: str) -> list[str]:
    """What is not in the form of Keep a Changelog."""
    found = [] if changelog.startswith("# Changelog\n") else ["does not begin with '# Changelog'"]
    dated = [(version, date) for version, date in releases(changelog) if version != "Unreleased"]
    for version, date in dated:
        if not re.fullmatch(r"\d+\.\d+\.\d+", version) or not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
            found.append(f"'{version} - {date}' is no version and date")
    if sorted(dated, key=lambda entry: entry[1], reverse=True) != dated:
        found.append("the newest version is not on top")
    if "Unreleased" in [version for version, _ in releases(changelog)[1:]]:
        found.append("what is not released is not on top")
    for section in re.split(r"^## ", changelog, flags=re.M)[1:]:
        kinds = re.findall(r"^### (.+)$", section, re.M)
        found += [f"'{kind}' is no kind of change" for kind in kinds if kind not in KINDS]
        if "- " in section.split("\n", 1)[1] and not kinds:
            found.append("changes without a kind")
    return found


def citation_problems(citation: dict) -> list[str]:
    """What CFF 1.2.0 requires and this has not, of the parts that are used here."""
    found = [f"no {key}" for key in ("cff-version", "message", "title", "authors") if not citation.get(key)]
    if citation.get("cff-version") != "1.2.0":
        found.append("not of version 1.2.0")
    known = {"cff-version", "message", "title", "authors", "type", "version", "date-released", "abstract", "keywords"}
    found += [f"unknown {key}" for key in citation if key not in known | {"license", "references"}]
    if not isinstance(citation.get("date-released", datetime.date.min), datetime.date):
        found.append("date-released is no date")
    for reference in citation.get("references", []):
        found += [f"a reference without {key}" for key in ("type", "title", "authors") if not reference.get(key)]
    people = [person for entry in (citation, *citation.get("references", [])) for person in entry.get("authors") or []]
    for person in people:
        if not set(person) <= {"name"} and not set(person) <= {"family-names", "given-names"}:
            found.append(f"{person} is neither a person nor an entity")
    return found


CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_all_say_the_same_version():
    version = pyproject()["project"]["version"]
    newest, date = next(entry for entry in releases(CHANGELOG) if entry[0] != "Unreleased")
    assert [version] * 3 == [newest, str(CITATION["version"]), softvq_lib.__version__]
    assert str(CITATION["date-released"]) == date
    assert metadata.version(pyproject()["project"]["name"]) == version, "install the project again: make setup"


def test_the_changelog_has_the_form_of_keep_a_changelog():
    assert not changelog_problems(CHANGELOG)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# Changelog\n\n## Unreleased\n\n### Fixed\n\n- It.\n\n## 0.1.0 - 2026-01-01\n\n### Added\n\n- It.\n", None),
        ("# History\n", "does not begin"),
        ("# Changelog\n\n## v1 - soon\n", "no version and date"),
        ("# Changelog\n\n## 0.1.0 - 2026-01-01\n\n## 0.2.0 - 2026-02-01\n", "not on top"),
        ("# Changelog\n\n## 0.1.0 - 2026-01-01\n\n## Unreleased\n", "not released is not on top"),
        ("# Changelog\n\n## 0.1.0 - 2026-01-01\n\n### News\n", "'News' is no kind"),
        ("# Changelog\n\n## 0.1.0 - 2026-01-01\n\n- It.\n", "changes without a kind"),
    ],
)
def test_another_form_is_noticed(text, complaint):
    found = changelog_problems(text)
    assert any(complaint in problem for problem in found) if complaint else not found


def test_the_citation_is_valid_and_names_the_licence():
    assert not citation_problems(CITATION)
    assert CITATION["license"] == pyproject()["project"]["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0" in licence and "END OF TERMS AND CONDITIONS" in licence


def test_an_invalid_citation_is_noticed():
    wrong = {"cff-version": "1.1", "titel": "x", "authors": [{"first": "A"}], "references": [{"type": "article"}]}
    found = citation_problems(wrong)
    assert {"no message", "no title", "not of version 1.2.0", "unknown titel"} <= set(found)
    assert {"a reference without title", "a reference without authors"} <= set(found) and "neither" in found[-1]


def missing(text: str) -> list[str]:
    """Files, and commands of the Makefile, that a text names and that are not there."""
    made = {"_build", "runs", ".venv", ".ci/venv"}
    named = re.findall(r"(?<![\w./-])((?:[\w.]+/)+[\w.-]+|[\w-]+\.(?:md|cff|toml|yml|yaml))(?=[\s`,;:)]|\.\s|$)", text)
    placed = [path for path in named if not any(path == top or path.startswith(f"{top}/") for top in made)]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = set(re.findall(r"`make ([a-z-]+)", text))
    there = [path for path in placed if not (ROOT / path).exists()]
    return there + sorted(f"make {command}" for command in commands - targets)


def test_the_contributing_guide_is_complete_and_names_only_what_exists():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    code = "\n".join(re.findall(r"`[^`\n]+`", re.sub(r"```.*?```", "", guide, flags=re.S)))
    assert not [path for path in missing(code) if "<" not in path]
    for section in ("## Tests", "### Add a quantizer", "### Add a notebook", "### Add a sweep", "## Release"):
        assert f"\n{section}\n" in guide


def test_a_file_and_a_command_that_do_not_exist_are_noticed():
    assert missing("`tests/test_gone.py`, `Gone.md`, `make nothing`, `make test`, `README.md`, `_build/x.html`") == [
        "tests/test_gone.py",
        "Gone.md",
        "make nothing",
    ]
