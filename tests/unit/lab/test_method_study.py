from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig

from tunewise.errors import InputError
from tunewise.lab.contributions import method_findings
from tunewise.lab.factors import FactorSpace, On, factor_space
from tunewise.lab.laboratory import Laboratory, Spent
from tunewise.lab.method_study import MethodStudy
from tunewise.lab.outcome import Failed, Gate, Interval, Measurement, OutOfMemory
from tunewise.lab.trial import Trial
from tunewise.layers import native
from tunewise.machine.machine import Machine
from tunewise.methods import Fused, Quantize, complete
from tunewise.methods.reading import recipe_from_mapping
from tunewise.planner.predict import Predictor
from tunewise.quality.measured import Measured
from tunewise.recipe import BatchSpec, Recipe

EFFECT = {  # on time, on memory
    "bf16": (0.5, 0.8),
    "packing": (0.6, 0.7),
    "supervised loss": (0.9, 0.7),
    "attention": (0.95, 1.0),
    "accumulation": (1.05, 0.5),
    "checkpointing": (1.3, 0.4),
    "lora": (0.8, 0.6),
    "nf4": (1.2, 0.7),
}
CONFIG = AutoConfig.for_model("llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
MACHINE = Machine(
    name="here", kind="cpu", memory_bytes=2**33, usable_memory_bytes=2**33, usable_memory_rule="all",
    bandwidth_bytes_per_second=1e10, flops_per_second={"fp32": 1e11, "bf16": 3e11}, source="made up",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors are those of a machine without a compiler, whatever machine this is."""
    monkeypatch.setattr(native, "why_not", lambda: "there is none")


BF16: dict[str, Any] = {"precision": {"compute": "bf16"}}  # the default where the processor has it


def base_recipe(**methods: Any) -> Recipe:
    start = recipe_from_mapping(
        {
            "model": "embedded",
            "data": {"source": "stdlib", "max_length": 128},
            "methods": {"lora": {"rank": 4}, "packing": {"row_tokens": 256}, **BF16, **methods},
            "training": {"learning_rate": 1e-3},
        }
    )
    recipe = complete(start, CONFIG, torch.device("cpu"))
    return recipe.replace(batch=BatchSpec(supervised_tokens=512, micro_batch_size=1))


@dataclass
class Formula:
    """A laboratory whose trials take what a formula says; it keeps what was asked."""

    space: FactorSpace
    effects: dict[str, tuple[float, float]] = field(default_factory=lambda: dict(EFFECT))
    synergy: dict[On, float] = field(default_factory=dict)
    broken: dict[str, Any] = field(default_factory=dict)
    forgotten: dict[str, float] = field(default_factory=dict)
    asked: list[On] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    measured_forgetting: list[bool] = field(default_factory=list)
    spent: dict[str, Spent] = field(default_factory=dict)

    def run(self, study: str, trial: Trial, *, params: dict[str, bool], role: str, expected_seconds: float) -> Any:
        on = frozenset(name for name, is_on in params.items() if is_on)
        self.asked.append(on)
        self.roles.append(role)
        self.measured_forgetting.append(trial.measures_forgetting)
        account = self.spent.setdefault(study, Spent())
        account.num_trials += 1
        account.seconds += 1.0
        for name, outcome in self.broken.items():
            if name in on and not isinstance(outcome, float):
                return outcome
        seconds = math.prod((self.effects[name][0] for name in on), start=1.0)
        if role.startswith("beyond"):
            assert (trial.read_recipe().get(Quantize) or Quantize()).compute == "int8"
            seconds *= 0.8
        seconds *= math.prod(factor for both, factor in self.synergy.items() if both <= on)
        peak = 1e9 * math.prod((self.effects[name][1] for name in on), start=1.0)
        wrong = max((error for name, error in self.broken.items() if name in on), default=0.0)
        learning = "lora" if "lora" in on else "full"
        lost = sum(self.forgotten.get(name, 0.0) for name in on)
        forgetting = Measured(middle=lost, low=lost - 0.01, high=lost + 0.01, noise_floor=0.01, num=16)
        return Measurement(
            step_seconds=Interval(middle=seconds, low=0.98 * seconds, high=1.02 * seconds),
            tokens_per_second=Interval(middle=1000 / seconds, low=980 / seconds, high=1020 / seconds),
            peak_tensor_bytes=int(peak),
            loss=2.0 - 0.1 * ("lora" in on),
            forgetting=forgetting if trial.measures_forgetting else None,
            gate=Gate(loss=2.0, norm=1.0, sketch=(1.0, wrong), trainable=learning),
        )


def space_of(recipe: Recipe, machine: Machine = MACHINE) -> FactorSpace:
    rows = SimpleNamespace(rows_per_step=8, documents_per_row=3)

    def refuse(*_: object) -> None:
        raise InputError("nothing is predicted here")

    load = SimpleNamespace(laid_out=lambda packing, size: rows)
    predictor = SimpleNamespace(rows=lambda choice, size: rows, predict=refuse, load=load)
    return factor_space(recipe, CONFIG, machine, cast(Predictor, predictor))


def study(
    recipe: Recipe | None = None,
    *,
    budget: float = 1000.0,
    limit: float = 1e12,
    machine: Machine = MACHINE,
    **changes: Any,
) -> MethodStudy:
    space = space_of(recipe or base_recipe(), machine)
    wishes = {name: changes.pop(name) for name in ("wanted", "unwanted", "max_forgetting") if name in changes}
    laboratory = Formula(space, **changes)
    return MethodStudy(cast(Laboratory, laboratory), space, int(limit), budget, 0.5, **wishes)


def run(**arguments: Any) -> MethodStudy:
    done = study(**arguments)
    done.run()
    return done


def test_the_factors_of_a_recipe() -> None:
    space = space_of(base_recipe())
    assert space.names == tuple(EFFECT)
    assert space.of_base() == {"bf16", "packing", "supervised loss", "attention", "accumulation", "lora"}
    assert space.refusal(frozenset({"nf4"})) is not None
    assert space.refusal(frozenset({"nf4", "lora"})) is None


def test_compiled_kernels_are_a_factor_where_they_are_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = base_recipe()
    assert plain.get(Fused) is None
    monkeypatch.setattr(native, "why_not", lambda: None)
    offered, own = space_of(plain), space_of(base_recipe())
    assert (offered.names, own.names) == (own.names, (*tuple(EFFECT)[:4], "fused", *tuple(EFFECT)[4:]))
    assert "fused" not in offered.of_base()
    assert "fused" in own.of_base()
    for space in (offered, own):
        assert space.recipe(frozenset({"fused"})).get(Fused) == Fused()
        assert space.recipe(frozenset()).get(Fused) is None
    elsewhere = MACHINE.replace(kind="cuda")
    assert "fused" not in factor_space(plain, CONFIG, elsewhere, offered.predictor).names


def test_compiled_kernels_are_chosen_by_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: None)
    for factor, is_chosen in ((0.7, True), (1.4, False)):
        done = run(effects={**EFFECT, "fused": (factor, 1.0)})
        assert ("fused" in done.winner) is is_chosen


def test_on_means_what_the_users_recipe_says() -> None:
    space = space_of(base_recipe())
    methods = {m.name: m for m in space.recipe(space.of_base()).methods or ()}
    assert methods["lora"] == base_recipe().get(type(methods["lora"]))
    assert methods["packing"] == base_recipe().get(type(methods["packing"]))


def test_what_keeps_the_model_near_its_base_is_never_switched_off() -> None:
    """kl_to_base and l2_sp change what is learnt, so no study may drop them for speed."""
    recipe = base_recipe(kl_to_base={"beta": 0.3}, l2_sp={"strength": 0.2})
    kept = space_of(recipe)
    assert not {"supervised loss", "lora", "nf4"} & set(kept.names)
    assert {"packing", "accumulation", "checkpointing"} <= set(kept.names)
    for on in (frozenset[str](), frozenset(kept.names)):
        assert kept.refusal(on) is None
        names = {method.name for method in kept.recipe(on).methods or ()}
        assert {"kl_to_base", "l2_sp", "lora"} <= names


def test_full_fine_tuning_takes_a_tenth_of_the_rate() -> None:
    space = space_of(base_recipe())
    assert space.recipe(frozenset()).training.learning_rate == pytest.approx(1e-4)
    assert space.recipe(frozenset({"lora"})).training.learning_rate == pytest.approx(1e-3)


def test_what_is_fastest_of_the_users_problem_wins() -> None:
    done = run()
    assert done.winner == {"bf16", "packing", "supervised loss", "attention", "lora"}
    assert done.runner_up is not None


@pytest.mark.parametrize("budget", [14.0, 1000.0])
def test_a_method_that_is_faster_alone_and_slower_with_others_is_left_out(budget: float) -> None:
    effects = {**EFFECT, "bf16": (0.7, 0.8)}
    done = run(effects=effects, synergy={frozenset({"bf16", "packing"}): 2.5}, budget=budget)
    assert done.winner == {"packing", "supervised loss", "attention", "lora"}


def test_the_neighbours_of_the_users_recipe_come_first() -> None:
    done = study()
    done.run()
    asked = cast(Formula, done.laboratory).asked
    own = done.own
    assert asked[:3] == [frozenset(), frozenset({"lora"}), own]
    assert all(len(on ^ own) == 1 for on in asked[3 : 3 + 6])


def test_memory_methods_come_only_when_memory_is_short() -> None:
    plain = run()
    assert not plain.winner & {"checkpointing", "accumulation", "nf4"}
    need = plain.tried[plain.winner].peak_bytes
    short = run(limit=0.8 * need)
    assert short.winner & {"checkpointing", "accumulation"}
    assert short.tried[short.winner].peak_bytes <= 0.8 * need


def test_a_memory_method_that_makes_it_clearly_faster_is_welcome() -> None:
    done = run(effects={**EFFECT, "accumulation": (0.6, 0.5)})
    assert "accumulation" in done.winner


def test_what_changes_learning_is_shown_and_not_chosen_for_speed() -> None:
    done = run(effects={**EFFECT, "nf4": (0.2, 0.5)})
    assert "nf4" not in done.winner
    single = {effect.name: effect for effect in method_findings(done).single}
    assert single["nf4"].alone_time is not None
    assert single["nf4"].alone_time.middle == pytest.approx(0.2)


def test_a_wrong_gradient_takes_a_method_out() -> None:
    done = run(broken={"packing": 0.5})
    findings = method_findings(done)
    assert "packing" not in done.winner
    assert any(name == "packing" and "gradient" in reason for name, reason in findings.excluded)


@pytest.mark.parametrize("outcome", [Failed(reason="the interpreter crashed: SIGSEGV"), OutOfMemory(reason="full")])
def test_a_method_that_fails_is_an_outcome(outcome: Any) -> None:
    done = run(broken={"attention": outcome})
    assert "attention" not in done.winner
    assert any(name == "attention" for name, _ in method_findings(done).excluded)
    assert done.tried[done.winner].measured


def test_wishes() -> None:
    done = run(wanted=frozenset({"checkpointing"}), unwanted=frozenset({"packing"}))
    assert "packing" not in done.space.names
    recipe = done.space.recipe(done.winner)
    names = {method.name for method in recipe.methods or ()}
    assert "checkpointing" in names
    assert "packing" not in names


def test_single_effects_are_those_of_the_formula() -> None:
    findings = method_findings(run())
    for effect in findings.single:
        assert effect.alone_time is not None
        assert effect.alone_memory is not None
        assert effect.alone_time.middle == pytest.approx(EFFECT[effect.name][0], rel=1e-6)
        assert effect.alone_memory.middle == pytest.approx(EFFECT[effect.name][1], rel=1e-3)
        if effect.left_out_time is not None:
            assert effect.left_out_time.middle == pytest.approx(EFFECT[effect.name][0], rel=1e-6)


def test_independent_effects_have_no_synergy_and_dependent_ones_do() -> None:
    free = method_findings(run()).cumulative_time
    assert free is not None
    assert free.synergy == pytest.approx(1.0, rel=1e-6)
    both = frozenset({"bf16", "packing"})
    bound = run(synergy={both: 1.25})
    findings = method_findings(bound)
    assert findings.cumulative_time is not None
    assert findings.cumulative_time.synergy == pytest.approx(1.25, rel=1e-6)
    pairs = [effect for effect in findings.time_effects if " x " in effect.term]
    strongest = max(pairs, key=lambda effect: abs(math.log(effect.ratio.middle)))
    assert "bf16 x packing" in strongest.term
    assert 1.0 < strongest.ratio.low < strongest.ratio.middle < 1.3


def test_the_ladder_adds_the_winners_methods_one_by_one() -> None:
    done = run()
    assert [len(on) for on in done.ladder] == list(range(len(done.winner) + 1))
    assert done.ladder[-1] == done.winner


def test_no_recipe_is_measured_twice_but_the_finalists() -> None:
    done = run()
    asked = cast(Formula, done.laboratory).asked
    repeated = {on for on in asked if asked.count(on) > 1}
    assert len(repeated) <= 3
    assert all(done.tried[on].role in ("candidate", "around", "factorial", "baseline", "alone") for on in repeated)


def test_a_small_budget_still_gives_an_answer() -> None:
    done = run(budget=12.0)
    assert done.winner == {"bf16", "packing", "supervised loss", "attention", "lora"}
    assert any("budget" in reason for _, reason in done.excluded)
    assert len(cast(Formula, done.laboratory).asked) <= 16


def test_a_budget_that_the_plain_form_has_used_up_buys_no_candidate_that_nobody_asked_for() -> None:
    done = run(budget=3.0)  # a trial takes a second
    laboratory = cast(Formula, done.laboratory)
    assert laboratory.asked == [frozenset(), frozenset({"lora"}), done.own]
    assert (done.winner, done.runner_up) == (done.own, frozenset({"lora"}))


def test_nothing_that_works_is_an_error() -> None:
    names = dict.fromkeys(EFFECT, Failed(reason="broken"))
    done = study(broken=names)
    cast(Formula, done.laboratory).run = lambda *a, **k: Failed(reason="broken")  # type: ignore[method-assign]
    with pytest.raises(InputError, match="broken"):
        done.run()


def test_the_report_has_every_trial() -> None:
    done = run()
    findings = method_findings(done)
    assert len(findings.trials) == len(done.tried)
    assert findings.chosen in {trial.label for trial in findings.trials}
    assert findings.front
    assert findings.sentences


NARROW_MACHINE = MACHINE.replace(flops_per_second={**MACHINE.flops_per_second, "int8": 6e11})


def test_products_in_8_bits_are_shown_and_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: None)
    done = run(machine=NARROW_MACHINE, effects={**EFFECT, "fused": (0.7, 1.0)})
    findings = method_findings(done)
    last = findings.trials[-1]
    assert (last.role, last.label) == ("beyond", f"{findings.chosen} + products in 8 bits")
    assert done.space.recipe(done.winner).get(Quantize) is None
    assert "a step takes 0.80 times as long" in findings.sentences[-1]
    assert "quantize: {kind: int8, compute: int8, head_compute: int8}" in findings.sentences[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": MACHINE},
        {"methods": {"quantize": {"kind": "int8", "compute": "int8"}}},
        {"unwanted": frozenset({"nf4"})},
        {"budget": 12.0},
    ],
    ids=["no such products", "the recipe has them", "not wanted", "no budget left"],
)
def test_products_in_8_bits_are_not_tried_where_that_says_nothing(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "why_not", lambda: None)
    changes = dict(changes)
    effects = {**EFFECT, "fused": (0.7, 1.0), "8-bit products": (0.8, 0.9)}
    recipe = base_recipe(**changes.pop("methods", {}))
    done = run(**{"recipe": recipe, "machine": NARROW_MACHINE, "effects": effects, **changes})
    assert done.beyond is None
    assert not any(role.startswith("beyond") for role in cast(Formula, done.laboratory).roles)


def test_what_wins_time_by_forgetting_does_not_win() -> None:
    """bf16 is made the fastest and the most forgetful; without a budget it wins, with one it does not."""
    forgotten = {"bf16": 0.08, "packing": 0.03}
    free = run(forgotten=forgotten)
    assert "bf16" in free.winner, "nobody asked"
    kept = run(forgotten=forgotten, max_forgetting=0.05)
    assert kept.winner == free.winner - {"bf16"}
    findings = method_findings(kept)
    said = [reason for label, reason in findings.excluded if "bf16" in label]
    assert any("forgets 0.110 nats in 5 steps, over the budget of 0.05" in reason for reason in said)
    chosen = next(trial for trial in findings.trials if trial.label == findings.chosen)
    assert chosen.forgetting is not None
    assert (chosen.forgetting.middle, chosen.forgetting.low) == pytest.approx((0.03, 0.02))
    assert not [label for label in findings.front if "bf16" in label]


def test_where_all_forget_too_much_the_fastest_wins_and_it_is_said() -> None:
    done = run(forgotten={"lora": 0.2}, max_forgetting=0.05)
    assert done.winner == run().winner
    assert any("No combination" in said for said in method_findings(done).sentences)


def test_forgetting_is_measured_once_a_combination_and_only_when_asked() -> None:
    assert not any(cast(Formula, run().laboratory).measured_forgetting)
    laboratory = cast(Formula, run(max_forgetting=0.05).laboratory)
    by_combination: dict[On, list[bool]] = {}
    for on, did in zip(laboratory.asked, laboratory.measured_forgetting, strict=True):
        by_combination.setdefault(on, []).append(did)
    assert all(did[0] and not any(did[1:]) for did in by_combination.values())
