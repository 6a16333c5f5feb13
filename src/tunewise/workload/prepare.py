"""From a recipe's data to corpora that are ready to train on, and everything that a user must be told about
them."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunewise.errors import InputError
from tunewise.recipe import DataSpec, Recipe
from tunewise.workload import kept
from tunewise.workload.abstention import abstaining
from tunewise.workload.base_voice import BaseVoice, asked
from tunewise.workload.conversation import Conversation, Document
from tunewise.workload.corpus import Corpus
from tunewise.workload.detection import find_mapping
from tunewise.workload.diagnosis import Diagnosis, statistics_of
from tunewise.workload.doctor import examine
from tunewise.workload.formats import FieldMapping
from tunewise.workload.gathering import tokenized
from tunewise.workload.general_text import general_corpus
from tunewise.workload.kept import Diagnosed
from tunewise.workload.record import Record
from tunewise.workload.records import STDLIB, read_records
from tunewise.workload.replay import mix
from tunewise.workload.splits import leak_groups, split
from tunewise.workload.stdlib_source import Part, stdlib_records, stdlib_texts
from tunewise.workload.tally import Tally
from tunewise.workload.text_checks import checked
from tunewise.workload.tokens import Tokenized, TooLong, renderer_for, tokenize

DEFAULT_MAX_LENGTH = 2048
_SAMPLE_RECORDS = 100


@dataclass(frozen=True, eq=False)
class Prepared:
    """Data that are ready to train on.

    Attributes:
        train: the training documents.
        validation: the validation documents; none of them when the recipe wants none.
        said: sentences for the user: which fields became what, the layout, the counts, the policies.
        diagnosis: the doctor's findings.
        data_fingerprint: equal exactly when training and validation would see the same data.
        general: general text on which forgetting is measured; None when the recipe does not ask for it.
        replayed: what was mixed into the training documents, in words; "" for nothing.
    """

    train: Corpus
    validation: Corpus
    said: list[str]
    diagnosis: Diagnosis
    data_fingerprint: str
    general: Corpus | None = None
    replayed: str = ""


def default_max_length(context_length: int) -> int:
    """Return the `max_length` of a recipe that names none: the model's context, at most 2048 tokens."""
    return min(context_length, DEFAULT_MAX_LENGTH)


def resolved_too_long(recipe: Recipe) -> TooLong:
    """Return what happens to long documents: what the user wrote, else windows where every token is
    learnt."""
    return recipe.data.too_long or ("cut" if recipe.objective == "sft" else "split")


def prepare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    vocab_size: int,
    base: BaseVoice | None = None,
) -> Prepared:
    """Read, convert, tokenize, split and examine the recipe's data.

    Args:
        recipe: whose `data`, `objective` and `seed` count.
        tokenizer: the model's fast tokenizer.
        context_length: the most positions that the model knows.
        vocab_size: rows of the model's embedding.
        base: the base model, for recipes whose data ask it; None where none is there to be asked.

    Raises:
        InputError: the data cannot be read or converted, the doctor finds an error (all errors are listed), or the
            base must be asked and there is none.
    """
    if recipe.data.abstain is not None:
        asked(base, "data.abstain")
    found = diagnose(recipe, tokenizer, context_length, vocab_size, base)
    diagnosis, said = found.diagnosis, found.said
    if diagnosis.errors:
        listed = "\n".join(f"  {finding}" for finding in diagnosis.errors)
        others = [finding for finding in diagnosis.findings if finding.severity == "warning"]
        more = "".join(f"\n  {finding}" for finding in others) if len(found.train) == 0 else ""
        raise InputError(f"{recipe.data.source}: training on these data makes no sense:\n{listed}{more}")
    max_length = recipe.data.max_length or default_max_length(context_length)
    learnt, replayed = found.train, ""
    if recipe.data.replay is not None:
        mixed = mix(learnt, recipe.data.replay, tokenizer, max_length, recipe.seed, base)
        learnt, replayed = mixed.corpus, mixed.said
        said.append(replayed)
    general = _measured_text(recipe, tokenizer, max_length, said)
    parts = [part.fingerprint for part in (learnt, found.validation, general) if part is not None]
    return Prepared(
        train=learnt,
        validation=found.validation,
        said=said,
        diagnosis=diagnosis,
        data_fingerprint=hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16],
        general=general,
        replayed=replayed,
    )


def _measured_text(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int, said: list[str]
) -> Corpus | None:
    """Return the general text that evaluations measure; it does not depend on the recipe's seed."""
    spec = recipe.evaluation
    if spec.general_text is None:
        return None
    found = general_corpus(
        spec.general_text, "measured", tokenizer, max_length=max_length, max_tokens=spec.general_tokens
    )
    said.append(
        f"general text to measure forgetting on ('{spec.general_text}'): {len(found)} windows, "
        f"{int(found.is_supervised.sum()):,} tokens"
    )
    return found


def diagnose(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    vocab_size: int,
    base: BaseVoice | None = None,
) -> Diagnosed:
    """Do the work of `prepare`, without refusing what the doctor finds wrong; or take up what was done before.

    Without a base to be asked the data are examined as they are before `data.abstain` changes them.
    """
    data = recipe.data
    if data.max_length is not None and data.max_length > context_length:
        raise InputError(
            f"data.max_length: {data.max_length} tokens are more than the model's context of "
            f"{context_length}. Choose at most {context_length}."
        )
    max_length = data.max_length or default_max_length(context_length)
    more = {"max_length": max_length, "too_long": resolved_too_long(recipe), "vocab_size": vocab_size}
    # What the base answers is kept apart (`engine.asking`); data that depend on it are made anew.
    key = None if recipe.data.abstain is not None else kept.key_of(recipe, tokenizer, more)
    known = None if key is None else kept.read(key)
    if known is not None:
        return known
    started = time.perf_counter()
    made = _diagnosed(recipe, tokenizer, max_length, vocab_size, base)
    if key is not None and time.perf_counter() - started > kept.WORTH_SECONDS:
        kept.write(key, made)
        return kept.read(key) or made  # from now on the arrays are the kept ones, and those in memory are freed
    return made


