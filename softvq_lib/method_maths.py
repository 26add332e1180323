"""Soft assignment in a few lines of float64 numpy (Eq. 2 and Eq. 4 of arXiv:2412.10958), for the method page.

Written to be read beside the formulas. The quantizers that train are in `softvq_lib.tokenizers`; these
functions are an independent second writing of the same equations. Entropies are in nats.
"""

import numpy as np

FORMS = ("paper", "squared", "released")


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of `x` (..., d) scaled to length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def posterior(z_hat: np.ndarray, codebook: np.ndarray, temperature: float, form: str = "paper") -> np.ndarray:
    """Soft assignment q(k|ẑ) of tokens to codewords.

    Args:
        z_hat: encoder outputs (l, d).
        codebook: codewords (k, d).
        temperature: τ > 0.
        form: `paper` softmax(-‖ẑ-c‖/τ) (Eq. 4), `squared` softmax(-‖ẑ-c‖²/2τ) or `released`
            softmax(cos(ẑ,c)/τ).

    Returns:
        Probabilities (l, k); each row sums to 1.

    Raises:
        ValueError: for an unknown form, or a temperature that is not above 0.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown; choose one of {', '.join(FORMS)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; for τ = 0 use argmin")
    if form == "released":
        logits = unit(z_hat) @ unit(codebook).T
    else:
        distance = np.linalg.norm(z_hat[:, None] - codebook, axis=-1)  # (l, k)
        logits = -distance if form == "paper" else -(distance**2) / 2
    logits = logits / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    """H(p) = -Σ p log p in nats of distributions (..., k), (...), with 0 log 0 = 0."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)


def kl_divergence(p: np.ndarray, r: np.ndarray) -> np.ndarray:
    """KL(p‖r) in nats of distributions (..., k), (...); `r` must be positive where `p` is."""
    return np.sum(p * (np.log(np.where(p > 0, p, 1.0)) - np.log(np.where(p > 0, r, 1.0))), axis=-1)


def mutual_information(q: np.ndarray) -> float:
    """I(x;k) = H(E_x q) - E_x H(q) in nats, for posteriors `q` (l, k) of equally likely tokens."""
    return float(entropy(q.mean(axis=0)) - entropy(q).mean())


def perplexity(p: np.ndarray) -> np.ndarray:
    """exp H(p) of distributions (..., k): how many codewords share the weight, from 1 to k, (...)."""
    return np.exp(entropy(p))


def jacobian(z_hat: np.ndarray, codebook: np.ndarray, temperature: float, form: str = "paper") -> np.ndarray:
    """∂z/∂ẑ (l, d, d) of z = Σ_k q(k|ẑ) c_k: the covariance under q of c_k with the slope of its logit.

    In the `released` form z is the mean of unit codewords, and the slope includes normalising ẑ.
    """
    q = posterior(z_hat, codebook, temperature, form)
    if form == "released":
        values = unit(codebook)
        slope = np.broadcast_to(values / temperature, (len(z_hat), *values.shape))  # (l, k, d)
    else:
        values, slope = codebook, (codebook - z_hat[:, None]) / temperature  # (l, k, d)
        if form == "paper":
            # A token that sits on a codeword has no slope towards it: 0/0 is read as 0.
            distance = temperature * np.linalg.norm(slope, axis=-1, keepdims=True)  # (l, k, 1)
            slope = slope / np.where(distance > 0, distance, 1.0)
    z = q @ values  # (l, d)
    j = np.swapaxes(q[..., None] * (values - z[:, None]), 1, 2) @ slope  # (l, d, d)
    if form == "released":
        # The chain rule through h = ẑ/‖ẑ‖.
        h = unit(z_hat)
        tangent = np.eye(h.shape[1]) - h[:, :, None] * h[:, None, :]  # (l, d, d)
        j = j @ tangent / np.linalg.norm(z_hat, axis=1)[:, None, None]
    return j


def soft_kmeans(x: np.ndarray, start: np.ndarray, temperature: float, steps: int) -> np.ndarray:
    """EM for the means of a mixture with equal weights and covariance τI; τ = 0 is K-means.

    Args:
        x: points (n, d).
        start: first centres (k, d).
        temperature: τ, from 0.
        steps: EM steps.

    Returns:
        Centres (steps + 1, k, d), `start` first. A centre that gets no point stays where it is.
    """
    centres = [start]
    for _ in range(steps):
        c = centres[-1]
        if temperature > 0:
            r = posterior(x, c, temperature, "squared")
        else:
            r = np.eye(len(c))[np.argmin(np.linalg.norm(x[:, None] - c, axis=-1), axis=1)]
        mass = r.sum(axis=0)[:, None]
        centres.append(np.where(mass > 0, r.T @ x / np.maximum(mass, 1e-300), c))
    return np.stack(centres)


def temperature_sweep(tau: np.ndarray, k: int = 8192, d: int = 32, l: int = 8) -> dict:  # noqa: E741
    """Perplexity of the posterior and ‖∂z/∂ẑ‖_F against τ, for random tokens ẑ ~ N(0, I) and four codebooks.

    Returns:
        name -> (perplexity, slope), each of `tau`'s shape and averaged over tokens.
    """
    rng = np.random.default_rng(0)
    z_hat = rng.normal(size=(l, d))
    uniform, normal = rng.uniform(-1 / k, 1 / k, (k, d)), rng.normal(size=(k, d))
    cases = {
        "paper, codebook U(−1/K, 1/K)": (uniform, "paper"),
        "paper, codebook on the sphere": (unit(uniform), "paper"),
        "released (cosine)": (uniform, "released"),
        "paper, codebook N(0, 1)": (normal, "paper"),
    }
    curves = {}
    for name, (codes, form) in cases.items():
        used = [perplexity(posterior(z_hat, codes, t, form)).mean() for t in tau]
        slope = [np.linalg.norm(jacobian(z_hat, codes, t, form), axis=(1, 2)).mean() for t in tau]
        curves[name] = (np.array(used), np.array(slope))
    return curves
