"""Time of generators: steps, sampling with decoding, training, guidance (Tab. 1, 2; Sec. 4.2), and diffusers' DiT.

The paper's denominator is built too: SiT on 2 x 2 patches of KL latents, 256 of them at 256 px and 1024 at 512 px, and
diffusers' AutoencoderKL. All weights are random: time does not depend on them. What is compared takes turns in one
process, and ratios of medians come with a bootstrap interval over rounds.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from softvq_lib.config import at_least, one_of
from softvq_lib.evaluation.cost import counted_flops
from softvq_lib.evaluation.efficiency import pinned, ratio_of_medians
from softvq_lib.evaluation.generator_cost import CLASSES, TOKENS, forward_macs
from softvq_lib.generators import SIZES, GeneratorConfig, SiT, Transformer
from softvq_lib.generators.transformer import patchify, unpatchify
from softvq_lib.tokenizers import PRESETS, Tokenizer
from softvq_lib.training import engine

PAPER_STEPS = 250
_KL_CHANNELS, _KL_DOWN, _PATCH = 4, 8, 2
# SoftVQ's tokens, pixels of the image, KL's patches.
PAIRS = ((32, 256, 256), (64, 256, 256), (64, 512, 1024))

Subjects = dict[str, Callable[[], object]]
Seconds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Bench:
    """What is measured, all in fp32.

    Attributes:
        size: Of the SiT, a row of its `SIZES`.
        preset: Size of the SoftVQ tokenizer.
        kl_width: Channels of the KL autoencoder's first stage; SD-VAE has 128.
        batch_size: Images at once.
        steps: Of the solver, Euler's, in one measured run.
        rounds: Measured ones, 3 or more.
        threads: Of the processor. There its seconds are counted, elsewhere those of the clock.
        device: `cpu` or a torch device.
    """

    size: str = "b"
    preset: str = "b"
    kl_width: int = 128
    batch_size: int = 1
    steps: int = 2
    rounds: int = 5
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self):
        one_of("size", self.size, SIZES["sit"])
        one_of("preset", self.preset, PRESETS)
        for name in ("kl_width", "batch_size", "steps", "threads"):
            at_least(name, getattr(self, name), 1)
        at_least("rounds", self.rounds, 3)

    def labels(self) -> Tensor:
        """Return labels (b,) that go round the classes."""
        return torch.arange(self.batch_size, device=self.device) % CLASSES

    def generator(self) -> torch.Generator:
        """Return a generator that starts from 0, on the device."""
        return torch.Generator(self.device).manual_seed(0)

    def numbers(self, *shape: int) -> Tensor:
        """Return normal numbers (b, *shape) in fp32, the same at each call."""
        return torch.randn(self.batch_size, *shape, generator=self.generator(), device=self.device)


@dataclass(frozen=True)
class Comparison:
    """What one thing takes of another's time.

    Attributes:
        name: Short, for the row.
        what: That is measured.
        against: That it is measured against.
        bench: What it was measured on.
        seconds: Of what, the median over rounds.
        against_seconds: Of the other.
        ratio: Of the medians, seconds / against_seconds.
        low: Lower end of the ratio's 95 % interval.
        high: Its upper end.
        expected: The same ratio in true multiply-accumulates or network evaluations. None: not known.
        derived: Computed from measured parts, not measured as a whole.
    """

    name: str
    what: str
    against: str
    bench: Bench
    seconds: float
    against_seconds: float
    ratio: float
    low: float
    high: float
    expected: float | None = None
    derived: bool = False


def compare(
    bench: Bench,
    name: str,
    what: tuple[str, np.ndarray],
    against: tuple[str, np.ndarray],
    expected: float | None = None,
    derived: bool = False,
) -> Comparison:
    """Compare two things by their seconds in the same rounds, (rounds,) each."""
    medians = (float(np.median(seconds)) for _, seconds in (what, against))
    ratio = ratio_of_medians(what[1], against[1])
    return Comparison(name, what[0], against[0], bench, *medians, *ratio, expected, derived)


def in_turns(subjects: Subjects, bench: Bench) -> Seconds:
    """Return seconds of each subject in each round, (rounds,), after one round that does not count."""
    device = torch.device(bench.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return clock()

    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    with pinned(bench.threads):
        for _ in range(bench.rounds + 1):
            for name, run in subjects.items():
                start = now()
                run()
                seconds[name].append(now() - start)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def throughput(bench: Bench, peer_batch: int | None = None) -> list[Comparison]:
    """Measure all comparisons, one kind after the other, so that the nets of one kind fill the memory at a time.

    Args:
        bench: What is measured.
        peer_batch: Images at once beside diffusers' DiT, which takes little time. None: as elsewhere.
    """
    peers = replace(bench, batch_size=peer_batch or bench.batch_size)
    return [*sampling(bench), *training(bench), *guidance(bench), *against_diffusers(peers)]


# -- the nets --------------------------------------------------------------------------------------------------------


def _random(build: Callable[[], nn.Module], bench: Bench) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().to(bench.device).eval()


def sit_config(size: str, tokens: int) -> GeneratorConfig:
    """Return a SiT on SoftVQ's 32 or 64 tokens, or on 256 or 1024 patches of KL latents."""
    positions = "sincos" if tokens < 256 else "grid"
    return GeneratorConfig("sit", size, tokens=tokens, dim=TOKENS[tokens], classes=CLASSES, positions=positions)


