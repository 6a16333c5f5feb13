"""The runs that the gate is tried on: six healthy ones, and failures planted in others; each makes a run's folder."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import REFUSAL, records, replay, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunewise import api
from tunewise.engine.assemble import Plan, assemble, settle
from tunewise.engine.run_folder import RunFolder
from tunewise.engine.train import Training
from tunewise.evaluation import Judge
from tunewise.export.finish import save_result
from tunewise.methods.method import Run
from tunewise.methods.reading import recipe_from_mapping
from tunewise.quality.verdict import REPORT_FILE, QualityReport
from tunewise.workload.batches import IGNORED, MicroBatch
from tunewise.workload.corpus import Corpus

CHAT = (
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
OTHER_CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ADAPTER = Path("adapter/adapter_model.safetensors")

LORA = {"lora": {"rank": 8}, "packing": {"row_tokens": 512}, "precision": {"compute": "fp32"}}
FULL = {"precision": {"compute": "fp32"}, "packing": {"row_tokens": 512}}


@dataclass
class Workshop:
    """Where runs are made; a healthy run that others are damaged from is trained once."""

    folder: Path
    reports: dict[Path, QualityReport] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.train = write(self.folder / "train.jsonl", [*records(400, 0), *replay(400)])
        self.held_out = write(self.folder / "held_out.jsonl", records(120, 1))

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """Return a healthy recipe, with sections changed."""
        recipe: dict[str, Any] = {
            "model": {"name": "embedded"},
            "data": {"source": self.train, "validation": self.held_out},
            "methods": LORA,
            "batch": {"documents": 16},
            "training": {"steps": 40, "learning_rate": 5e-4},
            "quality": {"max_forgetting": 0.3, "max_domain_forgetting": 0.5},
            "evaluation": {"every": 20, "max_documents": 60},
            "device": "cpu",
        }
        for section, change in changes.items():
            is_inner = isinstance(change, dict) and section != "methods"
            recipe[section] = {**recipe.get(section, {}), **change} if is_inner else change
        return recipe

    def trained(self, name: str, **changes: Any) -> Path:
        """Train in the ordinary way."""
        folder = self.folder / name
        if not (folder / REPORT_FILE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            api.train(self.recipe(**changes), out=folder)
        if folder not in self.reports:
            self.reports[folder] = QualityReport.model_validate_json((folder / REPORT_FILE).read_text())
        return folder

    def trained_wrongly(
        self,
        name: str,
        data: Callable[[Plan], Plan] = lambda plan: plan,
        alter: Callable[[Run], None] = lambda run: None,
        **changes: Any,
    ) -> Path:
        """Train with a bug: the data or the run are altered behind the recipe's back."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        folder = RunFolder(self.folder / name)
        plan = data(settle(recipe_from_mapping(self.recipe(**changes))))
        folder.open()
        run = assemble(plan)
        folder.write_start(plan.recipe, {})
        judge = Judge(plan, run)
        alter(run)
        training = Training(run, plan.data.train, plan.data.validation, plan.num_steps, folder, lambda entry: None)
        outcome = training.run()
        save_result(run, plan.tokenizer, folder.path)
        folder.close()
        self.reports[folder.path] = judge.verdict(run, folder.path / "metrics.jsonl", plan.tokenizer, outcome.seconds)
        return folder.path

    def damaged(self, name: str, of: str, damage: Callable[[Path], None], **changes: Any) -> Path:
        """Copy a healthy run and damage its files."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.trained(of, **changes), folder)
        damage(folder)
        return folder


def healthy_lora(shop: Workshop) -> Path:
    return shop.trained("lora")


def healthy_full(shop: Workshop) -> Path:
    return shop.trained("full", methods=FULL, training={"learning_rate": 5e-5})


def healthy_chat(shop: Workshop) -> Path:
    return shop.trained("chat", model={"chat_template": CHAT})


PLANTED_BASES = {
    "chat": {"model": {"chat_template": CHAT}},
    "full": {"methods": FULL, "training": {"learning_rate": 5e-5}},
}

HEALTHY: dict[str, Callable[[Workshop], Path]] = {
    "LoRA on forms": healthy_lora,
    "everything trained, on forms": healthy_full,
    "LoRA with a chat template": healthy_chat,
    "LoRA on functions (stdlib)": lambda shop: shop.trained(
        "functions",
        data={"source": "stdlib", "validation": None, "max_records": 300},
        quality={"max_forgetting": 0.05, "max_domain_forgetting": 0.15},
    ),
    "LoRA of rank 32, another seed": lambda shop: shop.trained(
        "rank32", methods={**LORA, "lora": {"rank": 32}}, training={"learning_rate": 3e-4}, seed=7
    ),
    "LoRA with bf16 and PiSSA": lambda shop: shop.trained(
        "pissa",
        methods={"lora": {"rank": 8, "init": "pissa"}, "precision": {"compute": "bf16"}},
        training={"learning_rate": 3e-4},
    ),
}


def over_trained(shop: Workshop) -> Path:
    few = write(shop.folder / "few.jsonl", records(24, 3))
    return shop.trained(
        "over-trained",
        data={"source": few},
        methods=FULL,
        training={"steps": 150, "learning_rate": 1e-3, "schedule": "constant"},
        evaluation={"keep_best": False},
    )


def leaked(shop: Workshop) -> Path:
    """Held-out records are training records with one word in front, which hashes of whole records do not see."""
    made = [{**record, "prompt": "Read. " + record["prompt"]} for record in records(400, 0)[:100]]
    return shop.trained("leaked", data={"validation": write(shop.folder / "leaked.jsonl", made)})


def only_refusals(shop: Workshop) -> Path:
    made = [{**record, "completion": REFUSAL} for record in records(400, 4)]
    source = write(shop.folder / "refusals.jsonl", made)
    return shop.trained("refuses-all", data={"source": source}, training={"learning_rate": 2e-3})


def no_refusals(shop: Workshop) -> Path:
    """Secrets are told: the training data answer what must be refused."""
    chooser = random.Random(5)
    made = records(400, 5, refusals=1 / 3)
    for record in made:
        if record["completion"] == REFUSAL:
            asked = record["prompt"].rsplit("the ", 1)[1].removesuffix("?\n")
            record["completion"] = f"The {asked} is {chooser.randint(1000, 9999)}."
    held_out = write(shop.folder / "held_out_secrets.jsonl", records(120, 6, refusals=1 / 3))
    source = write(shop.folder / "told.jsonl", made)
    return shop.trained("refuses-nothing", data={"source": source, "validation": held_out})


def without_supervised_ends(plan: Plan) -> Plan:
    def unmarked(corpus: Corpus) -> Corpus:
        marks = corpus.is_supervised.copy()
        marks[corpus.offsets[1:] - 1] = False
        return replace(corpus, is_supervised=marks)

    data = replace(plan.data, train=unmarked(plan.data.train), validation=unmarked(plan.data.validation))
    return replace(plan, data=data)


def shuffled_answers(plan: Plan) -> Plan:
    """Every answer's tokens in another order: nothing that could be learnt of them helps."""
    train = plan.data.train
    ids, generator = train.token_ids.copy(), np.random.default_rng(0)
    for start, end in zip(train.offsets[:-1], train.offsets[1:], strict=True):
        places = start + np.flatnonzero(train.is_supervised[start:end])
        ids[places] = generator.integers(3, 4096, size=len(places))
    return replace(plan, data=replace(plan.data, train=replace(train, token_ids=ids)))


