"""The authors' published tokenizers (SoftVQVAE/softvq-* on the Hugging Face hub): their names, settings, statistics."""

import logging
import math
import re
from pathlib import Path

from torch import Tensor

from softvq_lib.config import strict
from softvq_lib.tokenizers.presets import PRESETS, TokenizerConfig

log = logging.getLogger(__name__)

# Their prefix -> ours, the first that fits. None: a tensor that nothing is computed from.
_NAMES = {
    "decoder.model.patch_embed.": None,  # the decoder sees no pixels
    "quantize.codebook_used": None,  # a counter of the training
    "repa_model.": None,  # the alignment loss: the frozen network that it aligns to, and the projector
    "projection.": None,
    "encoder.model.": "encoder.vit.",
    "decoder.model.": "decoder.vit.",
    "decoder.to_pixel.model.": "decoder.to_pixels.",
    "quant_conv.": "to_latent.",
    "post_quant_conv.": "from_latent.",
    "quantize.embedding": "quantizer.codebook",
}

# Mean and standard deviation of the latents over ImageNet, from the authors' code (inference settings of their
# generators); 512: images of 512 px, otherwise 256 px.
STATISTICS = {
    "l-64": (9.714666e-4, 0.07259091),
    "bl-64": (-7.7168e-4, 0.07157949),
    "b-64": (-3.192751e-3, 0.07235257),
    "s-64": (-9.900e-4, 0.06745294),
    "l-32": (6.0894643e-4, 0.029030401),
    "bl-32": (1.0870857e-3, 0.028672216),
    "b-32": (-1.770356e-4, 0.029009325),
    "s-32": (2.0753e-4, 0.029780312),
    "bl-64-512": (-2.1498345e-3, 0.073663734),
    "l-32-512": (-1.1922447e-3, 0.028908715),
}

# Their setting -> ours and its default in their code, which stands in for a setting that the file leaves out.
_SETTINGS = {
    "image_size": ("image_size", 256),
    "enc_patch_size": ("patch_size", 16),
    "num_latent_tokens": ("tokens", None),
    "codebook_embed_dim": ("dim", None),
    "codebook_size": ("codebook_size", None),
    "num_codebooks": ("codebooks", 1),
    "tau": ("temperature", 0.1),
}
_SIZES = ("s", "b", "bl", "l")
# Settings that this library has in one form only, with that form. Left out, they have it in their code too, but for
# the two types, which the published files always name.
_ONLY = {
    "codebook_l2_norm": True,
    "enc_type": "vit",
    "dec_type": "vit",
    "to_pixel": "linear",
    "use_ape": True,
    "use_rope": False,
    "dec_cls_token": True,
    "enc_token_drop": 0.0,
}
# Settings of the training, of their convolutional networks, and of losses: nothing here is computed from them.
# enc_pretrained asks for weights to start from, which the loaded ones would replace.
_UNUSED = re.compile(
    r"repa|repa_.*|aux_.*|rope_.*|(enc|dec)_(tuning_method|pretrained|drop_path_rate|token_drop_max)|base_image_size"
    r"|codebook_show_usage|commit_loss_beta|(entropy|vq)_loss_ratio|kl_loss_weight|(en|de)coder_ch_mult|z_channels"
    r"|dropout_p"
)


def our_name(name: str) -> str | None:
    """Return this library's name for a published tensor, None when nothing is computed from it."""
    for theirs, ours in _NAMES.items():
        if name.startswith(theirs):
            return None if ours is None else ours + name[len(theirs) :]
    return name


def their_name(name: str) -> str:
    """Undo `our_name`."""
    for theirs, ours in _NAMES.items():
        if ours is not None and name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a published state dict to this library's names, leaving out what nothing is computed from.

    Shapes stay as they are.

    Their pixel head orders a patch as rows, columns, channels, which is ours too.
    """
    return {ours: tensor for name, tensor in state.items() if (ours := our_name(name)) is not None}


def is_published(settings: dict) -> bool:
    """Tell the authors' flat settings from a `TokenizerConfig`."""
    return "preset" not in settings and any(
        name in settings for name in ("encoder_model", "codebook_embed_dim", "num_latent_tokens")
    )


def read(settings: dict) -> TokenizerConfig:
    """Translate the authors' settings.

    Raises:
        ValueError: for a setting that is missing, of the wrong type, or not supported here, naming it.
    """
    needed = {"encoder_model", "decoder_model"} | {theirs for theirs, (_, default) in _SETTINGS.items() if not default}
    if missing := sorted(needed - set(settings)):
        raise ValueError(f"{', '.join(missing)} missing from the settings of a published tokenizer.")
    only = {**_ONLY, "dec_patch_size": settings.get("enc_patch_size", 16)}
    for name, value in only.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]!r} is not supported: only {name}={value!r} is.")
    known = {*needed, *_SETTINGS, *only, "vq_mean", "vq_std"}
    if unknown := sorted(name for name in settings if name not in known and not _UNUSED.fullmatch(name)):
        log.warning("unknown settings of the published tokenizer are ignored: %s.", ", ".join(unknown))
    values = {ours: settings.get(theirs, default) for theirs, (ours, default) in _SETTINGS.items()}
    try:
        return strict(TokenizerConfig, {"preset": _preset(settings), "entropy_temperature": 0.01, **values})
    except ValueError as error:
        names = ", ".join(f"{ours} is {theirs}" for theirs, (ours, _) in _SETTINGS.items() if ours != theirs)
        raise ValueError(f"{error} (In the authors' names: {names}.)") from None


def _preset(settings: dict) -> str:
    """Return the preset with these two networks, whose timm names may come without the weights' tag."""
    pairs = {(PRESETS[size]["encoder"], PRESETS[size]["decoder"]): size for size in _SIZES}
    asked = (str(settings["encoder_model"]), str(settings["decoder_model"]))
    for pair, size in pairs.items():
        if all(name in (full, full.split(".")[0]) for name, full in zip(asked, pair, strict=True)):
            return size
    supported = "; ".join(f"{encoder} and {decoder}" for encoder, decoder in pairs)
    raise ValueError(f"encoder_model={asked[0]!r} with decoder_model={asked[1]!r} is not supported: only {supported}.")


def statistics(settings: dict, config: TokenizerConfig, name: str) -> tuple[float | None, float | None]:
    """Return mean and standard deviation of the latents: the file's own, or the published ones of the repository.

    Args:
        settings: The authors' settings.
        config: Their translation.
        name: Hub name, or path of the folder.

    Raises:
        ValueError: for a mean or deviation that cannot be one.
    """
    mean, std = settings.get("vq_mean", 0.0), settings.get("vq_std", 1.0)
    for key, value in (("vq_mean", mean), ("vq_std", std)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key}={value!r} is not a finite number.")
    if std <= 0:
        raise ValueError(f"vq_std={std!r} is not above 0.")
    if (mean, std) != (0.0, 1.0):
        return float(mean), float(std)
    folder = Path(name)
    if folder.parent.name == "snapshots":  # the hub's cache: models--SoftVQVAE--softvq-l-64/snapshots/<commit>
        folder = folder.parent.parent
    match = re.fullmatch(r"(?:models--.*--)?softvq-(.+)", folder.name.lower())
    if not match or match[1] not in STATISTICS:
        return None, None
    size, tokens, pixels = [*match[1].split("-"), "256"][:3]
    if (tokens, pixels) != (str(config.tokens), str(config.image_size)):
        return None, None
    if size != config.preset:
        log.warning("%s is named after size %s, but its settings are those of size %s.", name, size, config.preset)
    return STATISTICS[match[1]]
