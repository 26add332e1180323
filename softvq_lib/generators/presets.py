"""Generator sizes (Sec. 4.1: SiT, DiT, MAR) as rows of tables, and the configuration that they fill in."""

import dataclasses
import math
from dataclasses import dataclass

from softvq_lib.config import at_least, one_of

_TRANSFORMERS = {
    "tiny": {"depth": 6, "width": 128, "heads": 4},
    "mini": {"depth": 8, "width": 256, "heads": 4},
    "s": {"depth": 12, "width": 384, "heads": 6},
    "b": {"depth": 12, "width": 768, "heads": 12},
    "l": {"depth": 24, "width": 1024, "heads": 16},
    "xl": {"depth": 28, "width": 1152, "heads": 16},
}
# depth: of the encoder and again of the decoder. head_*: the network of the diffusion loss.
_MAR = {
    "tiny": {"depth": 3, "width": 128, "heads": 4, "head_depth": 2, "head_width": 128},
    "mini": {"depth": 4, "width": 256, "heads": 4, "head_depth": 3, "head_width": 256},
    "b": {"depth": 12, "width": 768, "heads": 12, "head_depth": 6, "head_width": 1024},
    "l": {"depth": 16, "width": 1024, "heads": 16, "head_depth": 8, "head_width": 1280},
    "h": {"depth": 20, "width": 1280, "heads": 16, "head_depth": 12, "head_width": 1536},
}
SIZES: dict[str, dict[str, dict]] = {"sit": _TRANSFORMERS, "dit": _TRANSFORMERS, "mar": _MAR}
GENERATORS = tuple(SIZES)

POSITIONS = ("sincos", "learned", "grid")
PATHS = ("linear", "gvp", "vp")
PREDICTIONS = ("velocity", "noise", "score")
WEIGHTINGS = ("none", "velocity", "likelihood")
TIMES = ("uniform", "lognormal")
SCHEDULES = ("linear", "cosine")

# Settings of one kind of generator, with their defaults; for the others they must stay None.
_SIT = {"path": "linear", "prediction": "velocity", "weighting": "none", "times": "uniform"}
_DIT = {"schedule": "linear"}
_BACKBONE = {"positions": "sincos", "time_scale": 1.0, "align_block": None, "align_width": None, "align_weight": None}
_HEAD = {"buffer": 64, "mask_per_sample": False, "head_depth": None, "head_width": None, "head_repeat": 4}
_HEAD |= {"dropout": 0.1}
_OWN: dict[str, dict] = {"sit": _BACKBONE | _SIT, "dit": _BACKBONE | _DIT, "mar": _HEAD}


