"""Sphinx extension: the directive `explorable`, which puts an explorable picture into a page with its scripts.

    ```{explorable} posterior
    What the picture shows, under it.
    ```

Without JavaScript the page shows a static figure. Scripts and data lie in `_static/explore`; Jupyter Book would put
every script below `_static` into every page, so they are taken out again and given to the pages that need them.
"""

from html import escape
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

FOLDER = "explore"
# Of each kind: its scripts in order, beside the shared one and its data, and what the static figure shows.
KINDS = {
    "reconstruction": (
        ["reconstruction.js"],
        "Twelve images and their reconstructions by AE, KL, VQ and SoftVQ with 2 and with 16 tokens.",
    ),
    "posterior": (
        ["posterior.js"],
        "The plane around seven codewords in their colours, mixed by the posterior, at four temperatures: hard cells "
        "at 0, one grey at the highest.",
    ),
    "tokens": (
        ["decoder.js", "tokens.js"],
        "An image decoded with each of its latent tokens taken away, taken over from a second image, and kept alone.",
    ),
    "cost": (
        ["cost.js"],
        "Bars: multiply-accumulates of sampling and decoding an image by SiT-XL on 32 to 256 tokens and on KL latents.",
    ),
}


def files(kind: str) -> list[str]:
    """Scripts of a kind in the order in which a page needs them, below `_static`."""
    return [f"{FOLDER}/{name}" for name in ("explore.js", f"data_{kind}.js", *KINDS[kind][0])]


class Explorable(SphinxDirective):
    """`explorable KIND`, with a caption as its content."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the figure's nodes, and note for the page which scripts it needs."""
        kind = directives.choice(self.arguments[0], tuple(KINDS))
        still, origin = f"{FOLDER}/still_{kind}.png", f"{FOLDER}/provenance_{kind}.txt"
        static = Path(self.env.srcdir) / "_static"
        for name in (*files(kind), still, origin):
            if not (static / name).exists():
                raise ExtensionError(f"explorable {kind}: {static / name} is missing; run book/make_explorables.py.")
            self.env.note_dependency(f"_static/{name}")
        self.env.metadata[self.env.docname].setdefault("explorables", "")
        self.env.metadata[self.env.docname]["explorables"] += f" {kind}"
        source = "../" * self.env.docname.count("/") + f"_static/{still}"
        # Inside noscript, so that a page that runs the picture does not load its stand-in.
        start = (
            f'<div class="explore" data-explore="{kind}" role="group" aria-label="Explorable picture: {kind}">'
            f'<noscript><figure class="explore-still"><img class="dark-light" src="{source}" alt="{KINDS[kind][1]}">'
            '<p class="explore-note">With JavaScript this picture can be explored.</p></figure></noscript>'
        )
        caption = nodes.container(classes=["explore-caption"])
        caption += self.parse_content_to_nodes()
        end = f'<p class="explore-provenance">{escape((static / origin).read_text().strip())}</p></div>'
        return [nodes.raw("", start, format="html"), caption, nodes.raw("", end, format="html")]


def leave_out(app, config) -> None:
    """Event of the configuration: no page gets scripts or style of the explorables by itself."""

    def kept(entries: list) -> list:
        return [e for e in entries if not str(e[0] if isinstance(e, (tuple, list)) else e).startswith(f"{FOLDER}/")]

    config.html_js_files, config.html_css_files = kept(config.html_js_files), kept(config.html_css_files)


def add_scripts(app, page, template, context, doctree) -> None:
    """Event of a page: add what its explorables need, each file once."""
    kinds = app.env.metadata.get(page, {}).get("explorables", "").split()
    if kinds:
        app.add_css_file(f"{FOLDER}/explore.css")
    for name in dict.fromkeys(name for kind in kinds for name in files(kind)):
        app.add_js_file(name, loading_method="defer")


def setup(app):
    """Sphinx calls this."""
    app.add_directive("explorable", Explorable)
    app.connect("config-inited", leave_out, priority=100)
    app.connect("html-page-context", add_scripts)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
