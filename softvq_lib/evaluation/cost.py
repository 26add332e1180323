"""Time and memory of one forward pass of a tokenizer, each measured in a process of its own."""

import json
import subprocess
import sys
from functools import cache, partial


def forward_cost(preset: str, *, batch_size: int, tokens: int = 64, precision: str = "fp32", rounds: int = 5) -> dict:
    """Measure encoding and decoding of random images at the preset's size, on the CPU, without gradients.

    Args:
        preset: Name of a row of `PRESETS`.
        batch_size: Images in a pass.
        tokens: Latent tokens l.
        precision: `fp32`, or `bf16` autocast.
        rounds: Passes timed after one that is not.

    Returns:
        `encode_seconds` and `decode_seconds` (medians); `encode_ratio` and `decode_ratio`, to a forward pass of
        timm's own transformer of that half on as many tokens, taken in turns; `encode_peak_share` and
        `decode_peak_share`, of the floating-point operations a second that this machine reaches in one large matrix
        product of that precision; `peak_mib` (largest resident memory less what the process held before the tokenizer
        was built), `weights_mib`, `image_size`, `threads`.

    Raises:
        RuntimeError: when the measuring process fails; its last line is the message.
    """
    asked = {"preset": preset, "batch_size": batch_size, "tokens": tokens, "precision": precision, "rounds": rounds}
    command = [sys.executable, "-m", __name__, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring {preset!r} with {batch_size} images failed: {last}")
    return asked | json.loads(done.stdout.splitlines()[-1])


def _plain_vit(tokenizer, half: str, batch_size: int):
    """Build timm's transformer of the encoder or decoder and images that give it as many tokens: cls, n and l."""
    import timm
    import torch

    config = tokenizer.config
    name, overrides = getattr(config, f"{half}_network")
    across = config.image_size // config.patch_size
    total = across**2 + config.tokens
    width = next(w for w in range(across, 0, -1) if total % w == 0)
    size = (total // width * config.patch_size, width * config.patch_size)
    vit = timm.create_model(name, img_size=size, patch_size=config.patch_size, num_classes=0, **overrides)
    return vit.eval(), torch.rand(batch_size, 3, *size)


def counted_flops(call) -> int:
    """Count floating-point operations, a multiply-add as two, of a call on meta tensors, fused attention included."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@cache
def decoding_macs(preset: str, tokens: int, dim: int, image_size: int) -> int:
    """Return the multiply-accumulates of decoding one image, counted on tensors without storage.

    Args:
        preset: Size of the tokenizer.
        tokens: Latent tokens l.
        dim: Latent channels d.
        image_size: Height and width in pixels.
    """
    import torch

    from softvq_lib.tokenizers import Tokenizer

    with torch.device("meta"), torch.no_grad():
        settings = {"tokens": tokens, "dim": dim, "image_size": image_size, "codebooks": 1, "codebook_size": 1}
        tokenizer = Tokenizer.from_preset(preset, quantizer="ae", **settings).eval()
        return counted_flops(lambda: tokenizer.decode(torch.empty(1, tokens, dim))) // 2


def _matmul_flops_per_second(dtype) -> float:
    """Best of several large matrix products."""
    import time

    import torch

    side = 2048
    a, b = torch.rand(side, side, dtype=dtype), torch.rand(side, side, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _measure(preset: str, batch_size: int, tokens: int, precision: str, rounds: int) -> dict:
    import statistics
    import time

    import torch

    from softvq_lib.evaluation.efficiency import peak_bytes, reset_peak
    from softvq_lib.tokenizers import Tokenizer

    def seconds(call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    torch.manual_seed(0)
    # A small one first: what importing and starting the libraries takes is not the tokenizer's.
    Tokenizer.from_preset("tiny").eval()(torch.zeros(1, 3, 32, 32))
    before = reset_peak()
    tokenizer = Tokenizer.from_preset(preset, tokens=tokens).eval()
    size = tokenizer.config.image_size
    images = torch.rand(batch_size, 3, size, size) * 2 - 1
    bf16 = precision == "bf16"
    times: dict[str, list[float]] = {"encode": [], "decode": [], "encoder vit": [], "decoder vit": []}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        z = tokenizer.encode(images).z
        tokenizer.decode(z)
        peak = (peak_bytes() - before) / 2**20
        calls = {"encode": lambda: tokenizer.encode(images), "decode": lambda: tokenizer.decode(z)}
        for half in ("encoder", "decoder"):
            calls[f"{half} vit"] = partial(*_plain_vit(tokenizer, half, batch_size))
        for _ in range(rounds + 1):
            for name, call in calls.items():
                times[name].append(seconds(call))
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    with torch.device("meta"), torch.no_grad():
        shadow = Tokenizer.from_preset(preset, tokens=tokens).eval()
        pixels, latents = torch.empty(batch_size, 3, size, size), torch.empty(z.shape)
        flops = {
            "encode": counted_flops(lambda: shadow.encode(pixels)),
            "decode": counted_flops(lambda: shadow.decode(latents)),
        }
    best = _matmul_flops_per_second(torch.bfloat16 if bf16 else torch.float32)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in tokenizer.parameters())
    return {
        **{f"{name}_seconds": median[name] for name in flops},
        **{f"{name}_ratio": median[name] / median[f"{name}r vit"] for name in flops},
        **{f"{name}_peak_share": flops[name] / median[name] / best for name in flops},
        "peak_mib": peak,
        "weights_mib": weights / 2**20,
        "image_size": size,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
