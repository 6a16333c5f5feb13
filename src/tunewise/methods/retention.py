"""What keeps a model near its base while it learns: a divergence in the objective, a pull on the weights.

Replay, the third of the kind, is a matter of the data: `data.replay` (`tunewise.workload.replay`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tunewise.errors import Conflict
from tunewise.layers.kl import loss_and_kl
from tunewise.layers.lora import adapted_only, adapters_off, is_plain, lora_layers
from tunewise.layers.pull import pulled
from tunewise.methods.freezing import Freeze
from tunewise.methods.lora import LoRA
from tunewise.methods.loss import loss_of_supervised, verified_head
from tunewise.methods.low_rank import LowRank
from tunewise.methods.method import Run
from tunewise.methods.optimizers import Optimizer
from tunewise.recipe import Fidelity, Method, PositiveInt, Recipe, Slot
from tunewise.workload.batches import IGNORED, MicroBatch

Weight = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class KLToBase(Method):
    """Cross entropy plus `beta` times KL(base || model) at every supervised position; the base is the same model
    with its adapter switched off.

    Costs a forward pass without gradient and no memory for a second model. Drift from the base on the new task's
    prompts predicts forgetting ("RL's Razor", Shenfeld et al. 2025, arXiv 2509.04259); with `data.replay` the
    divergence is taken on the replayed text as well. Validation losses stay plain cross entropies; a step's loss is
    the whole objective.

    Formula: L = CE + beta sum_v p_base(v) (log p_base(v) - log p(v)), a mean over the supervised positions.

    Source: Shenfeld et al. 2025, "RL's Razor" (arXiv 2509.04259); Li and Hoiem 2016, "Learning without Forgetting"
    (1606.09282), has the idea. When to use: forgetting is over its budget and an adapter is trained
    (docs/forgetting.md). When not: the task is to leave the base's distribution: it holds the gain back too.

    Attributes:
        beta: weight of the divergence, nats for nats.
        chunk_tokens: rows of logits in memory at once, of the model and of the base.
    """

    name: ClassVar[str] = "kl_to_base"
    slot: ClassVar[Slot] = Slot.LOSS
    fidelity: ClassVar[Fidelity] = Fidelity.LEARNING

    beta: Weight = 0.1
    chunk_tokens: PositiveInt = 1024

    def conflict(self, recipe: Recipe) -> str | None:
        """Without an adapter that holds everything that is learnt there is no base to switch back to."""
        lora = recipe.get(LoRA)
        if lora is None:
            return "kl_to_base switches the adapter 'lora' off to have the base; add lora"
        if lora.init == "loftq":
            return "kl_to_base: LoftQ's factors hold a part of the base; use lora's init 'kaiming'"
        if lora.modules_to_save or recipe.get(Freeze) is not None:
            return "kl_to_base needs a base that stays as it is; leave lora.modules_to_save and freeze out"
        return None

    def apply(self, run: Run) -> None:
        """Set the objective, and the loss that validation takes.

        Raises:
            Conflict: the model's head computes something that we do not know, or more than the adapter is trained.
        """
        if not adapted_only(run.model):
            raise Conflict("kl_to_base: more than the adapter is trained, so switching it off does not give the base.")
        head = verified_head(run)
        beta, chunk_tokens = self.beta, self.chunk_tokens
        run.loss = loss_of_supervised(head, chunk_tokens)

        def with_divergence(run: Run, batch: MicroBatch) -> Tensor:
            labels_N = batch.labels_RL.flatten()
            index_T = torch.nonzero_static(labels_N != IGNORED, size=batch.num_supervised).squeeze(1)
            mask_R1LL = run.documents.mask(batch.input_ids_RL)

            def hidden_states() -> Tensor:
                hidden_RLD = head.hidden(run.model, batch.input_ids_RL, batch.position_ids_RL, mask_R1LL)
                return hidden_RLD.flatten(0, 1).index_select(0, index_T)

            was_training = run.model.training
            run.model.eval()  # the base has no dropout, and draws nothing from the random generator
            try:
                with torch.no_grad(), adapters_off(run.model):
                    base_TD = hidden_states()
            finally:
                run.model.train(was_training)
            labels_T = labels_N.index_select(0, index_T)
            return loss_and_kl(
                hidden_states(), base_TD, labels_T, head, lambda: adapters_off(run.model), beta, chunk_tokens
            )

        run.objective = with_divergence


class L2SP(Method):
    """A pull of all that is trained towards where it started (L2-SP, Li et al. 2018, arXiv 1802.01483), decoupled from
    the gradient as AdamW's decay is.

    LoRA layers are pulled by their product B A, the distance of the weights from the base; everything else by the
    difference from its start, of which a copy is kept.

    Formula: W -= lr strength (W - W_start) before the optimizer's own step.

    Source: Li et al. 2018, "Explicit Inductive Bias for Transfer Learning" (L2-SP, arXiv 1802.01483), equation 1.
    When to use: a weak cure of forgetting is enough, and a second forward pass (`kl_to_base`) too dear. When not:
    forgetting is far over its budget: here it removed a tenth of it (docs/forgetting.md).

    Attributes:
        strength: each update also moves by learning rate x strength x distance towards the start.
    """

    name: ClassVar[str] = "l2_sp"
    slot: ClassVar[Slot] = Slot.REGULARIZER
    fidelity: ClassVar[Fidelity] = Fidelity.LEARNING

    strength: Weight = 0.1

    def conflict(self, recipe: Recipe) -> str | None:
        """An update inside backward sees one factor after the other has moved; masters overwrite a pull."""
        optimizers = [method for method in recipe.methods or () if isinstance(method, Optimizer)]
        if any(method.in_backward for method in optimizers) and recipe.get(LowRank) is not None:
            return "l2_sp pulls on both factors of LoRA at once; set in_backward of the optimizer to false"
        if any(method.name == "fp8_lm" for method in optimizers):
            return "l2_sp moves the weights, and fp8_lm keeps masters of its own that it writes them from; use adamw"
        if (lora := recipe.get(LoRA)) is not None and lora.init == "loftq":
            return "l2_sp would pull away what LoftQ puts back of the base; use lora's init 'kaiming'"
        return None

    def apply(self, run: Run) -> None:
        """Let the optimizer pull before each step.

        Raises:
            Conflict: a layer's update is not the product of its factors.
        """
        if not all(is_plain(layer) for layer in lora_layers(run.model).values()):
            raise Conflict("l2_sp pulls on the product B A, and this adapter's update is another. Use lora.")
        run.make_optimizer = pulled(run.make_optimizer, run.model, self.strength)
