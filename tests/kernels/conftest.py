"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest
from metareward_kernels import implementation

from tests.cuda_on_cpu import compiled


@pytest.fixture(params=["cpp", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The head's ops on a CPU in each implementation."""
    monkeypatch.delenv("METAREWARD_KERNELS", raising=False)
    if request.param == "cpp" and implementation("head_rows") != "cpp":
        pytest.skip("the compiled library is not built")
    if request.param == "torch":
        monkeypatch.setenv("METAREWARD_KERNELS", "torch")
    return request.param


@pytest.fixture(scope="module")
def cuda_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> compiled.CudaOnCpu:
    if compiled.missing is not None:
        pytest.skip(compiled.missing)
    return compiled.CudaOnCpu(tmp_path_factory.mktemp("cuda-on-cpu"))