def _sit(bench: Bench, tokens: int) -> SiT:
    return _random(lambda: SiT(sit_config(bench.size, tokens)), bench)


def _tokenizer(bench: Bench, tokens: int, pixels: int) -> Tokenizer:
    settings = {"tokens": tokens, "dim": TOKENS[tokens], "image_size": pixels}
    return _random(lambda: Tokenizer.from_preset(bench.preset, **settings), bench)


def autoencoder(width: int) -> nn.Module:
    """Build diffusers' AutoencoderKL; with width 128 it is SD-VAE's. Random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
        latent_channels=_KL_CHANNELS,
        norm_num_groups=min(32, width),
    )


def kl_decoding_macs(image_size: int) -> int:
    """Return the multiply-accumulates of decoding one image by SD-VAE, counted on tensors without storage.

    Args:
        image_size: Height and width in pixels.
    """
    with torch.device("meta"), torch.no_grad():
        kl, side = autoencoder(128).eval(), image_size // _KL_DOWN
        return counted_flops(lambda: kl.decode(torch.empty(1, _KL_CHANNELS, side, side))) // 2


def in_diffusers(transformer: Transformer) -> nn.Module:
    """Build diffusers' DiTTransformer2DModel with the weights of a transformer on a square of tokens.

    It maps (b, d, height, width) and is the same function at time 0; at others its frequencies of time are a little
    denser.
    """
    from diffusers import DiTTransformer2DModel

    width, heads = transformer.x_embedder.out_features, transformer.blocks[0].attn.heads
    theirs = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=transformer.dim,
        out_channels=transformer.final_layer.linear.out_features,
        num_layers=len(transformer.blocks),
        sample_size=math.isqrt(transformer.tokens),
        patch_size=1,
        num_embeds_ada_norm=transformer.classes,
        norm_eps=1e-6,
    )
    pairs = [
        (theirs.proj_out_1, transformer.final_layer.adaLN_modulation[1]),
        (theirs.proj_out_2, transformer.final_layer.linear),
    ]
    for block, ours in zip(theirs.transformer_blocks, transformer.blocks, strict=True):
        time_embedder = block.norm1.emb.timestep_embedder
        pairs += [
            (time_embedder.linear_1, transformer.t_embedder.mlp[0]),
            (time_embedder.linear_2, transformer.t_embedder.mlp[2]),
            (block.norm1.emb.class_embedder.embedding_table, transformer.y_embedder.embedding_table),
            (block.norm1.linear, ours.adaLN_modulation[1]),
            (block.attn1.to_out[0], ours.attn.proj),
            (block.ff.net[0].proj, ours.mlp.fc1),
            (block.ff.net[2], ours.mlp.fc2),
        ]
        for i, linear in enumerate((block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)):
            linear.load_state_dict({k: v.chunk(3)[i] for k, v in ours.attn.qkv.state_dict().items()})
    for module, ours in pairs:
        module.load_state_dict(ours.state_dict())
    patch = theirs.pos_embed.proj
    patch.load_state_dict(
        {"weight": transformer.x_embedder.weight[:, :, None, None], "bias": transformer.x_embedder.bias}
    )
    return theirs.eval()


# -- sampling --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def sampling(bench: Bench) -> list[Comparison]:
    """Measure a step on 32, 64, 256 and 1024 tokens, and sampling with decoding against KL's.

    Whole images are compared twice: with the steps that were made, and with the paper's 250 from the same times.
    """
    kl = _random(lambda: autoencoder(bench.kl_width), bench)
    subjects: Subjects = {}
    for tokens in TOKENS:
        subjects[f"sample {tokens}"] = _sampler(_sit(bench, tokens), bench)
    for tokens, pixels, patches in PAIRS:
        tokenizer = _tokenizer(bench, tokens, pixels)
        subjects[f"decode {tokens} {pixels}"] = _decoder(tokenizer.decode, bench.numbers(tokens, TOKENS[tokens]))
        latents = bench.numbers(patches, TOKENS[patches])
        subjects[f"decode KL {pixels}"] = _decoder(lambda z: kl.decode(unpatchify(z, _PATCH)).sample, latents)
    seconds = in_turns(subjects, bench)

    def step(tokens: int) -> tuple[str, np.ndarray]:
        return f"a step on {tokens} tokens", seconds[f"sample {tokens}"] / bench.steps

    macs = {tokens: forward_macs(sit_config(bench.size, tokens)) for tokens in TOKENS}
    found = [compare(bench, f"step-{n}", step(n), step(256), macs[n] / macs[256]) for n in TOKENS if n != 256]
    for tokens, pixels, patches in PAIRS:
        for steps in dict.fromkeys([bench.steps, PAPER_STEPS]):
            ours = steps * step(tokens)[1] + seconds[f"decode {tokens} {pixels}"]
            theirs = steps * step(patches)[1] + seconds[f"decode KL {pixels}"]
            what = f"{tokens} tokens, {pixels} px, {steps} steps and decoding"
            against = (f"{patches} patches of KL latents", theirs)
            found.append(
                compare(bench, f"image-{tokens}-{pixels}-{steps}", (what, ours), against, derived=steps != bench.steps)
            )
    return found


def _sampler(model: SiT, bench: Bench, **settings: object) -> Callable[[], Tensor]:
    settings = {"steps": bench.steps, **settings}
    return lambda: model.sample(bench.labels(), draws=bench.generator(), **settings)


def _decoder(decode: Callable[[Tensor], Tensor], z: Tensor) -> Callable[[], Tensor]:
    return lambda: decode(z)


# -- training --------------------------------------------------------------------------------------------------------


def training(bench: Bench) -> list[Comparison]:
    """Measure an optimiser step on SoftVQ's 64 tokens and on KL's 256 patches, on cached latents and with encoding."""
    tokenizer, kl = _tokenizer(bench, 64, 256), _random(lambda: autoencoder(bench.kl_width), bench)
    images = bench.numbers(3, 256, 256).clamp(-1, 1)

    @torch.inference_mode()
    def encode() -> Tensor:
        return tokenizer.encode(images).z

    @torch.inference_mode()
    def encode_kl() -> Tensor:
        return patchify(kl.encode(images).latent_dist.mode(), _PATCH)

    steps = {tokens: training_step(_sit(bench, tokens), bench) for tokens in (64, 256)}
    seconds = in_turns({"64": steps[64], "256": steps[256], "encode": encode, "encode KL": encode_kl}, bench)
    cached, online = "on cached latents", "on latents encoded on the fly"
    ours = {cached: seconds["64"], online: seconds["64"] + seconds["encode"]}
    theirs = {cached: seconds["256"], online: seconds["256"] + seconds["encode KL"]}
    macs = forward_macs(sit_config(bench.size, 64)) / forward_macs(sit_config(bench.size, 256))
    patches = "256 patches of KL latents"

    def what(how: str) -> tuple[str, np.ndarray]:
        return f"training on 64 tokens, {how}", ours[how]

    return [
        compare(bench, "training-cached", what(cached), (patches, theirs[cached]), macs),
        compare(bench, "training-encoding", what(online), (patches, theirs[online])),
        compare(bench, "training-cache", what(cached), (f"the same {online}", ours[online])),
    ]


def training_step(model: SiT, bench: Bench) -> Callable[[], None]:
    """Return a function that makes one optimiser step on one batch of latents."""
    model.train()
    optimizer = engine.adamw(model, lr=1e-4, beta2=0.999, weight_decay=0.0)
    latents, labels = bench.numbers(model.config.tokens, model.config.dim), bench.labels()

    def step() -> None:
        loss, _ = model(latents, labels, bench.generator())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# -- guidance, and another library -----------------------------------------------------------------------------------


def guidance(bench: Bench, steps: int = 10) -> list[Comparison]:
    """Measure sampling with guidance up to noise level 0.7 against sampling without, both by the stochastic solver."""
    model = _sit(bench, 64)
    settings = {"steps": steps, "solver": "sde"}
    guided = {**settings, "guidance_scale": 1.75, "guidance_interval": (0.0, 0.7)}
    seconds = in_turns({"plain": _sampler(model, bench, **settings), "guided": _sampler(model, bench, **guided)}, bench)
    expected = model.evaluations(**guided) / model.evaluations(**settings)
    what = (f"{steps} steps, guided up to noise level 0.7", seconds["guided"])
    return [compare(bench, "guided", what, (f"{steps} steps without guidance", seconds["plain"]), expected)]


@torch.inference_mode()
def against_diffusers(bench: Bench, steps: int = 8) -> list[Comparison]:
    """Measure a step on 64 tokens against diffusers' DiT of equal depth and width on as many, and that against itself.

    `step`: one call of the network. `sampling`: a step of the sampler, which embeds each class and time once and makes
    the modulation of several steps together.
    """
    tokens, dim = 64, TOKENS[64]
    model = _sit(bench, tokens)
    theirs = in_diffusers(model.backbone).to(bench.device)
    x, labels = bench.numbers(tokens, dim), bench.labels()
    t = torch.linspace(0, 1, bench.batch_size, device=bench.device)
    square = unpatchify(x, 1).contiguous()

    def call() -> Tensor:
        return theirs(square, t, labels).sample

    subjects = {
        "step": lambda: model.backbone(x, t, labels),
        "theirs": call,
        "sampling": _sampler(model, bench, steps=steps),
        "again": call,
    }
    seconds = in_turns(subjects, bench)
    peer = ("diffusers' DiT on 64 tokens", seconds["theirs"])
    return [
        compare(bench, "diffusers-itself", ("the same again", seconds["again"]), peer, 1.0),
        compare(bench, "diffusers-step", ("SiT, one call", seconds["step"]), peer),
        compare(bench, "diffusers-sampling", ("SiT, a step of the sampler", seconds["sampling"] / steps), peer),
    ]
