"""Peak rates of devices by their exact names."""

from __future__ import annotations

import pytest
import torch

from metareward.model.data_sheets import EXAMPLES, DataSheet, data_sheet, peak_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "teraflops", "gigabytes"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0, 2039.0),
        ("NVIDIA A100-SXM4-40GB", 312.0, 1555.0),
        ("NVIDIA A100-PCIE-40GB", 312.0, 1555.0),
        ("NVIDIA A100 80GB PCIe", 312.0, 1935.0),
        ("A100 80GB PCIe", 312.0, 1935.0),
        ("NVIDIA A800-SXM4-80GB", 312.0, 2039.0),
        ("NVIDIA H100 80GB HBM3", 989.5, 3350.0),
        ("NVIDIA H100 PCIe", 756.5, 2000.0),
        ("NVIDIA H100 NVL", 835.5, 3900.0),
        ("NVIDIA H200", 989.5, 4800.0),
        ("NVIDIA H200 NVL", 835.5, 4800.0),
        ("NVIDIA GH200 480GB", 989.5, 4000.0),
        ("NVIDIA B200", 2250.0, 8000.0),
        ("NVIDIA L4", 121.0, 300.0),
        ("NVIDIA L40S", 362.0, 864.0),
        ("NVIDIA A10", 125.0, 600.0),
    ],
)
def test_by_device_name(name: str, teraflops: float, gigabytes: float) -> None:
    found = data_sheet(name)
    assert found is not None
    assert (found.name, found.bfloat16, found.bandwidth) == (name, teraflops * 1e12, gigabytes * 1e9)


def test_float32_is_without_tensor_cores() -> None:
    assert data_sheet("NVIDIA L4") == DataSheet("NVIDIA L4", 121e12, 30.3e12, 300e9)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA L400",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA A1000 Laptop GPU",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA H20",
        "AMD Instinct MI300X",
        "AMD EPYC",
        "H100",
        "",
    ],
)
def test_a_device_that_is_not_known_has_none(name: str) -> None:
    assert data_sheet(name) is None


def test_every_example_is_known() -> None:
    for name in EXAMPLES.split(", "):
        assert data_sheet(name) is not None, name


def test_peak_needs_a_gpu_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), "bfloat16") == 989.5e12
    assert peak_flops(torch.device("cuda"), "float32") is None
    assert peak_flops(CPU, "bfloat16") is None
