"""What is done: the `Recipe` and the frozen values it is made of.

A recipe is data. It says what to learn from, in which batches, with which methods, for how long; it computes nothing.
It is validated when it is made, written to YAML and read back without loss, and its `id` is the hash of its content.
Where a field is `None`, `tunewise.methods.complete` fills in a default and the run folder's `recipe.yaml` shows it.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from tunewise.errors import InputError

if TYPE_CHECKING:
    from tunewise.methods.method import Run

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

DataFormat = Literal["auto", "alpaca", "prompt-completion", "messages", "sharegpt", "text"]
Objective = Literal["sft", "continue", "pretrain"]


class Value(BaseModel):
    """A frozen value that knows all its fields: unknown keys are errors, equal content is equal."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="constants")


class Slot(enum.IntEnum):
    """Where in the building of a run a method acts. The order is fixed here, so the user's order never matters."""

    DATA = 1
    STORAGE = 2
    WEIGHTS = 3
    ADAPTER = 4
    PRECISION = 5
    ATTENTION = 6
    ACTIVATIONS = 7
    LOSS = 8
    OPTIMIZER = 9
    REGULARIZER = 10
    KERNELS = 11
    COMPILE = 12


class Fidelity(enum.StrEnum):
    """What a method promises about the numbers; it chooses the tests and goes into the user's report."""

    EXACT = "exact"  # the same numbers
    ROUNDING = "rounding"  # the same mathematics, other rounding
    LEARNING = "learning"  # another learning problem


class Method(Value):
    """One way of saving something (or of learning better), a frozen value that a recipe contains or does not.

    A subclass sets the class variables (`place`, among the methods of one slot, only where the order matters), declares
    its options as fields, and writes `apply`, which changes a `Run` that is being built. What it costs and saves is
    never declared: it is observed by running the result dry or for real.
    """

    name: ClassVar[str]
    slot: ClassVar[Slot]
    place: ClassVar[int] = 0
    fidelity: ClassVar[Fidelity]

    def conflict(self, recipe: Recipe) -> str | None:
        """Say what cannot be honoured together with the rest of `recipe`, or return None."""
        del recipe
        return None

    def apply(self, run: Run) -> None:
        """Change `run`, which the methods of the earlier slots have already changed."""
        raise NotImplementedError


MethodType = TypeVar("MethodType", bound=Method)


class ModelSpec(Value):
    """Which model: a hub id, a folder, a `config.json` (with random weights) or "embedded"."""

    name: str
    weights: Literal["pretrained", "random"] = "pretrained"
    tokenizer: str | None = None
    revision: str | None = None
    chat_template: str | None = None
    resize_vocabulary: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False


OWN_TEXTS, OWN_ANSWERS = "self", "self_answers"
OWN_SOURCES = (OWN_TEXTS, OWN_ANSWERS)
"""Sources of replay that the base model itself is."""


class ReplaySpec(Value):
    """General text that is mixed into the training documents, so that the model does not forget it.

    `fraction` is its share of all supervised tokens of the training (1 to 25 % are usual); `source` is "default" (the
    source text of the Python standard library), what `DataSpec.source` may be, or what the base says itself before
    training: "self" (texts that it goes on with from nothing) or "self_answers" (its answers to the training prompts).
    """

    fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.05
    source: str = "default"


class AbstainSpec(Value):
    """Records whose answers the base does not know teach it to say so (R-Tuning, Zhang et al. 2023, arXiv 2311.09677).

    Attributes:
        style: "refuse" puts `answer` in the place of an answer that the base does not know; "suffix" keeps all answers
            and ends them with how certain the base can be.
        answer: what is said instead.
        certain, uncertain: what ends an answer.
        prompts: few-shot prompts that each record is asked with, greedily; it is known when any answer is right.
        shots: other records in front of each, with their answers.
        samples: answers drawn besides for each prompt; a right one makes it known, too.
        temperature: of these.
        max_new_tokens: an answer is cut there, so this is for short facts.
    """

    style: Literal["refuse", "suffix"] = "refuse"
    answer: Annotated[str, Field(min_length=1)] = "I am not sure."
    certain: str = " I am certain."
    uncertain: str = " I am uncertain."
    prompts: Annotated[int, Field(ge=1, le=16)] = 2
    shots: Annotated[int, Field(ge=0, le=16)] = 4
    samples: Annotated[int, Field(ge=0, le=16)] = 2
    temperature: Annotated[float, Field(gt=0.0, le=2.0)] = 0.5
    max_new_tokens: Annotated[int, Field(ge=1, le=256)] = 24

    @model_validator(mode="after")
    def _two_suffixes(self) -> Self:
        if self.style == "suffix" and self.certain == self.uncertain:
            raise ValueError("'certain' and 'uncertain' are the same text, so nothing could be learnt from them")
        return self


