"""Times a decode step's layers without attention: python benchmarks/kernels/linear.py [qwen3-0.6b|llama-3.1-8b]

Library products with kernels of their own for all else, against Shoal's products; both in a CUDA graph of all layers,
whose weights exceed the L2 cache together. The results of both are compared first. Medians, microseconds a layer.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from shoal.kernels.triton import linear as ours
from shoal.kernels.triton.activation import activation_and_mul
from shoal.kernels.triton.qk_norm_rope_store import qk_norm_rope_store
from shoal.kernels.triton.rms_norm import rms_norm

DEVICE, DTYPE = "cuda", torch.bfloat16
ROWS = (1, 8, 16, 32, 64, 96, 128, 160, 192, 256)
REPLAYS, ROUNDS = 4, 7
LARGEST_DIFFERENCE = 0.05


@dataclass(frozen=True)
class Model:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: int
    head_norm: bool


MODELS = {
    "qwen3-0.6b": Model(1024, 16, 8, 128, 3072, 28, True),
    "llama-3.1-8b": Model(4096, 32, 8, 128, 14336, 6, False),
}
Layer = dict[str, torch.Tensor]


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE) * scale


def make_layer(model: Model) -> Layer:
    hidden, size = model.hidden, model.head_dim
    return {
        "norm": 1 + normal(hidden, scale=0.02),
        "heads": 1 + normal(2, size, scale=0.02),
        "qkv": normal((model.heads + 2 * model.kv_heads) * size, hidden, scale=hidden**-0.5),
        "o": normal(hidden, model.heads * size, scale=(model.heads * size) ** -0.5),
        "gate_up": normal(2 * model.intermediate, hidden, scale=hidden**-0.5),
        "down": normal(hidden, model.intermediate, scale=model.intermediate**-0.5),
    }


def make_rope(model: Model, rows: int) -> Callable[[torch.Tensor, Layer], torch.Tensor]:
    table = torch.randn(4096, model.head_dim, device=DEVICE)
    positions, slots = torch.randint(0, 4096, (rows,), device=DEVICE), torch.randperm(8192, device=DEVICE)[:rows]
    cache = torch.zeros(2, 512, 16, model.kv_heads, model.head_dim, device=DEVICE, dtype=DTYPE)

    def rope(qkv: torch.Tensor, layer: Layer) -> torch.Tensor:
        weights = layer["heads"] if model.head_norm else (None, None)
        query = qk_norm_rope_store(qkv, *weights, 1e-6, table, positions, *cache, slots, model.heads)[0]
        return query.view(rows, -1)

    return rope


def step(layers: list[Layer], x: torch.Tensor, rope: Callable, library: bool) -> torch.Tensor:
    residual = x
    for layer in layers:
        if library:
            heads = rope(functional.linear(x, layer["qkv"]), layer)
            x, residual = rms_norm(functional.linear(heads, layer["o"]), layer["norm"], 1e-6, residual)
            inner = activation_and_mul(functional.linear(x, layer["gate_up"]), "silu")
            x, residual = rms_norm(functional.linear(inner, layer["down"]), layer["norm"], 1e-6, residual)
        else:
            heads = rope(ours.linear(x, layer["qkv"]), layer)
            x, residual = ours.linear_add_norm(heads, layer["o"], residual, layer["norm"], 1e-6)
            inner = ours.gated_linear(x, layer["gate_up"], "silu")
            x, residual = ours.linear_add_norm(inner, layer["down"], residual, layer["norm"], 1e-6)
    return x


def microseconds(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / REPLAYS)
    return statistics.median(times), out.float()


def main() -> int:
    torch.manual_seed(0)
    names = sys.argv[1:] or list(MODELS)
    wrong = 0
    for name in names:
        model = MODELS[name]
        layers = [make_layer(model) for _ in range(model.layers)]
        print(f"{name}, {torch.cuda.get_device_name()}: us a layer, library / ours / relative difference of results")
        for rows in ROWS:
            x, rope = normal(rows, model.hidden), make_rope(model, rows)
            found = [microseconds(lambda b=b, x=x, r=rope: step(layers, x, r, b)) for b in (True, False)]  # noqa: B023
            difference = float((found[0][1] - found[1][1]).norm() / found[0][1].norm())
            wrong += not difference < LARGEST_DIFFERENCE
            times = " ".join(f"{time / model.layers:8.2f}" for time, _ in found)
            print(f"{rows:5d} {times} {difference:9.4f}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
