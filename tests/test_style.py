"""Figures in notebooks: as SVG where that is small, the same bytes for the same figure, and one colour a quantizer."""

import builtins
import re
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from softvq_lib import style
from softvq_lib.tokenizers.presets import QUANTIZERS


class Formatter:
    """Stands for IPython's: remembers what shows a type."""

    def for_type(self, kind: type, show) -> None:
        """Remember."""
        assert kind is Figure
        self.show = show


@pytest.fixture
def formatters(monkeypatch):
    """Those of a shell in which `vector_figures` was called."""
    found = {"image/png": Formatter(), "image/svg+xml": Formatter()}
    shell = SimpleNamespace(display_formatter=SimpleNamespace(formatters=found))
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    style.vector_figures()
    return found


def figure_of(points: int):
    """A figure with so many points."""
    figure, axes = style.new_figure(1, 1, 2.5)
    axes.scatter(*np.random.default_rng(0).normal(size=(2, points)), s=np.arange(points) % 7 + 1)
    return figure


def test_a_figure_is_shown_as_svg_of_the_size_of_its_png(formatters):
    from io import BytesIO

    from PIL import Image

    drawn = formatters["image/svg+xml"].show(figure_of(5))
    assert drawn == formatters["image/svg+xml"].show(figure_of(5))
    assert not re.search(r"<dc:date>", drawn)
    sizes = [int(re.search(rf'{side}="(\d+)"', drawn)[1]) for side in ("height", "width")]
    picture = Image.open(BytesIO(formatters["image/png"].show(figure_of(5))))
    assert np.allclose(sizes, picture.size[::-1], atol=2)


def test_a_figure_of_very_many_points_is_a_png_alone(formatters):
    assert formatters["image/svg+xml"].show(figure_of(5000)) is None
    assert formatters["image/png"].show(figure_of(5000))[:4] == b"\x89PNG"


def test_outside_of_a_notebook_nothing_happens(monkeypatch):
    monkeypatch.delattr(builtins, "get_ipython", raising=False)
    style.vector_figures()


def test_every_quantizer_has_a_colour_of_its_own():
    colours = [style.colour_of(name) for name in style.QUANTIZER_NAMES]
    assert len(set(colours)) == len(colours) and set(colours) <= set(style.OKABE_ITO.values())
    assert set(style.QUANTIZER_NAMES) == set(QUANTIZERS)
    with pytest.raises(ValueError, match="no colour for quantizer 'lfq'"):
        style.colour_of("lfq")
