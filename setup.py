"""Installs `cobra` and `vision_scan`, and builds the CPU kernels where that is possible; everything else is
in pyproject.toml.

The kernels need torch, a C++ compiler and the headers of Python. Without one of them, or if they do not
compile, the install still works, on the reference; `cobra doctor` says so.
"""

import os
import platform
import warnings

from setuptools import setup


def extension_arguments() -> dict:
    """What setup() needs to build `vision_scan._C`; nothing where it cannot be built."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:  # an isolated build: torch is not there
        return {}

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # the compiler's own message stands above it
                warnings.warn(f"the CPU kernels were not built, the reference serves: {error}", stacklevel=1)
                self.extensions = []  # so that nothing is looked for afterwards

    kernels = CppExtension(
        "vision_scan._C",
        [f"csrc/cpu/{name}.cpp" for name in ("ops", "scan_ops", "decode_ops", "avx2", "avx512")],
        extra_compile_args=[
            *os.environ.get("COBRA_KERNEL_FLAGS", "-O3").split(),
            "-g0",
            "-fopenmp",
            "-Wno-psabi",
            "-Wno-ignored-attributes",
            "-Wno-maybe-uninitialized",
            "-Wno-unknown-warning-option",  # of Clang, which does not know all of GCC's
            "-Wno-for-loop-analysis",
        ],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [kernels], "cmdclass": {"build_ext": Build}}


setup(**extension_arguments())
