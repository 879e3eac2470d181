"""Peak bf16 rate of a CUDA device, for the model-FLOPs utilisation (MFU) of a run.

Dense tensor-core rates in TFLOP/s, as published by the vendor. Where a data sheet gives only the
rate with structured sparsity, we halve it:

    A100, A800          312     NVIDIA A100 data sheet
    A30                 165     NVIDIA A30 data sheet
    A10                 125     NVIDIA A10 data sheet
    A40                 149.7   NVIDIA A40 data sheet
    L4, L40, L40S       121, 181.05, 362.05     their data sheets
    H100, H800          989.4 SXM, 756.5 PCIe, 835.5 NVL (H100 data sheet)
    H200                989.4 SXM, 835.5 NVL (H200 data sheet)
    H20                 148     NVIDIA H20 data sheet
    GH200               989.4   GH200 data sheet
    B200, B300          2250    DGX B200 data sheet (eight devices: 36 PFLOP/s sparse), HGX B300
    GB200, GB300        2500    GB200 NVL72 (72 devices: 360 PFLOP/s sparse)

fp32 is not covered, because its peak depends on whether TF32 is allowed. In fp32, or on a device
that is not in the table, a run reports TFLOP/s without MFU.
"""

import re

import torch

BF16_TFLOPS: dict[frozenset[str], float] = {
    frozenset(words.split()): tflops
    for words, tflops in {
        "A100": 312.0,
        "A800": 312.0,
        "A30": 165.0,
        "A10": 125.0,
        "A40": 149.7,
        "L4": 121.0,
        "L40": 181.05,
        "L40S": 362.05,
        "H100": 989.4,
        "H100 PCIe": 756.5,
        "H100 NVL": 835.5,
        "H800": 989.4,
        "H800 PCIe": 756.5,
        "H200": 989.4,
        "H200 NVL": 835.5,
        "H20": 148.0,
        "GH200": 989.4,
        "B200": 2250.0,
        "B300": 2250.0,
        "GB200": 2500.0,
        "GB300": 2500.0,
    }.items()
}
"""Peak bf16 TFLOP/s, by words that the name of a device contains."""


def peak_tflops(*, bf16: bool) -> float | None:
    """Peak of the current device in TFLOP/s; None if it is unknown.

    Args:
        bf16: whether the run computes in bf16.
    """
    if not bf16 or not torch.cuda.is_available():
        return None
    return bf16_tflops(torch.cuda.get_device_name())


def bf16_tflops(device_name: str) -> float | None:
    """Dense peak of a device in TFLOP/s; None if it is unknown.

    Args:
        device_name: as CUDA reports it, e.g. "NVIDIA H100 80GB HBM3". The peak of a slice of a
            device (MIG) is unknown, because the name does not contain its share.
    """
    words = set(re.split(r"[ -]", device_name))
    known = [key for key in BF16_TFLOPS if key <= words]
    if not known or "MIG" in words:
        return None
    return BF16_TFLOPS[max(known, key=len)]
