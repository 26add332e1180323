"""Data of explorable pictures: what trained tokenizers, posteriors and counts give, packed for a page without server.

Every function returns plain values that JSON can hold. Pictures are PNG, base64; weights are float16, base64.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softvq_lib.data import Source
from softvq_lib.data.images import fit, to_tensor
from softvq_lib.evaluation import bootstrap_mean
from softvq_lib.evaluation.cost import decoding_macs
from softvq_lib.evaluation.export import to_uint8
from softvq_lib.evaluation.generator_cost import forward_macs, generator_config, sampling_macs
from softvq_lib.evaluation.throughput import kl_decoding_macs
from softvq_lib.experiments import TokenizerExperiment
from softvq_lib.generators import SIZES
from softvq_lib.method_figures import CODE_COLOURS, TOY_CODEBOOK
from softvq_lib.style import OKABE_ITO, QUANTIZER_COLOURS, QUANTIZER_NAMES
from softvq_lib.tokenizers import PRESETS
from softvq_lib.tokenizers.softvq import FORMS

LOOKS = {"colours": QUANTIZER_COLOURS, "names": QUANTIZER_NAMES}


# -- pictures --------------------------------------------------------------------------------------------------------


def pictures_of(source: Source, indices: Iterable[int], image_size: int) -> Tensor:
    """Take pictures out of a source as models see them: (m, 3, height, width) in [-1, 1]."""
    pixels = np.stack([fit(source[index][0], image_size) for index in indices])  # (m, h, w, 3)
    return to_tensor(torch.from_numpy(pixels))


def png_row(images: Tensor) -> str:
    """Put pictures (m, 3, height, width) in [-1, 1] beside each other as one PNG, base64."""
    row = np.concatenate(list(to_uint8(images)), axis=1)  # (h, m w, 3)
    file = io.BytesIO()
    Image.fromarray(row).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def provenance(experiments: Iterable[TokenizerExperiment]) -> str:
    """Say in a line what trained tokenizers come from: data, steps, seed, machine, versions, commits, last date.

    A commit with a + had changes on top.
    """
    runs = [experiment.run for experiment in experiments]
    manifests = [run.manifest for run in runs]

    def said(values: Iterable[object]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    of = [run.identity for run in runs]
    in_time = sorted(manifests, key=lambda manifest: manifest["ended"])
    made = list(dict.fromkeys(m["commit"][:9] + ("+" if m["dirty"] else "") for m in in_time))
    commits = f"commit {made[0]}" if len(made) == 1 else f"commits {made[0]} to {made[-1]}"
    packages = said(f"torch {manifest['packages']['torch']}" for manifest in manifests)
    return (
        f"{len(runs)} {'tokenizer' if len(runs) == 1 else 'tokenizers'} of size {said(one['preset'] for one in of)}, "
        f"trained on {said(m['data']['name'] for m in manifests)} for {said(one['steps'] for one in of)} steps of "
        f"{said(one['batch_size'] for one in of)} images, seed {said(one['seed'] for one in of)}; "
        f"{said(m['device_name'] for m in manifests)}, {said(m['precision'] for m in manifests)}, {packages}; "
        f"{commits}; "
        f"{max(m['ended'] for m in manifests)[:10]}."
    )


# -- reconstructions by quantizer and tokens ---------------------------------------------------------------------------


@torch.no_grad()
def reconstruction_data(
    experiments: Mapping[tuple[str, int], TokenizerExperiment], images: Tensor, names: Sequence[str]
) -> dict[str, object]:
    """Reconstruct pictures by every tokenizer.

    Args:
        experiments: By quantizer and tokens.
        images: (m, 3, height, width) in [-1, 1], which none of them was trained on.
        names: What each picture shows.

    Returns:
        `size` in pixels, `pictures` (names), `originals` (PNG row), `arms`: quantizer, tokens, dim, `png` (row of
        reconstructions), and of all held-out images the mean PSNR with its 95 % bootstrap interval, dB.
    """
    arms = []
    for (quantizer, tokens), experiment in experiments.items():
        tokenizer = experiment.run.tokenizer.eval()
        reconstructions, _ = tokenizer(images)
        mean, low, high = bootstrap_mean(experiment.measured.psnr)
        arms.append(
            {
                "quantizer": quantizer,
                "tokens": tokens,
                "dim": tokenizer.config.dim,
                "png": png_row(reconstructions),
                "psnr": {"mean": mean, "low": low, "high": high, "n": len(experiment.measured.psnr)},
            }
        )
    return {
        "size": images.shape[-1],
        "pictures": list(names),
        "originals": png_row(images),
        "arms": arms,
        **LOOKS,
    }


# -- tokens, one by one ------------------------------------------------------------------------------------------------

# What a page decodes with; the rest of a tokenizer stays at home.
_DECODER = ("decoder.", "from_latent.")
_UNUSED = ("decoder.vit.norm_pre", "decoder.vit.fc_norm")


def pack(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Pack tensors as float16: `shapes` by name, and `data`, all numbers in that order, base64."""
    numbers = np.concatenate([tensor.detach().numpy().astype("<f2").ravel() for tensor in tensors.values()])
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return {"shapes": shapes, "data": base64.b64encode(numbers.tobytes()).decode()}


