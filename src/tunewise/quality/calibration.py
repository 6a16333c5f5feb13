"""Does a model know how sure it may be: ECE, Brier score, negative log likelihood, before and after a temperature.

For language models each supervised token is a decision: confidence is the probability of the likeliest token, and it is
right when that is the token that stood there.

Sources: Guo et al. 2017 (arXiv 1706.04599) for ECE with 15 bins and temperature scaling, Brier 1950.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from tunewise.quality.battery import Items
from tunewise.quality.losses import Chunk

NUM_BINS = 15
TEMPERATURES = (0.25, 4.0)


def expected_calibration_error(
    confidence: NDArray[np.float64], is_right: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> float:
    """Return ECE over equally wide bins of confidence."""
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=is_right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def calibration_items(chunks: Iterable[Chunk], num_documents: int) -> dict[str, Items]:
    """Measure calibration over all supervised tokens, with and without the temperature that fits them best.

    Items are documents. ECE is no mean of items; it is resampled by document with the signs of its
    bins' gaps kept, so that each document has a share of it.

    Returns:
        ECE, Brier score, NLL, accuracy and confidence, the first three also after the temperature (fitted on the same
        tokens, so it is the best that a temperature can do), and the temperature.
    """
    kept = [(chunk.documents, chunk.labels_C, chunk.logits_CV) for chunk in chunks]
    if not kept:
        return {}
    documents = np.concatenate([each[0] for each in kept])
    counts = np.bincount(documents, minlength=num_documents)
    temperature = best_temperature([(labels_C, logits_CV) for _, labels_C, logits_CV in kept])
    found: dict[str, Items] = {}
    for suffix, divisor in (("", 1.0), (", after temperature", temperature)):
        parts = [_decisions(labels_C, logits_CV / divisor) for _, labels_C, logits_CV in kept]
        confidence, is_right, nll = (np.concatenate(part) for part in zip(*parts, strict=True))
        values = {
            "ECE": (_signed_gaps(confidence, is_right), -1),
            "Brier": ((confidence - is_right) ** 2, -1),
            "NLL": (nll, -1),
        }
        if not suffix:
            values |= {"accuracy": (is_right.astype(np.float64), 1), "confidence": (confidence, 0)}
        for name, (value, better) in values.items():
            sums = np.bincount(documents, weights=value, minlength=num_documents).astype(np.float64)
            found[name + suffix] = Items(sums[counts > 0], counts[counts > 0], better)
    found["temperature"] = Items.of([temperature], 0)
    return found


def _decisions(
    labels_C: Tensor, logits_CV: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Return confidence, whether the likeliest token is right, and the loss of each token."""
    log_CV = logits_CV.log_softmax(-1)
    best_C, guess_C = log_CV.max(-1)
    loss_C = -log_CV.gather(1, labels_C[:, None]).squeeze(1)
    return (
        best_C.exp().double().cpu().numpy(),
        (guess_C == labels_C).cpu().numpy(),
        loss_C.double().cpu().numpy(),
    )


def _signed_gaps(confidence: NDArray[np.float64], is_right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return values whose mean is ECE: (right - confidence) with the sign of its bin's gap."""
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    signs = np.sign(np.bincount(bins, weights=is_right - confidence, minlength=NUM_BINS))
    gaps: NDArray[np.float64] = (is_right - confidence) * signs[bins]
    return gaps


def best_temperature(decisions: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the temperature of the lowest negative log likelihood of (labels, logits)."""

    def nll(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        losses = (F.cross_entropy(logits / temperature, labels, reduction="sum") for labels, logits in decisions)
        return sum(float(loss) for loss in losses)

    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(nll, bounds=(low, high), method="bounded").x))
