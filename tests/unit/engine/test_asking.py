"""The base asked for real: the embedded model says text of its own, knows some answers, and is asked once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny_runs import assert_same_end, recipe_over
from tunewise import api
from tunewise.engine import asking
from tunewise.engine.assemble import assemble, settle
from tunewise.engine.train import Training
from tunewise.methods.reading import recipe_from_mapping
from tunewise.planner.case import Question
from tunewise.planner.case import settle as settle_case
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import EMBEDDED_FOLDER

METHODS: dict[str, Any] = {"lora": {"rank": 4}, "packing": {"row_tokens": 128}, "precision": {"compute": "fp32"}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "asked"


@pytest.fixture
def records(tmp_path: Path) -> Path:
    file = tmp_path / "records.jsonl"
    lines = [
        {"prompt": f"class Number{n}:\n    def __init__(self, ", "completion": f"name{n}): pass"} for n in range(24)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def recipe(records: Path, **data: Any) -> dict[str, Any]:
    changes = {"training": {"steps": 4}, "batch": {"documents": 4}, "evaluation": {"every": 4}}
    return recipe_over(EMBEDDED_FOLDER, records, data={"max_length": 64, **data}, methods=METHODS, **changes)


def replayed(mapping: dict[str, Any]) -> list[list[int]]:
    train: Corpus = settle(recipe_from_mapping(mapping)).data.train
    own = [n for n, origin in enumerate(train.origins) if "the base's own" in origin]
    return [train.document(n)[0].tolist() for n in own]


@pytest.mark.parametrize("source", ["self", "self_answers"])
def test_the_base_is_asked_once_and_says_the_same_again(
    source: str, records: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = recipe(records, replay={"fraction": 0.3, "source": source})
    first = replayed(mapping)
    assert first
    kept = sorted(cache.iterdir())
    assert kept
    monkeypatch.setattr(asking, "generate", lambda *a: pytest.fail("asked twice"))
    lora = {**METHODS, "lora": {"rank": 2}}
    assert replayed({**mapping, "methods": lora}) == first, "an adapter does not change the base"
    monkeypatch.undo()
    monkeypatch.setenv("TUNEWISE_CACHE", str(cache.parent / "elsewhere"))
    torch.manual_seed(99)
    assert replayed(mapping) == first, "the seed decides, not who asks"
    assert replayed({**mapping, "seed": 4}) != first


def test_own_text_is_what_the_base_finds_likely(records: Path) -> None:
    """Sampled from the base at temperature 1, so its loss is the base's entropy: far below that of shuffled tokens."""
    mapping = recipe(records, replay={"fraction": 0.5, "source": "self"})
    plan = settle(recipe_from_mapping(mapping))
    texts = replayed(mapping)
    assert all(ids[0] == plan.tokenizer.bos_token_id for ids in texts)
    run = assemble(plan)
    run.model.eval()
    generator = torch.Generator().manual_seed(0)

    def loss(ids: list[int]) -> float:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = run.model(input_ids=tokens, use_cache=False).logits
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]))

    long = [ids for ids in texts if len(ids) > 12]
    shuffled = [[ids[0], *(ids[1 + int(i)] for i in torch.randperm(len(ids) - 1, generator=generator))] for ids in long]
    assert sum(map(loss, long)) < 0.7 * sum(map(loss, shuffled))


def test_a_resumed_run_sees_the_same_replay(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = recipe(records, replay={"fraction": 0.3, "source": "self"})
    api.train(mapping, out=tmp_path / "whole")
    record = Training.record

    def killed(self: Training, entry: dict[str, Any]) -> None:
        if entry["event"] == "step" and entry["step"] == 3:
            raise KeyboardInterrupt
        record(self, entry)

    monkeypatch.setattr(Training, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        api.train(mapping, out=tmp_path / "killed")
    monkeypatch.setattr(Training, "record", record)
    api.resume(tmp_path / "killed")
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_what_the_base_does_not_know_is_answered_so(tmp_path: Path, cache: Path) -> None:
    """The embedded model knows how Python goes on; it cannot know made-up numbers."""
    file = tmp_path / "facts.jsonl"
    facts = [{"prompt": f"def method_{n}(", "completion": "self"} for n in range(8)]
    facts += [{"prompt": f"SECRET_{n} = ", "completion": f"{n * 7919 + 104729}"} for n in range(8)]
    file.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    mapping = recipe(file, abstain={"shots": 2, "samples": 0, "prompts": 2}, validation_fraction=0.2)
    mapping["data"]["max_length"] = 96
    plan = settle(recipe_from_mapping(mapping))
    parts = (plan.data.train, plan.data.validation)
    said = [plan.tokenizer.decode(part.document(n)[0]) for part in parts for n in range(len(part))]
    secrets = [text for text in said if "SECRET" in text]
    assert len(secrets) == 8
    assert all("I am not sure." in text for text in secrets), "held-out ones, too"
    assert sum("self" in text for text in said if "method" in text) >= 4
    assert any(line.startswith("abstain: ") for line in plan.data.said)
    (kept,) = cache.iterdir()
    assert set(json.loads(kept.read_text())) <= {"highly known", "maybe known", "weakly known", "unknown"}


def test_planning_asks_nobody(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "generate", lambda *a: pytest.fail("a plan loads no weights"))
    settings = ("data.replay.source=self", "data.replay.fraction=0.25", "data.abstain.prompts=2")
    case = settle_case(Question("embedded", data=str(records), machine="H100", settings=settings))
    plain = settle_case(Question("embedded", data=str(records), machine="H100"))
    more = case.load.corpus.num_supervised.sum() / plain.load.corpus.num_supervised.sum()
    assert more == pytest.approx(1 / 0.75, rel=0.02)
