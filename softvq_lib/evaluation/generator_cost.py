"""Parameters and multiply-accumulates of a generator's forward pass (Tab. 1, 2), truly and as the paper counted them.

The paper's "Gflops" are multiply-accumulates (MACs), and they come from two ways of counting. For rows on SoftVQ, all
linear layers count and the two products inside attention do not. For rows on KL latents it is the other way round:
inside attention the products count, and the projections before and after them do not. Both are what a counter of
modules, ptflops 0.7.5, makes of a network that brings its own attention, and of one with timm's. It counts a bias, a
normalised number or an activation as one, too, and a GELU twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from softvq_lib.config import at_least, one_of
from softvq_lib.evaluation.capacity import PEAK_TFLOPS, UTILISATION
from softvq_lib.generators import GeneratorConfig, build_generator
from softvq_lib.generators.mar import mask_ratio

# true: matrix products and nothing else. linear, timm: the two ways of the paper.
CONVENTIONS = ("true", "linear", "timm")
CLASSES = 1000  # of ImageNet
TOKENS = {32: 64, 64: 32, 256: 16, 1024: 16}  # channels: SoftVQ's two, then 2 x 2 patches of KL's at 256 and 512 px

_FREQUENCIES = 256  # numbers that a time becomes
_PROJECTOR = 2048  # width of REPA's projector


class _Counter:
    """MACs of one sample's layers in one convention."""

    def __init__(self, convention: str):
        one_of("convention", convention, CONVENTIONS)
        self.convention = convention
        self.modules = convention != "true"

    def linear(self, rows: int, inputs: int, outputs: int) -> int:
        return rows * outputs * (inputs + self.modules)

    def norm(self, numbers: int) -> int:
        return numbers if self.modules else 0

    silu = norm

    def gelu(self, numbers: int) -> int:
        return 2 * numbers if self.modules else 0

    def attention(self, tokens: int, width: int, heads: int) -> int:
        projections = self.linear(tokens, width, 3 * width) + self.linear(tokens, width, width)
        products = 2 * tokens**2 * width
        if self.convention == "timm":
            return products + tokens**2 * heads + tokens * width  # with the softmax and the scaling
        return projections + (0 if self.modules else products)

    def mlp(self, tokens: int, width: int) -> int:
        inner = 4 * width
        return self.linear(tokens, width, inner) + self.gelu(tokens * inner) + self.linear(tokens, inner, width)

    def adaln(self, rows: int, width: int, parts: int) -> int:
        return self.silu(rows * width) + self.linear(rows, width, parts * width)

    def time(self, rows: int, width: int) -> int:
        return self.linear(rows, _FREQUENCIES, width) + self.silu(rows * width) + self.linear(rows, width, width)


def forward_macs(
    config: GeneratorConfig,
    convention: str = "true",
    *,
    kept: int = 0,
    all_tokens: bool = False,
    dead_projector: bool = False,
) -> int:
    """Return the MACs of one sample's forward pass; of MAR, of the one in training.

    Args:
        config: With tokens and dim; the number of classes has no effect.
        convention: `true`; `linear`, a counter of modules that does not see into attention; `timm`, one that counts
            attention's products and not its projections.
        kept: MAR: tokens that are not masked.
        all_tokens: MAR: every token is embedded and goes through the head, as in the published code, and not only
            those that are kept, and masked.
        dead_projector: SiT, DiT: with REPA's projector to nothing, which the authors' class carries.

    Raises:
        ValueError: for another convention, no tokens or dim, or more kept tokens than there are.
    """
    config = replace(config, classes=config.classes or CLASSES).resolved()
    at_least("kept", kept, 0)
    if kept > config.tokens:
        raise ValueError(f"kept={kept} of tokens={config.tokens}: give at most all of them.")
    count = _Counter(convention)
    if config.generator == "mar":
        return _mar(config, count, kept, all_tokens)
    return _transformer(config, count) + (_projector(config, count) if dead_projector else 0)


def _transformer(config: GeneratorConfig, count: _Counter) -> int:
    n, d = config.tokens, config.dim
    depth, c, heads = (config.row[name] for name in ("depth", "width", "heads"))
    out = d if config.generator == "sit" else 2 * d
    block = count.adaln(1, c, 6) + 2 * count.norm(n * c) + count.attention(n, c, heads) + count.mlp(n, c)
    final = count.adaln(1, c, 2) + count.norm(n * c) + count.linear(n, c, out)
    return count.linear(n, d, c) + count.time(1, c) + depth * block + final


