"""Tokenized data on disk, so that each trial of a study starts without tokenizing them again. No pickle."""

from __future__ import annotations

import json
from pathlib import Path

from tunewise.engine.run_folder import write_whole
from tunewise.quality.general_text import GeneralText
from tunewise.workload.diagnosis import Diagnosis, Statistics
from tunewise.workload.kept import load_corpus, save_corpus
from tunewise.workload.prepare import Prepared


def store(data: Prepared, folder: Path) -> None:
    """Write the training and the validation documents, and the general text if there is one, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": data.train, "validation": data.validation, "general": data.general}
    corpora = {name: save_corpus(corpus, folder, name) for name, corpus in parts.items() if corpus is not None}
    content = {"fingerprint": data.data_fingerprint, "replayed": data.replayed, "corpora": corpora}
    write_whole(folder / "data.json", json.dumps(content))


def fingerprint(folder: Path) -> str | None:
    """Return the fingerprint of the data in `folder`; None where there are none, or those of an older version."""
    try:
        content = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        return str(content["fingerprint"]) if "corpora" in content else None
    except (OSError, ValueError):
        return None


def store_general(text: GeneralText, folder: Path) -> None:
    """Write the text on which trials measure forgetting into `folder`."""
    about = save_corpus(text.corpus, folder, "forgetting")
    content = {"domains": text.domains, "source": text.source, "corpus": about}
    write_whole(folder / "forgetting.json", json.dumps(content))


def load_general(folder: Path) -> GeneralText:
    """Read what `store_general` wrote."""
    content = json.loads((folder / "forgetting.json").read_text(encoding="utf-8"))
    corpus = load_corpus(folder, "forgetting", content["corpus"])
    return GeneralText(corpus, tuple(content["domains"]), content["source"])


def load(folder: Path) -> Prepared:
    """Read what `store` wrote; arrays stay on disk until they are looked at."""
    content = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    corpora = {name: load_corpus(folder, name, about) for name, about in content["corpora"].items()}
    train = corpora["train"]
    statistics = Statistics(
        records=len(train),
        documents=len(train),
        tokens=len(train.token_ids),
        supervised_tokens=int(train.num_supervised.sum()),
        length_quantiles=(),
        share_cut=0.0,
    )
    return Prepared(
        train=train,
        validation=corpora["validation"],
        said=[],
        diagnosis=Diagnosis((), statistics),
        data_fingerprint=content["fingerprint"],
        general=corpora.get("general"),
        replayed=content["replayed"],
    )
