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
    """Turn TF32 off on a GPU; return a line for the reader about the device, the precision and what that means.

    Nothing is set for a CPU. Raises ConfigError for a precision that the GPU can only imitate.
    """
    import torch

    if device.type != "cuda":
        return f"{cpu_name()}: {precision}; PyTorch's default matrix products"
    if precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"optim.precision = bfloat16: {device_name(device)} has no bfloat16; use float16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if precision == "float32":
        how = "TF32 off, so that float32 means float32; optim.precision=bfloat16 is the fast choice"
    else:
        how = f"frozen matrices kept in {precision}; what autocast leaves in float32 without TF32"
    return f"{device_name(device)}: {precision}; PyTorch's fused attention and AdamW; {how}"


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