def unpack(packed: Mapping[str, object]) -> dict[str, Tensor]:
    """Undo `pack`: fp32 tensors by name and of their shapes, their values rounded to float16."""
    numbers = torch.from_numpy(np.frombuffer(base64.b64decode(packed["data"]), "<f2").astype(np.float32))
    sizes = [int(np.prod(shape)) for shape in packed["shapes"].values()]
    parts = numbers.split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(packed["shapes"].items(), parts, strict=True)}


@torch.no_grad()
def token_data(
    experiment: TokenizerExperiment, images: Tensor, names: Sequence[str], pair: tuple[int, int], averaged: int = 999
) -> dict[str, object]:
    """Pack a decoder, and the latents of pictures for it.

    Args:
        experiment: A tokenizer whose decoder's blocks are plain ones, with or without LayerScale.
        images: (m, 3, height, width) in [-1, 1].
        names: What each picture shows.
        pair: Numbers of the two pictures that a page starts with.
        averaged: Held-out images whose mean latent stands for a token that is taken away.

    Returns:
        `size`, `patch`, `heads`, `depth`, `epsilon`, `tokens`, `dim`, `preset`, `quantizer`, `pictures`, `pair`,
        `originals` (PNG row), `weights` (see `pack`, under the names of the tokenizer's own parameters) and `latents`,
        z (m, l, d) and its mean (l, d), packed.
    """
    tokenizer = experiment.run.tokenizer.eval()
    source, config = experiment.data.validation, tokenizer.config
    held_out = pictures_of(source, range(min(averaged, len(source))), config.image_size)
    mean = torch.cat([tokenizer.encode(part).z for part in held_out.split(128)]).mean(0)
    vit = tokenizer.decoder.vit
    weights = {name: tensor for name, tensor in tokenizer.state_dict().items() if name.startswith(_DECODER)}
    assert not any(name.startswith(_UNUSED) for name in weights), "a decoder with norms that the page does not know"
    assert not any("q_norm" in name for name in weights), "blocks that the page does not know"
    return {
        "size": config.image_size,
        "patch": config.patch_size,
        "heads": vit.blocks[0].attn.num_heads,
        "depth": len(vit.blocks),
        "epsilon": vit.norm.eps,
        "tokens": config.tokens,
        "dim": config.dim,
        "preset": config.preset,
        "quantizer": config.quantizer,
        "pictures": list(names),
        "pair": list(pair),
        "originals": png_row(images),
        "weights": pack(weights),
        "latents": pack({"z": tokenizer.encode(images).z, "mean": mean}),
        **LOOKS,
    }


# -- the posterior on a plane ------------------------------------------------------------------------------------------


def posterior_data(tokens: int = 40) -> dict[str, object]:
    """Give codewords (k, 2) of the method's figures with their colours, and encoder outputs (l, 2) around them."""
    cloud = np.random.default_rng(7).uniform(-1, 1, (tokens, 2))
    return {
        "codebook": TOY_CODEBOOK.tolist(),
        "code_colours": [OKABE_ITO[name] for name in CODE_COLOURS],
        "tokens": cloud.round(3).tolist(),
        "temperatures": {name: form.temperature for name, form in FORMS.items()},
        **LOOKS,
    }


# -- costs -------------------------------------------------------------------------------------------------------------

SHOWN_SIZES = {"sit": ("s", "b", "l", "xl"), "dit": ("s", "b", "l", "xl"), "mar": ("b", "l", "h")}
SHOWN_NAMES = {"sit": "SiT", "dit": "DiT", "mar": "MAR"}
SOFTVQ_TOKENS = {32: 64, 64: 32, 128: 16, 256: 8}  # to channels: tokens x channels = 2048
KL_TOKENS = {256: (256, 16), 512: (1024, 16)}  # pixels to patches, or tokens of MAR, and channels
STEPS = (8, 16, 25, 32, 50, 64, 100, 128, 250)
GUIDANCE = {"none": {}, "all": {"guidance_scale": 2.0}, "low": {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.7)}}
DECODERS = ("s", "b", "bl", "l")


