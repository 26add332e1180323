"""Names of the authors' published state dicts, and ours (SoftVQVAE on the Hugging Face hub)."""

from torch import Tensor

# Their prefix -> ours, the first that fits. None: a tensor that nothing is computed from.
_NAMES = {
    "decoder.model.patch_embed.": None,  # the decoder sees no pixels
    "quantize.codebook_used": None,  # a counter of the training
    "encoder.model.": "encoder.vit.",
    "decoder.model.": "decoder.vit.",
    "decoder.to_pixel.model.": "decoder.to_pixels.",
    "quant_conv.": "to_latent.",
    "post_quant_conv.": "from_latent.",
    "quantize.embedding": "quantizer.codebook",
}


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a published state dict to this library's names, leaving out what nothing is computed from.

    Their pixel head orders a patch as rows, columns, channels, which is ours too.
    """
    ours = {}
    for name, tensor in state.items():
        for theirs, mine in _NAMES.items():
            if name.startswith(theirs):
                if mine is not None:
                    ours[mine + name[len(theirs) :]] = tensor
                break
        else:
            ours[name] = tensor
    return ours
