"""Which accelerators there are: memory, bandwidth and DENSE FLOP/s as their vendors print them, with sources.

Rates are dense. Vendors print the doubled rate of 2:4 sparsity for Ampere and later; it is halved here.
GeForce cards run fp16 and bf16 products that accumulate in fp32, which is what torch does, at half the rate
of RTX and data-centre cards; the halved rate stands here ("FP16 Tensor with FP32 accumulate" in NVIDIA's
whitepapers). The numbers were entered from knowledge of the named documents; the bf16 rates of A100, L40S,
H100, H200, B200, GB200, MI250X, MI300X and MI325X agree with the "TFLOPS comparison table" of S. Bekman's
ml-engineering, which is also where the achievable fractions are from.

Usable memory of NVIDIA's cards is what the driver reports (the smallest "total capacity" found in public
out-of-memory messages of torch for that card or one with the same memory; for P100 and V100 16GB as commonly
seen) less a CUDA context of 5 MiB a multiprocessor. That rule fits the differences "in use less allocated
less reserved" of such messages, in GiB: T4 (40 SMs) 0.13 to 0.15, L4 (58) 0.25, A6000 (84) 0.30, A100 (108)
0.49, RTX 4090 (128) 0.60, H200 (132) 0.65, B200 (148) 0.70, RTX 5090 (170) 0.58 to 0.66.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from tunewise.errors import InputError
from tunewise.machine.machine import Dtype, Interconnect, Machine
from tunewise.units import GIB, MIB

CONTEXT_BYTES_PER_MULTIPROCESSOR = 5 * MIB
SMALLEST_REPORTED_FRACTION = 0.957
"""Reported over label where no message was found: the smallest among cards without ECC (11.49 GiB of 12)."""
ROCM_CONTEXT_BYTES = 512 * MIB
"""In such messages of an MI300X 0.44 GiB are neither free nor torch's."""
MI300X_REPORTED_FRACTION = 0.998
METAL_WORKING_SET_FRACTION = 0.75

Rates = Mapping[str, float]


def _nvidia(
    name: str,
    label_gib: int,
    reported_gib: float | None,
    num_multiprocessors: int,
    bandwidth_gb: float,
    watts: float,
    tflops: Rates,
    source: str,
    *,
    nvlink_gb: float | None = None,
    pcie_gb: float = 64,
    alignment_bytes: int = 128,
    achievable: Mapping[Dtype, float] | None = None,
) -> Machine:
    seen, reported = _reported(label_gib, reported_gib, SMALLEST_REPORTED_FRACTION)
    return Machine(
        name=name,
        kind="cuda",
        memory_bytes=label_gib * GIB,
        usable_memory_bytes=reported - CONTEXT_BYTES_PER_MULTIPROCESSOR * num_multiprocessors,
        usable_memory_rule=f"{seen}, less 5 MiB x {num_multiprocessors} SMs for the CUDA context",
        bandwidth_bytes_per_second=bandwidth_gb * 1e9,
        flops_per_second=_flops(tflops),
        achievable=dict(achievable or {}),
        interconnect=_links(nvlink_gb, pcie_gb),
        alignment_bytes=alignment_bytes,
        num_multiprocessors=num_multiprocessors,
        power_watts=watts,
        source=source,
    )


def _amd(
    name: str,
    label_gib: int,
    reported_gib: float | None,
    num_multiprocessors: int,
    bandwidth_gb: float,
    watts: float,
    tflops: Rates,
    source: str,
    *,
    infinity_fabric_gb: float,
    pcie_gb: float,
    achievable: Mapping[Dtype, float] | None = None,
) -> Machine:
    seen, reported = _reported(label_gib, reported_gib, MI300X_REPORTED_FRACTION)
    return Machine(
        name=name,
        kind="cuda",
        memory_bytes=label_gib * GIB,
        usable_memory_bytes=reported - ROCM_CONTEXT_BYTES,
        usable_memory_rule=f"{seen}, less 0.5 GiB for the ROCm context",
        bandwidth_bytes_per_second=bandwidth_gb * 1e9,
        flops_per_second=_flops(tflops),
        achievable=dict(achievable or {}),
        interconnect=_links(infinity_fabric_gb, pcie_gb),
        num_multiprocessors=num_multiprocessors,
        power_watts=watts,
        source=source,
    )


