"""How a tokenizer uses its codes: effective codebook size, mutual information (the KL term of Eq. 4), codes by class.

Over images x and positions p with posterior q(k|x, p) the KL term is L_kl = E H(q) - H(E q) = -I(x, p; k). It splits:

    I(x, p; k) = I(p; k) + I(x; k | p),

what a code says of its position alone, and what it says of the image once the position is known. A tokenizer whose
positions have a code each would have all of the KL term and none of the image. All in nats, of the posterior that
makes z; with several codebooks averaged over them. From n images the second part cannot exceed log n, and comes out
too large where codes are many and images few.

Intervals leave one of 20 groups of images out (jackknife).
"""

import numpy as np
import torch
from torch import Tensor

from softvq_lib.tokenizers.quantizer import Quantizer

GROUPS = 20


def _entropy(p: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, in nats."""
    from scipy.special import entr

    return entr(p).sum(-1)


class CodeUse:
    """Sums posteriors over batches. A slot is one position's place in a codebook: product quantization has several.

    Args:
        quantizer: Whose posteriors are looked at.
        tokens: Latent tokens l.

    Attributes:
        images: Number of images so far.
        slots: Slots of each codebook, (codebooks, m).
        chosen: How often each code is the most likely one, (codebooks, k).

    Raises:
        ValueError: for a quantizer without codebook.
    """

    def __init__(self, quantizer: Quantizer, tokens: int):
        if not quantizer.codes:
            raise ValueError(
                f"{type(quantizer).__name__} has no codebook, so there is no use of codes to measure: choose vq, "
                "softvq or gmmvq."
            )
        self.quantizer, self.images = quantizer, 0
        self.shape = (tokens, quantizer.groups)
        places = torch.arange(tokens * quantizer.groups)
        places = places.view(1, *self.shape[: 1 + (quantizer.groups > 1)], 1)  # as a posterior (1, l, [groups,] k = 1)
        self.slots = quantizer.by_codebook(places)[..., 0].numpy()
        size = self.slots.size
        self.chosen = np.zeros((len(self.slots), quantizer.codes), np.int64)
        self._posterior = torch.zeros(GROUPS, size, quantizer.codes, dtype=torch.float64)
        self._entropy = torch.zeros(GROUPS, size, dtype=torch.float64)
        self._count = torch.zeros(GROUPS, dtype=torch.float64)
        self._of_images: list[np.ndarray] = []

    @torch.no_grad()
    def update(self, z_hat: Tensor) -> None:
        """Add a batch of encoder outputs (b, l, d)."""
        b = len(z_hat)
        q = self.quantizer.log_posterior(z_hat).exp().cpu().double().reshape(b, self.slots.size, -1)  # (b, slots, k)
        # By the image's number alone, so that it does not matter how batches are cut.
        group = (self.images + torch.arange(b)) % GROUPS
        self._posterior.index_add_(0, group, q)
        self._entropy.index_add_(0, group, torch.special.entr(q).sum(-1))
        self._count.index_add_(0, group, torch.ones(b, dtype=torch.float64))
        best = q.argmax(-1).numpy()  # (b, slots)
        for codebook, its in enumerate(self.slots):
            self.chosen[codebook] += np.bincount(best[:, its].ravel(), minlength=q.shape[-1])
        self._of_images.append(np.stack([q[:, its].mean(1).float().numpy() for its in self.slots], 1))
        self.images += b

    def _groups(self) -> list[int]:
        return [number for number in range(GROUPS) if self._count[number]]

    def _measure(self, left_out: int | None = None) -> dict[str, np.ndarray]:
        keep = torch.ones(GROUPS, dtype=torch.bool)
        if left_out is not None:
            keep[left_out] = False
        n = self._count[keep].sum()
        mean_q = (self._posterior[keep].sum(0) / n).numpy()  # (slots, k)
        entropy = (self._entropy[keep].sum(0) / n).numpy()  # (slots,)
        given_position = _entropy(mean_q) - entropy
        by_codebook = _entropy(np.stack([mean_q[its].mean(0) for its in self.slots]))  # (codebooks,)
        total = (by_codebook - np.stack([entropy[its].mean() for its in self.slots])).mean()

        def by_position(x: np.ndarray) -> np.ndarray:
            return x.reshape(self.shape).mean(1)  # (l,)

        return {
            "codebook_entropy": by_codebook,
            "code_entropy": by_codebook.mean() + np.log(len(by_codebook)),
            "mutual_information": total,
            "mutual_information_image": given_position.mean(),
            "mutual_information_position": total - given_position.mean(),
            "posterior_entropy": entropy.mean(),
            "mutual_information_by_position": by_position(given_position),
            "posterior_entropy_by_position": by_position(entropy),
        }

    def measure(self) -> dict[str, tuple[np.ndarray | float, np.ndarray]]:
        """Return these, each with what it becomes without each of the groups of images, for `jackknife`.

        code_entropy: H(E q) over all codes and tokens; exp of it is the effective codebook size, 1 to codebooks x k.
        codebook_entropy: The same of each codebook, (codebooks,).
        mutual_information: I(x, p; k), which is -L_kl.
        mutual_information_image: I(x; k | p).
        mutual_information_position: I(p; k).
        posterior_entropy: E H(q), of one code.
        mutual_information_by_position: I(x; k | p) of each position, (l,).
        posterior_entropy_by_position: E H(q) of each position, (l,).

        Raises:
            ValueError: for fewer than two images.
        """
        if self.images < 2:
            raise ValueError(f"{self.images} images tell nothing of the use of codes: give two or more.")
        parts = [self._measure(number) for number in self._groups()]
        return {name: (value, np.stack([part[name] for part in parts])) for name, value in self._measure().items()}

    def usage(self) -> float:
        """Share of codes that are the most likely one of at least one token, averaged over codebooks."""
        return float((self.chosen > 0).mean())

    def mean_posterior(self) -> np.ndarray:
        """E q of each codebook, (codebooks, k)."""
        mean_q = (self._posterior.sum(0) / self._count.sum()).numpy()
        return np.stack([mean_q[its].mean(0) for its in self.slots])

    def by_class(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """E[q | class], the mean posterior of each class over its images and tokens, (classes, codebooks, k).

        0 for a class without images.

        Raises:
            ValueError: for labels that do not fit.
        """
        return self._joint(labels, classes) / np.maximum(np.bincount(labels, minlength=classes), 1)[:, None, None]

    def _joint(self, labels: np.ndarray, classes: int, keep: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Sums of posteriors by class, (classes, codebooks, k)."""
        if len(labels) != self.images:
            raise ValueError(f"{len(labels)} labels for {self.images} images: give one an image.")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels from {labels.min()} to {labels.max()} do not fit {classes} classes.")
        of_images = np.concatenate(self._of_images).reshape(self.images, -1)  # (n, codebooks k)
        members = np.eye(classes, dtype=np.float32)[labels[keep]]
        return (members.T @ of_images[keep]).reshape(classes, len(self.slots), -1).astype(np.float64)

    def class_information(
        self, labels: np.ndarray, classes: int, *, shuffles: int = 20, seed: int = 0
    ) -> tuple[float, np.ndarray, float]:
        """Normalised mutual information of a token's code and the class of its image, 2 I(k; y) / (H(k) + H(y)).

        The labels (n,) are those of all images added, in their order.

        A code is drawn from its posterior; for one-hot posteriors this is scikit-learn's
        `normalized_mutual_info_score`. Averaged over codebooks. Few images make it larger than it is, so it comes with
        what chance gives: the mean over labels shuffled among the images.

        Returns:
            The information, 0 to 1; what it becomes without each of the groups of images, (groups,); what chance gives.

        Raises:
            ValueError: for labels that do not fit, or one class alone.
        """
        if len(np.unique(labels)) < 2:
            raise ValueError("information about classes needs images of two classes or more.")
        value = _normalised_information(self._joint(labels, classes))
        group = np.arange(self.images) % GROUPS
        parts = [_normalised_information(self._joint(labels, classes, group != g)) for g in self._groups()]
        rng = np.random.default_rng(seed)
        chance = [_normalised_information(self._joint(rng.permutation(labels), classes)) for _ in range(shuffles)]
        return value, np.array(parts), float(np.mean(chance))


def _normalised_information(joint: np.ndarray) -> float:
    """From sums (classes, codebooks, k)."""
    p = joint.transpose(1, 0, 2) / joint.sum((0, 2))[:, None, None]  # (codebooks, classes, k)
    of_class, of_code = _entropy(p.sum(2)), _entropy(p.sum(1))
    both = _entropy(p.reshape(len(p), -1))
    return float(np.mean(2 * (of_class + of_code - both) / (of_class + of_code)))