def cost_data(paper_rows: Iterable[dict], measured_rows: Iterable[dict]) -> dict[str, object]:
    """Count what generators and decoders cost, for every choice that a page offers; beside it the paper's and ours.

    Args:
        paper_rows: As `results.read_paper` returns them.
        measured_rows: Of `efficiency.jsonl`, as `results.read` returns them.

    Returns:
        `forward[generator][size][tokens]`, MACs of one pass; `sampling[generator][size][tokens][guidance][steps]`, of
        an image, tokens being SoftVQ's or, under `kl256` and `kl512`, those of KL latents; `decoding[pixels]`, by
        preset and tokens, and SD-VAE's under `kl`; `paper`, printed rows; `measured`, ratios of time.
    """
    shapes = {str(n): (n, d) for n, d in SOFTVQ_TOKENS.items()}
    shapes |= {f"kl{pixels}": shape for pixels, shape in KL_TOKENS.items()}
    forward: dict = {}
    sampling: dict = {}
    for generator, sizes in SHOWN_SIZES.items():
        assert set(sizes) <= set(SIZES[generator])
        for size in sizes:
            for name, (n, d) in shapes.items():
                config = generator_config(generator, size, n, d)
                forward.setdefault(generator, {}).setdefault(size, {})[name] = forward_macs(config)
                guidance = {g: how for g, how in GUIDANCE.items() if not (generator == "mar" and g == "low")}
                sampling.setdefault(generator, {}).setdefault(size, {})[name] = {
                    g: {str(s): sampling_macs(config, s, **how) for s in STEPS if generator != "mar" or s <= n}
                    for g, how in guidance.items()
                }
    decoding = {
        str(pixels): {
            **{p: {str(n): decoding_macs(p, n, d, pixels) for n, d in SOFTVQ_TOKENS.items()} for p in DECODERS},
            "kl": kl_decoding_macs(pixels),
        }
        for pixels in KL_TOKENS
    }
    return {
        "names": SHOWN_NAMES,
        "sizes": SHOWN_SIZES,
        "tokens": list(SOFTVQ_TOKENS),
        "dims": {str(n): d for n, d in SOFTVQ_TOKENS.items()},
        "steps": list(STEPS),
        "decoders": {preset: f"SoftVQ-{preset.upper()}" for preset in DECODERS if preset in PRESETS},
        "forward": forward,
        "sampling": sampling,
        "decoding": decoding,
        "paper": _printed(paper_rows),
        "measured": _ratios(measured_rows),
        "colours": QUANTIZER_COLOURS,
    }


def cost_provenance(data: Mapping[str, object]) -> str:
    """Say in a line where the numbers of `cost_data` come from."""
    rows = data["measured"]
    dates, devices = sorted({row["date"][:10] for row in rows}), sorted({row["device"] for row in rows})
    return (
        "MACs: counted on shapes by softvq_lib.evaluation. The paper's numbers: Tab. 1 and 2 of arXiv:2412.10958. "
        f"Times: measured on {', '.join(devices)}, {', '.join(dates)}, random weights."
    )


def _printed(rows: Iterable[dict]) -> list[dict]:
    """Gflops and images a second of Tab. 1 and 2, with the generator that a row is of."""
    rows = [row for row in rows if row["place"] in ("Tab. 1", "Tab. 2")]
    known = {(row["place"], row["what"]): row for row in rows if "generator" in row}
    found = []
    for row in rows:
        of = row if "generator" in row else known.get((row["place"], row["what"]))
        if row["metric"] not in ("gflops", "throughput") or of is None:
            continue
        kind = {"latents": of.get("latents", "softvq"), "generator": of["generator"], "size": of["size"]}
        said = {name: row[name] for name in ("place", "what", "metric", "value", "note") if name in row}
        found.append(kind | {"tokens": of["tokens"], "preset": row.get("preset")} | said)
    return found


def _ratios(rows: Iterable[dict]) -> list[dict]:
    """Ratios of time of generators' steps, whole images and guidance, with their intervals and what counts say."""
    found = []
    for row in rows:
        config = row["config"]
        name = str(config.get("name", ""))
        if row["metric"] == "time_ratio" and name.startswith(("step-", "image-", "guided")):
            said = {key: config.get(key) for key in ("name", "what", "against", "expected", "size", "batch_size")}
            said |= {key: row[key] for key in ("value", "low", "high", "device", "date")}
            found.append(said | {"derived": row["source"] == "derived"})
    return found
