"""Tokenized data on disk, so that each trial of a study starts without tokenizing them again. No pickle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tunewise.engine.run_folder import write_whole
from tunewise.quality.general_text import GeneralText
from tunewise.workload.corpus import Corpus
from tunewise.workload.diagnosis import Diagnosis, Statistics
from tunewise.workload.prepare import Prepared

_ARRAYS = ("token_ids", "is_supervised", "offsets")


def store(data: Prepared, folder: Path) -> None:
    """Write the training and the validation documents, and the general text if there is one, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, corpus in (("train", data.train), ("validation", data.validation), ("general", data.general)):
        if corpus is not None:
            _write(corpus, folder, name)
    content = {"fingerprint": data.data_fingerprint, "has_general": data.general is not None, "replayed": data.replayed}
    write_whole(folder / "data.json", json.dumps(content))


def store_general(text: GeneralText, folder: Path) -> None:
    """Write the text on which trials measure forgetting into `folder`."""
    _write(text.corpus, folder, "forgetting")
    write_whole(folder / "forgetting.json", json.dumps({"domains": text.domains, "source": text.source}))


def load_general(folder: Path) -> GeneralText:
    """Read what `store_general` wrote."""
    content = json.loads((folder / "forgetting.json").read_text(encoding="utf-8"))
    return GeneralText(_corpus(folder, "forgetting"), tuple(content["domains"]), content["source"])


def _write(corpus: Corpus, folder: Path, name: str) -> None:
    for array in _ARRAYS:
        np.save(folder / f"{name}.{array}.npy", getattr(corpus, array), allow_pickle=False)
    write_whole(folder / f"{name}.origins.json", json.dumps(list(corpus.origins)))


def load(folder: Path) -> Prepared:
    """Read what `store` wrote; arrays stay on disk until they are looked at."""
    train, validation = (_corpus(folder, name) for name in ("train", "validation"))
    statistics = Statistics(
        records=len(train),
        documents=len(train),
        tokens=len(train.token_ids),
        supervised_tokens=int(train.is_supervised.sum()),
        length_quantiles=(),
        share_cut=0.0,
    )
    content = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    general = _corpus(folder, "general") if content.get("has_general") else None
    diagnosis = Diagnosis((), statistics)
    return Prepared(
        train, validation, [], diagnosis, content["fingerprint"], general=general, replayed=content.get("replayed", "")
    )


def _corpus(folder: Path, name: str) -> Corpus:
    arrays = {array: np.load(folder / f"{name}.{array}.npy", mmap_mode="r", allow_pickle=False) for array in _ARRAYS}
    origins = json.loads((folder / f"{name}.origins.json").read_text(encoding="utf-8"))
    return Corpus(**arrays, origins=origins)
