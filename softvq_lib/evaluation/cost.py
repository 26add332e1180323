"""Time and memory of one forward pass of a tokenizer, each measured in a process of its own."""

import json
import subprocess
import sys


def forward_cost(preset: str, *, batch_size: int, tokens: int = 64, precision: str = "fp32", rounds: int = 5) -> dict:
    """Measure encoding and decoding of random images at the preset's size, on the CPU, without gradients.

    Args:
        precision: `fp32`, or `bf16` autocast.
        rounds: Passes timed after one that is not.

    Returns:
        `encode_seconds` and `decode_seconds` (medians), `peak_mib` (largest resident memory less what the process
        held before the tokenizer was built), `weights_mib`, `image_size`, `threads`.

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


def _measure(preset: str, batch_size: int, tokens: int, precision: str, rounds: int) -> dict:
    import resource
    import statistics
    import time

    import torch

    from softvq_lib.tokenizers import Tokenizer

    def resident_mib() -> float:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)

    torch.manual_seed(0)
    # A small one first: what importing and starting the libraries takes is not the tokenizer's.
    Tokenizer.from_preset("tiny").eval()(torch.zeros(1, 3, 32, 32))
    before = resident_mib()
    tokenizer = Tokenizer.from_preset(preset, tokens=tokens).eval()
    size = tokenizer.config.image_size
    images = torch.rand(batch_size, 3, size, size) * 2 - 1
    times: dict[str, list[float]] = {"encode_seconds": [], "decode_seconds": []}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for _ in range(rounds + 1):
            start = time.perf_counter()
            z = tokenizer.encode(images).z
            middle = time.perf_counter()
            tokenizer.decode(z)
            times["encode_seconds"].append(middle - start)
            times["decode_seconds"].append(time.perf_counter() - middle)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in tokenizer.parameters())
    return {
        **{name: statistics.median(values[1:]) for name, values in times.items()},
        "peak_mib": resident_mib() - before,
        "weights_mib": weights / 2**20,
        "image_size": size,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
