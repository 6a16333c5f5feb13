"""Names of what can be measured -> how: each suite asks one model and returns values item by item."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tunewise.engine.generate import Answer, Progress, Sampling, generate
from tunewise.engine.knowledge import CATEGORIES, few_shot_texts, slick
from tunewise.errors import InputError, did_you_mean
from tunewise.methods.method import Run
from tunewise.quality.answers import answer_items, kind_of
from tunewise.quality.battery import Items
from tunewise.quality.calibration import calibration_items
from tunewise.quality.code import passes, program_of
from tunewise.quality.exceptional import contract_cases, contract_items, read_contract
from tunewise.quality.facts import GREEDY, NUM_PROMPTS, NUM_SHOTS, SAMPLED, is_right
from tunewise.quality.general_text import GeneralText, general_text
from tunewise.quality.lm_eval_tasks import LM_EVAL, lm_eval_suite
from tunewise.quality.losses import document_losses, logit_chunks
from tunewise.quality.metamorphic import consistency_items, pairs_of
from tunewise.quality.questions import Question, read_questions
from tunewise.quality.refusals import Refusals
from tunewise.quality.sandbox import require_sandbox
from tunewise.quality.tasks import (
    Score,
    json_match,
    json_valid,
    numeric_match,
    rouge_1,
    rouge_2,
    rouge_l,
    token_f1,
    user_score,
)
from tunewise.recipe import QualitySpec
from tunewise.workload.corpus import Corpus
from tunewise.workload.matching import exact_match
from tunewise.workload.tokens import tokenize

GENERAL_TOKENS = 16384
MAX_QUESTIONS = 200
CONTRACT_QUESTIONS = 4


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and what it is asked.

    Attributes:
        run: the model, in the precision of its recipe.
        tokenizer: the one beside it.
        context: the most positions that the model knows.
        data: a file of questions or records; None for suites that need none.
        max_new_tokens: of an answer.
        max_questions: how many of the file are asked.
        progress: told while answers are generated.
    """

    run: Run
    tokenizer: PreTrainedTokenizerBase
    context: int
    data: str | None = None
    max_new_tokens: int = 256
    max_questions: int = MAX_QUESTIONS
    progress: Progress = lambda done, total: None

    @property
    def spec(self) -> QualitySpec:
        """The recipe's section on quality."""
        return self.run.recipe.quality

    def questions(self, suite: str) -> list[Question]:
        """Read the questions.

        Raises:
            InputError: the suite needs a file and none was named, or it cannot be read.
        """
        if self.data is None:
            raise InputError(f"The suite '{suite}' needs questions: name a file with --data.")
        return read_questions(self.data, self.run.recipe, self.tokenizer, self.max_questions)

    def answers(self, questions: list[Question], sampling: Sampling | None = None) -> list[list[Answer]]:
        """Answer questions; a prompt that leaves no room for an answer keeps its end."""
        sampling = sampling or Sampling(self.max_new_tokens)
        room = max(1, self.context - sampling.max_new_tokens)
        return generate(self.run, self.tokenizer, [q.ids[-room:] for q in questions], sampling, self.progress)


Suite = Callable[[Subject], dict[str, Items]]
"""From a model to its values, metric by metric; the same items in the same order for every model."""


def general(subject: Subject) -> dict[str, Items]:
    """Loss on general text, whole and by domain, nats per token."""
    text: GeneralText = general_text(subject.spec, subject.tokenizer, subject.context, GENERAL_TOKENS)
    losses = document_losses(subject.run, text.corpus, range(len(text.corpus)))
    found = {"general loss": Items.of_losses(losses)}
    for domain in dict.fromkeys(text.domains):
        chosen = [name == domain for name in text.domains]
        found[f"general loss, {domain}"] = Items(losses.sums[chosen], losses.counts[chosen], -1)
    return found


def loss(subject: Subject) -> dict[str, Items]:
    """Loss per supervised token of the data's answers."""
    corpus = answers_corpus(subject, subject.questions("loss"))
    return {"loss": Items.of_losses(document_losses(subject.run, corpus, range(len(corpus))))}


def answers_corpus(subject: Subject, questions: list[Question]) -> Corpus:
    """Tokenize questions with their answers, as training does."""
    longest = min(subject.context, subject.run.recipe.data.max_length or subject.context)
    documents = (question.conversation for question in questions)
    return tokenize(documents, subject.tokenizer, objective="sft", max_length=longest, too_long="cut").corpus


