"""Builds the compiled kernels (csrc/) into metareward_kernels/_C.so and, with nvcc, _CUDA.so; the rest is in pyproject.toml.

The library is optional: without PyTorch or a C++ compiler at build time the package installs with its PyTorch
kernels. METAREWARD_BUILD=on makes that a failure, METAREWARD_BUILD=off builds nothing. It is built against
libtorch's stable ABI (2.11 and later) and asks the machine for AVX2 or AVX-512 when it runs, so a wheel built here
is fast elsewhere. PyTorch must be visible to the build: pip install --no-build-isolation.

_CUDA.so has kernels that METAREWARD_KERNELS=cuda selects. METAREWARD_CUDA=auto, the default, builds it where nvcc is
found and PyTorch has CUDA or TORCH_CUDA_ARCH_LIST is set, and goes on without it when that fails; `on` builds it with
any PyTorch or fails, `off` leaves it out. No GPU is asked for. See csrc/cuda/build_cuda.py.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

CSRC = Path(__file__).parent / "csrc"
SOURCE_LIST = CSRC / "sources.txt"
sys.path.insert(0, str(CSRC / "cuda"))
import build_cuda  # noqa: E402

COMPILE_ARGUMENTS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # GCC 12 on its own AVX-512 header
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the oldest supported torch: 2.11
]


def missing_for_build() -> str | None:
    """What keeps the library from being built here, or None."""
    if sys.platform not in ("linux", "darwin"):
        return f"the compiled kernels are not supported on {sys.platform}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler!r} is not on the PATH; install one or set CXX)"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"PyTorch is not importable during the build ({error}); use pip install --no-build-isolation"
    return None


def missing_for_cuda(wanted: str) -> str | None:
    """What keeps the CUDA library from being built here, or None. Asks for a compiler, never for a GPU."""
    if wanted == "off":
        return "METAREWARD_CUDA=off"
    if build_cuda.find_nvcc() is None:
        return build_cuda.MISSING
    import torch

    if wanted == "auto" and torch.version.cuda is None and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return "this PyTorch has no CUDA (METAREWARD_CUDA=on builds them all the same)"
    return None


def choice(variable: str) -> str:
    wanted = os.environ.get(variable, "auto")
    if wanted not in ("auto", "on", "off"):
        raise SystemExit(f"{variable}={wanted!r} is not one of auto, on, off")
    return wanted


def extension_arguments() -> dict[str, Any]:
    """Arguments for setup() that build the libraries, or none when nothing is to be built."""
    wanted, cuda_wanted = choice("METAREWARD_BUILD"), choice("METAREWARD_CUDA")
    reason = "METAREWARD_BUILD=off" if wanted == "off" else missing_for_build()
    if reason is not None:
        if wanted == "on":
            raise SystemExit(f"METAREWARD_BUILD=on, but the kernels cannot be compiled: {reason}")
        if cuda_wanted == "on":
            raise SystemExit(f"METAREWARD_CUDA=on, but the kernels cannot be compiled: {reason}")
        print(f"metareward: installing without the compiled kernels: {reason}", file=sys.stderr)
        return {}

    from setuptools import Extension
    from setuptools.errors import CompileError
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildKernels(BuildExtension):
        """PyTorch's build of _C.so, and our own of _CUDA.so."""

        def build_extension(self, ext: Extension) -> None:
            nvcc = build_cuda.find_nvcc()
            if ext.name != "metareward_kernels._CUDA" or nvcc is None:
                return super().build_extension(ext)
            library = Path(self.get_ext_fullpath(ext.name))
            try:
                build_cuda.build(nvcc, library, Path(self.build_temp) / "cuda")
            except (ValueError, OSError, RuntimeError) as error:  # setuptools warns where ext is optional
                raise CompileError(f"the CUDA kernels were not built: {error}") from error

    extensions = [
        CppExtension(
            "metareward_kernels._C",
            SOURCE_LIST.read_text().split(),
            extra_compile_args=COMPILE_ARGUMENTS,
            depends=[str(header) for header in CSRC.rglob("*.h")],
            py_limited_api=True,  # the library does not touch Python: no libtorch_python, any CPython
        )
    ]
    without_cuda = missing_for_cuda(cuda_wanted)
    if without_cuda is None:
        extensions.append(
            Extension("metareward_kernels._CUDA", ["csrc/cuda/ops.cpp"], optional=cuda_wanted == "auto")
        )
    elif cuda_wanted == "on":
        raise SystemExit(f"METAREWARD_CUDA=on, but the CUDA kernels cannot be compiled: {without_cuda}")
    else:
        print(f"metareward: installing without the CUDA kernels: {without_cuda}", file=sys.stderr)
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildKernels.with_options(no_python_abi_suffix=True)},
    }


setup(**extension_arguments())
