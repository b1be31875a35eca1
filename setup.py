"""Installs `cobra` and `vision_scan`, and builds the kernels where that is possible; everything else is in
pyproject.toml.

The CPU kernels need torch, a C++ compiler and the headers of Python, those for GPUs nvcc too. Without one of
them, or if they do not compile, the install still works, on the reference; `cobra doctor` says so.

COBRA_CUDA = auto (the default: the CUDA kernels where a GPU is visible) | 0 | 1 (they must be built) |
             only (they alone) | emulate (they alone, as a C++ program for tests: csrc/cuda/emulate.h)
COBRA_CUDA_ARCHS = the GPUs to build for, for instance "8.0;9.0a"; the one at hand by default, else 9.0a
"""

import os
import platform
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import setup

CUDA = os.environ.get("COBRA_CUDA", "auto")
MUST_BUILD = CUDA in ("1", "only", "emulate")
COMPILER_FLAGS = [
    *os.environ.get("COBRA_KERNEL_FLAGS", "-O3").split(),
    "-g0",
    "-fopenmp",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-unknown-pragmas",  # "unroll", which is for nvcc
    "-Wno-maybe-uninitialized",
    "-Wno-unknown-warning-option",  # of Clang, which does not know all of GCC's
    "-Wno-for-loop-analysis",
]


def extension_arguments() -> dict:
    """What setup() needs to build the kernels; nothing where they cannot be built."""
    if CUDA not in ("auto", "0", "1", "only", "emulate"):
        sys.exit(f"error: COBRA_CUDA is {CUDA!r}: allowed are auto, 0, 1, only and emulate")
    find_toolkit()
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:  # an isolated build: torch is not there
        if MUST_BUILD:
            sys.exit(f"error: COBRA_CUDA={CUDA} needs torch to build: pip install --no-build-isolation -e .")
        return {}

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # the compiler's own message stands above it
                if MUST_BUILD:
                    raise
                warnings.warn(f"kernels were not built, the reference serves: {error}", stacklevel=1)
                self.extensions = []  # so that nothing is looked for afterwards

    if CUDA == "emulate":
        extensions = [emulated_kernels()]
    else:
        for_cpu = CUDA != "only" and platform.machine().lower() in ("x86_64", "amd64")
        extensions = [*cuda_kernels(), *([cpu_kernels()] if for_cpu else [])]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}} if extensions else {}


def find_toolkit() -> None:
    """Tells torch, which takes the folder above nvcc for the toolkit, where that is if nvcc is a link or a
    script that starts the real one: the first of the usual places that has the headers."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    for home in (Path(nvcc).parents[1], Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")):
        if (home / "include" / "cuda_runtime.h").exists():
            os.environ["CUDA_HOME"] = str(home)
            return


def cpu_kernels():
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "vision_scan._C",
        [f"csrc/cpu/{name}.cpp" for name in ("ops", "scan_ops", "decode_ops", "avx2", "avx512")],
        extra_compile_args=COMPILER_FLAGS,
        extra_link_args=["-fopenmp"],
    )


def cuda_sources(*kinds: str) -> list[str]:
    return sorted(str(path) for kind in kinds for path in Path("csrc/cuda").glob(kind))


def cuda_kernels() -> list:
    """The extension, or nothing where no GPU asks for it."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if CUDA == "0" or (CUDA == "auto" and not (torch.cuda.is_available() and CUDA_HOME)):
        return []
    if CUDA_HOME is None:
        sys.exit(f"error: COBRA_CUDA={CUDA} needs nvcc: install the CUDA toolkit or set CUDA_HOME to it")
    if archs := os.environ.get("COBRA_CUDA_ARCHS", "" if torch.cuda.is_available() else "9.0a"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    return [
        CUDAExtension(
            "vision_scan._cuda",
            cuda_sources("*.cu", "*_ops.cpp"),
            extra_compile_args={
                "cxx": COMPILER_FLAGS,
                "nvcc": ["-O3", "-std=c++20", "-Xptxas=-v", "--expt-relaxed-constexpr", "-lineinfo"],
            },
        )
    ]


def emulated_kernels():
    """The same kernels as C++. A compiler of that takes no .cu: each is included in a file of its own."""
    from torch.utils.cpp_extension import CppExtension

    folder = Path("build/emulated/sources")
    folder.mkdir(parents=True, exist_ok=True)
    for source in cuda_sources("*.cu"):
        wrapper = folder / f"{Path(source).stem}.cpp"
        text = f'#include "{Path(source).resolve()}"\n'
        if not wrapper.exists() or wrapper.read_text() != text:
            wrapper.write_text(text)
    return CppExtension(
        "vision_scan._cuda_emulated",
        [*sorted(map(str, folder.glob("*.cpp"))), "csrc/cuda/emulated.cpp", *cuda_sources("*_ops.cpp")],
        extra_compile_args=[
            "-O1",
            "-g0",
            "-DEMULATE_CUDA",
            "-Wno-unknown-pragmas",
            *os.environ.get("COBRA_KERNEL_FLAGS", "").split(),
        ],
    )


setup(**extension_arguments())
