"""The built site: links, what pages load, their sizes, equation numbers, launch links. `make check-site` asks.

That reads `_build/html` and needs `make book` before. Each rule is a function that returns a list of complaints, and is
asked of a small bad site too, by tests that run with all others.
"""

import os
import re
from collections.abc import Iterable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from repository import ROOT

SITE = Path(os.environ.get("SOFTVQ_SITE", ROOT / "_build" / "html"))
MOST_BYTES = 3_000_000
# What a page makes the browser fetch by itself, by element and attribute.
LOADS = {("img", "src"), ("script", "src"), ("source", "src"), ("video", "src"), ("iframe", "src"), ("input", "src")}
LOADING_RELS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "manifest"}
IN_CSS = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


class Page(HTMLParser):
    """What a page links, what it loads, and the names of its places."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Collect the attributes that name an address or a place."""
        given = {name: value for name, value in attributes if value is not None}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        for name, value in given.items():
            if (tag, name) in LOADS:
                self.loads.append(value)
            elif name == "srcset":
                self.loads += [part.split()[0] for part in value.split(",") if part.strip()]
            elif name == "style":
                self.loads += [first or second for first, second in IN_CSS.findall(value)]
        if tag == "link" and "href" in given:
            loading = LOADING_RELS & set(given.get("rel", "").split())
            (self.loads if loading else self.links).append(given["href"])
        elif tag in ("a", "area") and "href" in given:
            self.links.append(given["href"])
        self._style = tag == "style"

    def handle_data(self, data: str) -> None:
        """Addresses in a style sheet inside the page."""
        if self._style:
            self.loads += [first or second for first, second in IN_CSS.findall(data)]


@cache
def read(path: Path) -> Page:
    """Parse a page once."""
    return Page(path.read_text())


def pages(site: Path) -> list[Path]:
    """All pages of a site; snippets of the theme are none."""
    return [path for path in sorted(site.rglob("*.html")) if "_static" not in path.relative_to(site).parts]


def outside(address: str) -> bool:
    """Whether an address is another machine's."""
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https")


def target(page: Path, site: Path, address: str) -> tuple[Path, str]:
    """The file and the place in it that an address of a page names."""
    parts = urlsplit(address)
    path = unquote(parts.path)
    base = site if path.startswith("/") else page.parent
    return Path(os.path.normpath(base / path.lstrip("/"))) if path else page, unquote(parts.fragment)


def link_problems(site: Path) -> list[str]:
    """Links inside a site that lead to no file, or to no place in it."""
    found = []
    for page in pages(site):
        parsed = read(page)
        for address in dict.fromkeys([*parsed.links, *parsed.loads]):
            if outside(address) or urlsplit(address).scheme in ("mailto", "data", "javascript"):
                continue
            file, place = target(page, site, address)
            at = f"{page.relative_to(site)}: {address}"
            if not file.is_file():
                found.append(f"{at}: no such file")
            elif place and file.suffix == ".html" and place not in read(file).places:
                found.append(f"{at}: no such place")
    return found


def css_loads(file: Path) -> list[str]:
    """Addresses that a style sheet loads."""
    return [first or second for first, second in IN_CSS.findall(file.read_text(errors="replace"))]


def network_problems(site: Path) -> list[str]:
    """What a page, or a style sheet of the site, would load from another machine."""
    found = [
        f"{page.relative_to(site)}: loads {address}"
        for page in pages(site)
        for address in read(page).loads
        if outside(address)
    ]
    for sheet in sorted(site.rglob("*.css")):
        found += [f"{sheet.relative_to(site)}: loads {a}" for a in css_loads(sheet) if outside(a)]
    return found


def page_bytes(page: Path, site: Path) -> int:
    """Bytes of a page with all that it loads: pictures, scripts, and style sheets with their fonts."""
    files = {page}
    for address in read(page).loads:
        if outside(address) or address.startswith("data:"):
            continue
        file = target(page, site, address)[0]
        files.add(file)
        if file.suffix == ".css" and file.is_file():
            # Of fonts a browser takes the first format only, and those that are used.
            fonts = [target(file, site, a)[0] for a in css_loads(file) if not a.startswith("data:") and not outside(a)]
            files |= {font for font in fonts if font.suffix != ".ttf"}
    return sum(file.stat().st_size for file in files if file.is_file())


def size_problems(site: Path, most: int = MOST_BYTES) -> list[str]:
    """Pages of the book above the limit; listings of source code count as any other."""
    sizes = {page.relative_to(site).as_posix(): page_bytes(page, site) for page in pages(site)}
    return [f"{name}: {size:,} bytes, allowed are {most:,}" for name, size in sizes.items() if size > most]


def equation_problems(site: Path, numbers: Iterable[int] = range(1, 8)) -> list[str]:
    """Equations of the paper that the site shows under another number."""
    text = (site / "equations.html").read_text()
    found = []
    for number in numbers:
        # A formula is labelled before its number is written.
        shown = re.search(rf'id="equation-eq-paper-{number}".*?class="eqno">\((\d+)\)', text, re.S)
        if shown is None or int(shown[1]) != number:
            found.append(f"Eq. {number} is shown as {shown and shown[1]}")
    return found


