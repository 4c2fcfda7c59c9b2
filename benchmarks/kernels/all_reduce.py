"""Sums over the GPUs of one host with residual and norm: NCCL and a norm, against peer memory; then beside products.

    python benchmarks/kernels/all_reduce.py [--gpus 2] [--width 4096] [--output FILE.json]

Small steps are timed in CUDA graphs, as decode steps run. "beside": a prefill step's halves, whose sums travel while
the other half's product computes; the products alone are its floor. Every way's result is compared with NCCL's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal.kernels.ops.rms_norm import rms_norm
from shoal.kernels.registry import use_implementation
from shoal.workers.layers.norm import RMSNorm
from shoal.workers.parallel import TensorParallel

ROWS = (1, 8, 64, 256, 512, 2048, 8192, 16384)
IN_GRAPH_UP_TO = 2048
CALLS, REPEATS = 10, 15
INPUTS = 7168  # of the product that parts come from: Llama-3.1-8B's down projection on one of two GPUs


def milliseconds(run: Callable[[], Any], calls: int) -> float:
    """Median over some repeats of the time of one of `calls` calls inside `run`."""
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times[2:])


def in_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """Replays of a recording of CALLS calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(CALLS):
            call()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def repeated(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def small_and_large(tp: TensorParallel, width: int, norm: RMSNorm) -> dict[str, dict[int, float]]:
    """Microseconds of one sum with residual and norm."""
    peers = tp.peers
    assert peers is not None
    found: dict[str, dict[int, float]] = {"nccl": {}, "peers": {}, "two_shot": {}}
    for rows in ROWS:
        part = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
        start = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
        dist.broadcast(start, 0)
        mine, residual = part.clone(), start.clone()
        dist.all_reduce(mine)
        wanted, _ = rms_norm(mine, norm.weight, norm.eps, residual)
        peers.own_parts[:rows].copy_(part)
        peers._sum(rows, width, residual, norm)
        error = (peers.own_sums[:rows].float() - wanted.float()).norm() / wanted.float().norm()
        assert error < 1e-2, f"{rows} rows: relative error {error}"

        def with_nccl(mine: torch.Tensor = mine, start: torch.Tensor = start) -> None:
            dist.all_reduce(mine)
            rms_norm(mine, norm.weight, norm.eps, start)

        def with_peers(rows: int = rows, residual: torch.Tensor = residual) -> None:
            peers._sum(rows, width, residual, norm)

        def with_two_shot(rows: int = rows, start: torch.Tensor = start) -> None:
            own = peers.own_parts.view(-1)[: rows * width].view(rows, width)
            torch.ops.symm_mem.two_shot_all_reduce_(own, "sum", dist.group.WORLD.group_name)
            rms_norm(own, norm.weight, norm.eps, start)

        for name, call in (("nccl", with_nccl), ("peers", with_peers), ("two_shot", with_two_shot)):
            run = in_graph(call) if rows <= IN_GRAPH_UP_TO else repeated(call)
            found[name][rows] = 1e3 * milliseconds(run, CALLS)
    return found


def beside_products(tp: TensorParallel, width: int, norm: RMSNorm) -> dict[str, float]:
    """Milliseconds of the products and sums of 16,384 rows: one block of a layer."""
    peers = tp.peers
    assert peers is not None
    overlap = peers.overlap
    assert overlap is not None
    rows = ROWS[-1]
    x = torch.randn(rows, INPUTS, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(width, INPUTS, dtype=torch.bfloat16, device="cuda") * INPUTS**-0.5
    start = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
    dist.broadcast(start, 0)
    half = rows // 2

    def products() -> None:
        for first in (0, half):
            torch.mm(x[first : first + half], weight.t(), out=peers.own_parts[first : first + half])

    def serial(residual: torch.Tensor = start) -> torch.Tensor:
        return peers.linear_add_norm(x, weight, None, residual, norm, 1.0)[0]

    def beside(residual: torch.Tensor = start) -> torch.Tensor:
        for first in (0, half):
            with overlap.half(first):
                peers.linear_add_norm(x[first : first + half], weight, None, residual[first : first + half], norm, 1.0)
        return overlap.results(rows)

    def nccl() -> None:
        output = x @ weight.t()
        dist.all_reduce(output)
        rms_norm(output, norm.weight, norm.eps, start)

    wanted = serial(start.clone()).clone()
    got = beside(start.clone())
    overlap.finish()
    error = (got.float() - wanted.float()).norm() / wanted.float().norm()
    assert error < 1e-2, f"beside products: relative error {error}"
    found = {}
    for name, call in (("products", products), ("nccl", nccl), ("serial", serial), ("beside", beside)):
        found[name] = milliseconds(repeated(call), CALLS)
        overlap.finish()
    return found


def rank_main(rank: int, args: argparse.Namespace, init: str) -> None:
    torch.cuda.set_device(rank)
    use_implementation("triton")
    with torch.inference_mode():
        tp = TensorParallel.init(rank, args.gpus, init, "cuda", 60.0)
        tp.open_peers(ROWS[-1], args.width, torch.bfloat16, torch.device("cuda", rank))
        with torch.device("cuda"):
            norm = RMSNorm(args.width, 1e-5)
            norm.weight = torch.nn.Parameter(torch.rand(args.width, dtype=torch.bfloat16), requires_grad=False)
        dist.broadcast(norm.weight, 0)
        result = {"sums_us": small_and_large(tp, args.width, norm), "block_ms": beside_products(tp, args.width, norm)}
        if rank == 0:
            print(f"{torch.cuda.get_device_name()} x {args.gpus}, bfloat16, width {args.width}")
            print("rows    " + "".join(f"{name:>12}" for name in result["sums_us"]) + "   microseconds")
            for rows in ROWS:
                print(f"{rows:<8}" + "".join(f"{times[rows]:12.1f}" for times in result["sums_us"].values()))
            for name, value in result["block_ms"].items():
                print(f"{name:<12}{value:.3f} ms")
            if args.output is not None:
                args.output.write_text(json.dumps(result, indent=1))
        tp.destroy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (args, f"file://{folder}/meet"), nprocs=args.gpus)


if __name__ == "__main__":
    main()