def _projector(config: GeneratorConfig, count: _Counter) -> int:
    n, c = config.tokens, config.row["width"]
    layers = count.linear(n, c, _PROJECTOR) + count.linear(n, _PROJECTOR, _PROJECTOR)
    return layers + 2 * count.silu(n * _PROJECTOR)


def _mar(config: GeneratorConfig, count: _Counter, kept: int, all_tokens: bool) -> int:
    predicted = config.tokens - (0 if all_tokens else kept)
    return _mar_transformer(config, count, kept, all_tokens) + _head(config, count, predicted)


def _mar_transformer(config: GeneratorConfig, count: _Counter, kept: int, all_tokens: bool = False) -> int:
    n, d, buffer = config.tokens, config.dim, config.buffer
    depth, c, heads = (config.row[name] for name in ("depth", "width", "heads"))

    def blocks(length: int) -> int:
        block = 2 * count.norm(length * c) + count.attention(length, c, heads) + count.mlp(length, c)
        return depth * block + count.norm(length * c)

    seen = buffer + kept
    embedded = n if all_tokens else kept
    encoder = count.linear(embedded, d, c) + count.norm((buffer + embedded) * c) + blocks(seen)
    decoder = count.linear(seen, c, c) + blocks(buffer + n)
    return encoder + decoder


def _head(config: GeneratorConfig, count: _Counter, tokens: int) -> int:
    rows = config.head_repeat * tokens  # noise levels of all tokens; z is the same for those of one token
    return count.linear(tokens, config.row["width"], config.head_width) + _head_net(config, count, rows, rows, rows)


def _head_net(config: GeneratorConfig, count: _Counter, times: int, noisy: int, rows: int) -> int:
    """Count times that are embedded, noisy tokens that are, and rows that go through the blocks."""
    d, w = config.dim, config.head_width
    block = count.adaln(rows, w, 3) + count.norm(rows * w) + 2 * count.linear(rows, w, w) + count.silu(rows * w)
    final = count.adaln(rows, w, 2) + count.norm(rows * w) + count.linear(rows, w, 2 * d)
    return count.time(times, w) + count.linear(noisy, d, w) + config.head_depth * block + final


def sampling_macs(
    config: GeneratorConfig,
    steps: int,
    *,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    head_steps: int = 100,
) -> int:
    """Return the MACs (`true`) of sampling one image's latents, without decoding them.

    SiT and DiT: a forward pass for each evaluation, of which Euler's method and the ancestral sampler make one a step,
    and a guided step two. (`sample` computes what depends on time and class alone once for all images.) MAR: encoder
    and decoder for each set of tokens, and the head for each token of the set, `head_steps` times.

    Args:
        config: With tokens and dim.
        steps: Of the solver; MAR: sets of tokens, at most all tokens.
        guidance_scale: 1 is none.
        guidance_interval: SiT, DiT: least and greatest noise level that is guided, 0 to 1.
        head_steps: MAR: evaluations of the head for each set.

    Raises:
        ValueError: for steps that the generator does not allow.
    """
    config = replace(config, classes=config.classes or CLASSES).resolved()
    if config.generator != "mar":
        settings = {"guidance_scale": guidance_scale, "guidance_interval": tuple(guidance_interval)}
        return forward_macs(config) * _small(config.generator, 1).evaluations(steps, **settings)
    count, total, kept = _Counter("true"), 0, 0
    for size, scale in _small("mar", config.tokens)._plan(steps, guidance_scale, "linear"):
        copies = 1 if scale == 1 else 2
        total += copies * _mar_transformer(config, count, kept)
        total += count.linear(copies * size, config.row["width"], config.head_width)
        total += head_steps * _head_net(config, count, 1, size, copies * size)
        kept += size
    return total


@cache
def _small(generator: str, tokens: int):
    """Build a generator that is asked how it samples, which its size has no part in."""
    return build_generator(GeneratorConfig(generator, "tiny", tokens=tokens, dim=1, classes=1))


