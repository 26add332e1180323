"""ONNX: encoder and decoder of a tokenizer as two files that need neither torch nor this library.

    encoder.onnx   images (b, 3, height, width) in [-1, 1]  ->  z (b, l, d), z_hat (b, l, d), for KL (b, l, 2 d)
    decoder.onnx   z (b, l, d)                              ->  images (b, 3, height, width), about [-1, 1], not clamped

The batch b is free. z is as `Tokenizer.encode` gives it in evaluation (for KL the mean) and not normalised: mean and
standard deviation of the latents are in each file's metadata, with the configuration and the tokenizer's fingerprint.
z_hat is the encoder's output before quantization; of KL's, the first half is the mean and the second the logarithm of
the variance.

A graph has no loop over chunks, so for the posteriors that training takes in chunks (`paper`), and in VQ and GMMVQ, the
scores of all tokens and codes are in memory at once: 4 b l k bytes.
"""

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from softvq_lib import __version__, cards, weights
from softvq_lib.conversion.convert import Statistics, relative
from softvq_lib.data.latents import tokenizer_hash
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.tokenizers.card import card

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
_MOST = 1.5e9  # bytes of weights inside a file, whose format ends at 2 GiB; more of them lie beside it
_BATCHES = (1, 3)  # that are compared
_USE = """\
Needs onnxruntime and numpy alone. `encoder.onnx` maps `images` (batch, 3, {image_size}, {image_size}) in [-1, 1] to `z`
(batch, {tokens}, {dim}) and `z_hat`, the encoder's output before quantization; `decoder.onnx` maps `z` to `images`.

```python
import json

import numpy as np
import onnxruntime as ort

encoder = ort.InferenceSession("encoder.onnx", providers=["CPUExecutionProvider"])
decoder = ort.InferenceSession("decoder.onnx", providers=["CPUExecutionProvider"])
images = np.zeros((2, 3, {image_size}, {image_size}), np.float32)  # values in [-1, 1]
(z,) = encoder.run(["z"], {{"images": images}})  # (2, {tokens}, {dim})
(restored,) = decoder.run(["images"], {{"z": z}})  # (2, 3, {image_size}, {image_size}), not clamped

known = encoder.get_modelmeta().custom_metadata_map
mean, std = (np.array(json.loads(known[name]), np.float32) for name in ("latent_mean", "latent_std"))
normalised = (z - mean) / std  # what generators see
```

{statistics}"""


class _Encoder(nn.Module):
    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        code = self.tokenizer.encode(images)
        # Without a quantizer the two are one tensor, which cannot have two names.
        return code.z, code.z_hat.clone() if code.z is code.z_hat else code.z_hat


class _Decoder(nn.Module):
    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, z: Tensor) -> Tensor:
        return self.tokenizer.decode(z)


def write(tokenizer: Tokenizer, folder: Path, statistics: Statistics, *, opset: int) -> None:
    """Write the two files, config.json and the card of a tokenizer on the CPU, in evaluation mode, in fp32."""
    config = tokenizer.config
    about = {
        "softvq_lib": __version__,
        "config": asdict(replace(config, pretrained=False)),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "latent_mean": statistics.mean,
        "latent_std": statistics.std,
        "latent_statistics_known": statistics.known,
        "origin": tokenizer.origin,
        "trained": tokenizer.trained,
    }
    size = config.image_size
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    images, z = torch.zeros(2, 3, size, size), torch.zeros(2, config.tokens, config.dim)
    to_file(_Encoder(tokenizer).eval(), images, ["images"], ["z", "z_hat"], folder / ENCODER, opset, metadata)
    to_file(_Decoder(tokenizer).eval(), z, ["z"], ["images"], folder / DECODER, opset, metadata)
    weights.write_settings(folder, {"format": "onnx", "opset": opset} | about)
    said = "The tokenizer came without mean and standard deviation of its latents, so these are 0 and 1 here."
    if statistics.known:
        said = "Mean and standard deviation are those of the latents over the training data."
    use = _USE.format(image_size=size, tokens=config.tokens, dim=config.dim, statistics=said)
    cards.write(card(tokenizer, use=use, library="onnx"), folder)


def to_file(
    module: nn.Module,
    example: Tensor,
    inputs: list[str],
    outputs: list[str],
    path: Path,
    opset: int,
    metadata: dict[str, str],
) -> None:
    """Write a module of one input as an ONNX file.

    Args:
        module: In evaluation mode, on the CPU.
        example: An input (b, ...), b above 1; in the file b is free.
        inputs: The input's name.
        outputs: Names of the outputs.
        path: The file.
        opset: Version of the operators.
        metadata: For the file, by name.
    """
    size = sum(x.numel() * x.element_size() for x in module.state_dict().values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=opset,
            verbose=False,
        )
    graph = program.model
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()  # the exporter notes the lines of source that each came from, with their paths
    graph.metadata_props.clear()
    graph.metadata_props.update(metadata)
    graph.producer_name, graph.producer_version = "softvq_lib", __version__
    program.save(path, external_data=size > _MOST)


def differences(tokenizer: Tokenizer, folder: Path, seed: int = 0) -> dict[str, float]:
    """Run the files with onnxruntime and return by how much each output differs from the tokenizer's.

    z is compared with what the tokenizer's quantizer makes of the file's own z_hat: of two codewords that are equally
    near, rounding of z_hat may choose either, and both are right.

    Args:
        tokenizer: On the CPU, in evaluation mode.
        folder: Where the files lie.
        seed: Of the images, uniform noise.

    Returns:
        Largest differences by output, as in `Exported.differences`, over batches of different sizes.
    """
    import onnxruntime

    encoder, decoder = (
        onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"]) for name in (ENCODER, DECODER)
    )
    size = tokenizer.config.image_size
    generator = torch.Generator().manual_seed(seed)
    worst = {"z_hat": 0.0, "z": 0.0, "images": 0.0}
    for batch in _BATCHES:
        images = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
        z, z_hat = encoder.run(["z", "z_hat"], {"images": images.numpy()})
        (restored,) = decoder.run(["images"], {"z": z})
        with torch.no_grad():
            wanted = {
                "z_hat": tokenizer.encode(images).z_hat,
                "z": tokenizer.quantizer(torch.from_numpy(z_hat))[0],
                "images": tokenizer.decode(torch.from_numpy(z)),
            }
        for name, found in {"z_hat": z_hat, "z": z, "images": restored}.items():
            worst[name] = max(worst[name], relative(found, wanted[name]))
    return worst
