"""Soft assignment of tokens to codewords without a (tokens x codes) tensor in memory (Eq. 4).

The scores s_ik of all forms of the posterior are q_i . k_k of suitable tokens q and keys k, or -sqrt(q_i . k_k):

    cosine             q = z_hat / |z_hat|           k = c / |c|
    squared distance   q = [z_hat, 1]                k = [c, -|c|^2 / 2]    (but for a constant of each token)
    distance           q = [-2 z_hat, |z_hat|^2, 1]  k = [c, 1, |c|^2]      (under the root)

So z = softmax(s / tau) c is attention with the codebook as keys and values: `attend`. The KL term asks for more than
attention gives. With a = s / T, p = softmax(a) and m the average of p over N tokens it is

    L = mean_i H(p_i) + sum_k m_k log(m_k + eps),   H(p_i) = logsumexp(a_i) - sum_k p_ik a_ik,

and its gradient

    dL/da_ik = p_ik (w_ik - sum_j p_ij w_ij) / N,   w_ik = log(m_k + eps) + m_k / (m_k + eps) - a_ik,

is known for each token alone once a first pass has found m. `assign` gives z and the KL term: it takes a few tokens at
a time, forward and backward, and the backward pass computes the scores anew.

Where several processes hold N tokens each, m is averaged over the processes and the rest stays. The mean of their L is
then the L of the whole batch, and the mean of their gradients its gradient: m is all that a token has to know of
other processes.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from softvq_lib.distributed import mean_across
from softvq_lib.tokenizers.quantizer import in_fp32

_EPSILON = 1e-6  # keeps the logarithm finite where a code is never used; the release has the same
_LEAST_SQUARE = 1e-12  # rounding may take a small squared distance below 0, and the root has no slope at 0
_ON_CPU, _ELSEWHERE = 2**19, 2**26  # scores of one chunk: 2 MiB stay in a core's cache, 256 MiB keep a GPU busy
_LEAST = 32  # tokens of a chunk, below which a matrix product is slow


def attend(q: Tensor, k: Tensor, v: Tensor, temperature: float) -> Tensor:
    """Return softmax(q k^T / temperature) v by fused attention: (n, t, e), (n, k, e), (n, k, d) to (n, t, d)."""
    # Fused kernels want four axes, and q, k and v of one width that is a multiple of 8.
    width = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8
    # Padding by nothing would still copy the codebook.
    padded = [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v)]
    padded = [x[:, None] for x in padded]  # (n, 1, t or k, e)
    return F.scaled_dot_product_attention(*padded, scale=1 / temperature)[:, 0, :, : v.shape[-1]]


def scores(q: Tensor, k: Tensor, *, root: bool) -> Tensor:
    """Return q k^T, or -sqrt(q k^T): (n, t, k), the very tensor that the rest of this file does without."""
    s = q @ k.mT
    return -s.clamp(min=_LEAST_SQUARE).sqrt() if root else s


def squared_operands(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (n, t, d + 1) and k (n, k, d + 1) whose product is -|z - c|^2 / 2, but for a constant of each token.

    Tokens z are (n, t, d), codewords c (n, k, d).
    """
    bias = -c.square().sum(-1, keepdim=True) / 2
    return torch.cat([z, torch.ones_like(z[..., :1])], -1), torch.cat([c, bias], -1)


