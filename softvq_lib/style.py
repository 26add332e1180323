"""One look for every figure: font sizes, a colour-blind-safe palette, a colour per quantizer.

The palette is that of M. Okabe and K. Ito, "Color Universal Design" (2008). `use_style` sets only rcParams;
the SVG hash salt is among them, so two runs of a page draw the same bytes if figures are saved with
`metadata=SAVE_METADATA`.
"""

import io
import re

OKABE_ITO = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "grey": "#7F7F7F",
}

# A quantizer keeps its colour on every page.
QUANTIZER_COLOURS = {
    "ae": OKABE_ITO["grey"],
    "kl": OKABE_ITO["orange"],
    "vq": OKABE_ITO["vermilion"],
    "softvq": OKABE_ITO["blue"],
    "gmmvq": OKABE_ITO["green"],
}

QUANTIZER_NAMES = {"ae": "AE", "kl": "KL", "vq": "VQ", "softvq": "SoftVQ", "gmmvq": "GMMVQ"}

# Yellow is left out of the cycle: a thin yellow line cannot be read on white.
COLOUR_CYCLE = [OKABE_ITO[n] for n in ("blue", "vermilion", "green", "orange", "purple", "sky", "black")]

SEQUENTIAL = "viridis"

# Inches: the width of a page column. On a phone (about 360 px) an 11-point letter is still 8 px high.
WIDTH = 6.4

SAVE_METADATA = {"Date": None}

MOST_SVG = 100_000  # characters; beyond, a page loads a PNG faster

STYLE = {
    "figure.dpi": 120,
    "savefig.dpi": 120,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "image.cmap": SEQUENTIAL,
    "image.interpolation": "nearest",
    "svg.hashsalt": "softvq-book",
    "svg.fonttype": "path",
}


def use_style() -> None:
    """Set matplotlib's rcParams to this style, for this process."""
    import matplotlib as mpl
    from matplotlib import cycler

    mpl.rcParams.update(STYLE)
    mpl.rcParams["axes.prop_cycle"] = cycler(color=COLOUR_CYCLE)


def _in_pixels(match: re.Match) -> str:
    return f'{match[1]}="{float(match[2]) / 72 * STYLE["savefig.dpi"]:.0f}"'


def svg_of(figure) -> str | None:
    """Draw a figure of matplotlib as SVG, the same bytes for the same figure; None above `MOST_SVG` characters.

    It is as large as the PNG would be: points of 1/72 inch, at the resolution that PNGs have.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=SAVE_METADATA)
    drawn = buffer.getvalue()
    if len(drawn) > MOST_SVG:
        return None
    return re.sub(r'(width|height)="([\d.]+)pt"', _in_pixels, drawn, count=2)


def png_of(figure) -> bytes:
    """Draw a figure of matplotlib as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def vector_figures() -> None:
    """Let this notebook show matplotlib's figures as SVG, the same bytes for the same figure; outside IPython: nothing.

    A PNG is kept beside it for whoever shows no SVG. A figure of thousands of points, whose SVG would have more than
    `MOST_SVG` characters, is a PNG alone.
    """
    import builtins

    from matplotlib.figure import Figure

    if not hasattr(builtins, "get_ipython"):
        return
    formatters = builtins.get_ipython().display_formatter.formatters
    formatters["image/svg+xml"].for_type(Figure, svg_of)
    formatters["image/png"].for_type(Figure, png_of)


def new_figure(rows: int, columns: int, height: float, width: float = WIDTH, **kwargs):
    """A figure and its axes in the shared style, outside pyplot: it is shown once, where a cell returns it.

    Args:
        rows: Of axes.
        columns: Of axes.
        height: Inches.
        width: Inches.
        kwargs: As for matplotlib's `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    use_style()
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def colour_of(quantizer: str) -> str:
    """Hex colour of a quantizer.

    Args:
        quantizer: one of `ae`, `kl`, `vq`, `softvq`, `gmmvq`.

    Raises:
        ValueError: the name is not a quantizer's.
    """
    if quantizer not in QUANTIZER_COLOURS:
        raise ValueError(f"no colour for quantizer {quantizer!r}; choose one of {', '.join(QUANTIZER_COLOURS)}")
    return QUANTIZER_COLOURS[quantizer]
