"""Time of the Fréchet trace by symmetric eigenvalues, beside scipy's matrix square root and torch-fidelity's own."""

import numpy as np
import torch

from softvq_lib.config import at_least
from softvq_lib.evaluation.efficiency import interleaved, ratio_of_medians
from softvq_lib.evaluation.frechet import Moments, frechet_distance


def trace_rows(
    width: int = 2048, *, features: int = 4096, rounds: int = 3, threads: int = 1
) -> list[dict[str, object]]:
    """Measure the distance of the same two sets of moments in three ways; all give the same number.

    The features are normal with variances 1/k, as the spectra of nets fall. About a minute of processor time for
    2,048 dimensions. Set OMP_NUM_THREADS to `threads` too, which numpy looks at.

    Args:
        width: Dimensions.
        features: Of each side.
        rounds: In which each way takes its turn, three or more.
        threads: Of torch, for both sides.

    Returns:
        A row for each way that ours is compared with: names, processor seconds of both (medians), `ratio` ours / theirs
        with its 95 % interval `low`, `high`, and the relative `difference` of the distances.

    Raises:
        ValueError: for an argument out of range.
    """
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    for name, value, least in (("width", width, 1), ("features", features, 2), ("rounds", rounds, 3)):
        at_least(name, value, least)
    draws = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    turn = torch.linalg.qr(torch.randn(width, width, generator=draws, dtype=torch.float64)).Q
    sides = []
    for shift in (0.0, 0.1):
        x = torch.randn(features, width, generator=draws, dtype=torch.float64)
        sides.append(Moments.of((x + shift) * scale @ turn))
    arrays = [{"mu": side.mean.numpy(), "sigma": side.covariance.numpy()} for side in sides]

    def scipys() -> float:
        a, b = arrays
        root = sqrtm(a["sigma"] @ b["sigma"]).real
        shift = a["mu"] - b["mu"]
        return float(shift @ shift + np.trace(a["sigma"]) + np.trace(b["sigma"]) - 2 * np.trace(root))

    ways = {
        "softvq_lib": lambda: frechet_distance(*sides),
        "scipy.linalg.sqrtm": scipys,
        "torch-fidelity": lambda: fid_statistics_to_metric(*arrays, False)[KEY_METRIC_FID],
    }
    distances: dict[str, float] = {}

    def kept(name: str):
        def run() -> None:
            distances[name] = ways[name]()

        return run

    seconds = interleaved({name: kept(name) for name in ways}, rounds, threads)
    rows = []
    for name in list(ways)[1:]:
        ratio, low, high = ratio_of_medians(seconds["softvq_lib"], seconds[name])
        row = {"subject": "softvq_lib", "against": name, "ratio": ratio, "low": low, "high": high}
        row |= {"seconds": float(np.median(seconds["softvq_lib"])), "against_seconds": float(np.median(seconds[name]))}
        row |= {"difference": abs(distances[name] / distances["softvq_lib"] - 1)}
        rows.append(row | {"width": width, "features": features, "rounds": rounds, "threads": threads})
    return rows
