"""Draw every table and figure of a study from its committed rows: `make figures`. Nothing is trained.

Tables go to Markdown, figures to SVG, each with the line on where its rows come from. Same rows, same bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a checkout that is not installed

from softvq_lib.study import DRAWINGS, Study  # noqa: E402
from softvq_lib.study_cells import Drawn  # noqa: E402
from softvq_lib.style import SAVE_METADATA  # noqa: E402


def write(drawn: Drawn, title: str, folder: Path, name: str) -> None:
    """Write a table, or a figure and what belongs under it."""
    content = drawn.content
    if not isinstance(content, str):
        content.savefig(folder / f"{name}.svg", metadata=SAVE_METADATA)
        content = f"![{title}]({name}.svg)"
    text = "\n\n".join(filter(None, [f"# {title}", content, drawn.note, drawn.provenance]))
    (folder / f"{name}.md").write_text(text + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(prog="python book/draw_figures.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to draw; default: all. {', '.join(DRAWINGS)}")
    parser.add_argument("--scale", default="mini", help="sweeps/SCALE and book/results/SCALE (default mini)")
    parser.add_argument("--results", help="another folder of rows")
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "figures", help="default: _build/figures")
    asked = parser.parse_args(arguments)
    try:
        study = Study.of_checkout(ROOT, ROOT / "book" / "results", asked.scale, asked.results)
        asked.out.mkdir(parents=True, exist_ok=True)
        for name in asked.names or DRAWINGS:
            made = study.draw(name)
            for number, drawn in enumerate(made, 1):
                write(drawn, DRAWINGS[name].title, asked.out, f"{name}-{number}" if len(made) > 1 else name)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{len(asked.names or DRAWINGS)} drawings in {asked.out}")


if __name__ == "__main__":
    main()
