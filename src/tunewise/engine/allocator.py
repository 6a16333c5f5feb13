"""The most tensor memory that a piece of work needed, by the allocator's own record.

On CUDA that is torch's peak counter. The CPU allocator keeps no counter, but torch's profiler records each allocation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tunewise.methods.method import Run
from tunewise.workload.batches import MicroBatch


def peak_tensor_bytes(
    run: Run, optimizer: torch.optim.Optimizer, batches: list[MicroBatch], work: Callable[[], object]
) -> int:
    """Do `work` with `batches` once and return the most bytes of tensors that were alive at a time.

    On a CPU these are weights, buffers, optimizer state and `batches`, counted, and what the allocator gave out during
    `work`; gradients must not be there before it.
    """
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
        torch.cuda.reset_peak_memory_stats(run.device)
        work()
        torch.cuda.synchronize(run.device)
        return torch.cuda.max_memory_allocated(run.device)
    inputs = max((batch_bytes(batch) for batch in batches), default=0)
    return lasting_bytes(run, optimizer) + inputs + allocated_bytes(work)


def allocated_bytes(work: Callable[[], object]) -> int:
    """Return the most that the CPU allocator gave out above its level before `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    level = highest = 0
    for event in events:
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def lasting_bytes(run: Run, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of weights, buffers, optimizer state and what methods keep beside it, each storage once."""
    tensors: list[Tensor] = [*run.model.parameters(), *run.model.buffers()]
    for entries in optimizer.state.values():
        tensors += [value for value in entries.values() if isinstance(value, Tensor)]
    for companion in run.companions.values():
        tensors += companion.state().values()
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def batch_bytes(batch: MicroBatch) -> int:
    """Return the bytes of a micro-batch, which numpy has allocated."""
    return sum(part.untyped_storage().nbytes() for part in (batch.input_ids_RL, batch.position_ids_RL, batch.labels_RL))
