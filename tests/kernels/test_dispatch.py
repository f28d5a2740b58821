"""Which implementation runs, how it is forced, and what a missing library does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from metareward_kernels import (
    Segments,
    dispatch,
    implementation,
    linear_fp32,
    linear_logprob,
    paged_attention,
    report,
)

COMPILED = implementation("sample_tokens") == "cpp"
needs_library = pytest.mark.skipif(not COMPILED, reason="the compiled library is not built")


def one_token() -> Segments:
    zero, one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    return Segments(zero, zero, one, zero, torch.cat([zero, one]), one)


def test_report_names_every_op() -> None:
    assert set(report()) == set(dispatch.OPS)
    assert set(report().values()) <= {"cpp", "torch"}
    on_cuda = {"triton", "torch"} if importlib.util.find_spec("triton") else {"torch"}
    assert set(report("cuda").values()) <= on_cuda
    assert {op for op, chosen in report("cuda").items() if chosen == "triton"} <= dispatch.TRITON_OPS


def test_unknown_names_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown op 'softmax'"):
        implementation("softmax")
    monkeypatch.setenv("METAREWARD_KERNELS", "fast")
    with pytest.raises(ValueError, match="METAREWARD_KERNELS='fast'"):
        implementation("sample_tokens")


def test_torch_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", "torch")
    assert set(report().values()) == {"torch"}


@needs_library
def test_cpp_forced_where_it_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    every_op_runs = torch.ops.metareward.bf16_linear_supported()
    monkeypatch.setenv("METAREWARD_KERNELS", "cpp")
    if every_op_runs:
        assert {op for op, chosen in report().items() if chosen != "cpp"} == dispatch.PYTORCH_ON_CPU
    with pytest.raises(RuntimeError, match="not on cuda"):
        implementation("sample_tokens", "cuda")
    with pytest.raises(RuntimeError, match="float64"):
        linear_logprob(torch.zeros(1, 2).double(), torch.zeros(3, 2).double(), torch.tensor([0]))
    pages = torch.zeros(1, 4, 1, 8, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="float16"):
        paged_attention(pages[0, :1], pages, pages, one_token(), 1.0)


def test_triton_forced_where_it_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("METAREWARD_KERNELS", "triton")
    assert implementation("sample_tokens", "cuda") == "triton"
    with pytest.raises(
        RuntimeError, match=r"METAREWARD_KERNELS=triton, but sample_tokens cannot run so: .* not on cpu"
    ):
        implementation("sample_tokens")
    with pytest.raises(RuntimeError, match="linear_fp32 has no Triton kernel"):
        implementation("linear_fp32", "cuda")
    with pytest.raises(RuntimeError, match="takes no complex numbers"):
        implementation("sample_tokens", "cuda", unsupported="it takes no complex numbers")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert implementation("sample_tokens") == "triton"


def test_triton_is_not_imported_on_a_cpu() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import metareward_kernels as kernels; "
        "kernels.report(); sys.exit(('triton' in sys.modules) != before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_library
def test_an_op_that_the_cpu_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METAREWARD_KERNELS", raising=False)
    monkeypatch.setattr(
        dispatch, "_missing_instructions", lambda op: "no such unit" if op == "linear_fp32" else None
    )
    assert report()["linear_fp32"] == "torch"
    assert report()["sample_tokens"] == "cpp"
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    torch.testing.assert_close(linear_fp32(x, weight), x.float() @ weight.float().T)
    monkeypatch.setenv("METAREWARD_KERNELS", "cpp")
    with pytest.raises(RuntimeError, match="linear_fp32 cannot run so: no such unit"):
        linear_fp32(x, weight)


MISSING = """
import logging, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
import torch, metareward_kernels as kernels
assert Path(kernels.__file__).is_relative_to(sys.argv[1])
assert set(kernels.report().values()) == {"torch"}
kernels.keyed_uniforms(torch.arange(3), torch.arange(3))
kernels.linear_fp32(torch.zeros(2, 4).bfloat16(), torch.zeros(8, 4).bfloat16())
logprobs = kernels.linear_logprob(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([0, 1]))
uniforms = torch.full((1,), 0.5, dtype=torch.float64)
kernels.sample_tokens(torch.zeros(1, 8), uniforms, temperature=1.0, top_k=0, top_p=1.0)
pages = torch.zeros(1, 4, 1, 8)
zero, one = torch.zeros(1).int(), torch.ones(1).int()
segments = kernels.Segments(zero, zero, one, zero, torch.cat([zero, one]), one)
kernels.paged_attention(pages[0, :1], pages, pages, segments, 1.0)
import os
os.environ["METAREWARD_KERNELS"] = "cpp"
try:
    kernels.report()
except RuntimeError as error:
    print("RAISED", error)
"""


LOADED = """
from pathlib import Path
import torch
from metareward_kernels import report
torch.zeros(1 << 20).add_(1).sum()
report()
print(*(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line), sep="\\n")
"""


def run_without_library(tmp_path: Path, broken: bytes | None) -> str:
    package = tmp_path / "metareward_kernels"
    package.mkdir()
    for source in Path(dispatch.__file__).parent.glob("*.py"):
        (package / source.name).write_bytes(source.read_bytes())
    if broken is not None:
        (package / "_C.so").write_bytes(broken)
    command = [sys.executable, "-c", MISSING, str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout


@pytest.mark.parametrize("broken", [None, b"\x7fELF cut short"])
def test_a_missing_library_warns_once_and_everything_works(tmp_path: Path, broken: bytes | None) -> None:
    printed = run_without_library(tmp_path, broken)
    assert printed.count("WARNING metareward_kernels") == 1
    assert "using the slower PyTorch path; build with" in printed
    assert printed.count("RAISED METAREWARD_KERNELS=cpp") == 1


@needs_library
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_in_the_process() -> None:
    """Ours is PyTorch's own; in a process of its own, because other packages may bring another."""
    printed = subprocess.run(
        [sys.executable, "-c", LOADED],
        env={**os.environ, "PYTHONPATH": str(Path(dispatch.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = set(printed.splitlines())
    assert any("metareward_kernels/_C" in path for path in paths)
    assert len([path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))]) == 1