def task(name: str, score: Score, **more: Score) -> Suite:
    """Make a suite out of scores of single answers."""
    scores = {name: score, **more}

    def suite(subject: Subject) -> dict[str, Items]:
        questions = subject.questions(name)
        said = [answer.text for (answer,) in subject.answers(questions)]
        return {
            metric: Items.of([each(text, q.references) for text, q in zip(said, questions, strict=True)])
            for metric, each in scores.items()
        }

    return suite


def answers(subject: Subject) -> dict[str, Items]:
    """Right, wrong, abstained; false refusals, and refusals where there is no answer."""
    questions = subject.questions("answers")
    refusals = Refusals(subject.spec.refusals)
    said = subject.answers(questions, Sampling(min(64, subject.max_new_tokens)))
    kinds = [kind_of(answer.text, q.references, refusals) for (answer,), q in zip(said, questions, strict=True)]
    return answer_items(kinds, [question.has_answer for question in questions])


def facts(subject: Subject) -> dict[str, Items]:
    """SliCK: which facts the model knows, maybe knows, weakly knows, does not know."""
    questions = [question for question in subject.questions("facts") if question.has_answer]
    refusals = Refusals(subject.spec.refusals)
    shots = [(question.text, question.references[0]) for question in questions]
    texts = few_shot_texts([question.text for question in questions], shots, NUM_PROMPTS, NUM_SHOTS)
    categories = slick(
        subject.run,
        subject.tokenizer,
        texts,
        lambda number, said: is_right(said, questions[number], refusals),
        (GREEDY, SAMPLED),
        subject.context,
        subject.progress,
    )
    return {name: Items.of([category == name for category in categories], 0) for name in CATEGORIES}


def calibration(subject: Subject) -> dict[str, Items]:
    """Confidence against accuracy of the answers' tokens; ECE is resampled by document."""
    corpus = answers_corpus(subject, subject.questions("calibration"))
    return calibration_items(logit_chunks(subject.run, corpus, range(len(corpus))), len(corpus))


def metamorphic(subject: Subject) -> dict[str, Items]:
    """Does the answer change when, and only when, it should."""
    pairs = pairs_of(subject.questions("metamorphic"), subject.tokenizer)
    sampling = Sampling(min(64, subject.max_new_tokens))
    one = subject.answers([pair.question for pair in pairs], sampling)
    other = subject.answers([pair.other for pair in pairs], sampling)
    said = [(a.text, b.text) for (a,), (b,) in zip(one, other, strict=True)]
    return consistency_items(pairs, said)


def contract(subject: Subject) -> dict[str, Items]:
    """Does the output keep its contract on ordinary and on exceptional inputs."""
    if subject.spec.contract is None:
        raise InputError("The suite 'contract' needs the recipe's quality.contract: a YAML file; see docs/quality.md.")
    agreed = read_contract(subject.spec.contract)
    cases = contract_cases(subject.questions("contract")[:CONTRACT_QUESTIONS], agreed, subject.tokenizer)
    said = subject.answers([question for _, question in cases], Sampling(min(128, subject.max_new_tokens)))
    outputs = [answer.text for (answer,) in said]
    return contract_items([kind for kind, _ in cases], outputs, agreed, Refusals(subject.spec.refusals))


def code(subject: Subject) -> dict[str, Items]:
    """pass@1 of Python in the sandbox."""
    require_sandbox()
    questions = subject.questions("code")
    said = subject.answers(questions)
    programs = [program_of(q.fields, q.text, a.text, q.origin) for (a,), q in zip(said, questions, strict=True)]
    return {"pass@1": Items.of([passes(program) for program in programs])}


SUITES: Mapping[str, Suite] = {
    "general": general,
    "loss": loss,
    "exact_match": task("exact_match", exact_match, token_f1=token_f1),
    "numeric": task("numeric", numeric_match),
    "rouge": task("rouge_l", rouge_l, rouge_1=rouge_1, rouge_2=rouge_2),
    "json": task("json_match", json_match, json_valid=json_valid),
    "code": code,
    "answers": answers,
    "facts": facts,
    "calibration": calibration,
    "metamorphic": metamorphic,
    "contract": contract,
}


def suite_named(name: str) -> Suite:
    """Return a suite: a name of `SUITES`, a user's function "file.py:name", or "lm_eval:TASK".

    Raises:
        InputError: there is none of that name.
        MissingBackend: it needs a library that is not installed.
    """
    if name.startswith(LM_EVAL):
        return lm_eval_suite(name.removeprefix(LM_EVAL))
    if ".py:" in name:
        return task("score", user_score(name))
    if name not in SUITES:
        raise InputError(f"--suite {name}: there is no such suite.{did_you_mean(name, [*SUITES, 'gate'])}")
    return SUITES[name]