@dataclass(frozen=True)
class GeneratorConfig:
    """What a generator is. None means "as the preset says"; `resolved` fills it in.

    Attributes:
        generator: `sit`, `dit` or `mar`.
        size: Row of `SIZES`: `tiny`, `mini`, `s`, `b`, `l`, `xl`; for MAR `tiny`, `mini`, `b`, `l`, `h`.
        tokens: Latent tokens l. None until the latents are known.
        dim: Latent channels d. None until the latents are known.
        classes: Number of classes; the class after the last stands for "no class". None until the data are known.
        label_dropout: Share of labels that training replaces by "no class", 0 to 1.
        positions: SiT, DiT: `sincos`, fixed positions in a row; `learned`; `grid`, fixed positions in a square of
            tokens, for patches of 2-D latents.
        time_scale: SiT, DiT: Factor on the time before its embedding. 1 is the references'.
        path: SiT: `linear`, `gvp` (cosine) or `vp`.
        prediction: SiT: What the network gives: `velocity`, `noise` or `score`.
        weighting: SiT: Weight of the loss for `noise` and `score`: `none`, `velocity` or `likelihood`.
        times: SiT: Noise levels in training: `uniform`, or `lognormal` in the ratio of noise to data.
        schedule: DiT: Variances of the noise, `linear` or `cosine`.
        buffer: MAR: Tokens before the latents that carry the class.
        mask_per_sample: MAR: Draw the share of masked tokens for each image instead of once for the batch.
        head_depth: MAR: Blocks of the network of the diffusion loss.
        head_width: MAR: Its width.
        head_repeat: MAR: Noise levels that each token is trained at in one step.
        dropout: MAR: Dropout inside the transformer, 0 to below 1.
        align_block: SiT, DiT: Block, from 1, whose output is aligned with a teacher's features. None: no alignment.
        align_width: SiT, DiT: Width of those features.
        align_weight: SiT, DiT: Weight of the alignment in the loss. None: 0.5.
    """

    generator: str = "sit"
    size: str = "tiny"
    tokens: int | None = None
    dim: int | None = None
    classes: int | None = None
    label_dropout: float = 0.1
    positions: str | None = None
    time_scale: float | None = None
    path: str | None = None
    prediction: str | None = None
    weighting: str | None = None
    times: str | None = None
    schedule: str | None = None
    buffer: int | None = None
    mask_per_sample: bool | None = None
    head_depth: int | None = None
    head_width: int | None = None
    head_repeat: int | None = None
    dropout: float | None = None
    align_block: int | None = None
    align_width: int | None = None
    align_weight: float | None = None

    def __post_init__(self):
        one_of("generator", self.generator, GENERATORS)
        one_of("size", self.size, SIZES[self.generator])
        for name, valid in _CHOICES.items():
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), valid)
        for name in ("tokens", "dim", "classes", "head_depth", "head_width", "head_repeat"):
            at_least(name, getattr(self, name), 1)
        for name in ("align_block", "align_width", "buffer"):
            at_least(name, getattr(self, name), 1)
        at_least("align_weight", self.align_weight, 0)
        at_least("time_scale", self.time_scale, 0, above=True)
        for name in ("label_dropout", "dropout"):
            at_least(name, getattr(self, name), 0)
        if self.label_dropout > 1:
            raise ValueError(f"label_dropout={self.label_dropout} is not a share: give a number from 0 to 1.")
        if self.dropout is not None and self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout} is not allowed: give a number from 0 to below 1.")
        self._check_kind()
        self._check_weighting()
        self._check_alignment()

    def _check_kind(self) -> None:
        for other, settings in _OWN.items():
            for name in settings:
                if name not in _OWN[self.generator] and getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is a setting of generator={other!r}, not of "
                        f"{self.generator!r}: leave it out."
                    )

    def _check_weighting(self) -> None:
        if self.weighting not in (None, "none") and self.prediction in (None, "velocity"):
            raise ValueError(
                f"weighting={self.weighting!r} has no effect on prediction='velocity', whose loss is not weighted: "
                "choose prediction among 'noise', 'score', or weighting='none'."
            )

    def _check_alignment(self) -> None:
        if (self.align_block is None) != (self.align_width is None):
            raise ValueError(
                f"align_block={self.align_block} and align_width={self.align_width} belong together: give both, the "
                "block and the width of the teacher's features, or neither."
            )
        if self.align_block is None and self.align_weight is not None:
            raise ValueError(f"align_weight={self.align_weight} needs align_block and align_width: give them too.")
        if self.align_block is not None and self.align_block > self.row["depth"]:
            raise ValueError(
                f"align_block={self.align_block} is beyond the {self.row['depth']} blocks of size={self.size!r}: "
                f"choose a block from 1 to {self.row['depth']}."
            )

    @property
    def row(self) -> dict:
        """Depth, width and heads of this size."""
        return SIZES[self.generator][self.size]

    def resolved(self) -> "GeneratorConfig":
        """Return the configuration with every None filled in that belongs to this kind of generator.

        Raises:
            ValueError: when tokens, dim or classes are not known, or tokens make no square for positions `grid`.
        """
        for name in ("tokens", "dim", "classes"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is not given: take it from the latents, or give it, for example {name}=32.")
        filled = {}
        for name, default in _OWN[self.generator].items():
            value = getattr(self, name)
            filled[name] = value if value is not None else self.row.get(name, default)
        if self.align_block is not None and self.align_weight is None:
            filled["align_weight"] = 0.5
        if filled.get("positions") == "grid" and math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(
                f"tokens={self.tokens} make no square, which positions='grid' needs: choose positions among 'sincos', "
                "'learned', or a square number of tokens."
            )
        return dataclasses.replace(self, **filled)


_CHOICES = {
    "positions": POSITIONS,
    "path": PATHS,
    "prediction": PREDICTIONS,
    "weighting": WEIGHTINGS,
    "times": TIMES,
    "schedule": SCHEDULES,
}
