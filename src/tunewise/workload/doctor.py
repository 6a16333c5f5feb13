"""Is the data fit to learn from? What the doctor looks at, what it finds, and what to do about it.

Everything is looked at as the model will see it: token ids and marks. What only the text shows was counted on
the way (`tally`, `text_checks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunewise.workload.corpus import Corpus
from tunewise.workload.diagnosis import Diagnosis, Finding, Severity, statistics_of
from tunewise.workload.tally import EXAMPLES, Event, Tally
from tunewise.workload.tokens import Tokenized

MANY_TOKENS_CUT = 0.05
MANY_UNKNOWN_TOKENS = 0.001
MOST_UNKNOWN_TOKENS = 0.2
MOST_VALIDATION_LEAKED = 0.5


_OF_EVENTS: dict[Event, tuple[Severity, str, str]] = {
    Event.EMPTY: (
        "warning",
        "records with nothing to learn (empty answer or text), left out",
        "Remove or fill them.",
    ),
    Event.NOTHING_SUPERVISED: (
        "warning",
        "records with no supervised token, left out",
        "Each needs a text, or an assistant turn that is learnt.",
    ),
    Event.ANSWER_CUT_AWAY: (
        "warning",
        "records whose answer begins behind max_length, left out",
        "Choose a greater data.max_length, or shorten the prompts.",
    ),
    Event.CUT: ("info", "records cut at max_length (their end, EOS included, is not learnt)", ""),
    Event.DROPPED_TOO_LONG: ("info", "records longer than max_length, left out (too_long: drop)", ""),
    Event.SPLIT: ("info", "texts longer than max_length, split in windows", ""),
    Event.RUN_TOGETHER: (
        "info",
        "prompts that run into their answers without a blank or line end between them",
        "End prompts with a line end, or lay them out as Alpaca does (data.format: alpaca, "
        "data.fields: {instruction: <your prompt>, output: <your answer>}).",
    ),
    Event.BLANK_JOINED: (
        "info",
        "prompts that end with a blank which the tokenizer joins to the answer's first word",
        "Give the model prompts without that blank when you use it.",
    ),
    Event.STRADDLING: (
        "warning",
        "answers whose first character shares a token with the prompt; that token is not learnt",
        "End prompts with a line end.",
    ),
    Event.END_ADDED: ("info", "answers that the chat template does not end; EOS was added", ""),
    Event.TURN_REWRITTEN: (
        "warning",
        "assistant turns that the chat template rewrites or leaves out; they are not learnt",
        "Split such conversations, so that each of these answers is the last turn of a record.",
    ),
    Event.CONTENT_DROPPED: (
        "warning",
        "records of which the chat template drops or rewrites a message",
        "See the preview; a template that knows no system or tool role needs other data or another template.",
    ),
    Event.SPECIAL_TOKEN_IN_TEXT: (
        "info",
        "records that spell out a special token (it becomes that token)",
        "Fine for texts that were laid out by hand; otherwise remove it.",
    ),
    Event.EMPTY_PROMPT: (
        "warning",
        "records with an empty prompt",
        "Fill or remove them, unless this is meant.",
    ),
    Event.REPLACEMENT_CHARACTER: (
        "warning",
        "records with U+FFFD, the mark of characters lost in an earlier conversion",
        "Make the file anew from its source.",
    ),
    Event.MOJIBAKE: (
        "warning",
        "records with UTF-8 that was read as Latin-1 (such as 'Ã©')",
        "Repair them, for example with the library ftfy.",
    ),
    Event.CONTROL_CHARACTER: (
        "warning",
        "records with NUL or other control characters",
        "Remove these characters.",
    ),
}


def examine(
    train: Tokenized,
    validation: Tokenized | None,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> Diagnosis:
    """Examine tokenized data.

    Args:
        train: what is trained on; its counts are those of everything that was read with it.
        validation: what is validated on, or None.
        tokenizer: the tokenizer that made it.
        vocab_size: rows of the model's embedding; greater token ids would crash it.
    """
    corpora = [train.corpus] + ([validation.corpus] if validation is not None else [])
    findings = [
        *_event_findings(train.tally),
        *_end_findings(train, tokenizer),
        *_beginning_findings(train.corpus, tokenizer),
        *_vocabulary_findings(corpora, tokenizer, vocab_size),
        *_cut_findings(train),
        *_duplicate_findings(train),
    ]
    if len(train.corpus) == 0:
        findings.append(
            Finding("error", "documents to train on", 0, (), "Nothing is left to learn; see the other findings.")
        )
    if validation is not None:
        if validation.tally is not train.tally:
            findings += _event_findings(validation.tally, "validation: ")
        findings += _leak_findings(train, validation)
    order: list[Severity] = ["error", "warning", "info"]
    return Diagnosis(tuple(sorted(findings, key=lambda finding: order.index(finding.severity))), statistics_of(train))


def _event_findings(tally: Tally, prefix: str = "") -> Iterator[Finding]:
    for event, (severity, what, advice) in _OF_EVENTS.items():
        if tally.count(event):
            yield Finding(severity, prefix + what, tally.count(event), tally.origins(event), advice)


def _end_findings(data: Tokenized, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Is there an end among what is learnt? EOS, or another special token that a chat template ends turns
    with."""
    corpus = data.corpus
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: set[int] = set()
    anything = False
    for _, ids, marks in corpus.pieces():
        learnt_ids = ids[marks]
        anything |= len(learnt_ids) > 0
        if (learnt_ids == tokenizer.eos_token_id).any():
            return
        found |= special & set(np.unique(learnt_ids).tolist())
    if not anything:
        return
    ends = sorted(found)
    if ends and tokenizer.chat_template:
        names = ", ".join(tokenizer.convert_ids_to_tokens(ends))
        what = f"answers end with {names}, not with the tokenizer's EOS {tokenizer.eos_token}"
        yield Finding(
            "info",
            what,
            len(corpus),
            (),
            "Generation must stop at it (generation_config.json: eos_token_id).",
        )
        return
    all_cut = data.tally.count(Event.CUT) >= len(corpus)
    advice = (
        "Every record was cut: choose a greater data.max_length, or too_long: split for texts."
        if all_cut
        else "The chat template must write the EOS within the assistant's turn."
    )
    what = "no EOS among the supervised tokens, the model would never learn to stop; documents"
    yield Finding("error", what, len(corpus), tuple(corpus.origins[:EXAMPLES]), advice)


