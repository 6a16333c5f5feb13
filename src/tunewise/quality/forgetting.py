"""How much of what the base could do is gone: loss on a fixed general text, per domain, and the drift from the base.

    forgetting        CE_tuned - CE_base on general text, nats per token (PEFT's method comparison has the same)
    soft forgetting   -sum p_base log p_tuned on general text (Kalajdzievski 2024, arXiv 2401.05605)
    drift             KL(base || tuned), on general text or on the new task's prompts (Shenfeld et al. 2025,
                      arXiv 2509.04259, where it foretells forgetting)

The last two need the base's whole distribution beside the tuned one's. The base is the same model with its adapter
switched off, one chunk of logits at a time; there is no second model in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tunewise.methods.method import Run
from tunewise.quality.base import adapter_off
from tunewise.quality.general_text import GeneralText
from tunewise.quality.losses import DocumentLosses, document_losses, logit_chunks
from tunewise.quality.measured import Forgetting, Measured
from tunewise.quality.statistics import mean, paired_difference
from tunewise.recipe import Value
from tunewise.workload.corpus import Corpus

_GROUP = 4


class Drift(Value):
    """How far the tuned distribution is from the base's, nats per token.

    Attributes:
        kl: KL(base || tuned).
        soft: the cross entropy of the tuned model under the base's distribution.
    """

    kl: Measured
    soft: Measured


def general_losses(run: Run, text: GeneralText) -> DocumentLosses:
    """Return the present losses of all windows of the general text."""
    return document_losses(run, text.corpus, range(len(text.corpus)))


def forgetting(text: GeneralText, base: DocumentLosses, tuned: DocumentLosses) -> Forgetting:
    """Compare the losses of the same windows before and after, paired."""
    domains = np.array(text.domains)
    return Forgetting(
        change=change_of(base, tuned),
        domains={
            domain: change_of(base.take(domains == domain), tuned.take(domains == domain))
            for domain in dict.fromkeys(text.domains)
        },
        base_loss=base.mean,
        loss=tuned.mean,
    )


def change_of(base: DocumentLosses, tuned: DocumentLosses) -> Measured:
    """Return the loss after minus the loss before, nats per token, paired by document."""
    return paired_difference(base.sums, tuned.sums, base.counts)


@torch.no_grad()
def drift(run: Run, corpus: Corpus, documents: Sequence[int]) -> Drift:
    """Measure KL and soft forgetting on the supervised tokens of `documents`.

    Raises:
        Conflict: the run trains base weights, so there is no base to compare with.
    """
    kl, soft, counts = np.zeros(len(documents)), np.zeros(len(documents)), np.zeros(len(documents))
    for start in range(0, len(documents), _GROUP):  # the base's logits of few documents are in memory at once
        group = documents[start : start + _GROUP]
        with adapter_off(run):
            base = [chunk.logits_CV.log_softmax(-1) for chunk in logit_chunks(run, corpus, group)]
        for base_CV, chunk in zip(base, logit_chunks(run, corpus, group), strict=True):
            kl_C, soft_C = _divergence(base_CV, chunk.logits_CV.log_softmax(-1))
            np.add.at(kl, start + chunk.documents, kl_C.double().cpu().numpy())
            np.add.at(soft, start + chunk.documents, soft_C.double().cpu().numpy())
            np.add.at(counts, start + chunk.documents, 1)
    return Drift(kl=mean(kl, counts), soft=mean(soft, counts))


def _divergence(base_CV: Tensor, tuned_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(base || tuned) and the cross entropy under the base, of log probabilities."""
    soft_C = -(base_CV.exp() * tuned_CV).sum(-1)
    entropy_C = -(base_CV.exp() * base_CV).sum(-1)
    return soft_C - entropy_C, soft_C