def _apple(name: str, label_gib: int, num_cores: int, bandwidth_gb: float, tflops: Rates, source: str) -> Machine:
    return Machine(
        name=name,
        kind="mps",
        memory_bytes=label_gib * GIB,
        usable_memory_bytes=round(label_gib * GIB * METAL_WORKING_SET_FRACTION),
        usable_memory_rule="Metal's recommended working set, three quarters of the shared memory",
        bandwidth_bytes_per_second=bandwidth_gb * 1e9,
        flops_per_second=_flops(tflops),
        num_multiprocessors=num_cores,
        source=source,
    )


def _reported(label_gib: int, reported_gib: float | None, fraction: float) -> tuple[str, int]:
    """Return in words and bytes what the driver reports, by `fraction` where nobody saw it."""
    if reported_gib is not None:
        return f"driver reports {reported_gib} GiB", round(reported_gib * GIB)
    return f"driver taken to report {label_gib} x {fraction} GiB", round(label_gib * fraction * GIB)


def _flops(tflops: Rates) -> dict[Dtype, float]:
    order: tuple[Dtype, ...] = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")
    # Rounded, because a product such as 124.1 * 1e12 carries a last binary digit that nobody printed.
    return {dtype: float(round(tflops[dtype] * 1e12)) for dtype in order if dtype in tflops}


def _links(nvlink_gb: float | None, pcie_gb: float) -> Interconnect:
    nvlink = nvlink_gb * 1e9 if nvlink_gb else None
    return Interconnect(nvlink_bytes_per_second=nvlink, pcie_bytes_per_second=pcie_gb * 1e9)


def _tensor(fp32: float, half: float, *, tf32: float | None = None, fp8: float | None = None, int8: float) -> Rates:
    """TFLOP/s of Ampere and later: bf16 and fp16 run alike, tf32 at half their rate."""
    tf32 = half / 2 if tf32 is None else tf32
    rates = {"fp32": fp32, "tf32": tf32, "bf16": half, "fp16": half, "int8": int8}
    return rates if fp8 is None else {**rates, "fp8": fp8}


_PASCAL = "NVIDIA Tesla P100 datasheet"
_VOLTA = "NVIDIA V100 datasheet"
_TURING = "NVIDIA Turing architecture whitepaper, reference clock, FP16 with FP32 accumulate"
_GA102 = "NVIDIA Ampere GA102 whitepaper v2, dense, FP32 accumulate"
_A100 = "NVIDIA A100 datasheet, dense; achievable: ml-engineering, MAMF table"
_ADA = "NVIDIA Ada architecture whitepaper v2, dense, FP32 accumulate"
_H100 = "NVIDIA H100 datasheet, halved to dense"
_H200 = "NVIDIA H200 datasheet, halved to dense"
_MEASURED = "; achievable: ml-engineering, MAMF table"
_BLACKWELL = "NVIDIA RTX Blackwell architecture whitepaper, dense, FP32 accumulate"
_HGX = "NVIDIA HGX and GB200 datasheets, halved to dense"
_CDNA = "AMD Instinct datasheet, dense"
_HOPPER_RATES = _tensor(67, 989.4, fp8=1978.9, int8=1978.9)
_HOPPER_ACHIEVABLE: dict[Dtype, float] = {"bf16": 794.5 / 989.4, "fp16": 794.5 / 989.4}

