"""What a benchmark asks of a rank, as functions for `collective_rpc`: what it runs on and how fast that can be.

They load torch when they run: the client that names them needs none.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from shoal.workers.actor import Worker

_GPU_BYTES, _CPU_BYTES = 1 << 30, 1 << 27  # of the buffer that is read: many times any cache
_ROW_BYTES = 1 << 14  # it is a matrix of such rows
_GPU_EDGE, _CPU_EDGE = 8192, 768  # of the square matrices
_REPEATS = 12


def describe_rank(worker: Worker) -> dict[str, Any]:
    """Device and versions."""
    import torch

    device: torch.device = worker.runner.device
    about: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"triton": version("triton"), "cuda": torch.version.cuda, "device": properties.name}
        about |= {"memory_bytes": properties.total_memory, "num_sms": properties.multi_processor_count}
    else:
        about |= {"device": _cpu_name(), "num_threads": torch.get_num_threads()}
    return about


def measure_rates(worker: Worker) -> dict[str, float]:
    """Rates of this rank's device in the model's dtype, the best of some tries: bytes read a second, bytes copied
    (read and written) a second, and operations a second of a large matrix product."""
    import torch

    device, dtype = worker.runner.device, worker.runner.dtype
    on_gpu = device.type == "cuda"
    num_bytes, edge = (_GPU_BYTES, _GPU_EDGE) if on_gpu else (_CPU_BYTES, _CPU_EDGE)
    if on_gpu:
        torch.cuda.empty_cache()
        # The KV cache has left little, and there are two buffers.
        num_bytes = min(num_bytes, torch.cuda.mem_get_info()[0] // 4 // _ROW_BYTES * _ROW_BYTES)
    source = torch.ones(num_bytes // _ROW_BYTES, _ROW_BYTES // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    # Kernels that do little but read: which is fastest differs between devices and dtypes.
    flat = source.view(torch.float32)
    readers = (flat.sum, flat.amax, partial(torch.mv, source, source[0].clone()))
    read = min(_seconds(reader, device) for reader in readers)
    copy = _seconds(partial(target.copy_, source), device)
    del source, target, flat, readers  # memory is short beside the KV cache
    # Random values: a product of constants draws less power and runs faster than any real one.
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    product = _seconds(partial(torch.mm, left, right), device)
    del left, right
    if on_gpu:
        torch.cuda.empty_cache()
    return {
        "read_bytes_per_s": num_bytes / read,
        "copy_bytes_per_s": 2 * num_bytes / copy,
        "matmul_flops_per_s": 2 * edge**3 / product,
    }


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The shortest of some calls, after two that warm up."""
    import torch

    for _ in range(2):
        function()
    times: list[float] = []
    for _ in range(_REPEATS):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
    return min(times)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except FileNotFoundError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()