def _beginning_findings(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    bos = tokenizer.bos_token_id
    starts = corpus.offsets[:-1][corpus.lengths >= 2]
    doubled = np.flatnonzero((corpus.token_ids[starts] == bos) & (corpus.token_ids[starts + 1] == bos))
    if bos is None or len(doubled) == 0:
        return
    severity: Severity = "error" if len(doubled) > len(corpus) / 2 else "warning"
    origins = tuple(corpus.origins[int(index)] for index in np.flatnonzero(corpus.lengths >= 2)[doubled[:EXAMPLES]])
    advice = f"Remove {tokenizer.bos_token} from the texts or from the chat template."
    yield Finding(severity, f"documents that begin with two {tokenizer.bos_token} (BOS)", len(doubled), origins, advice)


def _vocabulary_findings(
    corpora: Sequence[Corpus], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Iterator[Finding]:
    for corpus in corpora:
        outside = _places(corpus, lambda ids: ids >= vocab_size)
        if len(outside):
            worst = int(corpus.token_ids[outside].max())
            what = f"tokens outside the model's vocabulary of {vocab_size} (the greatest id is {worst})"
            advice = "The tokenizer is not this model's, or the model's embedding must be resized."
            yield Finding("error", what, len(outside), _origins_at(corpus, outside), advice)
        unknown = tokenizer.unk_token_id
        if unknown is None or unknown == tokenizer.eos_token_id:
            continue
        places = _places(corpus, lambda ids, unknown=unknown: ids == unknown)  # type: ignore[misc]
        share = len(places) / max(1, len(corpus.token_ids))
        if share > MANY_UNKNOWN_TOKENS:
            severity: Severity = "error" if share > MOST_UNKNOWN_TOKENS else "warning"
            what = f"unknown tokens ({tokenizer.unk_token}), {share:.1%} of all"
            advice = "This tokenizer cannot write these texts; their characters are lost."
            yield Finding(severity, what, len(places), _origins_at(corpus, places), advice)


def _places(corpus: Corpus, holds: Callable[[NDArray[np.int32]], NDArray[np.bool_]]) -> NDArray[np.int64]:
    """Return where in the flat array something holds, without a mask of its whole length."""
    return np.concatenate(
        [np.flatnonzero(holds(ids)) + corpus.offsets[part.start] for part, ids, _ in corpus.pieces()]
        or [np.empty(0, dtype=np.int64)]
    )


def _origins_at(corpus: Corpus, places: NDArray[np.int64]) -> tuple[str, ...]:
    documents = np.unique(np.searchsorted(corpus.offsets, places, side="right") - 1)
    return tuple(corpus.origins[int(document)] for document in documents[:EXAMPLES])


def _cut_findings(data: Tokenized) -> Iterator[Finding]:
    share = data.num_tokens_cut / max(1, data.num_tokens_read)
    if data.num_tokens_cut:
        severity: Severity = "warning" if share > MANY_TOKENS_CUT else "info"
        advice = "Choose a greater data.max_length, or too_long: split for texts." if severity == "warning" else ""
        yield Finding(severity, f"tokens cut or dropped ({share:.1%} of all)", data.num_tokens_cut, (), advice)


def _duplicate_findings(data: Tokenized) -> Iterator[Finding]:
    _, firsts = np.unique(data.record_numbers, return_index=True)  # one document of each record
    _, first_of_kind, counts = np.unique(data.content_keys[firsts], return_index=True, return_counts=True)
    repeated = int((counts - 1).sum())
    if not repeated:
        return
    is_first = np.zeros(len(firsts), dtype=np.bool_)
    is_first[first_of_kind] = True
    origins = tuple(data.corpus.origins[int(index)] for index in firsts[~is_first][:EXAMPLES])
    exact = len(firsts) - len(np.unique(data.token_keys[firsts]))
    what = f"records that repeat another up to case and blanks ({exact} of them token for token)"
    severity: Severity = "warning" if repeated > len(firsts) / 100 else "info"
    yield Finding(severity, what, repeated, origins, "Remove them, unless the weight is meant.")


def _leak_findings(train: Tokenized, validation: Tokenized) -> Iterator[Finding]:
    if len(validation.corpus) == 0:
        return
    advice = "Remove them from one side; the validation loss would look better than it is."
    same_content = np.isin(validation.content_keys, train.content_keys)
    same_prompt = np.isin(validation.prompt_keys, train.prompt_keys) & ~same_content
    for leaked, what in ((same_content, "content"), (same_prompt, "prompt (with another answer)")):
        count = int(leaked.sum())
        if count:
            is_most = what == "content" and count > MOST_VALIDATION_LEAKED * len(leaked)
            origins = tuple(validation.corpus.origins[int(index)] for index in np.flatnonzero(leaked)[:EXAMPLES])
            described = f"validation documents whose {what} is in the training data, of {len(leaked)}"
            yield Finding("error" if is_most else "warning", described, count, origins, advice)
