"""csrc/cuda compiled for A100 (sm_80) and H100 (sm_90a) without a GPU: no spill, registers within bounds, 16-byte loads
and stores, no atomics, and a library that PyTorch loads and knows the ops of. Nothing here runs a kernel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from metareward_kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
# Kernels, and their instances for an architecture. 64 registers: 1,024 threads are on a multiprocessor, as blocks of 512,
# 1,024 and 256.
KERNELS = {"logprob_rows_kernel": 6, "softmax_residual_rows_kernel": 14, "logit_gradient_rows_kernel": 10}
REGISTERS = 64


def load_builder() -> ModuleType:
    specification = importlib.util.spec_from_file_location("build_cuda", ROOT / "csrc/cuda/build_cuda.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


builder = load_builder()


class Built(NamedTuple):
    library: Path
    said: str  # by nvcc and ptxas


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    nvcc = builder.find_nvcc()
    if nvcc is None:
        pytest.skip(builder.MISSING)
    folder = tmp_path_factory.mktemp("cuda")
    library = folder / "_CUDA.so"
    return Built(library, builder.build(nvcc, library, folder / "objects", "8.0 9.0a"))


def kernel_of(symbol: str) -> str:
    return next(name for name in KERNELS if name in symbol)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_no_spill_and_registers_within_bounds(built: Built, architecture: str) -> None:
    assert "warning" not in built.said
    found = re.findall(
        rf"Compiling entry function '(\S+)' for '{architecture}'\n.*\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        built.said,
    )
    instances = [kernel_of(symbol) for symbol, *_ in found]
    assert {name: instances.count(name) for name in KERNELS} == KERNELS
    for symbol, stack, stores, loads, registers, shared in found:
        assert (stack, stores, loads) == ("0", "0", "0"), symbol
        assert int(registers) <= REGISTERS, symbol
        assert int(shared or 0) <= 1024, symbol


def disassembled(built: Built, tmp_path: Path) -> dict[str, str]:
    """SASS of every kernel of both architectures, by architecture and symbol."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("triton, whose wheel carries cuobjdump, is not installed")
    cuobjdump = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.is_file():
        pytest.skip(f"{cuobjdump} is missing")
    listing = subprocess.run(
        [cuobjdump, "-sass", built.library], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    kernels = {}
    for part in re.split(r"^\s*code for ", listing, flags=re.MULTILINE)[1:]:
        architecture = part.split(maxsplit=1)[0]
        for function in re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]:
            symbol, _, text = function.partition("\n")
            kernels[f"{architecture} {symbol}"] = text
    return kernels


def test_wide_accesses_fast_exponentials_and_no_atomics(built: Built, tmp_path: Path) -> None:
    kernels = disassembled(built, tmp_path)
    assert len(kernels) == 2 * sum(KERNELS.values())
    for name, text in kernels.items():
        assert re.search(r"\bMUFU\.EX2\b", text), name
        assert not re.search(r"\b(ATOM|ATOMG|RED|REDG|LDL|STL)\b", text), name
        one_column = "kernelILi1E" in name  # rows of the two tensors are aligned differently
        reads_wide = re.search(r"\bLDG\.E(\.CONSTANT)?\.128\b", text) is not None
        writes_wide = re.search(r"\bSTG\.E\.128\b", text) is not None
        assert reads_wide == (not one_column or kernel_of(name) != "logit_gradient_rows_kernel"), name
        assert writes_wide == (not one_column and kernel_of(name) != "logprob_rows_kernel"), name


LOAD = """
import sys, torch
from metareward_kernels import cuda_head_rows
from pathlib import Path
cuda_head_rows.__file__ = sys.argv[1]  # the library is looked for beside it
assert cuda_head_rows.load_library() is None, cuda_head_rows.load_library()
ops = torch.ops.metareward
for name in ("logprob_rows_cuda", "softmax_residual_rows_cuda_", "logit_gradient_rows_cuda_"):
    print(getattr(ops, name).default._schema)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"metareward::{name}", "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"metareward::{name}", "CPU")
try:
    ops.logprob_rows_cuda(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 1.0, False)
except NotImplementedError as error:
    print("RAISED", str(error).splitlines()[0])
import os
os.environ["METAREWARD_KERNELS"] = "cuda"
from torch._subclasses import FakeTensorMode
from metareward_kernels import dispatch, head_rows
assert dispatch.implementation("head_rows", "cuda") == "cuda"
with FakeTensorMode():
    logits = torch.empty(4, 9, device="cuda", dtype=torch.bfloat16)
    targets = torch.empty(4, device="cuda", dtype=torch.int64)
    for entropy in (False, True):
        found = head_rows.logprob_rows(logits, targets, 1.0, entropy)
        assert found.lse.device.type == "cuda" and found.lse.shape == (4,) and found.lse.dtype == torch.float32
        assert (found.entropy is not None) == entropy
    assert head_rows.logit_gradient_rows_(logits, targets, found.lse, found.lse) is logits
    assert cuda_head_rows.softmax_residual_rows_(logits, targets, 1.0, True, None)[2].shape == (4,)
"""


