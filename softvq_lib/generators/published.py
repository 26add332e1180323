"""The authors' published generators (SoftVQVAE/{sit,dit}-xl_softvq-* on the Hugging Face hub): settings, statistics.

Tensors have the names of `Transformer`. SiT's class is REPA's: it predicts the velocity alone, and the projectors of
its alignment, if they are in a file, are of no use for sampling. DiT's predicts eps and the variance. Both add a fixed
embedding of positions that interleaves sines and cosines; it is among the tensors and is taken from there.
"""

import logging
import re
from pathlib import Path

from softvq_lib.config import strict
from softvq_lib.generators.presets import SIZES, GeneratorConfig
from softvq_lib.generators.sampling import SampleConfig
from softvq_lib.tokenizers.published import STATISTICS

log = logging.getLogger(__name__)

# What their files do not say. SiT: the path and the times of the training follow its code, which has both paths; its
# README and its notebook sample along the cosine one (`gvp`). The setting path_type='edm' of its files is not used by
# that code. DiT: the schedule of the paper's DiT.
_TRAINED = {"sit": {"path": "gvp", "times": "lognormal"}, "dit": {"schedule": "cosine"}}
# How their README samples for the published FIDs with guidance.
SAMPLING = {
    "sit": SampleConfig(solver="sde", sample_steps=250, diffusion="linear", guidance_scale=1.75, guidance_high=0.7),
    "dit": SampleConfig(solver="ddpm", sample_steps=250, guidance_scale=1.75),
}

# Their setting -> ours and its default in their code.
_SETTINGS = {
    "input_size": ("tokens", None),
    "in_channels": ("dim", None),
    "num_classes": ("classes", 1000),
    "class_dropout_prob": ("label_dropout", 0.1),
}
_NETWORK = {"depth": ("depth", 28), "hidden_size": ("width", 1152), "num_heads": ("heads", 16)}
# Settings that this library has in one form only, with that form.
_ONLY = {"vae_1d": True, "learn_sigma": True, "mlp_ratio": 4.0, "qk_norm": False}
# Which kernel computes attention, the training, and a card's head. A patch is one token whatever patch_size says.
_UNUSED = re.compile(
    r"path_type|use_cfg|patch_size|decoder_hidden_size|z_dims|encoder_depth|projector_dim|fused_attn|flash_attn"
    r"|tags|repo_url|license"
)


def our_name(name: str) -> str | None:
    """Return this library's name for a published tensor, None when nothing is computed from it."""
    return None if name.startswith("projectors.") else f"backbone.{name}"


def their_name(name: str) -> str:
    """Undo `our_name`."""
    return name.removeprefix("backbone.")


def is_published(settings: dict) -> bool:
    """Tell the authors' settings from a `GeneratorConfig`."""
    return "generator" not in settings and ("input_size" in settings or "in_channels" in settings)


def read(settings: dict) -> GeneratorConfig:
    """Translate the authors' settings; those of DiT are told from SiT's by learn_sigma.

    Raises:
        ValueError: for a setting that is missing, of the wrong type, or not supported here, naming it.
    """
    if missing := sorted(
        theirs for theirs, (_, default) in _SETTINGS.items() if not default and theirs not in settings
    ):
        raise ValueError(f"{', '.join(missing)} missing from the settings of a published generator.")
    for name, value in _ONLY.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]!r} is not supported: only {name}={value!r} is.")
    known = {*_SETTINGS, *_NETWORK, *_ONLY}
    if unknown := sorted(name for name in settings if name not in known and not _UNUSED.fullmatch(name)):
        log.warning("unknown settings of the published generator are ignored: %s.", ", ".join(unknown))
    kind = "dit" if "learn_sigma" in settings else "sit"
    network = {ours: settings.get(theirs, default) for theirs, (ours, default) in _NETWORK.items()}
    values = {ours: settings.get(theirs, default) for theirs, (ours, default) in _SETTINGS.items()}
    size = next((size for size, row in SIZES[kind].items() if row == network), None)
    if size is None:
        asked = ", ".join(f"{theirs}={network[ours]!r}" for theirs, (ours, _) in _NETWORK.items())
        allowed = "; ".join(", ".join(f"{name} {n}" for name, n in row.items()) for row in SIZES[kind].values())
        raise ValueError(f"{asked} is not supported: only {allowed}.")
    try:
        return strict(GeneratorConfig, {"generator": kind, "size": size, **_TRAINED[kind], **values}).resolved()
    except ValueError as error:
        names = ", ".join(f"{ours} is {theirs}" for theirs, (ours, _) in _SETTINGS.items())
        raise ValueError(f"{error} (In the authors' names: {names}.)") from None


def statistics(config: GeneratorConfig, name: str) -> tuple[str | None, float | None, float | None]:
    """Return the tokenizer whose latents a generator was trained on, and their mean and standard deviation.

    Args:
        config: The translated settings.
        name: Hub name, or path of the folder, which tells; None is returned where it does not.

    Raises:
        ValueError: when the tokenizer of that name has another number of tokens than the settings.
    """
    folder = Path(name)
    if folder.parent.name == "snapshots":  # the hub's cache: models--SoftVQVAE--sit-xl_softvq-l-64/snapshots/<commit>
        folder = folder.parent.parent
    match = re.fullmatch(r"(?:models--.*--)?(?:sit|dit)-\w+?_softvq-(.+)", folder.name.lower())
    if not match or match[1] not in STATISTICS:
        return None, None, None
    tokens = int(match[1].split("-")[1])
    if tokens != config.tokens:
        raise ValueError(
            f"input_size={config.tokens}, but softvq-{match[1]}, after which {folder.name} is named, has {tokens} "
            "tokens: get config.json and model.safetensors from one place."
        )
    return f"SoftVQVAE/softvq-{match[1]}", *STATISTICS[match[1]]
