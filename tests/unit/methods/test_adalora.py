"""AdaLoRA through peft: trained as peft's own loop trains it, resumed bit for bit, saved with the ranks left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.architectures import tiny_model
from tests.unit.methods.adapted import logits, make_recipe, make_run, token_ids
from tests.unit.tiny_runs import (
    TOKENIZER_SIZE,
    assert_same_end,
    recipe_over,
    save_model,
    train_with_loss,
    write_records,
)
from tunewise import api
from tunewise.engine.finished import open_finished
from tunewise.engine.step import begin_step, update
from tunewise.errors import InputError
from tunewise.export.adapter import load_peft
from tunewise.methods import SGD, Peft
from tunewise.methods.adalora import RankBudget, orthogonality
from tunewise.methods.compatibility import conflicts

peft = pytest.importorskip("peft")

OPTIONS = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "orth_reg_weight": 0.5}
STEPS = 6


def test_training_is_what_peft_s_own_loop_makes_of_it() -> None:
    run = make_run(tiny_model("llama"), Peft(kind="ADALORA", options=OPTIONS))
    config = peft.AdaLoraConfig(total_step=STEPS, task_type="CAUSAL_LM", **OPTIONS)
    theirs = peft.get_peft_model(tiny_model("llama"), config)
    theirs.load_state_dict(run.model.state_dict())
    ids = token_ids()
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5) for model in (run.model, theirs)
    ]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(STEPS):
        begin_step(run, step, STEPS)
        output = run.model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (loss + run.penalties[0]()).backward()
        update(run, optimizers[0], scaler)
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizers[1].step()
        theirs.base_model.update_and_allocate(step)
        optimizers[1].zero_grad()
    expected = dict(theirs.named_parameters())
    for name, parameter in run.model.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-5, atol=1e-6), name
    budget = run.companions["peft"]
    assert isinstance(budget, RankBudget)
    left = sum(int(kept.sum()) for name, kept in budget.state().items() if name.startswith("rank_pattern/"))
    assert left == 2 * 4  # target_r of q_proj and v_proj of each of two blocks


def test_orthogonality_is_zero_for_orthonormal_rows_and_the_formula_else() -> None:
    assert float(orthogonality([torch.eye(5)[:3]])) == 0.0
    factor = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    expected = (factor @ factor.T - torch.eye(3)).norm()
    assert float(orthogonality([factor, torch.eye(4)])) == pytest.approx(float(expected) / 2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("adalora")
    methods = {"peft": {"kind": "ADALORA", "options": OPTIONS}, "precision": {"compute": "fp32"}}
    base = recipe_over(save_model(folder / "model"), write_records(folder / "records.jsonl"))
    return {**base, "methods": methods, "evaluation": {"keep_best": True, "every": 1}}


def test_a_resumed_run_is_the_uninterrupted_one_and_loads_in_peft(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = api.train(recipe, out=tmp_path / "whole")
    seen = 0

    def stop_once(run: Any, batch: Any, loss: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += torch.is_grad_enabled()
        if seen == 14:  # in the last phase, when ranks are settled
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        train_with_loss(recipe, tmp_path / "run", stop_once)
    train_with_loss(recipe, tmp_path / "run", lambda run, batch, loss: loss, resume=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    model = load_peft(tiny_model("llama", vocab_size=TOKENIZER_SIZE), whole.saved.folder)
    run = open_finished(tmp_path / "whole", "read").run
    assert torch.allclose(logits(model), logits(run.model), rtol=1e-5, atol=1e-5)


def test_clear_errors() -> None:
    run = make_run(tiny_model("llama"), Peft(kind="ADALORA", options=OPTIONS))
    with pytest.raises(InputError, match="no step left of 3"):
        begin_step(run, 0, 3)
    method = Peft(kind="ADALORA")
    assert "switch sgd.in_backward off" in conflicts(make_recipe(method, SGD(in_backward=True)))[0]
