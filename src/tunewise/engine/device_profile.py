"""What a device adds to the bytes of its tensors: rounding of the allocator, workspaces of libraries, a context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunewise.units import KIB, MIB

DeviceKind = Literal["cpu", "cuda"]

CUDA_ALLOCATION_BYTES = 512
"""torch's caching allocator rounds each size up to this (kMinBlockSize, c10/cuda/CUDACachingAllocator)."""

CUBLAS_WORKSPACE_BYTES = 2 * 4096 * KIB + 8 * 16 * KIB
"""torch's workspace for cuBLAS before Hopper, ":4096:2:16:8" (getChosenWorkspaceSize, CublasHandlePool.cpp)."""

CUBLAS_WORKSPACE_HOPPER_BYTES = 32 * MIB
"""The same from Hopper (sm90) on: 4096 KiB eight times."""

CUDA_CONTEXT_BYTES = 500 * MIB
"""Kernels, stacks and driver structures of one process; no tensor memory. A typical value: it depends on the card."""


@dataclass(frozen=True)
class DeviceProfile:
    """What is added to the tensors' own bytes.

    Attributes:
        kind: torch's device type.
        granularity_bytes: each allocation is rounded up to a multiple of this.
        workspace_bytes: what libraries allocate through torch once and keep; part of torch's allocated memory.
        context_bytes: what the process takes besides; not part of torch's allocated memory.
    """

    kind: DeviceKind
    granularity_bytes: int = 1
    workspace_bytes: int = 0
    context_bytes: int = 0


CPU = DeviceProfile("cpu")
CUDA = DeviceProfile("cuda", CUDA_ALLOCATION_BYTES, CUBLAS_WORKSPACE_BYTES, CUDA_CONTEXT_BYTES)
CUDA_HOPPER = DeviceProfile("cuda", CUDA_ALLOCATION_BYTES, CUBLAS_WORKSPACE_HOPPER_BYTES, CUDA_CONTEXT_BYTES)
PROFILES: dict[str, DeviceProfile] = {"cpu": CPU, "cuda": CUDA}