CATALOGUE: tuple[Machine, ...] = (
    # Pascal, Volta, Turing: no bf16 and no tf32; dimensions of 16 bytes.
    _nvidia("P100 PCIe 16GB", 16, 15.89, 56, 732, 250, {"fp32": 9.3, "fp16": 18.7}, _PASCAL, pcie_gb=32,
            alignment_bytes=16),
    _nvidia("P100 SXM 16GB", 16, 15.89, 56, 732, 300, {"fp32": 10.6, "fp16": 21.2}, _PASCAL, nvlink_gb=160,
            pcie_gb=32, alignment_bytes=16),
    _nvidia("V100 PCIe 16GB", 16, 15.77, 80, 900, 250, {"fp32": 14, "fp16": 112}, _VOLTA, pcie_gb=32,
            alignment_bytes=16),
    _nvidia("V100 PCIe 32GB", 32, 31.73, 80, 900, 250, {"fp32": 14, "fp16": 112}, _VOLTA, pcie_gb=32,
            alignment_bytes=16),
    _nvidia("V100 SXM 16GB", 16, 15.77, 80, 900, 300, {"fp32": 15.7, "fp16": 125}, _VOLTA, nvlink_gb=300,
            pcie_gb=32, alignment_bytes=16),
    _nvidia("V100 SXM 32GB", 32, 31.73, 80, 900, 300, {"fp32": 15.7, "fp16": 125}, _VOLTA, nvlink_gb=300,
            pcie_gb=32, alignment_bytes=16),
    _nvidia("T4", 16, 14.56, 40, 320, 70, {"fp32": 8.1, "fp16": 65, "int8": 130}, "NVIDIA T4 datasheet",
            pcie_gb=32, alignment_bytes=16),
    _nvidia("RTX 2080 Ti", 11, 10.57, 68, 616, 250, {"fp32": 13.4, "fp16": 53.8, "int8": 215.2}, _TURING,
            nvlink_gb=100, pcie_gb=32, alignment_bytes=16),
    # Ampere.
    _nvidia("RTX 3060 12GB", 12, 11.49, 28, 360, 170, _tensor(12.7, 25.5, tf32=12.7, int8=102), _GA102),
    _nvidia("RTX 3080 10GB", 10, 9.62, 68, 760, 320, _tensor(29.8, 59.5, tf32=29.8, int8=238), _GA102),
    _nvidia("RTX 3090", 24, 23.52, 82, 936, 350, _tensor(35.6, 71.2, int8=284.7), _GA102, nvlink_gb=112.5),
    _nvidia("A10", 24, 22.06, 72, 600, 150, _tensor(31.2, 125, int8=250), "NVIDIA A10 datasheet, dense"),
    _nvidia("A10G", 24, 22.06, 80, 600, 300, _tensor(31.5, 70, int8=140), "NVIDIA A10G datasheet, dense"),
    _nvidia("A30", 24, None, 56, 933, 165, _tensor(10.3, 165, tf32=82, int8=330),
            "NVIDIA A30 datasheet, dense", nvlink_gb=200),
    _nvidia("A40", 48, 44.34, 84, 696, 300, _tensor(37.4, 149.7, tf32=74.8, int8=299.3), _GA102,
            nvlink_gb=112.5),
    _nvidia("RTX A5000", 24, None, 64, 768, 230, _tensor(27.8, 111.1, int8=222.2),
            "NVIDIA RTX A5000 datasheet, halved", nvlink_gb=112.5),
    _nvidia("RTX A6000", 48, 47.40, 84, 768, 300, _tensor(38.7, 154.8, int8=309.7), _GA102, nvlink_gb=112.5),
    _nvidia("A100 PCIe 40GB", 40, 39.39, 108, 1555, 250, _tensor(19.5, 312, int8=624), _A100, nvlink_gb=600,
            achievable={"bf16": 252.9 / 312, "fp16": 252.9 / 312}),
    _nvidia("A100 PCIe 80GB", 80, 79.15, 108, 1935, 300, _tensor(19.5, 312, int8=624), _A100, nvlink_gb=600,
            achievable={"bf16": 252.9 / 312, "fp16": 252.9 / 312}),
    _nvidia("A100 SXM 40GB", 40, 39.39, 108, 1555, 400, _tensor(19.5, 312, int8=624), _A100, nvlink_gb=600,
            achievable={"bf16": 271.2 / 312, "fp16": 271.2 / 312}),
    _nvidia("A100 SXM 80GB", 80, 79.15, 108, 2039, 400, _tensor(19.5, 312, int8=624), _A100, nvlink_gb=600,
            achievable={"bf16": 271.2 / 312, "fp16": 271.2 / 312}),
    _nvidia("A800 SXM 80GB", 80, 79.15, 108, 2039, 400, _tensor(19.5, 312, int8=624),
            _A100 + "; as the A100 but for NVLink", nvlink_gb=400,
            achievable={"bf16": 271.2 / 312, "fp16": 271.2 / 312}),
    # Ada.
    _nvidia("RTX 4060 Ti 16GB", 16, 15.46, 34, 288, 165, _tensor(22.1, 44.1, fp8=88.2, int8=176.5), _ADA,
            pcie_gb=32),
    _nvidia("RTX 4070", 12, 11.49, 46, 504.2, 200, _tensor(29.1, 58.3, fp8=116.6, int8=233.2), _ADA),
    _nvidia("RTX 4070 Ti SUPER", 16, 15.46, 66, 672.3, 285, _tensor(44.1, 88.2, fp8=176.4, int8=352.8),
            _ADA),
    _nvidia("RTX 4080", 16, 15.46, 76, 716.8, 320, _tensor(48.7, 97.5, fp8=194.9, int8=389.9), _ADA),
    _nvidia("RTX 4080 SUPER", 16, 15.46, 80, 736.3, 320, _tensor(52.2, 104.4, fp8=208.9, int8=417.8), _ADA),
    _nvidia("RTX 4090", 24, 23.52, 128, 1008, 450, _tensor(82.6, 165.2, fp8=330.3, int8=660.6), _ADA),
    _nvidia("RTX 6000 Ada", 48, 47.40, 142, 960, 300, _tensor(91.1, 364.2, fp8=728.5, int8=728.5), _ADA),
    _nvidia("L4", 24, 22.03, 58, 300, 72, _tensor(30.3, 121, fp8=242.5, int8=242.5),
            "NVIDIA L4 datasheet, halved"),
    _nvidia("L40", 48, 44.34, 142, 864, 300, _tensor(90.5, 181, fp8=362, int8=362), _ADA),
    _nvidia("L40S", 48, 44.34, 142, 864, 350, _tensor(91.6, 362, tf32=183, fp8=733, int8=733),
            "NVIDIA L40S datasheet, dense"),
    # Hopper.
    _nvidia("H100 PCIe 80GB", 80, 79.14, 114, 2000, 350, _tensor(51.2, 756.5, tf32=378, fp8=1513, int8=1513),
            _H100, nvlink_gb=600, pcie_gb=128),
    _nvidia("H100 SXM 80GB", 80, 79.14, 132, 3350, 700, _HOPPER_RATES, _H100 + _MEASURED, nvlink_gb=900,
            pcie_gb=128, achievable={**_HOPPER_ACHIEVABLE, "fp8": 1402.6 / 1978.9}),
    _nvidia("H100 NVL 94GB", 94, 93.02, 132, 3938, 400,
            _tensor(60, 835.5, tf32=417.5, fp8=1670.5, int8=1670.5), _H100, nvlink_gb=600,
            pcie_gb=128),
    _nvidia("H20 96GB", 96, None, 78, 4000, 400, _tensor(44, 148, fp8=296, int8=296),
            "NVIDIA H20 specification as resold, dense", nvlink_gb=900, pcie_gb=128),
    _nvidia("H200 SXM 141GB", 141, 139.72, 132, 4800, 700, _HOPPER_RATES, _H200 + _MEASURED,
            nvlink_gb=900, pcie_gb=128, achievable={**_HOPPER_ACHIEVABLE, "fp8": 1453 / 1978.9}),
    _nvidia("H200 NVL 141GB", 141, 139.72, 132, 4800, 600,
            _tensor(60, 835.5, tf32=417.5, fp8=1670.5, int8=1670.5),
            _H200, nvlink_gb=900, pcie_gb=128),
    _nvidia("GH200 96GB", 96, 94.50, 132, 4000, 900, _HOPPER_RATES,
            "NVIDIA GH200 datasheet, halved to dense" + _MEASURED + ", of the 144 GB version",
            nvlink_gb=900, pcie_gb=128, achievable={"bf16": 828.6 / 989.4, "fp8": 1535 / 1978.9}),
    # Blackwell.
    _nvidia("B200 180GB", 180, 178.35, 148, 8000, 1000, _tensor(75, 2250, tf32=1125, fp8=4500, int8=4500),
            _HGX, nvlink_gb=1800, pcie_gb=128),
    _nvidia("GB200 186GB", 186, 184.31, 152, 8000, 1200, _tensor(80, 2500, tf32=1250, fp8=5000, int8=5000),
            _HGX + ", one of the two GPUs", nvlink_gb=1800, pcie_gb=128),
    _nvidia("RTX 5070 Ti", 16, 15.46, 70, 896, 300, _tensor(43.9, 87.9, fp8=175.8, int8=351.5), _BLACKWELL,
            pcie_gb=128),
    _nvidia("RTX 5080", 16, 15.46, 84, 960, 360, _tensor(56.3, 112.6, fp8=225.1, int8=450.2), _BLACKWELL,
            pcie_gb=128),
    _nvidia("RTX 5090", 32, 31.36, 170, 1792, 575, _tensor(104.8, 209.5, fp8=419, int8=838), _BLACKWELL,
            pcie_gb=128),
    _nvidia("RTX PRO 6000 Blackwell", 96, 94.97, 188, 1792, 600,
            _tensor(126, 503.8, fp8=1007.6, int8=1007.6), _BLACKWELL, pcie_gb=128),
    # AMD. torch sees each of an MI250X's two dies as a device of its own.
    _amd("MI210", 64, 63.98, 104, 1638, 300, {"fp32": 45.3, "bf16": 181, "fp16": 181, "int8": 181}, _CDNA,
         infinity_fabric_gb=300, pcie_gb=64),
    _amd("MI250X", 64, 63.98, 110, 1638, 280, {"fp32": 47.9, "bf16": 191.5, "fp16": 191.5, "int8": 191.5},
         _CDNA + "; one of the card's two dies: half of what is printed", infinity_fabric_gb=400,
         pcie_gb=64),
    _amd("MI300X", 192, 191.69, 304, 5325, 750, _tensor(163.4, 1307.4, fp8=2614.9, int8=2614.9),
         _CDNA + _MEASURED, infinity_fabric_gb=896, pcie_gb=128,
         achievable={"bf16": 668.4 / 1307.4}),
    _amd("MI325X", 256, None, 304, 6000, 1000, _tensor(163.4, 1307.4, fp8=2614.9, int8=2614.9),
         _CDNA + _MEASURED, infinity_fabric_gb=896, pcie_gb=128,
         achievable={"bf16": 784.9 / 1307.4}),
    # Apple prints TFLOP/s up to the M2 only; from the M3 on it is cores x 128 lanes x 2 x the reported clock.
    _apple("M1 Max 64GB", 64, 32, 400, {"fp32": 10.4, "fp16": 10.4}, "Apple, M1 Max announcement"),
    _apple("M1 Ultra 128GB", 128, 64, 800, {"fp32": 21, "fp16": 21}, "Apple, M1 Ultra announcement"),
    _apple("M2 Max 96GB", 96, 38, 400, {"fp32": 13.6, "fp16": 13.6}, "Apple, M2 Max announcement"),
    _apple("M2 Ultra 192GB", 192, 76, 800, {"fp32": 27.2, "fp16": 27.2}, "Apple, M2 Ultra announcement"),
    _apple("M3 Max 128GB", 128, 40, 400, {"fp32": 14.1, "bf16": 14.1, "fp16": 14.1}, "computed, 1.38 GHz"),
    _apple("M4 Max 128GB", 128, 40, 546, {"fp32": 16.2, "bf16": 16.2, "fp16": 16.2}, "computed, 1.58 GHz"),
)  # fmt: skip

_NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|rtx|amd|instinct|apple|generation|blackwell|workstation|server|edition|oam|"
    r"nvlink|hbm\d?e?"
)
_FORM = re.compile(r"sxm[2-6]?(?!\d)|sxm|pcie|nvl(?!ink)")
_MEMORY = re.compile(r"(?<![a-z\d])(\d+)\s*gi?b(?![a-z\d])")


def find(name: str) -> Machine:
    """Return the catalogue's machine of that name, as people or the driver write it.

    Case, blanks, dashes and the maker's name do not matter: "rtx4090", "NVIDIA GeForce RTX 4090" and "4090
    24GB" are the same. A name without form factor means the SXM module where there is one. A name that fits
    cards of different memory is an error, never a guess.

    Raises:
        InputError: nothing is called so (names the nearest), or several are (names all).
    """
    core, memory, form = _split(name)
    entries = [(machine, *_split(machine.name)) for machine in CATALOGUE]
    named = [(machine, other_form) for machine, other, _, other_form in entries if other == core]
    if not named:
        likeness = [difflib.SequenceMatcher(None, core, other).ratio() for _, other, _, _ in entries]
        nearest = CATALOGUE[likeness.index(max(likeness))].name
        raise InputError(
            f"The catalogue has no machine '{name}'. The nearest is '{nearest}'; 'tunewise machine --list' shows all."
        )
    wanted = form or ("sxm" if any(other_form == "sxm" for _, other_form in named) else None)
    fitting = [
        machine
        for machine, other_form in named
        if memory in (None, machine.memory_bytes // GIB) and wanted in (None, other_form)
    ]
    if len(fitting) == 1:
        return fitting[0]
    could_be = ", ".join(f"'{machine.name}'" for machine in fitting or [machine for machine, _ in named])
    raise InputError(f"'{name}' is no single machine of the catalogue. Say which one you mean: {could_be}.")


def _split(name: str) -> tuple[str, int | None, str | None]:
    """Split a name into its letters and digits, the memory in GiB and the form factor."""
    text = name.lower()
    form = _FORM.search(text)
    text = _FORM.sub(" ", text)
    memory = _MEMORY.search(text.replace("_", " "))
    text = _MEMORY.sub(" ", text.replace("_", " "))
    core = re.sub(r"[^a-z0-9]", "", _NOISE.sub("", text))
    return core, int(memory.group(1)) if memory else None, form.group(0).rstrip("23456") if form else None