def test_pytorch_loads_it_and_knows_the_ops(built: Built) -> None:
    """With any PyTorch, without CUDA too: then a call is refused by the dispatcher."""
    command = [sys.executable, "-c", LOAD, str(built.library)]
    environment = os.environ | {"PYTHONPATH": str(Path(dispatch.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "logprob_rows_cuda(Tensor logits, Tensor targets, float temperature, bool entropy)" in done.stdout
    assert "logit_gradient_rows_cuda_(Tensor(a!) logits" in done.stdout
    assert "RAISED Could not run 'metareward::logprob_rows_cuda' with arguments from the 'CPU'" in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
def test_the_libraries_need_no_cuda_library(built: Built) -> None:
    """_CUDA.so links the runtime statically and finds libtorch_cuda through libtorch; _C.so needs neither."""
    assert "libtorch.so" in needed(built.library)
    own = sorted(Path(dispatch.__file__).parent.glob("_C.*"))
    for library in [built.library, *own]:
        assert not [name for name in needed(library) if "cuda" in name], library


def needed(library: Path) -> list[str]:
    listing = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", listing)


def test_architectures() -> None:
    assert builder.architecture_flags("7.5 8.0;9.0a+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    with pytest.raises(ValueError, match="'Hopper' is not of the form"):
        builder.architecture_flags("8.0 Hopper")
    with pytest.raises(ValueError, match=r"no architecture from 8\.0 on"):
        builder.architecture_flags("7.0 7.5+PTX")


def run_setup(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py as far as it decides what to build, where no nvcc can be found."""
    hidden = "import pathlib; real = pathlib.Path.is_file; "
    hidden += "pathlib.Path.is_file = lambda path: path.name != 'nvcc' and real(path); "
    run = (
        f"import runpy, sys; sys.argv = ['setup.py', '--version']; runpy.run_path({str(ROOT / 'setup.py')!r})"
    )
    return subprocess.run(
        [sys.executable, "-c", hidden + run],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PATH": "/usr/bin:/bin", "METAREWARD_BUILD": "auto"} | environment,
    )


def test_setup_says_what_is_missing(tmp_path: Path) -> None:
    done = run_setup(tmp_path, METAREWARD_CUDA="on")
    assert done.returncode != 0
    assert "METAREWARD_CUDA=on, but the CUDA kernels cannot be compiled: nvcc was not found" in done.stderr
    done = run_setup(tmp_path, METAREWARD_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert "installing without the CUDA kernels: nvcc was not found" in done.stderr
    done = run_setup(tmp_path, METAREWARD_CUDA="yes")
    assert "METAREWARD_CUDA='yes' is not one of auto, on, off" in done.stderr
    done = run_setup(tmp_path, METAREWARD_CUDA="on", METAREWARD_BUILD="off")
    assert "METAREWARD_CUDA=on, but the kernels cannot be compiled: METAREWARD_BUILD=off" in done.stderr


def test_cuda_is_asked_for_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", "cuda")
    with pytest.raises(
        RuntimeError, match="head_rows cannot run so: the CUDA kernels run on CUDA, not on cpu"
    ):
        dispatch.implementation("head_rows")
    if not sorted(Path(dispatch.__file__).parent.glob("_CUDA.*")):
        with pytest.raises(RuntimeError, match="no CUDA library in"):
            dispatch.implementation("head_rows", "cuda")
    assert dispatch.implementation("silu_mul") in ("cpp", "torch")  # no CUDA kernel: chosen freely
    assert dispatch.unsupported_dtype("cuda", torch.float16) is None
    assert dispatch.unsupported_dtype("cuda", torch.float64) == (
        "the CUDA kernel takes float32, float16 and bfloat16, not torch.float64"
    )