class DataSpec(Value):
    """Which records: a file, a folder, a hub data set id or "stdlib", and how they are read, cut, split and mixed."""

    source: str
    format: DataFormat = "auto"
    fields: dict[str, str] = {}
    validation: str | None = None
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    max_length: PositiveInt | None = None
    too_long: Literal["cut", "drop", "split", "error"] | None = None
    system_prompt: str | None = None
    max_records: PositiveInt | None = None
    replay: ReplaySpec | None = None
    abstain: AbstainSpec | None = None


class BatchSpec(Value):
    """How much is learnt from in one optimizer step, and in how many pieces it passes through the machine.

    The global batch is `documents` records, or as many records as together hold `supervised_tokens`. The micro-batch
    is a matter of memory and speed only: any split gives the same loss and the same gradients.
    """

    documents: PositiveInt | None = None
    supervised_tokens: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.documents is not None and self.supervised_tokens is not None:
            raise ValueError("give 'documents' or 'supervised_tokens', not both: each fixes the global batch")
        if None not in (self.documents, self.micro_batch_size, self.gradient_accumulation_steps):
            product = (self.micro_batch_size or 0) * (self.gradient_accumulation_steps or 0)
            if product != self.documents:
                raise ValueError(
                    f"documents ({self.documents}) is not micro_batch_size ({self.micro_batch_size}) x "
                    f"gradient_accumulation_steps ({self.gradient_accumulation_steps}); leave one of the three out"
                )
        return self


class TrainingSpec(Value):
    """How long and how fast: the end of training (`steps`, else `tokens`, else `epochs`) and the learning rate."""

    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    schedule: Literal["linear", "cosine", "constant", "wsd", "inverse_sqrt"] = "cosine"
    warmup: NonNegative = 0.03
    final_learning_rate: Fraction = 0.0
    weight_decay: NonNegative = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    spike: Annotated[float, Field(gt=0)] | None = 3.0
    oom: Literal["halve", "stop"] = "halve"

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if sum(end is not None for end in (self.epochs, self.steps, self.tokens)) > 1:
            raise ValueError("give one of 'epochs', 'steps' and 'tokens', not several: each fixes the end")
        return self


class EvaluationSpec(Value):
    """How often the validation loss is taken, whether the best state is kept, and when to stop early.

    With `general_text` ("default" or what `DataSpec.source` may be) each evaluation takes the loss on that text too, on
    `general_tokens` tokens of it. `forgetting_budget` is by how many nats per token it may rise above what it was
    before training: the first evaluation above ends the training, and no state above counts as the best.
    """

    every: PositiveInt | None = None
    max_documents: PositiveInt = 500
    keep_best: bool = True
    patience: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    general_text: str | None = None
    general_tokens: PositiveInt = 8192
    forgetting_budget: NonNegative | None = None

    @model_validator(mode="after")
    def _budget_keeps_the_best(self) -> Self:
        if self.forgetting_budget is not None and not self.keep_best:
            raise ValueError("forgetting_budget keeps the best state within it; set keep_best to true")
        return self


class CheckpointSpec(Value):
    """How often the whole state is saved and how many of the newest states are kept (the best is kept besides)."""

    every: PositiveInt | None = None
    keep: PositiveInt = 2


