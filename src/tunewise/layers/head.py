"""A causal language model in two parts: the decoder that makes hidden states and the head that makes logits
of them.

Who holds the two parts can compute logits for some positions only, in chunks, and never needs the whole
(tokens, vocabulary) matrix.

Shape suffixes: R rows, L positions in a row, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunewise.errors import Conflict


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside `model`, which may be a peft model around it."""
    find = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model if find is None else find())


@dataclass(frozen=True, eq=False)
class CausalHead:
    """The output embeddings of a model and what its architecture does to their product.

    logits = softcap * tanh(scale * output(hidden) / softcap), without softcap: scale * output(hidden).

    Attributes:
        output: from hidden states to raw logits; an `nn.Linear`, or an adapter around one.
        scale: factor on the raw logits (Cohere's logit_scale, one over Granite's logits_scaling).
        softcap: bound of the logits (Gemma's final_logit_softcapping), or None.
    """

    output: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(model: nn.Module) -> CausalHead:
        """Find the head of a transformers causal language model or of a peft model around one.

        Raises:
            Conflict: the model has no output embeddings or no decoder of its own.
        """
        base = base_model_of(model)
        output = base.get_output_embeddings()
        if output is None or base.base_model is base:
            raise Conflict(f"{type(base).__name__} cannot be split into decoder and head. Use loss: whole_loss.")
        config = base.config.get_text_config()
        scale = 1.0
        if config.model_type.startswith("cohere"):
            scale = config.logit_scale
        elif config.model_type.startswith("granite"):
            scale = 1.0 / config.logits_scaling
        return CausalHead(output, scale, getattr(config, "final_logit_softcapping", None))

    def hidden(
        self, model: nn.Module, input_ids_RL: Tensor, position_ids_RL: Tensor, mask_R1LL: Tensor | None = None
    ) -> Tensor:
        """Return the decoder's last hidden states, (R, L, D), as they enter the head."""
        decoder = base_model_of(model).base_model
        hidden_RLD: Tensor = decoder(
            input_ids=input_ids_RL, attention_mask=mask_R1LL, position_ids=position_ids_RL, use_cache=False
        ).last_hidden_state
        return hidden_RLD

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Return the logits of some hidden states, (T, V), in the head's own dtype."""
        logits_TV: Tensor = self.output(hidden_TD)
        if self.scale != 1.0:
            logits_TV = logits_TV * self.scale
        if self.softcap is not None:
            logits_TV = torch.tanh(logits_TV / self.softcap) * self.softcap
        return logits_TV

    @torch.no_grad()
    def verify(self, model: nn.Module) -> None:
        """Compare the two parts with the whole model on a row of eight tokens.

        Raises:
            Conflict: they differ: this architecture does something between decoder and logits that we do not
                know.
        """
        base = base_model_of(model)
        device = base.get_input_embeddings().weight.device
        vocab_size = base.config.get_text_config().vocab_size
        input_ids_RL = torch.arange(1, 9, device=device)[None] % vocab_size
        position_ids_RL = torch.arange(8, device=device)[None]
        was_training = model.training
        model.eval()
        try:
            hidden_RLD = self.hidden(model, input_ids_RL, position_ids_RL)
            ours = self.logits(hidden_RLD[0]).float()
            theirs = base(input_ids=input_ids_RL, position_ids=position_ids_RL, use_cache=False).logits[0].float()
        finally:
            model.train(was_training)
        tolerance = 1e-5 if hidden_RLD.dtype in (torch.float32, torch.float64) else 2e-2
        if (ours - theirs).abs().max() > tolerance * theirs.abs().max():
            raise Conflict(
                f"{type(base).__name__} does not compute its logits from the decoder's hidden states in a "
                "way that tunewise knows. Use loss: whole_loss."
            )
