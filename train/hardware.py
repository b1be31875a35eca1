"""What a run's device can do, and how much memory it takes."""

import re
import sys
from pathlib import Path

import torch

# Dense bfloat16 products with float32 accumulation, in 10^12 operations a second, as the vendors' data sheets have
# them for the boost clock: without the factor of two that they claim for sparse matrices. The first entry all of whose
# words are in the device's name counts, so a variant stands before its family.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.5),
    ("H100 NVL", 835.5),
    ("H100", 989.4),  # SXM: "NVIDIA H100 80GB HBM3"
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.4),
    ("MI325X", 1307.4),
    ("MI250X", 383.0),
)
PARTIAL = {"mig", "laptop", "d"}  # words of devices that have less than their namesake


def peak_flops(device: torch.device, given: float | None = None) -> float | None:
    """The operations a second that a device could do at most, None if nobody knows.

    Args:
        device: of this process.
        given: `log.peak_tflops`, which goes before the table.
    """
    if given is not None:
        return 1e12 * given
    if device.type != "cuda":
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """The entry of `PEAK_TFLOPS` for a device's name, in operations a second."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if words & PARTIAL:
        return None
    return next((1e12 * peak for entry, peak in PEAK_TFLOPS if words.issuperset(entry.lower().split())), None)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that tensors of this process have taken on a GPU so far; on a CPU the most that the process has
    had in memory; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage would count a larger parent, too
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found is not None:
        return 1024 * int(found[1])
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