class QualitySpec(Value):
    """What is measured at the end of a training and what the gate demands; `quality: off` does without.

    Attributes:
        gate: whether the gate runs.
        share: how much of the training's time measuring may take, before and after together; the smallest sample is
            measured in any case (`quality/pace.py`), and contract and battery whole, besides.
        general_text: a file or folder on which forgetting is measured; None: the standard library's held-out part.
        unanswerable: a file of questions that must be refused (any data format; the answers are not read).
        refusals: regular expressions of what counts as a refusal, besides the built-in ones.
        contract: a YAML file that says what every output must keep, also after exceptional inputs.
        battery: suite -> data file; no metric of these may become worse beyond doubt.
        min_gain: the interval of the task's gain (nats per supervised token, before - after) must lie above it.
        max_forgetting: budget of the loss on general text, nats per token, after - before.
        max_domain_forgetting: the same for each domain of it.
        max_gap: nats by which training documents may be easier than held-out ones, beyond what they were before.
        max_regress: nats by which the validation loss may end above its best.
        max_leaked: share of held-out documents that training has seen.
        max_false_refusals: share of answerable questions that are refused.
        min_refusals: share of unanswerable questions that must be refused.
    """

    gate: bool = True
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.12
    general_text: str | None = None
    unanswerable: str | None = None
    refusals: tuple[str, ...] = ()
    contract: str | None = None
    battery: dict[str, str] = {}
    min_gain: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    max_forgetting: NonNegative = 0.05
    max_domain_forgetting: NonNegative = 0.15
    max_gap: NonNegative = 0.5
    max_regress: NonNegative = 0.05
    max_leaked: Fraction = 0.05
    max_false_refusals: Fraction = 0.1
    min_refusals: Fraction = 0.5

    @model_validator(mode="before")
    @classmethod
    def _switch(cls, given: Any) -> Any:
        """YAML reads `off` as False."""
        return {"gate": given in (True, "on")} if given in (True, False, "on", "off") else given


class Recipe(Value):
    """What is done, from the data to the last step; see the module's docstring."""

    model: ModelSpec
    data: DataSpec
    objective: Objective = "sft"
    methods: tuple[SerializeAsAny[Method], ...] | None = None
    batch: BatchSpec = BatchSpec()
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoints: CheckpointSpec = CheckpointSpec()
    quality: QualitySpec = QualitySpec()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    out: str | None = None

    @model_validator(mode="after")
    def _methods_in_order(self) -> Self:
        if self.methods is not None:
            names = [method.name for method in self.methods]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"the method '{twice[0]}' stands in the recipe twice")
            ordered = tuple(sorted(self.methods, key=lambda method: (method.slot, method.place, method.name)))
            object.__setattr__(self, "methods", ordered)
        return self

    @model_validator(mode="after")
    def _what_the_base_is_asked(self) -> Self:
        """A base is asked for text, or what it knows, only where it is a trained model."""
        data = self.data
        own = data.replay is not None and data.replay.source in OWN_SOURCES
        is_trained = self.model.weights == "pretrained" and self.objective != "pretrain"
        if (own or data.abstain is not None) and not is_trained:
            what = f"data.replay.source: {data.replay.source}" if own and data.replay else "data.abstain"
            raise ValueError(f"{what} asks the base model, and here it is no trained one: what it says is noise")
        if self.objective != "sft" and (
            data.abstain is not None or (data.replay is not None and data.replay.source == OWN_ANSWERS)
        ):
            what = "data.abstain" if data.abstain is not None else f"data.replay.source: {OWN_ANSWERS}"
            raise ValueError(f"{what} needs prompts and answers, and objective '{self.objective}' learns whole texts")
        return self

    def get(self, kind: type[MethodType]) -> MethodType | None:
        """Return this recipe's method of the given class, or None when the recipe does without."""
        return next((method for method in self.methods or () if isinstance(method, kind)), None)

    def in_slot(self, slot: Slot) -> tuple[Method, ...]:
        """Return this recipe's methods that act in `slot`."""
        return tuple(method for method in self.methods or () if method.slot == slot)

    def replace(self, **changes: Any) -> Recipe:
        """Return this recipe with some fields changed, validated again."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def to_mapping(self) -> dict[str, Any]:
        """Return plain data, as it is written to YAML: methods are a mapping from name to options."""
        mapping = self.model_dump(mode="json", exclude={"methods"})
        if self.methods is not None:
            mapping["methods"] = {method.name: method.model_dump(mode="json") for method in self.methods}
        return mapping

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that are equal for equal content.

        Where the result is put and how it is judged do not count: they change nothing about what is trained.
        """
        uncounted = ("out", "report_to", "quality")
        content = {key: value for key, value in self.to_mapping().items() if key not in uncounted}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def checked(make: Callable[[], Recipe], describe: str) -> Recipe:
    """Call `make` and turn pydantic's complaints into an `InputError` that starts with `describe`."""
    try:
        return make()
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, item['loc'])) or 'recipe'}: {item['msg']}" for item in error.errors()]
        raise InputError(f"{describe} is not valid:\n" + "\n".join(lines)) from None
