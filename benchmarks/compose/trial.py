"""One random recipe tried: it trains three steps as predicted and as its plain form, or is refused with reason."""

from __future__ import annotations

import copy
import gc
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from benchmarks.compose.space import Case
from benchmarks.estimate.cpu_cases import VOCAB_SIZE
from torch import Tensor
from transformers import PretrainedConfig

from tunewise.engine import build as building
from tunewise.engine.allocator import allocated_bytes, batch_bytes, lasting_bytes
from tunewise.engine.build import build
from tunewise.engine.dry_run import BatchShape, dry_run
from tunewise.engine.step import (
    begin_step,
    clipped_norm,
    gradients,
    parameter_groups,
    set_learning_rate,
    update,
    update_in_backward,
)
from tunewise.engine.tracking import Moment
from tunewise.errors import Conflict
from tunewise.export.finish import probe_logits, relative_difference, save_result
from tunewise.export.parts import load_adapter
from tunewise.methods import Attention, WholeLoss, complete
from tunewise.methods.compatibility import conflicts
from tunewise.methods.method import Run
from tunewise.methods.precision import Precision
from tunewise.methods.qalora import QALoRA
from tunewise.methods.quantization import Quantize
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import BatchSpec, Recipe, Slot
from tunewise.workload.batches import Layout, MicroBatch
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import random_model

CPU = torch.device("cpu")
STEPS = 3
SCALE = 256.0
"""Of fp16's loss; with the usual 65,536 the first three steps may all be skipped."""

MEMORY_TOLERANCE = 0.01
"""By how much a step may need more than predicted: the planner's own tolerance."""

BY_DEFINITION = (
    "both set the", "there is none", "cannot be clipped", "unscale", "full fine-tuning cannot train", "stream keeps",
    "is saved without it", "masters of its own", "both factors of LoRA", "lets a block's weights go",
    "would not be in peft's files", "are two adapters", "keep fp32 ones besides", "nothing to store",
    "updates of the same layers", "our own layers, not of peft's", "fused compares modules",
    "head_compute: int8 is for supervised_loss",
)  # fmt: skip
"""Refusals that no trial can prove: a training goes on without, only not as it was wished.

Two methods in a slot that holds one; a wish about something that is absent; clipping and unscaling inside backward;
packed weights that would be trained; streaming where nothing is frozen; an adapter whose base is lost; a pull that the
optimizer's masters overwrite, or that sees one factor moved and the other not; a streamed block that stays in memory;
what would be saved only in part (16-bit logits hide a small loss); masters twice; a store for no gradients; two
updates where a layer holds one; sizes that pad cannot change; modules that fused would compare, if it knew this model;
a head that another loss would multiply as it is.
"""

Verdict = Literal["trained", "refused", "wrong"]


@dataclass(frozen=True)
class Tried:
    """What came of a case: the verdict, what it rests on, and the bytes of the step."""

    verdict: Verdict
    reason: str
    predicted_bytes: int | None = None
    measured_bytes: int | None = None


class Tokenizerless:
    """Stands for a tokenizer where none is needed."""

    def save_pretrained(self, folder: object) -> None:
        """Write nothing."""


class Broken(Exception):
    """The training did something else than it should; the message says what."""


def try_case(case: Case) -> Tried:
    """Try one case."""
    config = case.config()
    recipe = complete(recipe_from_mapping(case.mapping(), "compose"), config, CPU)
    corpus = make_corpus(case)
    layout = layout_of(recipe)
    groups = layout.micro_batches(list(range(len(corpus.lengths))), corpus.lengths)[: case.micro_batches]
    batches = [layout.build(rows, corpus) for rows in groups]
    try:
        predicted = predict(recipe, config, batches)
    except Conflict as refusal:
        return judge_refusal(recipe, config, batches, groups, corpus, str(refusal))
    try:
        measured = train(recipe, config, batches, groups, corpus)
    except Conflict as refusal:  # of what a dry run cannot know: values
        reason = f"refused by the real run only: {refusal}"
        known = "see the one before" in str(refusal) or "flash" in str(refusal)
        return Tried("refused" if known else "wrong", reason, predicted)
    if measured > predicted * (1 + MEMORY_TOLERANCE) + scratchpad_bytes(recipe, config):
        return Tried("wrong", f"needs {measured / predicted - 1:.1%} more than predicted", predicted, measured)
    return Tried("trained", f"{measured / predicted - 1:+.2%} of the prediction", predicted, measured)


def scratchpad_bytes(recipe: Recipe, config: PretrainedConfig) -> int:
    """Return what a 16-bit product may need besides: a packed copy of the head's weight.

    How much oneDNN packs at once differs between processors (see `tunewise.engine.workspace`); with AMX it packs more
    than on the machine that the rule was read off, which shows on models as small as these.
    """
    precision = recipe.get(Precision)
    assert precision is not None
    is_16_bit = precision.storage_dtype.itemsize == 2
    return VOCAB_SIZE * int(config.get_text_config().hidden_size) * 2 if is_16_bit else 0


