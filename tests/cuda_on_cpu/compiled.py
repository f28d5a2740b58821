"""The CUDA row kernels compiled as C++ and run on the CPU: what they compute, without a GPU. See cuda_runtime.h here."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch
from metareward_kernels.head_rows import RowLogprobs
from torch import Tensor

HERE = Path(__file__).resolve().parent
CUDA_SOURCES = HERE.parents[1] / "csrc" / "cuda"
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Element in launch.h
COMPILER = os.environ.get("CXX", "c++").split()[0]
missing = None if shutil.which(COMPILER) else f"no C++ compiler ({COMPILER})"


class CudaOnCpu:
    """`head_rows` by the CUDA kernels. Tensors are contiguous, on the CPU; `first_block` leaves out those before it."""

    def __init__(self, folder: Path, replace: tuple[str, str] | None = None) -> None:
        """Compile in `folder`; replace: (text, other text) in the sources, for tests of the tests."""
        sources = folder / "sources"
        shutil.copytree(CUDA_SOURCES, sources)
        if replace is not None:
            texts = {path: path.read_text() for path in sources.iterdir() if path.suffix in (".cu", ".h")}
            assert sum(text.count(replace[0]) for text in texts.values()) == 1, (
                f"{replace[0]!r} is not unique"
            )
            for path, text in texts.items():
                path.write_text(text.replace(*replace))
        objects = []
        for source in (HERE / "machine.cpp", *sorted(sources.glob("*.cu"))):
            objects.append(folder / f"{source.stem}.o")
            flags = [
                "-std=c++17",
                "-O1",
                "-fPIC",
                "-Wall",
                "-Wno-unknown-pragmas",
                f"-I{HERE}",
                f"-I{sources}",
            ]
            subprocess.run([COMPILER, "-x", "c++", *flags, "-c", source, "-o", objects[-1]], check=True)
        subprocess.run([COMPILER, "-shared", *objects, "-o", folder / "cuda_on_cpu.so"], check=True)
        self.library = ctypes.CDLL(str(folder / "cuda_on_cpu.so"))
        for name in ("logprob_rows", "softmax_residual_rows", "logit_gradient_rows"):
            function = getattr(self.library, name)
            function.restype = ctypes.c_char_p

    def start_at(self, first_block: int) -> None:
        self.library.set_first_block(ctypes.c_uint(first_block))

    def logprob_rows(
        self, logits: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> RowLogprobs:
        rows = [torch.full(targets.shape, 12345.0) for _ in range(3 if entropy else 2)]
        failed = self.library.logprob_rows(
            pointer(logits),
            ELEMENTS[logits.dtype],
            pointer(targets),
            *(ctypes.c_int64(size) for size in logits.shape),
            ctypes.c_double(temperature),
            *(pointer(row) for row in rows),
            *([] if entropy else [None]),
        )
        assert failed is None, failed
        return RowLogprobs(rows[0], rows[1], rows[2] if entropy else None)

    def softmax_residual_rows_(
        self,
        logits: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        out: Tensor | None = None,
        scale: float = 1.0,
    ) -> RowLogprobs:
        rows = [torch.full(targets.shape, 12345.0) for _ in range(3 if entropy else 2)]
        to = logits if out is None else out
        failed = self.library.softmax_residual_rows(
            pointer(logits),
            ELEMENTS[logits.dtype],
            pointer(targets),
            *(ctypes.c_int64(size) for size in logits.shape),
            ctypes.c_double(temperature),
            ctypes.c_double(scale),
            *(pointer(row) for row in rows),
            *([] if entropy else [None]),
            pointer(to),
            ELEMENTS[to.dtype],
        )
        assert failed is None, failed
        return RowLogprobs(rows[0], rows[1], rows[2] if entropy else None)

    def logit_gradient_rows_(
        self,
        logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        coefficient: Tensor,
        temperature: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        to = logits if out is None else out
        failed = self.library.logit_gradient_rows(
            pointer(logits),
            ELEMENTS[logits.dtype],
            pointer(targets),
            pointer(lse),
            pointer(coefficient),
            *(ctypes.c_int64(size) for size in logits.shape),
            ctypes.c_double(temperature),
            pointer(to),
            ELEMENTS[to.dtype],
        )
        assert failed is None, failed
        return to


def pointer(x: Tensor) -> ctypes.c_void_p:
    assert x.is_contiguous()
    return ctypes.c_void_p(x.data_ptr())
