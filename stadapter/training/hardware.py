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