def judge_refusal(
    recipe: Recipe, config: PretrainedConfig, batches: list[MicroBatch], groups: list[Any], corpus: Corpus, refusal: str
) -> Tried:
    """Say whether a refusal is true: the real run says the same, and without it something goes wrong."""
    try:
        build(recipe, load(recipe, config), CPU)
    except Conflict as real:
        if str(real) != refusal:
            return Tried("wrong", f"the dry run says '{refusal}', the real one '{real}'")
    else:
        return Tried("wrong", f"the dry run alone refuses: {refusal}")
    if not conflicts(recipe):
        return Tried("refused", f"found while building: {refusal}")
    if any(mark in line for line in conflicts(recipe) for mark in BY_DEFINITION):
        return Tried("refused", f"by definition: {refusal}")
    with without_conflicts():
        try:
            predict(recipe, config, batches)
            train(recipe, config, batches, groups, corpus)
        except Exception as proof:  # any failure at all proves that the refusal was true
            told = str(proof).splitlines()[0] if str(proof) else type(proof).__name__
            return Tried("refused", f"{refusal} PROOF: {type(proof).__name__}: {told[:200]}")
    return Tried("wrong", f"refused, and works all the same: {refusal}")


@contextmanager
def without_conflicts() -> Iterator[None]:
    """Let runs be built whose methods contradict each other."""
    kept = building.refuse_conflicts
    building.refuse_conflicts = lambda recipe: None
    try:
        yield
    finally:
        building.refuse_conflicts = kept


def predict(recipe: Recipe, config: PretrainedConfig, batches: list[MicroBatch]) -> int:
    """Return the dry run's peak of a step, in bytes."""
    moments = dry_run(recipe, config, "cpu", [BatchShape.of(batch) for batch in batches]).moments
    return max(moments[moment].total_bytes for moment in (Moment.FORWARD, Moment.BACKWARD, Moment.UPDATE))


def load(recipe: Recipe, config: PretrainedConfig) -> torch.nn.Module:
    """Make the random base model, with a configuration of its own: a model's attention is written into it."""
    precision = recipe.get(Precision)
    assert precision is not None
    return random_model(copy.deepcopy(config), precision.loading_dtype(recipe), recipe.seed)


def train(
    recipe: Recipe, config: PretrainedConfig, batches: list[MicroBatch], groups: list[Any], corpus: Corpus
) -> int:
    """Train three steps, hold them against the plain form, save and read again; return the peak bytes of a step.

    Raises:
        Broken: something is not as it should be.
        Conflict: the recipe is refused.
    """
    run = build(recipe, load(recipe, config), CPU)
    num_supervised = sum(batch.num_supervised for batch in batches)
    optimizer = run.make_optimizer(parameter_groups(run))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=run.use_grad_scaler)
    set_learning_rate(optimizer, 1e-3)
    if run.update_in_backward:
        update_in_backward(run, optimizer)
    trained = {name for name, _ in run.trainable()}
    before = {name: tensor.detach().clone() for name, tensor in resident(run)}

    def step(number: int) -> float:
        begin_step(run, number, STEPS)
        loss = float(gradients(run, iter(batches), num_supervised, scaler))
        if not run.update_in_backward:
            clipped_norm(run, optimizer, scaler)
            update(run, optimizer, scaler)
        return loss

    losses = [step(0), step(1)]
    gc.collect()
    peak = lasting_bytes(run, optimizer) + max(map(batch_bytes, batches))
    peak += allocated_bytes(lambda: losses.append(step(2)))
    if not all(np.isfinite(losses)):
        raise Broken(f"the losses are {losses}")
    after = dict(resident(run))
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    if moved - trained:
        raise Broken(f"'{min(moved - trained)}' is frozen and has moved")
    if not moved and all(before[name].dtype.itemsize > 2 for name in trained):  # 16 bits round a small update away
        raise Broken("nothing has moved")
    save_and_read(recipe, config, run)
    compare_with_plain(recipe, config, batches, groups, corpus)
    return peak


