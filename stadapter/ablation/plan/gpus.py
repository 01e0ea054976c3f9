"""Memory and peak rates, by the vendor's data sheets, of the GPUs that a sweep can be planned for.

Memory is the nominal size. Rates are peaks in 10^12 operations per second: dense matrix products with float32
accumulation (a data sheet's figure "with sparsity" is halved), and float32 without TF32, as PyTorch computes it unless
told otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU. The name that its driver gives it holds all of `words`."""

    memory_gib: int
    half_tflops: float  # float16, on tensor cores
    float32_tflops: float
    words: tuple[str, ...]
    source: str
    has_bfloat16: bool = True


GPUS = {
    "h200-141gb": Gpu(141, 989, 67, ("H200",), "NVIDIA H200 data sheet (SXM)"),
    "h100-80gb": Gpu(80, 989, 67, ("H100", "80GB HBM3"), "NVIDIA H100 data sheet (SXM)"),
    "a100-80gb": Gpu(80, 312, 19.5, ("A100", "80GB"), "NVIDIA A100 data sheet"),
    "a100-40gb": Gpu(40, 312, 19.5, ("A100", "40GB"), "NVIDIA A100 data sheet"),
    "l40s-48gb": Gpu(48, 362, 91.6, ("L40S",), "NVIDIA L40S data sheet"),
    "a10-24gb": Gpu(24, 125, 31.2, ("A10",), "NVIDIA A10 data sheet"),
    "rtx4090-24gb": Gpu(24, 165, 82.6, ("RTX 4090",), "NVIDIA Ada GPU architecture white paper"),
    "v100-32gb": Gpu(32, 125, 15.7, ("V100", "32GB"), "NVIDIA V100 data sheet (SXM2)", has_bfloat16=False),
    "v100-16gb": Gpu(16, 125, 15.7, ("V100", "16GB"), "NVIDIA V100 data sheet (SXM2)", has_bfloat16=False),
    "t4-16gb": Gpu(16, 65, 8.1, ("T4",), "NVIDIA T4 data sheet", has_bfloat16=False),
}
DEFAULT_GPU = "a100-80gb"


def gpu_named(device: str) -> str | None:
    """Return the entry of a device that the driver names, such as `NVIDIA A100-SXM4-80GB`; None if it is not listed."""
    parts = device.replace("-", " ").split()
    for name, gpu in GPUS.items():
        if all(word in parts or (" " in word and word in device) for word in gpu.words):
            return name
    return None
