"""Builds the compiled kernels (csrc/) into metareward_kernels/_C.so; everything else is in pyproject.toml.

The library is optional: without PyTorch or a C++ compiler at build time the package installs with its PyTorch
kernels. METAREWARD_BUILD=on makes that a failure, METAREWARD_BUILD=off builds nothing. It is built against
libtorch's stable ABI (2.11 and later) and asks the machine for AVX2 or AVX-512 when it runs, so a wheel built here
is fast elsewhere. PyTorch must be visible to the build: pip install --no-build-isolation.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

SOURCE_LIST = Path(__file__).parent / "csrc" / "sources.txt"
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


def extension_arguments() -> dict[str, Any]:
    """Arguments for setup() that build the library, or none when it is not to be built."""
    wanted = os.environ.get("METAREWARD_BUILD", "auto")
    if wanted not in ("auto", "on", "off"):
        raise SystemExit(f"METAREWARD_BUILD={wanted!r} is not one of on, off")
    reason = "METAREWARD_BUILD=off" if wanted == "off" else missing_for_build()
    if reason is not None:
        if wanted == "on":
            raise SystemExit(f"METAREWARD_BUILD=on, but the kernels cannot be compiled: {reason}")
        print(f"metareward: installing without the compiled kernels: {reason}", file=sys.stderr)
        return {}

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(
        "metareward_kernels._C",
        SOURCE_LIST.read_text().split(),
        extra_compile_args=COMPILE_ARGUMENTS,
        depends=[str(header) for header in SOURCE_LIST.parent.rglob("*.h")],
        py_limited_api=True,  # the library does not touch Python: no libtorch_python, any CPython
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    }


setup(**extension_arguments())