@cache
def parameter_count(config: GeneratorConfig) -> int:
    """Return the trained parameters of a generator, counted without storage."""
    with torch.device("meta"):
        model = build_generator(replace(config, classes=config.classes or CLASSES))
    return sum(parameter.numel() for parameter in model.parameters())


def training_hours(config: GeneratorConfig, images: int) -> float:
    """Return the GPU-hours of training on so many cached latents, on an H100 that is used to 40 %.

    The backward pass costs two forward passes; of MAR the median share of tokens is masked.
    """
    kept = 0
    if config.generator == "mar":
        kept = config.tokens - round(config.tokens * mask_ratio(0.5))
    operations = 2 * 3 * forward_macs(config, kept=kept) * images
    return operations / (PEAK_TFLOPS * 1e12 * UTILISATION) / 3600


# -- the paper's rows ------------------------------------------------------------------------------------------------


class _Counted(NamedTuple):
    """How the rows of one generator on one kind of tokenizer were counted."""

    convention: str
    note: str
    dead_projector: bool = False


_LINEAR, _TIMM = "linear layers, without attention's products", "attention's products, without its projections"
_COUNTED = {
    ("dit", "softvq"): _Counted("linear", _LINEAR),
    ("sit", "softvq"): _Counted("linear", f"{_LINEAR}; with REPA's projector, which is not used", True),
    ("mar", "softvq"): _Counted("linear", f"{_LINEAR}; a training pass"),
    ("dit", "kl"): _Counted("timm", _TIMM),
    ("sit", "kl"): _Counted("timm", _TIMM),
    ("dit", "dc-ae"): _Counted("timm", _TIMM),
    ("mar", "kl"): _Counted("timm", f"{_TIMM}; a training pass"),
}
# The mask of MAR's training pass is random, and so is the number that was printed. Of 0, 1, ... tokens that are not
# masked these come nearest.
_KEPT = {32: 0, 64: 3, 256: 0}
NOT_BUILT = "not built here: the paper's figure"


@dataclass(frozen=True)
class GeneratorCost:
    """One row of Tab. 1 or 2.

    Attributes:
        place: In the paper.
        what: Generator and latents.
        paper: The printed "Gflops".
        note: What they count.
        tokens: That the transformer sees; None for a generator that is not built here, as all that follows.
        parameters: Trained ones.
        macs: Of one sample's forward pass; for MAR of one in training with all tokens masked, one noise level each.
        as_printed: The same in the convention of the row.
    """

    place: str
    what: str
    paper: float
    note: str
    tokens: int | None = None
    parameters: int | None = None
    macs: int | None = None
    as_printed: int | None = None


def generator_table(paper_rows: Iterable[dict]) -> list[GeneratorCost]:
    """Count the generators of the paper's rows of the metric `gflops`.

    Args:
        paper_rows: Rows as `results.read_paper` returns them; those of other metrics are left out. A row of a generator
            that is built here says `generator`, `size`, `tokens`, `dim` and `latents`: `softvq`, `kl` or `dc-ae`.
    """
    table = []
    for row in paper_rows:
        if row["metric"] != "gflops":
            continue
        known = {"place": row["place"], "what": row["what"], "paper": row["value"]}
        if "generator" not in row:
            table.append(GeneratorCost(**known, note=row.get("note", NOT_BUILT)))
            continue
        config = generator_config(row["generator"], row["size"], row["tokens"], row["dim"])
        counted = _COUNTED[row["generator"], row["latents"]]
        options: dict = {"dead_projector": counted.dead_projector}
        note = "; ".join(filter(None, [counted.note, row.get("note")]))
        if config.generator == "mar":
            options = {"kept": _KEPT[config.tokens], "all_tokens": True}
            note += f", {_KEPT[config.tokens]} of {config.tokens} tokens not masked"
        table.append(
            GeneratorCost(
                **known,
                note=note,
                tokens=config.tokens,
                parameters=parameter_count(config),
                macs=forward_macs(config),
                as_printed=forward_macs(config, counted.convention, **options),
            )
        )
    return table


def generator_config(generator: str, size: str, tokens: int, dim: int) -> GeneratorConfig:
    """Return a generator as the paper's costs are counted for: of MAR with one noise level for each token."""
    repeat = 1 if generator == "mar" else None
    return GeneratorConfig(generator, size, tokens=tokens, dim=dim, classes=CLASSES, head_repeat=repeat)