def _diagnosed(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocab_size: int,
    base: BaseVoice | None = None,
) -> Diagnosed:
    """Read, convert, tokenize, split and examine."""
    data = recipe.data
    said: list[str] = []
    whole = _tokenized(recipe, _source(recipe, "train"), data.source, tokenizer, max_length, said, base)
    if data.source == STDLIB and data.validation is None and data.validation_fraction > 0:
        train = whole
        validation = _tokenized(
            recipe, _source(recipe, "validation"), "stdlib (held out)", tokenizer, max_length, said, base
        )
        validation = _without_leaks(train, validation, said)
    elif data.validation is not None:
        train = whole
        records = read_records(data.validation)
        validation = _tokenized(recipe, records, data.validation, tokenizer, max_length, said, base)
    else:
        train, validation = _split(whole, recipe, said)
    said.append(f"training: {statistics_of(train)}")
    said.append(
        f"validation: {len(validation.corpus)} documents, "
        f"{int(validation.corpus.is_supervised.sum())} supervised tokens"
    )
    said.append(f"longer than {max_length} tokens: {resolved_too_long(recipe)}")
    has_validation = len(validation.corpus) > 0
    diagnosis = examine(train, validation if has_validation else None, tokenizer, vocab_size)
    return Diagnosed(diagnosis, train.corpus, validation.corpus, said)


def _source(recipe: Recipe, part: Part) -> Iterator[Record]:
    data = recipe.data
    if data.source != STDLIB:
        return read_records(data.source, data.max_records)
    wants_texts = data.format == "text" or (data.format == "auto" and recipe.objective != "sft")
    records = stdlib_texts(part) if wants_texts else stdlib_records(part)
    return itertools.islice(records, data.max_records if part == "train" else None)


def _tokenized(
    recipe: Recipe,
    records: Iterator[Record],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    said: list[str],
    base: BaseVoice | None,
) -> Tokenized:
    sample = list(itertools.islice(records, _SAMPLE_RECORDS))
    if not sample:
        raise InputError(f"{name}: there are no records.")
    mapping = find_mapping(sample, recipe.data.format, recipe.data.fields)
    said.append(f"{name}: {mapping.describe()}")
    layout = renderer_for(tokenizer).describe()
    if mapping.format != "text" and layout not in said:
        said.append(layout)

    def make(documents: Iterator[Document], first: int) -> Tokenized:
        tally = Tally()
        return tokenize(
            checked(documents, tokenizer, tally),
            tokenizer,
            objective=recipe.objective,
            max_length=max_length,
            too_long=resolved_too_long(recipe),
            tally=tally,
            first_record=first,
        )

    everything = itertools.chain(sample, records)
    if recipe.data.abstain is not None and base is not None:  # the base is asked once, of all of them, by this process
        documents = list(_documents(everything, mapping, recipe.data))
        changed, what = abstaining(documents, recipe.data.abstain, tokenizer, base, recipe.seed)
        said.append(what)
        return make(iter(changed), 0)

    def work(chunk: Sequence[Record], first: int) -> Tokenized:
        return make(_documents(iter(chunk), mapping, recipe.data), first)

    return tokenized(everything, work)


def _documents(records: Iterator[Record], mapping: FieldMapping, data: DataSpec) -> Iterator[Document]:
    if data.system_prompt is not None and mapping.format == "text":
        raise InputError("data.system_prompt: plain texts have no system message. Leave it out.")
    for record in records:
        document = mapping.convert(record)
        if data.system_prompt is not None and isinstance(document, Conversation):
            document = document.with_system_prompt(data.system_prompt)
        yield document


def _split(whole: Tokenized, recipe: Recipe, said: list[str]) -> tuple[Tokenized, Tokenized]:
    """Set validation documents aside; where there are too few texts for that, some of their windows."""
    if len(whole.corpus) == 0:
        return whole, whole
    num_records = len(np.unique(whole.record_numbers))
    if num_records * recipe.data.validation_fraction < 1 and num_records < len(whole.corpus):
        whole = whole.by_window()
        said.append(f"texts: {num_records}, too few to set one aside; validation takes some of their windows")
    keys = leak_groups(whole.content_keys, whole.prompt_keys)
    train, validation = split(keys, recipe.data.validation_fraction, recipe.seed)
    said.append(
        f"split by content with seed {recipe.seed}: {len(train)} documents for training, {len(validation)} "
        "for validation; equal prompts or contents stay on one side"
    )
    return whole.take(train), whole.take(validation)


def _without_leaks(train: Tokenized, validation: Tokenized, said: list[str]) -> Tokenized:
    """Leave out held-out documents whose prompt or content the training part has too."""
    leaked = np.isin(validation.prompt_keys, train.prompt_keys) | np.isin(validation.content_keys, train.content_keys)
    if leaked.any():
        said.append(f"held-out documents that training has too, left out: {int(leaked.sum())}")
    return validation.take(np.flatnonzero(~leaked))