def distance_operands(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (n, t, d + 2) and k (n, k, d + 2) whose product is |z - c|^2, of z (n, t, d) and c (n, k, d)."""
    one = torch.ones_like
    q = torch.cat([-2 * z, z.square().sum(-1, keepdim=True), one(z[..., :1])], -1)
    return q, torch.cat([c, one(c[..., :1]), c.square().sum(-1, keepdim=True)], -1)


def assign(
    q: Tensor, k: Tensor, v: Tensor, temperature: float, entropy_temperature: float | None, *, root: bool, pooled: bool
) -> tuple[Tensor, Tensor]:
    """Return z = softmax(s / temperature) v and the KL term -I(x; k) at its own temperature.

    Args:
        q: Tokens (n, t, e) of n codebooks, float32 or float64.
        k: Keys (n, k, e). Gradients reach them if they require any.
        v: Codewords (n, k, d).
        temperature: tau, above 0.
        entropy_temperature: Temperature T of the KL term; None leaves it out (0).
        root: Scores are -sqrt(q k^T) instead of q k^T.
        pooled: The KL term averages the posterior over all codebooks together instead of over each.

    Returns:
        z: (n, t, d).
        kl: Scalar, in nats; across processes as in `kl_term`.
    """
    return _Assign.apply(q, k, v, temperature, entropy_temperature, root, pooled)


def _chunks(q: Tensor, codes: int, buffers: int) -> tuple[list[slice], Tensor]:
    """Return the parts that the tokens are taken in, and memory for so many tensors of one part, (buffers, t, k)."""
    tokens = q.shape[1]
    rows = tokens
    if q.device.type != "meta":
        rows = min(tokens, max(_LEAST, (_ON_CPU if q.device.type == "cpu" else _ELSEWHERE) // codes))
    # One allocation for all chunks: fresh memory costs as much as the arithmetic.
    return [slice(i, i + rows) for i in range(0, tokens, max(1, rows))], q.new_empty(buffers, rows, codes)


def _scores(q: Tensor, k: Tensor, root: bool, out: Tensor) -> Tensor:
    s = torch.mm(q, k.T, out=out)  # (t, k)
    return s.clamp_(min=_LEAST_SQUARE).sqrt_().neg_() if root else s


def _exp_(a: Tensor) -> Tensor:
    """Replace a by its exponential; arguments up to 0."""
    # Arithmetic on numbers near the least float is ten times slower; e^-60 of a sum is below any rounding.
    return a.clamp_(min=-60.0 if a.dtype == torch.float32 else -500.0).exp_()


class _Assign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tau, entropy_tau, root, pooled):
        n, t, _ = q.shape
        temperatures = [tau] if entropy_tau in (None, tau) else [tau, entropy_tau]
        z = q.new_empty(n, t, v.shape[-1])
        level = q.new_empty(len(temperatures), n, t)  # log-sum-exp of s / T, times T
        entropy, mass = q.new_empty(n, t), q.new_zeros(n, k.shape[1])  # H(p) of tokens; p summed over tokens
        parts, memory = _chunks(q, k.shape[1], 2)
        with in_fp32(q):
            for i, part in itertools.product(range(n), parts):
                tokens = q[i, part]
                s, e = memory[:, : len(tokens)]
                top = _scores(tokens, k[i], root, s).amax(-1)  # (t,)
                s -= top[:, None]
                for j, temperature in enumerate(temperatures):
                    _exp_(torch.mul(s, 1 / temperature, out=e))
                    total = e.sum(-1)  # (t,)
                    level[j, i, part] = top + temperature * total.log()
                    if j == 0:
                        z[i, part] = (e @ v[i]) / total[:, None]
                    if temperature == entropy_tau:
                        mass[i] += e.T @ (1 / total)
                        entropy[i, part] = total.log() - e.mul_(s).sum(-1) / (total * temperature)
        if entropy_tau is None:
            kl, slope = q.new_zeros(()), None
        else:
            mean = mean_across(mass.mean(0, keepdim=True) / t if pooled else mass / t)  # (1, k) or (n, k)
            kl = entropy.mean() + (mean * (mean + _EPSILON).log()).sum(-1).mean()
            slope = ((mean + _EPSILON).log() + mean / (mean + _EPSILON)).expand(n, -1)  # (n, k)
        ctx.save_for_backward(q, k, v, z, level, entropy, slope)
        ctx.settings = tau, entropy_tau, root
        ctx.set_materialize_grads(False)
        return z, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_z, grad_kl):
        q, k, v, z, level, entropy, slope = ctx.saved_tensors
        tau, entropy_tau, root = ctx.settings
        n, t, _ = q.shape
        if slope is None:
            grad_kl = None
        if grad_z is None and grad_kl is None:
            return (None,) * 7
        grad_q, grad_k, grad_v = (
            torch.zeros_like(x) if need else None for x, need in zip((q, k, v), ctx.needs_input_grad[:3], strict=True)
        )
        if grad_z is None:
            grad_v = None
        parts, memory = _chunks(q, k.shape[1], 4)
        with in_fp32(q):
            for i, part in itertools.product(range(n), parts):
                tokens = q[i, part]
                s, p, w, grad_s = memory[:, : len(tokens)]
                _scores(tokens, k[i], root, s)
                if grad_z is None:
                    grad_s.zero_()
                else:
                    g = grad_z[i, part]
                    _exp_(torch.sub(s, level[0, i, part, None], out=p).mul_(1 / tau))
                    if grad_v is not None:
                        grad_v[i].addmm_(p.T, g)
                    g = g / tau
                    torch.mm(g, v[i].T, out=grad_s).sub_((g * z[i, part]).sum(-1, keepdim=True)).mul_(p)
                if grad_kl is not None:
                    if grad_z is None or len(level) == 2:
                        _exp_(torch.sub(s, level[-1, i, part, None], out=p).mul_(1 / entropy_tau))
                    # The mean of w over p; the mean of a is logsumexp(a) - H(p).
                    center = p @ slope[i] - level[-1, i, part] / entropy_tau + entropy[i, part]  # (t,)
                    torch.sub(slope[i], s, alpha=1 / entropy_tau, out=w).sub_(center[:, None])
                    grad_s.addcmul_(p, w.mul_(grad_kl / (n * t * entropy_tau)))
                if root:
                    grad_s.div_(s.mul_(2))  # s = -sqrt(u), so ds/du = 1 / (2 s)
                if grad_q is not None:
                    torch.mm(grad_s, k[i], out=grad_q[i, part])
                if grad_k is not None:
                    grad_k[i].addmm_(grad_s.T, tokens)
        return grad_q, grad_k, grad_v, None, None, None, None