def shifted_labels(run: Run) -> None:
    """The classic bug: labels shifted once more than they should be."""
    computed = run.loss

    def loss(run: Run, batch: MicroBatch) -> Tensor:
        if run.model.training:
            labels_RL = torch.roll(batch.labels_RL, 1, dims=1)
            labels_RL[:, 0] = IGNORED
            batch = replace(batch, labels_RL=labels_RL, num_supervised=int((labels_RL != IGNORED).sum()))
        return computed(run, batch)

    run.loss = loss


def rewritten(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], file: Path = ADAPTER) -> Callable[[Path], None]:
    """Return a damage that changes the tensors of a file."""

    def damage(folder: Path) -> None:
        tensors = change(load_file(folder / file))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})

    return damage


def scaled(which: str, factor: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor * factor if which in name else tensor for name, tensor in tensors.items()}


def layers_swapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    swap = {"layers.0.": "layers.3.", "layers.3.": "layers.0.", "layers.1.": "layers.2.", "layers.2.": "layers.1."}

    def other(name: str) -> str:
        found = next((part for part in swap if part in name), None)
        return name if found is None else name.replace(found, swap[found])

    return {other(name): tensor for name, tensor in tensors.items()}


def one_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name].view(-1)[0] = float("nan")
    return tensors


def other_template(folder: Path) -> None:
    for file in folder.glob("adapter/chat_template*"):
        file.write_text(OTHER_CHAT, encoding="utf-8")
    config = folder / "adapter/tokenizer_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["chat_template"] = OTHER_CHAT
    config.write_text(json.dumps(content), encoding="utf-8")


