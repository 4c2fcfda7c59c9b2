"""Times a decode step's layers with attention: python benchmarks/kernels/decode_layers.py [NAME ...]

Names are qwen3-0.6b, llama-3.1-8b (lengths of 0.25 to 1.75 times a mean) and nano (those of `shoal bench throughput
--workload nano` at some of its steps, with the padding of the graphs that serve them). All layers in one CUDA graph, as
the engine records them, over a paged cache whose blocks lie in random order. Attention of the first layer is compared
with the op's reference first. Medians, microseconds; beside them what keys and values alone would take at the read rate
measured before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import attention
import linear
import torch

from shoal.driver.bench.workloads import get_workload
from shoal.kernels.registry import load_op
from shoal.workers.decode_graphs import graph_sizes

BLOCK = 16
CELLS = {  # rows, mean context
    "qwen3-0.6b": ((1, 2900), (4, 2500), (11, 1500), (16, 2000), (24, 1200), (34, 900), (64, 660), (128, 800),
                   (160, 900), (256, 800)),
    "llama-3.1-8b": ((1, 2900), (16, 2000), (64, 660), (122, 1088), (256, 1088), (390, 1088)),
}  # fmt: skip
NANO_STEPS = (60, 250, 400, 550, 800, 950)
LONGEST = 4096


@dataclass(frozen=True)
class Step:
    """What the layers of one decode step read: weights and caches, the rows' inputs and lengths, angles."""

    model: linear.Model
    layers: list[linear.Layer]
    x: torch.Tensor
    seq_lens: torch.Tensor
    tables: torch.Tensor
    angles: torch.Tensor

    def attention(self, qkv: torch.Tensor, layer: linear.Layer, reference: bool = False) -> torch.Tensor:
        """decode_attention in Triton, or as the op's reference has it."""
        model, op = self.model, load_op("decode_attention")
        run = op.reference if reference else op.get("triton")
        norms = tuple(layer["heads"]) if model.head_norm else (None, None)
        lengths = (self.seq_lens, self.tables, model.head_dim**-0.5, LONGEST)
        return run(qkv, *norms, 1e-6, self.angles, *layer["caches"], *lengths, model.heads).flatten(1)

    def run(self) -> torch.Tensor:
        """All layers."""
        return linear.step(self.layers, self.x, self.attention, library=False)

    def check(self) -> None:
        """The first layer's attention against the reference. Both write the same newest keys and values."""
        layer = self.layers[0]
        qkv = linear.ours.linear(self.x, layer["qkv"])
        found, expected = (self.attention(qkv, layer, reference).float() for reference in (False, True))
        error = (found - expected).abs().max().item()
        if not error <= attention.TOLERANCE:
            raise SystemExit(f"attention of {len(self.x)} rows is wrong by {error}")


def make_step(model: linear.Model, lengths: Sequence[int]) -> Step:
    """Rows of these contexts, 0 for padding."""
    device, needs = linear.DEVICE, [-(-length // BLOCK) for length in lengths]
    tables = torch.zeros(len(lengths), LONGEST // BLOCK, dtype=torch.int32, device=device)
    inside = torch.arange(tables.shape[1], device=device) < torch.tensor(needs, device=device).unsqueeze(1)
    tables[inside] = torch.randperm(sum(needs), device=device).int()
    angles = torch.randn(LONGEST, model.head_dim // 2, device=device) * 5
    caches = (2, sum(needs), BLOCK, model.kv_heads, model.head_dim)
    return Step(
        model,
        [linear.make_layer(model) | {"caches": linear.normal(*caches)} for _ in range(model.layers)],
        linear.normal(len(lengths), model.hidden),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        tables,
        torch.cat([angles.cos(), angles.sin()], dim=1),
    )


def nano_lengths() -> list[tuple[str, list[int]]]:
    """Contexts of nano's rows at some steps, and the padding of their graphs."""
    work = get_workload("nano")
    requests = work.draw(work)
    cells = []
    for step in NANO_STEPS:
        rows = [len(request.prompt) + step for request in requests if request.num_output > step]
        size = min(size for size in graph_sizes(1024) if size >= len(rows))
        cells.append((f"step {step}, {len(rows)} of {size} rows", rows + [0] * (size - len(rows))))
    return cells


def main() -> None:
    torch.manual_seed(0)
    rate = attention.read_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, read {rate / 1e12:.3f} TB/s", flush=True)
    for name in sys.argv[1:] or [*CELLS, "nano"]:
        model = linear.MODELS["qwen3-0.6b" if name == "nano" else name]
        cells = [(f"{rows} x {mean}", attention.ragged_lengths(rows, mean)) for rows, mean in CELLS.get(name, ())]
        print(f"{name}: us of {model.layers} layers / keys and values alone")
        for label, lengths in nano_lengths() if name == "nano" else cells:
            step = make_step(model, lengths)
            step.check()
            read = sum(lengths) * model.kv_heads * model.head_dim * 2 * 2 * model.layers / rate * 1e6
            print(f"{label:28} {linear.microseconds(step.run)[0]:9.0f} {read:9.0f}", flush=True)


if __name__ == "__main__":
    main()
