"""Builds csrc/cuda into metareward_kernels/_CUDA.so with nvcc: for setup.py and for the test that compiles it.

PyTorch's own CUDAExtension refuses a PyTorch without CUDA; here nvcc sees no PyTorch header, so any PyTorch will do.
nvcc 12.0 or later: on the PATH, in CUDA_HOME, in /usr/local/cuda, or from pip (nvidia-cuda-nvcc 13). The CUDA runtime
is linked statically: the library needs nothing but the driver, whichever CUDA PyTorch was built for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / line for line in (ROOT / "csrc" / "sources_cuda.txt").read_text().split()]
ARCHITECTURES = "8.0+PTX 9.0a"  # A100 and H100; anything newer translates the PTX when it loads the library
OLDEST = (8, 0)  # bfloat16 conversions
MISSING = (
    "nvcc was not found on the PATH, in CUDA_HOME, in /usr/local/cuda or among the installed packages; "
    "install the CUDA toolkit, or nvidia-cuda-nvcc with pip"
)


def find_nvcc() -> Path | None:
    """CUDA_HOME's nvcc where that is set, else the first of the PATH, /usr/local/cuda and the installed packages."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    candidates = [Path(home) / "bin" / "nvcc" for home in homes]
    candidates += [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in sys.path:
        candidates += sorted(Path(folder or ".").glob("nvidia/cu*/bin/nvcc"), reverse=True)
    return next((nvcc for nvcc in candidates if nvcc.is_file()), None)


def architecture_flags(wanted: str) -> list[str]:
    """nvcc's -gencode options for a TORCH_CUDA_ARCH_LIST such as "8.0 9.0a+PTX"; those before 8.0 are left out."""
    flags = []
    for name in re.split(r"[\s;]+", wanted.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST={wanted!r}: {name!r} is not of the form 8.0, 9.0a or 8.0+PTX"
            )
        if (int(match[1]), int(match[2])) < OLDEST:
            continue
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST={wanted!r} names no architecture from 8.0 on, which the kernels need"
        )
    return flags


def runtime_folder(nvcc: Path) -> Path:
    """Where the toolkit of `nvcc` has libcudart_static.a."""
    # nvcc may be a wrapper script: it says itself where it lives.
    asked = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", asked, re.MULTILINE)
    home = Path(top[1]) if top else nvcc.resolve().parents[1]
    for folder in (home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))):
        if (folder / "libcudart_static.a").is_file():
            return folder
    raise FileNotFoundError(
        f"no libcudart_static.a beside {nvcc}; install the CUDA runtime of the same version"
    )


def run(command: list[str | Path]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def build(nvcc: Path, library: Path, objects: Path, architectures: str | None = None) -> str:
    """Compile to `library`, with object files in the folder `objects`; returns what nvcc and ptxas said.

    architectures: as TORCH_CUDA_ARCH_LIST, which is the default where it is set, else `ARCHITECTURES`.
    Raises ValueError for a bad list, FileNotFoundError without the CUDA runtime, RuntimeError when a compiler fails.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = os.environ.get("CXX", "c++").split()
    flags = architecture_flags(architectures or os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
    objects.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    made: list[str | Path] = []
    said = ""
    for source in SOURCES:
        made.append(objects / f"{source.name}.o")
        to = ["-c", source, "-o", made[-1]]
        if source.suffix == ".cu":
            host = ["-ccbin", compiler[0], "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
            said += run([nvcc, "-std=c++17", "-O3", "-lineinfo", "-Xptxas=-v", *flags, *host, *to])
        else:
            host = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall"]
            include = [f"-I{folder}" for folder in include_paths()]
            said += run([*compiler, *host, "-DTORCH_TARGET_VERSION=0x020b000000000000", *include, *to])
    folders = [*library_paths(), runtime_folder(nvcc)]
    # libtorch.so, which names no symbol, must stay: on a PyTorch with CUDA it brings libtorch_cuda.so.
    torch = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10"]
    said += run(
        [
            *compiler,
            "-shared",
            *made,
            *(f"-L{folder}" for folder in folders),
            *torch,
            "-lcudart_static",
            "-Wl,--exclude-libs,ALL",
            "-ldl",
            "-lrt",
            "-lpthread",
            "-o",
            library,
        ]
    )
    return said
