"""The processor or GPU that a training runs on: its name, precisions, matrix products and peak memory."""

from __future__ import annotations

import contextlib
import platform
from functools import cache
from pathlib import Path

import torch

from stadapter.config import ConfigError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STATUS = Path("/proc/self/status")
_FORGET_PEAK = Path("/proc/self/clear_refs")


@cache
def cpu_name() -> str:
    """Return the processor's model name, as the operating system gives it."""
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
    """Return the model name of the GPU or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context of a forward pass: autocast to `dtype`, which does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, so that `peak_memory_mib` is of the training that begins now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _FORGET_PEAK.exists():  # Linux
        with contextlib.suppress(OSError):  # where a container forbids it, the peak is the process's: an upper bound
            _FORGET_PEAK.write_text("5")


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak since `reset_peak_memory`: allocated on the GPU, resident on the CPU; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    # Some sandboxes' kernels (gVisor) count no peak: a training must not fail at its end for that.
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)
