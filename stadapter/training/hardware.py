"""What a reader needs to know about the machine, the code and its libraries to judge or repeat a number.

torch loads where a device is asked about, not before: the MLflow mirror of a finished sweep needs the versions alone.
"""

from __future__ import annotations

import contextlib
import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from stadapter.config import ConfigError

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")


@cache
def cpu_name() -> str:
    """The processor's model name, as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the standard library's answer is the best there is
    return platform.processor() or platform.machine()


def set_up(device: torch.device, precision: str) -> str:
    """Choose how this process multiplies matrices; one line for the reader: what was chosen, and why.

    ConfigError for a precision that the GPU can only imitate.
    """
    import torch

    if device.type == "cuda":
        if precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError(f"optim.precision = bfloat16: {device_name(device)} has no bfloat16; use float16")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        if precision == "float32":
            how = "TF32 off, so that float32 means float32; optim.precision=bfloat16 is the fast choice"
        else:
            how = f"frozen matrices kept in {precision}; what autocast leaves in float32 without TF32"
        return f"{device_name(device)}: {precision}; PyTorch's fused attention and AdamW; {how}"
    error = set_fast_float32(device)
    if torch.get_float32_matmul_precision() == "highest":
        return f"{cpu_name()}: {precision}; PyTorch's default matrix products: oneDNN's are off by {error:.0e} here"
    return (
        f"{cpu_name()}: {precision}; oneDNN for large matrix products, exact to {error:.0e} here and as fast or faster "
        "than the default where both were timed; the default for attention's small ones"
    )


def set_fast_float32(device: torch.device) -> float:
    """On a CPU, take oneDNN's matrix products where they are as exact as the default ones; their relative error.

    MKL takes a slow path on some AMD processors. The setting that avoids it allows oneDNN to compute in bfloat16, which
    it does on some processors: a probe against float64 decides, and the default stays where precision would be lost.
    Which is faster is not timed: a choice that could fall differently the next time would cost bitwise repetition.
    """
    import torch

    if device.type != "cpu":
        return 0.0
    torch.set_float32_matmul_precision("medium")
    error = _product_error()
    if error > 1e-6:
        torch.set_float32_matmul_precision("highest")
    return error


def _product_error() -> float:
    """Relative, of float32 products as they are set now."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    return float((a.float() @ b.float() - a @ b).norm() / (a @ b).norm())


def device_name(device: torch.device) -> str:
    """The model name of the GPU or the processor."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring anew: what `peak_memory_mib` then gives belongs to this training alone."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        # Linux: forget the peak, so that a process that is used again reports its own training. Where a container
        # forbids it, the peak is the process's: an upper bound.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory since the training began: allocated on the GPU, resident on the CPU; None where it is not known."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    # Some sandboxes' kernels (gVisor) count no peak: a training must not fail at its end for that.
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)
