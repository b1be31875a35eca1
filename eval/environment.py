"""What a measurement was made on: hardware, versions, threads, commit, and which ops are
compiled."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import vision_scan

PACKAGES = (
    "torch",
    "transformers",
    "llama-cpp-python",
    "gguf",
    "deepspeed",
    "timm",
    "numpy",
    "scikit-learn",
    "scikit-image",
)


def describe_environment(device: str = "cpu") -> dict:
    """Everything that a reader needs to judge a speed or to repeat a run, JSON-able.

    Returns:
        device, cpu, cores, threads, memory_bytes, gpu (name or None), system, python, versions
        (package -> version, those that are installed), commit (of this checkout, "+changes" if it
        is not clean, None outside git), backend (per op: compiled or reference, see
        `vision_scan.backend_report`).
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device,
        "cpu": _cpu_name(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "backend": vision_scan.backend_report(),
    }


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """Of this checkout, "+changes" behind it if it is not clean; None outside git."""
    def git(*arguments: str) -> str:
        root = Path(__file__).parents[1]
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
