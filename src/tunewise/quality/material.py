"""What a run is measured on, fixed before training: texts, held-out documents, training documents, prompts.

Sizes follow from the work that the training itself does, so that measuring stays a small part of it: a token in a
forward pass costs a third of one in training, and a generated token is counted `GENERATED_COST` times. What measuring
then takes in seconds is another matter (short rows, loops over tokens): `pace` decides how much of it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunewise.engine.assemble import Plan
from tunewise.quality.exceptional import Contract, Kind, contract_cases, read_contract
from tunewise.quality.general_text import GeneralText, general_text
from tunewise.quality.overfitting import sample
from tunewise.quality.prompts import Prompt, endings_of, prompts_of, share_of_taught_ends
from tunewise.quality.questions import Question, read_questions
from tunewise.quality.refusals import Refusals
from tunewise.recipe import QualitySpec, Recipe
from tunewise.workload.conversation import Conversation, Document, Message
from tunewise.workload.corpus import Corpus
from tunewise.workload.detection import find_mapping
from tunewise.workload.model import context_length
from tunewise.workload.records import read_records
from tunewise.workload.tokens import tokenize

GENERATED_COST = 4.0
FEWEST_DOCUMENTS = 8
"""Pieces of each kind that are always measured; half as many answers."""

MOST_DOCUMENTS = 200
MOST_PROMPTS = 16
MOST_NEW_TOKENS = 64
CONTRACT_QUESTIONS = 2
_SHARES = {"general": 0.35, "validation": 0.3, "training": 0.15, "generation": 0.2}


@dataclass(frozen=True, eq=False)
class Material:
    """What both sides, before and after, are measured on, in an order of which every beginning is a fair sample.

    Attributes:
        general: the general text; None where the base is no trained model.
        validation, training: held-out and training documents; training's are a sample.
        endings: held-out documents with only the token supervised that ends the answer.
        taught_ends: share of the training documents whose end is learnt; None where there are no answers.
        answerable, unanswerable: prompts to be answered, and to be refused.
        max_new_tokens: of an answer.
        contract, contract_cases: what outputs must keep, and the inputs that try it.
        context: the most positions that the model knows.
        refusals: tells refusals from answers.
        tokenizer: decodes.
    """

    general: GeneralText | None
    validation: Corpus
    training: Corpus
    endings: Corpus
    answerable: tuple[Prompt, ...]
    unanswerable: tuple[Prompt, ...]
    max_new_tokens: int
    refusals: Refusals
    tokenizer: PreTrainedTokenizerBase
    taught_ends: float | None = None
    contract: Contract | None = None
    contract_cases: tuple[tuple[Kind, Question], ...] = ()
    context: int = 2048

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model for one state's losses."""
        corpora = [self.validation, self.training, self.endings]
        corpora += [self.general.corpus] if self.general is not None else []
        return sum(int(corpus.lengths.sum()) for corpus in corpora)

    @property
    def num_answers(self) -> int:
        """Answers that are generated for one state, those of contract and battery not counted."""
        return len(self.answerable) + len(self.unanswerable)

    def part(self, fraction: float) -> Material:
        """Return the beginning that is `fraction` of each kind of piece (see `number_of`); 0 is the smallest part."""
        return self._between(None, fraction)

    def more(self, before: float, fraction: float) -> Material:
        """Return what `part(fraction)` has beyond `part(before)`."""
        return self._between(before, fraction)

    def _between(self, before: float | None, fraction: float) -> Material:
        def bounds(num: int, least: int) -> range:
            return range(0 if before is None else number_of(num, before, least), number_of(num, fraction, least))

        def taken(corpus: Corpus) -> Corpus:
            return corpus.take(bounds(len(corpus), FEWEST_DOCUMENTS))

        def asked(prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
            return tuple(prompts[number] for number in bounds(len(prompts), FEWEST_DOCUMENTS // 2))

        general = self.general
        if general is not None:
            chosen = bounds(len(general.domains), FEWEST_DOCUMENTS)
            domains = tuple(general.domains[number] for number in chosen)
            general = replace(general, corpus=general.corpus.take(chosen), domains=domains)
        return replace(
            self,
            general=general,
            validation=taken(self.validation),
            training=taken(self.training),
            endings=taken(self.endings),
            answerable=asked(self.answerable),
            unanswerable=asked(self.unanswerable),
        )


def number_of(num: int, fraction: float, least: int) -> int:
    """Return how many of `num` pieces are the beginning that is `fraction` of them; `least`, if there are."""
    return min(num, max(least, round(fraction * num)))


def material_of(plan: Plan) -> Material:
    """Choose what a plan's run is measured on.

    Raises:
        InputError: the general text or the unanswerable questions cannot be read.
    """
    recipe, spec, tokenizer = plan.recipe, plan.recipe.quality, plan.tokenizer
    train, held_out = plan.data.train, plan.data.validation
    budget = tokens_to_measure(plan)
    is_trained = recipe.model.weights == "pretrained" and recipe.objective != "pretrain"
    general = None
    if is_trained:
        general = general_text(spec, tokenizer, context_length(plan.config), int(_SHARES["general"] * budget)).mixed()
    validation = held_out.take(_some(held_out, _SHARES["validation"] * budget))
    refusals = Refusals(spec.refusals)
    prompts: list[Prompt] = []
    training = train.take(_some(train, _SHARES["training"] * budget))
    endings, taught_ends = Corpus.from_documents([], []), None
    if recipe.objective == "sft":
        max_length = recipe.data.max_length or 1 << 30
        endings = endings_of(validation, range(len(validation)), tokenizer, max_length)
        taught_ends = share_of_taught_ends(training, tokenizer, max_length)
        prompts = prompts_of(validation, range(len(validation)), tokenizer)
    answerable = [prompt for prompt in prompts if not refusals.matches(prompt.reference)]
    unanswerable = [prompt for prompt in prompts if refusals.matches(prompt.reference)]
    unanswerable += own_questions(recipe, spec, tokenizer)
    contract, cases = _contract(recipe, spec, tokenizer)
    num, new = _generation(answerable + unanswerable, _SHARES["generation"] * budget)
    return Material(
        general=general,
        validation=validation,
        training=training,
        endings=endings,
        taught_ends=taught_ends,
        answerable=tuple(answerable[:num]),
        unanswerable=tuple(unanswerable[:num]),
        max_new_tokens=new,
        refusals=refusals,
        tokenizer=tokenizer,
        contract=contract,
        contract_cases=tuple(cases),
        context=context_length(plan.config),
    )


def tokens_to_measure(plan: Plan) -> float:
    """Return the tokens, in forward passes, that one of the two measurements may take."""
    return plan.recipe.quality.share * training_tokens(plan) * 3 / 2


def training_tokens(plan: Plan) -> float:
    """Return the tokens that pass through the model in training."""
    lengths, batch = plan.data.train.lengths, plan.recipe.batch
    if batch.documents is not None:
        a_step = min(batch.documents, len(lengths)) * float(lengths.mean())
    else:
        share = int(plan.data.train.num_supervised.sum()) / max(1, int(lengths.sum()))
        a_step = (batch.supervised_tokens or 1) / max(share, 1e-6)
    return plan.num_steps * a_step


def own_questions(recipe: Recipe, spec: QualitySpec, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return the user's unanswerable questions, laid out as in training.

    Raises:
        InputError: the file cannot be read, or its records are no questions.
    """
    if spec.unanswerable is None:
        return []
    records = list(read_records(spec.unanswerable, MOST_PROMPTS))
    mapping = find_mapping(records, "auto", {})
    asked: list[Document] = [_answered(mapping.convert(record)) for record in records]
    longest = recipe.data.max_length or 1 << 30
    corpus = tokenize(asked, tokenizer, objective="sft", max_length=longest, too_long="drop").corpus
    return prompts_of(corpus, range(len(corpus)), tokenizer)


def _contract(
    recipe: Recipe, spec: QualitySpec, tokenizer: PreTrainedTokenizerBase
) -> tuple[Contract | None, list[tuple[Kind, Question]]]:
    if spec.contract is None:
        return None, []
    contract = read_contract(spec.contract)
    questions = read_questions(recipe.data.validation or recipe.data.source, recipe, tokenizer, CONTRACT_QUESTIONS)
    return contract, contract_cases(questions, contract, tokenizer)


def _answered(document: Document) -> Document:
    """Give a question without answer one, because only what has an answer has a prompt before it."""
    if not isinstance(document, Conversation) or not document.is_empty:
        return document
    turns = tuple(message for message in document.messages if message.role != "assistant")
    answer = Message("assistant", "I do not know.", is_supervised=True)
    return Conversation((*turns, answer), document.origin, document.tools, document.plain_prompt)


def _number(corpus: Corpus, tokens: float) -> int:
    mean_length = float(corpus.lengths.mean()) if len(corpus) else 1.0
    return min(MOST_DOCUMENTS, max(FEWEST_DOCUMENTS, round(tokens / max(1.0, mean_length))))


def _some(corpus: Corpus, tokens: float) -> NDArray[np.int64]:
    """Draw documents, in an order of which every beginning is drawn at random too."""
    drawn = np.asarray(sample(len(corpus), _number(corpus, tokens)), dtype=np.int64)
    return np.random.default_rng(0).permutation(drawn)


def _generation(prompts: list[Prompt], tokens: float) -> tuple[int, int]:
    """Return (prompts of each kind, new tokens of each) for what may be computed."""
    if not prompts:
        return 0, MOST_NEW_TOKENS
    longest = sorted(len(prompt.reference) for prompt in prompts)[len(prompts) // 2] // 2 + 8
    new = min(MOST_NEW_TOKENS, longest)
    prompt_tokens = sum(len(prompt.ids) for prompt in prompts) / len(prompts)
    affordable = int(tokens / (prompt_tokens + GENERATED_COST * new))
    return min(MOST_PROMPTS, max(FEWEST_DOCUMENTS // 2, affordable)), new
