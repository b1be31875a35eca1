"""What devices can do."""

import pytest
import torch

from train.hardware import named_peak, peak_flops, peak_memory


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A10G", 70),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, tflops: float | None) -> None:
    assert named_peak(name) == (None if tflops is None else 1e12 * tflops)


def test_what_is_given_goes_before_what_is_known() -> None:
    assert peak_flops(torch.device("cpu")) is None
    assert peak_flops(torch.device("cpu"), 0.5) == 5e11


def test_memory_of_a_process_holds_what_it_took() -> None:
    before = peak_memory(torch.device("cpu"))
    taken = torch.ones(30_000_000)
    after = peak_memory(torch.device("cpu"))
    assert before is not None and after is not None
    assert after >= taken.nbytes and after >= before
