"""Decoder plus head equals the whole model, for every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.unit.architectures import ARCHITECTURES, VOCAB_SIZE, tiny_model
from tunewise.errors import Conflict
from tunewise.layers.head import CausalHead, base_model_of


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_parts_equal_the_whole(architecture: str) -> None:
    model = tiny_model(architecture).eval()
    head = CausalHead.of(model)
    head.verify(model)
    ids = torch.randint(3, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(11).expand(2, -1)
    with torch.no_grad():
        ours = head.logits(head.hidden(model, ids, positions).flatten(0, 1))
        theirs = model(input_ids=ids, position_ids=positions).logits.flatten(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gemma2", "cohere", "granite"])
def test_verify_finds_a_head_that_misses_something(architecture: str) -> None:
    model = tiny_model(architecture)
    with pytest.raises(Conflict, match="whole_loss"):
        CausalHead(CausalHead.of(model).output).verify(model)
    assert model.training


def test_inside_a_peft_model() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    head = CausalHead.of(model)
    assert type(head.output) is not nn.Linear  # the adapter around lm_head belongs to the head
    with torch.no_grad():
        head.output.get_submodule("lora_B.default").get_parameter("weight").normal_()
    head.verify(model)
    assert base_model_of(model) is model.base_model.model