def resident(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that are on the device; those that are streamed are placeholders of one element."""
    for name, tensor in run.model.named_parameters():
        if run.streamer is None or any(tensor.stride()):
            yield name, tensor


def compare_with_plain(
    recipe: Recipe, config: PretrainedConfig, batches: list[MicroBatch], groups: list[Any], corpus: Corpus
) -> None:
    """Compare the first loss and gradient with those of eager attention, whole logits, one unpacked row at a time."""
    if any(getattr(method, "dropout", 0.0) for method in recipe.methods or ()):
        return
    kept = tuple(
        method.model_copy(update={"head_compute": "dense"}) if isinstance(method, Quantize) else method
        for method in recipe.methods or ()
        if method.slot not in (Slot.DATA, Slot.ATTENTION, Slot.ACTIVATIONS, Slot.LOSS) and method.name != "stream"
    )
    kind: Literal["sdpa", "eager"] = "sdpa" if config.model_type == "falcon" else "eager"  # it has no eager one
    plain = recipe.replace(
        methods=(*kept, Attention(kind=kind), WholeLoss()), batch=BatchSpec(documents=1, micro_batch_size=1)
    )
    run, twin = (build(each, load(recipe, config), CPU) for each in (recipe, plain))
    for other in (run, twin):
        begin_step(other, 0, STEPS)
    alone = [Layout(1).build([(document,)], corpus) for rows in groups for row in rows for document in row]
    loss, ours = first_gradient(run, batches)
    expected_loss, theirs = first_gradient(twin, alone)
    coarse = is_coarse(run)
    if abs(loss - expected_loss) > (2e-2 if coarse else 1e-4) * expected_loss:
        raise Broken(f"the first loss is {loss:.5f}, of the plain form {expected_loss:.5f}")
    cosine = float(torch.cosine_similarity(ours, theirs, dim=0))
    ratio = float(ours.norm() / theirs.norm().clamp_min(1e-30))
    if cosine < (0.9 if coarse else 0.9999) or not 0.9 < ratio < 1.1:
        raise Broken(f"the first gradient has cosine {cosine:.5f} and norm ratio {ratio:.3f} to the plain form's")


def is_coarse(run: Run) -> bool:
    """Whether two ways to the same number may differ by more than fp32's rounding."""
    packed = run.recipe.get(Quantize)
    return run.storage_dtype.itemsize == 2 or (packed is not None and packed.compute != "dequantize")


def first_gradient(run: Run, batches: list[MicroBatch]) -> tuple[float, Tensor]:
    """Return loss and gradient of a step, as one fp64 vector ordered by names; the gradients are dropped again."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = float(gradients(run, iter(batches), sum(batch.num_supervised for batch in batches), scaler))
    named = sorted(run.trainable(), key=lambda item: item[0])
    parts = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for _, p in named]
    for _, parameter in named:
        parameter.grad = None
    return loss, torch.cat([part.double() for part in parts])


def save_and_read(recipe: Recipe, config: PretrainedConfig, run: Run) -> None:
    """Save what was trained, and read an adapter into a base of its own."""
    with tempfile.TemporaryDirectory(prefix="compose-") as folder:
        saved = save_result(run, Tokenizerless(), Path(folder))  # type: ignore[arg-type]
        if saved.kind != "adapter" or recipe.get(QALoRA) is not None:
            return  # a model has been read again already; QA-LoRA's adapter belongs to a run that is built
        model = load_adapter(quantized(recipe, load(recipe, config)), saved.folder)
        own, again = (probe_logits(each, run)[:, :VOCAB_SIZE] for each in (run.model, model.eval()))  # without padding
        difference = relative_difference(again, own)
        if difference > (5e-2 if is_coarse(run) else 1e-3):
            raise Broken(f"read again, the logits differ by {difference:.1e}")


def quantized(recipe: Recipe, model: torch.nn.Module) -> torch.nn.Module:
    """Quantize a base model as the recipe says, in the dtypes of the run."""
    method, precision = recipe.get(Quantize), recipe.get(Precision)
    assert precision is not None
    if method is not None:
        alone = recipe.replace(methods=(method,))
        method.apply(Run(alone, CPU, model, Layout(1), loss=_nothing, make_optimizer=_nothing))
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            parameter.data = parameter.data.to(precision.storage_dtype)
    return model


def _nothing(*arguments: Any) -> Any:
    raise AssertionError(f"nothing is trained here: {arguments}")


def layout_of(recipe: Recipe) -> Layout:
    """Return how rows are laid out, without building a model."""
    packing = next((method for method in recipe.methods or () if method.name == "packing"), None)
    size = recipe.batch.micro_batch_size or 1
    if packing is None:
        return Layout(size)
    return Layout(size, packing.row_tokens, packing.pad_to)  # type: ignore[attr-defined]


def make_corpus(case: Case) -> Corpus:
    """Make random documents: as many as fill the micro-batches."""
    draw = random.Random(f"{case.number} documents")
    is_packed = "packing" in case.methods
    longest = 96 if is_packed else case.length
    count = case.rows * case.micro_batches * (6 if is_packed else 1)
    lengths = [max(4, longest - draw.randrange(longest // 2)) if number else longest for number in range(count)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    generator = np.random.default_rng(case.number)
    ids = generator.integers(1, VOCAB_SIZE, offsets[-1]).astype(np.int32)
    return Corpus(ids, generator.random(offsets[-1]) < 0.6, offsets, ["random"] * count)