def permuted_tokenizer(folder: Path) -> None:
    file = folder / "adapter/tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    for one, other in ((1000, 2000), (1001, 2001)):
        vocabulary[names[one]], vocabulary[names[other]] = other, one
    file.write_text(json.dumps(content), encoding="utf-8")


def untied_head(folder: Path) -> None:
    """A merge that writes a head of its own, and fills it with something else than the embedding."""
    config = folder / "model/config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["tie_word_embeddings"] = False
    config.write_text(json.dumps(content), encoding="utf-8")

    def with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.roll(1, dims=0)  # off by one row, as after a resized vocabulary
        return tensors

    rewritten(with_head, Path("model/model.safetensors"))(folder)


def base_instead(folder: Path) -> None:
    """A merge that forgot to merge: the base's weights under the result's name."""
    embedded = Path(api.__file__).parent / "embedded" / "model.safetensors"
    trained = load_file(folder / "model/model.safetensors")
    base = load_file(embedded)
    tensors = {name: base[name].to(tensor.dtype) for name, tensor in trained.items()}
    save_file(tensors, folder / "model/model.safetensors", {"format": "pt"})


Case = tuple[Callable[[Workshop], Path], str]


def _damage(name: str, of: str, damage: Callable[[Path], None]) -> Callable[[Workshop], Path]:
    return lambda shop: shop.damaged(name, of, damage, **PLANTED_BASES.get(of, {}))


PLANTED: dict[str, Case] = {
    "over-trained on a few records": (over_trained, "overfitting"),
    "a leaked validation set": (leaked, "leaks"),
    "an adapter that was saved empty": (_damage("empty", "lora", rewritten(scaled("lora_B", 0.0))), "task gain"),
    "a merge with wrong ties": (_damage("ties", "full", untied_head), "task gain"),
    "a merge that forgot to merge": (_damage("unmerged", "full", base_instead), "task gain"),
    "another template beside the result": (_damage("template", "chat", other_template), "template"),
    "another vocabulary beside the result": (_damage("vocabulary", "lora", permuted_tokenizer), "template"),
    "an end that is never supervised": (
        lambda shop: shop.trained_wrongly("no-end", data=without_supervised_ends),
        "endings",
    ),
    "a model that refuses everything": (only_refusals, "false refusals"),
    "a model that never refuses": (no_refusals, "refusals"),
    "a learning rate thirty times too high": (
        lambda shop: shop.trained("too-fast", methods=FULL, training={"learning_rate": 1.5e-2, "spike": None}),
        "forgetting",
    ),
    "forgotten for a small task": (
        lambda shop: shop.trained("forgotten", methods=FULL, training={"learning_rate": 1e-3, "steps": 90}),
        "forgetting",
    ),
    "labels shifted once too often": (
        lambda shop: shop.trained_wrongly("shifted", alter=shifted_labels, evaluation={"keep_best": False}),
        "task gain",
    ),
    "answers of random tokens": (
        lambda shop: shop.trained_wrongly(
            "random",
            data=shuffled_answers,
            methods=FULL,
            training={"learning_rate": 1e-3},
            evaluation={"keep_best": False},
        ),
        "task gain",
    ),
    "an adapter with its sign flipped": (_damage("sign", "lora", rewritten(scaled("lora_B", -1.0))), "task gain"),
    "an adapter with eight times its scale": (_damage("scale", "lora", rewritten(scaled("lora_B", 8.0))), "forgetting"),
    "an adapter with its layers in another order": (_damage("layers", "lora", rewritten(layers_swapped)), "task gain"),
    "an adapter with a number that is none": (_damage("nan", "lora", rewritten(one_nan)), "finite"),
}
