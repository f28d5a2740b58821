"""Peak rates of GPUs by NVIDIA's data sheets, in one table: what MFU and bandwidth use are shares of.

A device is found by its exact name, as CUDA gives it. One that is not in the table has no peak, and whoever asks says so: the
variants of an "H100" differ by a third, those of an "A100" in bandwidth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DataSheet:
    """Dense bf16 FLOP/s, float32 FLOP/s without tensor cores, and memory bandwidth in bytes/s of one device."""

    name: str
    bfloat16: float
    float32: float
    bandwidth: float


# Device names of CUDA as regular expressions: dense bf16 TFLOP/s, float32 TFLOP/s without tensor cores, GB/s. The first that is
# found counts.
TABLE = (
    (r"B200", 2250.0, 75.0, 8000.0),
    (r"H200 NVL", 835.5, 60.0, 4800.0),
    (r"GH200 480GB", 989.5, 67.0, 4000.0),
    (r"GH200 144G HBM3e", 989.5, 67.0, 4900.0),
    (r"H200", 989.5, 67.0, 4800.0),
    (r"H[18]00 PCIe", 756.5, 51.0, 2000.0),
    (r"H100 NVL", 835.5, 60.0, 3900.0),
    (r"H100 80GB HBM3", 989.5, 67.0, 3350.0),
    (r"A[18]00-SXM4-80GB", 312.0, 19.5, 2039.0),
    (r"A[18]00 80GB PCIe", 312.0, 19.5, 1935.0),
    (r"A100-SXM4-40GB|A100-PCI[Ee]-40GB|A800 40GB Active", 312.0, 19.5, 1555.0),
    (r"L40S", 362.0, 91.6, 864.0),
    (r"A30", 165.0, 10.3, 933.0),
    (r"A10", 125.0, 31.2, 600.0),
    (r"L4", 121.0, 30.3, 300.0),
)
EXAMPLES = "H100 80GB HBM3, H100 PCIe, H200, B200, A100-SXM4-80GB, A100 80GB PCIe, L40S"
"""Names that the table knows, for messages."""


def data_sheet(name: str) -> DataSheet | None:
    """The data sheet of a CUDA device by its name, with "NVIDIA" before it or without; None for one that is not in the table.

    A MIG slice bears its whole device's name and is a part of it: unknown.
    """
    exact = name.removeprefix("NVIDIA ")
    for pattern, tensor, plain, bandwidth in TABLE:
        if re.fullmatch(pattern, exact):
            return DataSheet(name, tensor * 1e12, plain * 1e12, bandwidth * 1e9)
    return None


def peak_flops(device: torch.device, compute_dtype: str) -> float | None:
    """FLOP/s that MFU is a share of. None where it is not known: CPUs, devices that are not in the table, and float32, whose
    rate depends on PyTorch's TF32 setting.
    """
    if device.type != "cuda" or compute_dtype != "bfloat16":
        return None
    found = data_sheet(torch.cuda.get_device_name(device))
    return None if found is None else found.bfloat16


def no_mfu(device: torch.device, compute_dtype: str) -> str:
    """Why a step has no MFU, as a sentence for the log."""
    if device.type != "cuda":
        return "no MFU: the peak rate of a CPU is in no table"
    if compute_dtype != "bfloat16":
        return f"no MFU: the table of peak rates is for bfloat16, not {compute_dtype}"
    name = torch.cuda.get_device_name(device)
    return f"no MFU: the peak rate of {name} is not known; add it to metareward/model/data_sheets.py"
