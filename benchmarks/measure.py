"""Time, memory and FLOPs of a function, and the machine's peak FLOP/s in matrix products."""

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from models.numerics import AUTOCAST_DTYPES

LEAST_RUNS = 3
MOST_RUNS = 50
# side of the square matrices, and images of the convolution, for the peak
PEAK_SIZES = {"cpu": (2048, 1), "cuda": (8192, 32)}


@dataclass(frozen=True)
class Measurement:
    """One stage: seconds of a call, images of a call, peak memory in bytes, counted FLOPs of a call (0: none)."""

    median: float
    fastest: float
    slowest: float
    runs: int
    images: int
    memory: int
    flops: int


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(work: Callable[[], object], images: int, device: torch.device, seconds: float) -> Measurement:
    """Call `work` once to warm up, once to count FLOPs, once for memory, and then repeatedly for about `seconds`.

    A call handles `images` images.
    """
    work()
    flops = counted_flops(work)
    memory = peak_memory(work, device)
    times: list[float] = []
    while len(times) < LEAST_RUNS or (sum(times) < seconds and len(times) < MOST_RUNS):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return Measurement(statistics.median(times), min(times), max(times), len(times), images, memory, flops)


def counted_flops(work: Callable[[], object]) -> int:
    """FLOPs of a call's matrix products, convolutions and attention; a multiplication and an addition are two.

    Compiled networks run uncompiled here, because the counter cannot see into kernels.
    """
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Peak memory of a call in bytes: of the GPU's allocator, or on CPUs of the whole process (0 without /proc)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        wait(device)
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    work()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def matrix_peak(device: torch.device, precision: str, seconds: float = 2.0) -> float:
    """FLOP/s of a large square matrix product or a 3x3 convolution in `precision`, whichever is faster.

    Different libraries compute them, and on some CPUs the matrix product is half as fast. Precision no is float32, or
    TF32 where it is allowed.
    """
    side, images = PEAK_SIZES[device.type]
    options = {"device": device, "dtype": AUTOCAST_DTYPES[precision] or torch.float32}
    a, b = (torch.randn(side, side, **options) for _ in range(2))
    x = torch.randn(images, 512, 64, 64, **options).to(memory_format=torch.channels_last)
    kernel = torch.randn(512, 512, 3, 3, **options).to(memory_format=torch.channels_last)
    found = [measure(work, 1, device, seconds) for work in (lambda: a @ b, lambda: F.conv2d(x, kernel, padding=1))]
    return max(stage.flops / stage.fastest for stage in found)


def profile(work: Callable[[], object], device: torch.device, rows: int = 12) -> list[dict]:
    """The operations of a call that take most time themselves, with their share of all time and number of calls."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        wait(device)

    def own(event) -> float:
        if on_gpu:  # kernels only, not the calls that launch them
            return event.self_device_time_total if event.device_type == DeviceType.CUDA else 0.0
        return event.self_cpu_time_total

    events = sorted(profiler.key_averages(), key=own, reverse=True)
    total = sum(map(own, events)) or 1.0
    return [{"operation": event.key, "share": own(event) / total, "calls": event.count} for event in events[:rows]]
