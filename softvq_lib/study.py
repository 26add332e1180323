"""A study as a whole: its plan with what was measured, and its tables, figures and sentences by name.

`Study.show` is the one way in which pages show them, so that none is without the line on where its rows come from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from softvq_lib import results as rows_of
from softvq_lib import study_figures as figures
from softvq_lib import study_pictures as pictures
from softvq_lib import study_reruns as again
from softvq_lib import study_tables as tables
from softvq_lib import study_words as words
from softvq_lib.arms import Measured, measured
from softvq_lib.config import one_of
from softvq_lib.paper_tables import paper_table
from softvq_lib.study_budget import budget
from softvq_lib.study_cells import Drawn
from softvq_lib.style import png_of, svg_of
from softvq_lib.sweeps import read_ledger, read_plan
from softvq_lib.train import read_parameters


@dataclass(frozen=True, repr=False)
class Shown:
    """Markdown, or a figure, as IPython displays it."""

    text: str | None = None
    figure: object = None

    def __repr__(self) -> str:
        return "a figure" if self.figure else "Markdown"

    def _repr_markdown_(self) -> str | None:
        return self.text

    def _repr_svg_(self) -> str | None:
        return svg_of(self.figure) if self.figure else None

    def _repr_png_(self) -> bytes | None:
        return png_of(self.figure) if self.figure else None


@dataclass(frozen=True)
class Study:
    """Arms with their rows, and the paper's numbers.

    Attributes:
        arms: All that are planned, with what was measured.
        files: Sweep to the name of its file.
        results: Folder of the rows and of the arrays that go with them.
        paper: File of the paper's own numbers.
        recorded: Folder of other recorded rows and pictures.
    """

    arms: list[Measured]
    files: dict[str, str]
    results: Path
    paper: Path
    recorded: Path

    @classmethod
    def read(cls, sweeps: Path, results: Path, *, root: Path, paper: Path, recorded: Path | None = None) -> "Study":
        """Read a plan, its results rows and the paper's numbers.

        Args:
            sweeps: Folder of sweep files.
            results: Folder of rows and ledger; an empty or missing one is a study of which nothing has been run.
            root: Folder that paths of parameter files start from.
            paper: File of the paper's numbers.
            recorded: Folder of other recorded rows, by default that of the paper's numbers.

        Raises:
            ValueError: for a folder without sweep files, or a file that is damaged.
        """
        paths = sorted(Path(sweeps).glob("*.yaml"))
        if not paths:
            raise ValueError(f"sweeps={str(sweeps)!r} has no sweep files (*.yaml).")
        files = {read_parameters(path)["sweep"]: path.name for path in paths}
        arms = measured(read_plan(paths, Path(root)), Path(results))
        return cls(arms, files, Path(results), Path(paper), Path(recorded or Path(paper).parent))

    @classmethod
    def of_checkout(cls, root: Path, folder: Path, scale: str = "mini", results: str | None = None) -> "Study":
        """Read the study of a scale: `sweeps/<scale>` of a checkout and `<scale>` of a folder of results.

        Args:
            root: The checkout.
            folder: Of all recorded results, the paper's numbers among them.
            scale: Folder of sweeps, such as `mini`.
            results: Another folder of rows, for a study that was run elsewhere.
        """
        where = Path(results).expanduser() if results else folder / scale
        return cls.read(root / "sweeps" / scale, where, root=root, paper=folder / "paper.json")

    def draw(self, name: str) -> list[Drawn]:
        """Draw one of `DRAWINGS`.

        Raises:
            ValueError: for a name that is none (the nearest is named), or files that are damaged.
        """
        one_of("drawing", name, DRAWINGS)
        made = DRAWINGS[name].make(self)
        return made if isinstance(made, list) else [made]

    def show(self, *names: str) -> list["Shown"]:
        """Return some of `DRAWINGS` for a cell of a page to display, each with the line on where its rows come from."""
        found: list[Shown] = []
        for name in names:
            for drawn in self.draw(name):
                picture = not isinstance(drawn.content, str)
                found += [Shown(figure=drawn.content)] if picture else []
                parts = [drawn.note if picture else drawn.content, drawn.provenance]
                found.append(Shown("\n\n".join(filter(None, parts))))
        return found

    def planned(self, *sweeps: str) -> str:
        """One line a sweep: how many arms are planned; the same whatever has been run."""
        lines = []
        for sweep in sweeps or self.files:
            one_of("sweep", sweep, self.files)
            mine = [arm.arm for arm in self.arms if arm.arm.sweep == sweep]
            away = sum(bool(arm.unavailable) for arm in mine)
            lines.append(
                f"{sweep}: {len(mine) - away} arms, {sum(arm.first for arm in mine)} of them in the first pass"
                + (f"; {away} that cannot be run here" if away else "")
            )
        return "\n".join(lines)


class Drawing(NamedTuple):
    """What is drawn under a name.

    Attributes:
        title: One line.
        make: Of a study; several where it is a list.
    """

    title: str
    make: Callable[[Study], Drawn | list[Drawn]]


def _paper(place: str) -> Drawing:
    def make(study: Study) -> Drawn:
        return Drawn(paper_table(rows_of.read_paper(study.paper), place), files=(study.paper,))

    return Drawing(f"{place} as the paper prints it", make)


def _of_arms(title: str, function: Callable[..., Drawn], *arguments: object) -> Drawing:
    return Drawing(title, lambda study: function(study.arms, *arguments))


def _budget(study: Study) -> Drawn:
    return budget([arm.arm for arm in study.arms], study.files, read_ledger(study.results))


def _attempt(study: Study) -> Drawn:
    return again.attempt([arm.arm for arm in study.arms], study.results.with_name(f"{study.results.name}-800"))


def _samples(study: Study) -> list[Drawn]:
    rows = rows_of.read(study.recorded / "train_generator.jsonl")
    return pictures.samples(rows, study.recorded / "train_generator")


def _umaps(tokens: str) -> Drawing:
    title = f"Fig. 4 at mini scale: ẑ and z in the plane, {tokens} tokens"
    return Drawing(title, lambda study: pictures.umaps(study.arms, study.results / "latent_space", tokens))


DRAWINGS = {
    "paper-table1": _paper("Tab. 1"),
    "paper-table2": _paper("Tab. 2"),
    "paper-table3": _paper("Tab. 3"),
    "paper-table4": _paper("Tab. 4"),
    "generators": _of_arms("Tab. 1 at mini scale: SiT, DiT and MAR on two tokenizers", tables.generators),
    "generators-words": _of_arms("What it shows: generators", words.generators),
    "sizes": _of_arms("Tab. 1 at mini scale: four trunks", tables.sizes),
    "sizes-words": _of_arms("What it shows: trunks", words.sizes),
    "steps": _of_arms("Steps of training to a target", figures.steps),
    "steps-table": _of_arms("Samples by steps of training", tables.steps),
    "steps-words": _of_arms("What it shows: steps of training", words.steps),
    "resolution": _of_arms("Tab. 2 at mini scale: four times the pixels", tables.resolution),
    "resolution-words": _of_arms("What it shows: resolution", words.resolution),
    "reconstruction": _of_arms("Tab. 3 at mini scale: reconstruction and probe", tables.factorial_reconstruction),
    "generation": _of_arms("Tab. 3 at mini scale: samples of SiT", tables.factorial_generation),
    "learning-curves": _of_arms("Held-out PSNR in training", figures.learning_curves),
    "distortion": _of_arms("Distortion against the number of tokens", figures.distortion),
    "generation-by-tokens": _of_arms("Samples against the number of tokens", figures.generation),
    "slopes": _of_arms("Change per doubling of the tokens", tables.slopes),
    "factorial-words": _of_arms("What it shows: quantizers and alignment", words.factorial),
    "fixed-dim": _of_arms("Tab. 3 at mini scale, all tokens of 16 channels", tables.fixed_dim),
    "fixed-dim-words": _of_arms("What it shows: tokens of 16 channels", words.fixed_dim),
    "rate": _of_arms("Tab. 3 at mini scale, at twice the learning rate", tables.rate),
    "rate-words": _of_arms("What it shows: learning rate", words.rate),
    "alignment": _of_arms("Tab. 4 at mini scale, with controls", tables.alignment),
    "alignment-words": _of_arms("What it shows: alignment", words.alignment),
    "repa": _of_arms("Alignment of the latents beside REPA", tables.repa),
    "repa-words": _of_arms("What it shows: REPA", words.repa),
    "samples": Drawing("Fig. 1: sheets of samples that were recorded", _samples),
    "probing-by-tokens": _of_arms("Fig. 3 at mini scale: tokenizers", figures.probing_by_tokens),
    "probing-by-size": _of_arms("Fig. 3 at mini scale: trunks", figures.probing_by_size),
    "probing-by-block": _of_arms("Fig. 3 at mini scale: SiT by block", figures.probing_by_block),
    "umap-2": _umaps("2"),
    "umap-16": _umaps("16"),
    "latents": _of_arms("The latent space in numbers", tables.latents),
    "representations-words": _of_arms("What it shows: representations", words.representations),
    "pilot": _of_arms("The pilot", figures.pilot),
    "attempt": Drawing("The attempt before: half as many steps", _attempt),
    "trunk": _of_arms("The study's trunk and one without LayerScale", tables.trunk),
    "trunk-words": _of_arms("What it shows: LayerScale", words.trunk),
    "budget": Drawing("What the study costs", _budget),
    "reruns": Drawing("Arms that were run again", lambda study: again.reruns(study.results)),
    "ablations": _of_arms("Sec. 4.5 at mini scale, one change at a time", figures.ablations),
    **{
        name: drawing
        for topic, (title, _) in tables.TOPICS.items()
        for name, drawing in {
            f"ablations-{topic}": _of_arms(f"Sec. 4.5: {title}", tables.ablations, topic),
            f"ablations-{topic}-words": _of_arms(f"What it shows: {title}", words.ablations, topic),
        }.items()
    },
}


def index() -> str:
    """Names and titles of all drawings, for people."""
    long = max(map(len, DRAWINGS))
    return "\n".join(f"{name:{long}}  {drawing.title}" for name, drawing in DRAWINGS.items())
