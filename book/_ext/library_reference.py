"""Sphinx extension: the library's docstrings as they are written, links to equations, launch links, a lighter page.

Docstrings of the library are plain text with Google sections. What reStructuredText would take for markup is escaped;
code in backticks becomes literal, and a link where it names something public of the same module; "Eq. 4" becomes a link
to that equation of the paper, which the page of equations has under the label `eq-paper-4`.
"""

import inspect
import json
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

LIBRARY = "softvq_lib"
# "Eq. 5", "Eq. 5-6" and "Eq. 5, 6", but neither "Eq. 13" nor, of another author's paper, "2004, Eq. 3".
EQUATION = re.compile(r"(?<!\d{4}, )\bEq\. ([1-7])(?![\d.]\d)(?:(-|–|, )([1-7])\b(?!\d))?(?!\d)")
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Note|Example|Examples):$")
ICON_SCRIPT = re.compile(r"<(?:link|script)[^>]*fontawesome\.js[^>]*>(?:</script>)?\s*")
SEARCH_SCRIPT = re.compile(r"<script[^>]*(?:searchindex|searchtools|language_data)\.js[^>]*></script>\s*")
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def _role(match: re.Match, role: str) -> str:
    """One or two references for what was found."""
    first = f"{role}`eq-paper-{match[1]}`"
    return f"{first}{match[2]}{role}`eq-paper-{match[3]}`" if match[3] else first


def linked_equations(text: str) -> str:
    """Turn the paper's equation numbers in a line of a docstring into references."""
    return EQUATION.sub(lambda match: _role(match, ":eq:"), text)


def linked_prose(text: str) -> str:
    """Turn "Eq. 4" in the prose of a page into a reference: not in headings, code, formulas or directives."""
    parts = re.split(r"(^(?:```|:::)[\s\S]*?^(?:```|:::)\s*$|\$\$[\s\S]*?\$\$|`[^`]*`|^#.*$)", text, flags=re.M)
    return "".join(
        part if k % 2 else EQUATION.sub(lambda match: _role(match, "{eq}"), part) for k, part in enumerate(parts)
    )


def escaped(text: str) -> str:
    """Escape what reStructuredText reads as emphasis, substitution or reference."""
    text = re.sub(r"([*|\\])", r"\\\1", text)
    return re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)


def public_of(module: object, name: str) -> str | None:
    """Full name of what a module calls `name`, if that is a public class or function of the library."""
    if name.islower() and name.isalpha():
        return None  # a word that is more often a parameter, or a value of one
    thing = module
    for part in name.removesuffix("()").split("."):
        if part.startswith("_") or not hasattr(thing, part):
            return None
        thing = getattr(thing, part)
    home = getattr(thing, "__module__", "") or ""
    ours = (inspect.isclass(thing) or inspect.isfunction(thing)) and home.startswith(LIBRARY)
    return f"{home}.{thing.__qualname__}" if ours and not thing.__qualname__.startswith("_") else None


def line_of_text(line: str, module: object) -> str:
    """One line of a docstring as reStructuredText."""
    parts = CODE.split(line)
    for k, part in enumerate(parts):
        if k % 2 == 0:
            parts[k] = linked_equations(escaped(part))
            continue
        target = public_of(module, part)
        parts[k] = f"\\ :py:obj:`{part} <{target}>`\\ " if target else f"\\ ``{part}``\\ "
    return re.sub(r"^(\s*)\\ ", r"\1", "".join(parts)).rstrip("\\ ")


def listed(lines: list[str]) -> list[str]:
    """Several named values under "Returns:" as a list, one point each."""
    found, inside, named = [], False, re.compile(r"^    (\w[\w, ]*): ")
    for k, line in enumerate(lines):
        if line.strip() and not line.startswith(" "):
            inside = False
            if line == "Returns:":
                rest = lines[k + 1 :]
                ends = (n for n, other in enumerate(rest) if other.strip() and not other.startswith(" "))
                inside = sum(bool(named.match(other)) for other in rest[: next(ends, len(rest))]) > 1
                if inside:  # napoleon would take the first point for a type
                    found += [line, "    These, by name.", ""]
                    continue
        elif inside and named.match(line):
            line = "    - " + line[4:]
        elif inside and line.startswith("     "):
            line = "      " + line.lstrip()
        found.append(line)
    return found


def as_rst(lines: list[str], module: object) -> list[str]:
    """A docstring as reStructuredText: escaped, with its tables and its aligned lines as they stand."""
    lines = listed(lines)
    found, literal, section, before = [], None, False, ""
    for line in lines:
        indent = len(line) - len(line.lstrip())
        table = line.lstrip().startswith("|") and line.rstrip().endswith("|") and line.count("|") > 2
        if literal is not None and (not line.strip() or table or indent > literal):
            found.append("    " + line if line.strip() else "")
            before = line
            continue
        if literal is not None:
            literal = None
            found.append("")
        if SECTION.match(line):
            section = True
        elif line.strip() and not indent:
            section = False
        hanging = indent and not section and before.strip() and indent > len(before) - len(before.lstrip())
        if table or hanging:
            literal = indent if table else len(before) - len(before.lstrip())
            found += ["", "::", "", "    " + line]
        else:
            found.append(line if SECTION.match(line) else line_of_text(line, module))
        before = line
    return found


def rewrite_docstring(app, what, name, thing, options, lines):
    """Event of autodoc: before napoleon reads the sections."""
    module = sys.modules.get(getattr(thing, "__module__", None) or name)
    lines[:] = as_rst(lines, module)


def link_equations_of_page(app, page, source):
    """Event of a source that was read: Markdown, or the Markdown cells of a notebook."""
    if app.env.doc2path(page).endswith(".ipynb"):
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = linked_prose("".join(cell["source"]))
        source[0] = json.dumps(notebook)
    elif not source[0].startswith("---\njupytext"):
        source[0] = linked_prose(source[0])


def keep_launch_links_of_notebooks(app, page, template, context, doctree):
    """Event of a page: only notebooks have launch links, and Binder's, with its 2 GB, only those that train nothing."""
    source = app.env.doc2path(page, base=False) if page in app.env.all_docs else ""
    heavy = any(fnmatch(source, pattern) for pattern in app.config.nb_execution_excludepatterns)
    for button in context.get("header_buttons", []):
        if button.get("label") == "launch-buttons":
            kept = [b for b in button["buttons"] if "Binder" not in b["text"] or not heavy]
            button["buttons"] = kept if source.endswith(".ipynb") else []
    context["header_buttons"] = [
        b for b in context.get("header_buttons", []) if b.get("label") != "launch-buttons" or b["buttons"]
    ]


def drop_idle_scripts(app, exception):
    """Event of the finished site: take out scripts of the theme that a page loads and never uses, over half its bytes.

    Icons are drawn by the fonts of the style sheet as well; the index is searched on the search page alone, as long as
    `search_as_you_type` is off.
    """
    if exception is not None or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        shorter = ICON_SCRIPT.sub("", text)
        if path.name != "search.html":
            shorter = SEARCH_SCRIPT.sub("", shorter)
        if shorter != text:
            path.write_text(shorter, encoding="utf-8")
    for path in Path(app.outdir).glob("_static/scripts/fontawesome.js*"):
        path.unlink()


def setup(app):
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", rewrite_docstring, priority=100)
    app.connect("source-read", link_equations_of_page)
    app.connect("build-finished", drop_idle_scripts)
    app.connect("html-page-context", keep_launch_links_of_notebooks, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
