"""The doctor finds what is put there, and nothing in sound data."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.unit.workload import tiny_tokenizers as tiny
from tests.unit.workload.tiny_tokenizers import tiny_tokenizer
from tunewise.workload.conversation import Conversation, Document, Message, PlainText
from tunewise.workload.diagnosis import Diagnosis, Finding, preview
from tunewise.workload.doctor import examine
from tunewise.workload.tally import Tally
from tunewise.workload.text_checks import checked
from tunewise.workload.tokens import tokenize

SOUND = [(f"What is {i}?\n", f"The answer is {i}.") for i in range(40)]


def _pairs(pairs: Sequence[tuple[str, str]]) -> list[Document]:
    return [
        Conversation(
            (Message("user", prompt), Message("assistant", answer, True)),
            f"a.jsonl:{line}",
            plain_prompt=prompt,
        )
        for line, (prompt, answer) in enumerate(pairs, start=1)
    ]


def _diagnosed(
    documents: Sequence[Document],
    template: str | None = None,
    validation: Sequence[Document] | None = None,
    vocab_size: int = 400,
    max_length: int = 200,
) -> Diagnosis:
    tokenizer = tiny_tokenizer(template)
    parts = []
    for part in (documents, validation):
        if part is not None:
            tally = Tally()
            parts.append(tokenize(checked(part, tokenizer, tally), tokenizer, max_length=max_length, tally=tally))
    return examine(parts[0], parts[1] if len(parts) > 1 else None, tokenizer, vocab_size)


def _found(diagnosis: Diagnosis, words: str) -> Finding:
    matching = [finding for finding in diagnosis.findings if words in finding.what]
    assert len(matching) == 1, [str(finding) for finding in diagnosis.findings]
    return matching[0]


def test_sound_data_have_no_findings() -> None:
    diagnosis = _diagnosed(_pairs(SOUND[:30]), validation=_pairs(SOUND[30:]))
    assert diagnosis.findings == ()
    assert diagnosis.statistics.records == diagnosis.statistics.documents == 30
    assert 0 < diagnosis.statistics.supervised_tokens < diagnosis.statistics.tokens
    assert diagnosis.statistics.share_cut == 0.0


def test_missing_eos_is_an_error() -> None:
    finding = _found(_diagnosed(_pairs(SOUND), max_length=12), "no EOS among the supervised tokens")
    assert (finding.severity, finding.count) == ("error", 40)
    assert "max_length" in finding.advice


def test_another_end_of_turn_is_information() -> None:
    finding = _found(_diagnosed(_pairs(SOUND), tiny.CHATML), "<|im_end|>")
    assert finding.severity == "info"


def test_doubled_bos() -> None:
    template = "{{ bos_token + bos_token }}" + tiny.CHATML
    assert _found(_diagnosed(_pairs(SOUND), template), "two <s>").severity == "error"
    one = [*_pairs(SOUND), PlainText("<s><s>once", "b.txt")]
    finding = _found(_diagnosed(one), "two <s>")
    assert (finding.severity, finding.count, finding.origins) == ("warning", 1, ("b.txt",))


def test_duplicates_exact_and_normalised() -> None:
    pairs = [*SOUND, SOUND[0], ("what  IS 1?", "the answer is 1.")]
    finding = _found(_diagnosed(_pairs(pairs)), "repeat another")
    assert finding.count == 2
    assert "(1 of them token for token)" in finding.what
    assert finding.origins == ("a.jsonl:41", "a.jsonl:42")


def test_leak_is_a_warning_and_an_error_above_half() -> None:
    some = _diagnosed(_pairs(SOUND[:30]), validation=_pairs(SOUND[28:]))
    assert (_found(some, "whose content is in the training").severity, some.errors) == ("warning", ())
    assert _found(some, "whose content").count == 2
    most = _diagnosed(_pairs(SOUND), validation=_pairs(SOUND[:5]))
    assert _found(most, "whose content is in the training").severity == "error"
    prompts = _diagnosed(_pairs(SOUND), validation=_pairs([(SOUND[3][0], "no idea")]))
    assert _found(prompts, "prompt (with another answer)").severity == "warning"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("na\ufffdve", "U+FFFD"),
        ("cafÃ© au lait", "Latin-1"),
        ("68Â°F", "Latin-1"),
        ("itâ€™s", "Latin-1"),
        ("a\x00b", "control characters"),
        ("ends </s> here", "special token"),
        ("", "nothing to learn"),
    ],
)
def test_damage_in_the_text(answer: str, words: str) -> None:
    finding = _found(_diagnosed(_pairs([*SOUND, ("Who?\n", answer)])), words)
    assert (finding.count, finding.origins) == (1, ("a.jsonl:41",))


@pytest.mark.parametrize("answer", ["café", "São Paulo, SÃO", "ÂNGELO", "日本語", "Ünïcödé «â»", "tab\tand\x0c"])
def test_sound_text_is_not_called_damaged(answer: str) -> None:
    assert _diagnosed(_pairs([*SOUND, ("Who?\n", answer)])).findings == ()


def test_tokens_cut() -> None:
    pairs = [*SOUND, ("Long?\n", "word " * 300)]
    diagnosis = _diagnosed(_pairs(pairs), max_length=100)
    assert _found(diagnosis, "tokens cut or dropped").severity == "warning"
    assert _found(diagnosis, "records cut at max_length").origins == ("a.jsonl:41",)
    assert diagnosis.statistics.share_cut > 0.1


def test_vocabulary() -> None:
    finding = _found(_diagnosed(_pairs(SOUND), vocab_size=100), "outside the model's vocabulary of 100")
    assert finding.severity == "error"
    assert len(finding.origins) == 5


def test_template_that_drops_the_system_message() -> None:
    document = Conversation(
        (Message("system", "be kind"), Message("user", "a"), Message("assistant", "b", True)), "a.jsonl:1"
    )
    assert _found(_diagnosed([document], tiny.DROPS_SYSTEM), "drops or rewrites a message").count == 1


def test_nothing_left_is_an_error() -> None:
    diagnosis = _diagnosed(_pairs([("a", ""), ("b", " ")]))
    assert _found(diagnosis, "documents to train on").severity == "error"


def test_preview_joins_to_the_whole() -> None:
    tokenizer = tiny_tokenizer()
    data = tokenize(_pairs([("Who is naïve?\n", "Me 🙂, of course.")]), tokenizer, max_length=100)
    pieces = preview(data.corpus, tokenizer, 0)
    assert pieces == [("<s>Who is naïve?\n", False), ("Me 🙂, of course.</s>", True)]
