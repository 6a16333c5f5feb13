"""The law of streaming: blocks whose weights wait on a disk compute what resident ones compute, bit for bit, in a
fraction of the memory; and the dry run knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import LlamaConfig

from tests.laws.test_same_gradients import CONFIG, PROBLEMS, corpus, loss_and_gradients, make_run
from tests.unit.architectures import tiny_model
from tests.unit.built import make_recipe
from tunewise.engine.allocator import allocated_bytes, lasting_bytes
from tunewise.engine.build import build
from tunewise.engine.dry_run import BatchShape, dry_run
from tunewise.engine.evaluate import summed_loss
from tunewise.engine.step import clipped_norm, gradients, parameter_groups, set_learning_rate, update
from tunewise.engine.tracking import Moment
from tunewise.errors import Conflict, StorageError
from tunewise.export.merge import merge_adapters
from tunewise.layers.lora import lora_layers
from tunewise.methods import Attention, Checkpointing, Freeze, LoRA, Peft, Precision, Quantize, Stream, complete
from tunewise.methods.method import Run
from tunewise.recipe import BatchSpec, Method, ModelSpec
from tunewise.workload.model import random_model

STREAMED = ("lora", "rslora on attention", "lora over nf4", "lora over int8")
CPU = torch.device("cpu")
DEEP = LlamaConfig(
    vocab_size=500, hidden_size=128, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
"""Nearly all of its weights lie in its blocks."""


@pytest.mark.parametrize("problem", STREAMED)
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_streaming_is_bit_equal(problem: str, policy: Literal["full", "selective"]) -> None:
    methods = (*PROBLEMS[problem], Checkpointing(policy=policy))
    expected = loss_and_gradients(make_run(methods, micro_batch_size=3))
    loss, found = loss_and_gradients(make_run((*methods, Stream()), micro_batch_size=3))
    assert loss == expected[0]
    assert found.keys() == expected[1].keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected[1].items())


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8", "int4"])
def test_what_is_away_is_held_by_nobody(kind: Literal["nf4", "int8", "fp8", "int4"]) -> None:
    """A buffer that is a view would hold its base, with all numbers, for as long as the model lives."""
    run = make_run((LoRA(rank=4), Quantize(kind=kind), Checkpointing(), Stream()), micro_batch_size=3)
    packed = [layer.base_layer for layer in lora_layers(run.model).values()]
    assert len(packed) == 21
    assert all(buffer._base is None for layer in packed for buffer in layer.buffers())


@pytest.mark.parametrize("problem", STREAMED)
def test_evaluation_and_merging_are_the_same(problem: str) -> None:
    methods = (*PROBLEMS[problem], Checkpointing())
    plain, streamed = make_run(methods, 7), make_run((*methods, Stream()), 7)
    losses = []
    for run in (plain, streamed):
        run.model.eval()
        batch = run.layout.build(run.layout.micro_batches(range(7), corpus().lengths)[0], corpus())
        with torch.no_grad():
            losses.append(summed_loss(run, batch))
    assert torch.equal(*losses)
    expected = merge_adapters(plain).state_dict()
    merged = merge_adapters(streamed).state_dict()
    assert expected.keys() == merged.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def deep_run(*methods: Method) -> Run:
    lora = LoRA(rank=2, target_modules=("q_proj", "v_proj"))
    attention = Attention(kind="per_document")  # who says so gets torch's kernels, which the streamed model has too
    recipe = make_recipe(lora, Checkpointing(), Precision(compute="fp32"), attention, *methods).replace(
        batch=BatchSpec(documents=7, micro_batch_size=2)
    )
    return build(complete(recipe, DEEP, CPU), random_model(DEEP, torch.float32, seed=0), CPU)


def peak_of_two_steps(run: Run) -> int:
    """Everything that is there before, and the most that comes on top in two whole steps."""
    optimizer = run.make_optimizer(parameter_groups(run))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    rows = run.layout.micro_batches(range(7), corpus().lengths)

    def train() -> None:
        for _ in range(2):
            set_learning_rate(optimizer, 1e-2)
            batches = [run.layout.build(part, corpus()) for part in rows]
            gradients(run, batches, int(corpus().num_supervised.sum()), scaler)
            clipped_norm(run, optimizer, scaler)
            update(run, optimizer, scaler)

    before = lasting_bytes(run, optimizer)
    return before + allocated_bytes(train)


def test_a_model_four_times_the_memory_trains_with_the_same_result() -> None:
    resident, streamed = deep_run(), deep_run(Stream())
    model_bytes = sum(parameter.numel() * 4 for parameter in resident.model.parameters())
    assert peak_of_two_steps(resident) > model_bytes
    assert 4 * peak_of_two_steps(streamed) < model_bytes
    expected = dict(resident.trainable())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in streamed.trainable())


def test_what_is_away_cannot_be_used_unnoticed_and_nothing_stays() -> None:
    run = deep_run(Stream())
    loss_and_gradients(run)
    assert run.streamer is not None
    assert not run.streamer._present
    blocks = [parameter for name, parameter in run.model.named_parameters() if ".layers." in name]
    frozen = [parameter for parameter in blocks if not parameter.requires_grad]
    assert frozen
    assert all(bool(parameter.isnan().all()) for parameter in frozen)
    assert sum(parameter.untyped_storage().nbytes() for parameter in frozen) == 4 * len(frozen)
    assert run.streamer.stored_bytes == sum(4 * parameter.numel() for parameter in frozen)


@pytest.mark.parametrize("methods", [{}, {"quantize": {"kind": "nf4"}}], ids=["fp32", "nf4"])
@pytest.mark.parametrize(("depth", "at_once"), [(4, 7), (7, 7), (4, 1)])
def test_the_dry_run_knows_it(methods: dict[str, Any], depth: int, at_once: int) -> None:
    """With one document at once the weights of a block are most of the peak: they must not be there twice."""
    config = LlamaConfig(**{**DEEP.to_dict(), "num_hidden_layers": depth})
    quantize: tuple[Method, ...] = (Quantize(kind="nf4"),) if methods else ()
    recipe = make_recipe(LoRA(rank=2), Checkpointing(), Precision(compute="fp32"), Stream(), *quantize).replace(
        batch=BatchSpec(documents=7, micro_batch_size=at_once)
    )
    recipe = complete(recipe, config, CPU)
    run = build(recipe, random_model(config, torch.float32, seed=0), CPU)
    rows = run.layout.micro_batches(range(7), corpus().lengths)
    shapes = [BatchShape.of(run.layout.build(part, corpus())) for part in rows]
    moments = dry_run(recipe, config, "cpu", shapes).moments
    predicted = max(moments[moment].total_bytes for moment in (Moment.FORWARD, Moment.BACKWARD, Moment.UPDATE))
    batch_bytes = 3 * 8 * 7 * 40
    assert predicted == pytest.approx(peak_of_two_steps(run) + batch_bytes, rel=0.01)


def test_weights_go_where_they_are_told_and_vanish(tmp_path: Path) -> None:
    run = make_run((LoRA(rank=4), Checkpointing(), Stream(folder=str(tmp_path / "blocks"))), 3)
    files = list(tmp_path.rglob("*.weights"))
    assert len(files) == CONFIG.num_hidden_layers
    assert sum(file.stat().st_size for file in files) > 4 * 3 * 64 * 96
    del run
    (tmp_path / "no folder").write_text("in the way")
    with pytest.raises(StorageError, match="stream"):
        make_run((LoRA(rank=4), Checkpointing(), Stream(folder=str(tmp_path / "no folder"))), 3)


def test_weights_that_were_cut_off_are_said(tmp_path: Path) -> None:
    run = make_run((LoRA(rank=4), Checkpointing(), Stream(folder=str(tmp_path))), 3)
    file = min(tmp_path.rglob("*.weights"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"stream: cannot read weights from .*the file has become shorter"):
        loss_and_gradients(run)


@pytest.mark.parametrize(
    ("methods", "device", "words"),
    [
        ((Checkpointing(),), "cpu", "use lora, alone"),
        ((Checkpointing(), LoRA(), Freeze(train=("*norm*",))), "cpu", "use lora, alone"),
        ((Checkpointing(), Peft(kind="IA3")), "cpu", "use lora, alone"),
        ((Checkpointing(), LoRA(init="pissa")), "cpu", "pissa"),
        ((LoRA(),), "cpu", "add checkpointing"),
        ((LoRA(), Checkpointing(every=2)), "cpu", "add checkpointing"),
        ((LoRA(), Checkpointing()), "cpu", None),
        ((LoRA(), Checkpointing()), "cuda", None),
    ],
)
def test_conflicts(methods: tuple[Method, ...], device: str, words: str | None) -> None:
    found = Stream().conflict(make_recipe(*methods, Stream(), device=device))
    assert found is None if words is None else words in str(found)


def test_conflicts_of_its_options() -> None:
    plain = (LoRA(), Checkpointing())
    on_host = Stream(source="host")
    assert "source to disk" in str(on_host.conflict(make_recipe(*plain, on_host, device="cpu")))
    assert on_host.conflict(make_recipe(*plain, on_host, device="cuda")) is None
    with_folder = Stream(source="host", folder="x")
    assert "folder" in str(with_folder.conflict(make_recipe(*plain, with_folder, device="cuda")))


def test_a_block_that_is_trained_is_refused() -> None:
    with pytest.raises(Conflict, match="trained"):
        make_run((LoRA(rank=4, target_modules=("q_proj",), modules_to_save=("mlp",)), Checkpointing(), Stream()), 3)


def test_other_architectures(tmp_path: Path) -> None:
    """GPT-2's transposed layers, and blocks with biases."""
    for architecture in ("gpt2", "opt"):
        config = tiny_model(architecture).config
        found = []
        for streams in ((), (Stream(),)):
            recipe = make_recipe(LoRA(rank=4), Checkpointing(), Precision(compute="fp32"), *streams).replace(
                batch=BatchSpec(documents=7, micro_batch_size=7), model=ModelSpec(name="x", weights="random")
            )
            model = random_model(config, torch.float32, seed=0)
            found.append(loss_and_gradients(build(complete(recipe, config, CPU), model, CPU)))
        assert found[0][0] == found[1][0]
        assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