def launch_problems(site: Path, config: dict, notebooks: Iterable[str], light: Iterable[str]) -> list[str]:
    """Pages whose links to Colab and Binder are not exactly those of their own notebook.

    Args:
        config: The book's, of which the repository is taken.
        notebooks: Pages that are notebooks; the others have no such link.
        light: Those of them that Binder opens.
    """
    repository = config["repository"]
    owner = urlsplit(repository["url"]).path.strip("/")
    branch, folder = repository["branch"], repository["path_to_book"]
    found, notebooks, light = [], set(notebooks), set(light)
    for path in pages(site):
        page = path.relative_to(site).with_suffix("").as_posix()
        links = read(path).links
        wanted = []
        if page in notebooks:
            wanted.append(f"https://colab.research.google.com/github/{owner}/blob/{branch}/{folder}/{page}.ipynb")
        if page in light:
            wanted.append(f"https://mybinder.org/v2/gh/{owner}/{branch}?urlpath=lab/tree/{folder}/{page}.ipynb")
        launches = {link for link in links if "colab." in link or "mybinder." in link}
        if launches != set(wanted):
            found.append(f"{page}: launches {sorted(launches)}, its own are {sorted(wanted)}")
    return found


# -- asked of the site -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site() -> Path:
    """The built site; without one the tests fail and say how to get it."""
    assert (SITE / "intro.html").is_file(), f"{SITE} is not there: run `make book` first"
    return SITE


@pytest.mark.site
def test_every_link_inside_the_site_resolves(site):
    assert not link_problems(site)


@pytest.mark.site
def test_no_page_loads_anything_from_outside(site):
    assert not network_problems(site)


@pytest.mark.site
def test_no_page_is_too_large(site):
    assert not size_problems(site)


@pytest.mark.site
def test_the_papers_equations_have_the_papers_numbers(site):
    assert not equation_problems(site)


@pytest.mark.site
def test_each_notebook_is_launched_as_itself(site):
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    contents = re.findall(r"file: (\S+)", (ROOT / "book" / "_toc.yml").read_text())
    notebooks = [page for page in contents if (ROOT / "book" / f"{page}.ipynb").is_file()]
    stored = [re.compile(p.replace(".", r"\.").replace("*", ".*")) for p in config["execute"]["exclude_patterns"]]
    light = [page for page in notebooks if not any(p.fullmatch(f"{page}.ipynb") for p in stored)]
    assert notebooks and light
    assert not launch_problems(site, config, notebooks, light)


@pytest.mark.site
def test_licence_and_citation_are_linked(site):
    linked = {target(site / "licence.html", site, link)[0].name for link in read(site / "licence.html").links}
    assert {"LICENSE", "CITATION.cff"} <= linked


# -- asked of a bad site -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A site of two pages that are in order."""
    (tmp_path / "style.css").write_text("a { background: url('dot.png') }")
    (tmp_path / "dot.png").write_bytes(b"12345")
    (tmp_path / "a.html").write_text(
        '<link rel="stylesheet" href="style.css"><p id="top"></p><a href="b.html#end">b</a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="end"></h1><a href="a.html#top"></a><a href="https://example.org">out</a>')
    return tmp_path


def test_a_site_in_order_has_no_complaint(small):
    assert not link_problems(small) + network_problems(small) + size_problems(small)
    assert page_bytes(small / "a.html", small) == sum(
        (small / n).stat().st_size for n in ("a.html", "style.css", "dot.png")
    )


def test_broken_links_are_noticed(small):
    (small / "c.html").write_text(
        '<a href="gone.html"></a><a href="a.html#gone"></a><a href="#here"></a><img src="x.png">'
    )
    assert link_problems(small) == [
        "c.html: gone.html: no such file",
        "c.html: a.html#gone: no such place",
        "c.html: #here: no such place",
        "c.html: x.png: no such file",
    ]


def test_what_comes_from_outside_is_noticed(small):
    (small / "style.css").write_text("@import 'https://example.org/a.css';")
    (small / "c.html").write_text(
        '<script src="https://cdn.example.org/x.js"></script><a href="https://example.org"></a>'
    )
    assert network_problems(small) == [
        "c.html: loads https://cdn.example.org/x.js",
        "style.css: loads https://example.org/a.css",
    ]


def test_a_large_page_and_wrong_numbers_are_noticed(small):
    assert size_problems(small, 100) == [f"a.html: {page_bytes(small / 'a.html', small)} bytes, allowed are 100"]
    (small / "equations.html").write_text('<div id="equation-eq-paper-1"><span class="eqno">(2)</span></div>')
    assert equation_problems(small, [1]) == ["Eq. 1 is shown as 2"]


def test_a_link_to_another_notebook_is_noticed(small):
    config = {"repository": {"url": "https://github.com/me/mine", "branch": "main", "path_to_book": "book"}}
    colab = "https://colab.research.google.com/github/me/mine/blob/main/book/{}.ipynb"
    (small / "c.html").write_text(f'<a href="{colab.format("c")}"></a>')
    assert not launch_problems(small, config, ["c"], [])
    assert len(launch_problems(small, config, [], [])) == 1
    (small / "d.html").write_text(f'<a href="{colab.format("c")}"></a>')
    assert len(launch_problems(small, config, ["c", "d"], [])) == 1
