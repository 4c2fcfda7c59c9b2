"""Times the Triton kernels of a decode step but attention: python benchmarks/kernels/elementwise.py [op ...]

Each kernel is first compared with its reference, at every size; a wrong one is not timed, and the exit status says so.
Times are medians over replays of a CUDA graph of many calls. The calls go round up to 32 sets of inputs, which exceed
the L2 cache together unless they are small; small ones a decode step finds there too. "share" is of a copy's rate.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shoal.kernels.registry import load_op

DEVICE = "cuda"
DTYPE = torch.bfloat16
TOLERANCE = 0.04
BATCHES = (1, 8, 64, 256, 1024)
PREFILL = 16384
COLD_BYTES = 160 << 20  # three times an H100's L2
MAX_SETS = 32
CALLS = 32
REPLAYS = 7


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    head_norm: bool


MODELS = (
    Model("Qwen3-0.6B", 1024, 16, 8, 128, 3072, 151936, True),
    Model("Llama-3.1-8B", 4096, 32, 8, 128, 14336, 128256, False),
)


@dataclass(frozen=True)
class Case:
    op: str
    label: str
    make: Callable[[], tuple[Any, ...]]
    num_bytes: int  # read and written by one call, each byte once


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(DTYPE)


def layer_cases(model: Model, tokens: int) -> Iterator[Case]:
    hidden, size, inner = model.hidden, model.head_dim, model.intermediate
    width = (model.heads + 2 * model.kv_heads) * size
    label = f"{model.name} {tokens}"

    def norm() -> tuple[Any, ...]:
        return normal(tokens, hidden), normal(hidden), 1e-6, normal(tokens, hidden)

    def qkv() -> tuple[Any, ...]:
        caches = torch.zeros(2, 2 * PREFILL // 16, 16, model.kv_heads, size, dtype=DTYPE, device=DEVICE)
        weights = normal(2, size) if model.head_norm else (None, None)
        angles = torch.randn(4096, size // 2, device=DEVICE)
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
        positions = torch.randint(0, 4096, (tokens,), device=DEVICE)
        slots = torch.randperm(2 * PREFILL, device=DEVICE)[:tokens]
        return (normal(tokens, width), *weights, 1e-6, cos_sin, positions, *caches, slots, model.heads)

    yield Case("rms_norm", label, norm, 8 * tokens * hidden)
    yield Case("activation_and_mul", f"{label} silu", lambda: (normal(tokens, 2 * inner), "silu"), 6 * tokens * inner)
    yield Case("qk_norm_rope_store", label, qkv, 2 * tokens * (2 * width + model.kv_heads * size))


def vocabulary_cases(model: Model, rows: int) -> Iterator[Case]:
    label, num_bytes = f"{model.name} {rows}", 2 * rows * model.vocab

    def draws() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(-(2**63), 2**63 - 1, (rows,), device=DEVICE), torch.arange(rows, device=DEVICE)

    def logits(scale: float) -> torch.Tensor:
        return normal(rows, model.vocab, scale=scale)

    def ids() -> torch.Tensor:
        return torch.randint(0, model.vocab, (rows, 6), device=DEVICE)

    temperature = torch.full((rows,), 0.6, device=DEVICE)
    log_min_p = torch.full((rows,), -3.0, device=DEVICE)
    flat, steep = 0.3, 4.0  # random weights' logits, and what a trained model's are like
    yield Case("sample_rows", f"{label} flat", lambda: (logits(flat), temperature, *draws()), num_bytes)
    yield Case("sample_rows", f"{label} steep", lambda: (logits(steep), temperature, *draws()), num_bytes)
    yield Case("sample", f"{label} min_p", lambda: (logits(steep), temperature, log_min_p, *draws()), 2 * num_bytes)
    yield Case("greedy", label, lambda: (logits(steep),), num_bytes)
    yield Case("logprobs_of", label, lambda: (logits(steep), ids()), num_bytes)
    yield Case("top_ids", f"{label} 5", lambda: (logits(steep), 5), num_bytes)


def opt_cases(tokens: int) -> Iterator[Case]:
    label, hidden, inner = f"OPT-125m {tokens}", 768, 3072

    def norm() -> tuple[Any, ...]:
        return normal(tokens, hidden), normal(hidden), normal(hidden), 1e-5

    def act(name: str) -> Case:
        return Case("activation", f"{label} {name}", lambda: (normal(tokens, inner), name), 4 * tokens * inner)

    yield Case("layer_norm", label, norm, 4 * tokens * hidden)
    yield from map(act, ("relu", "gelu", "gelu_new"))
    yield Case("activation_and_mul", f"{label} gelu", lambda: (normal(tokens, 2 * inner), "gelu"), 6 * tokens * inner)


def batch_cases(rows: int) -> Iterator[Case]:
    length, context, block_size = 4096, 2048, 16

    def ints(dtype: torch.dtype, *shape: int, fill: int = 0) -> torch.Tensor:
        return torch.full(shape, fill, dtype=dtype, device=DEVICE)

    def state() -> tuple[torch.Tensor, ...]:
        ids = torch.randint(0, 1000, (rows, length), dtype=torch.int32, device=DEVICE)
        ended = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
        return torch.randperm(rows, device=DEVICE), ids, ints(torch.int32, rows, fill=context), ended

    def prepare() -> tuple[Any, ...]:
        order, ids, num_tokens, ended = state()
        blocks = torch.randperm(rows * length // block_size, device=DEVICE).view(rows, -1).int()
        outputs = [ints(torch.int64, rows) for _ in range(3)]
        temperatures, streams = torch.ones(rows, device=DEVICE), ints(torch.int64, rows, fill=5)
        wishes = num_tokens // 2, temperatures, streams, temperatures.clone(), streams.clone(), streams.clone()
        return (
            order, ids, num_tokens, blocks, ended, block_size, *outputs, ints(torch.int32, rows), blocks * 0, *wishes,
        )  # fmt: skip

    def append() -> tuple[Any, ...]:
        order, ids, num_tokens, ended = state()
        stops, sampled = torch.randint(-1, 1000, (rows, 4), device=DEVICE), ints(torch.int64, rows, fill=1001)
        prompts, minimum = ints(torch.int32, rows, fill=1), ints(torch.int64, rows)
        return order, sampled, ids, num_tokens, prompts, minimum, stops, ended, ints(torch.int32, rows)

    yield Case("prepare_decode", f"{rows} rows of {context}", prepare, rows * (8 * context // block_size + 100))
    yield Case("append_decode", f"{rows} rows", append, rows * 82)


def copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def difference(case: Case) -> float:
    """The largest error of anything returned or written, relative where values exceed 1; inf for a wrong integer."""
    op, arguments = load_op(case.op), case.make()
    theirs, ours = copied(arguments), copied(arguments)
    expected, found = op.reference(*theirs), op.get("triton")(*ours)
    if case.op in ("sample_rows", "sample"):  # a rounding apart, two scores may change places
        return 0.0 if (expected != found).sum() <= 1 else float("inf")
    if case.op == "greedy":
        return 0.0 if torch.equal(arguments[0].gather(1, found[:, None])[:, 0], arguments[0].amax(1)) else float("inf")
    worst = 0.0
    for a, b in [*zip(as_tuple(expected), as_tuple(found), strict=True), *zip(theirs, ours, strict=True)]:
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            error = (a.float() - b.float()).abs() / a.float().abs().clamp(min=1)
            worst = max(worst, float(error.max()))
        elif isinstance(a, torch.Tensor) and not torch.equal(a, b):
            return float("inf")
    return worst


def time_calls(calls: list[Callable[[], Any]]) -> float:
    """Microseconds a call, by replays of one graph of at least CALLS calls."""
    calls = calls * -(-CALLS // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        calls[0]()
        graph.capture_begin()
        for call in calls:
            call()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def measure(case: Case) -> float:
    run = load_op(case.op).get("triton")
    first = case.make()
    size = sum(a.nbytes for a in first if isinstance(a, torch.Tensor))
    sets = [first] + [case.make() for _ in range(min(MAX_SETS, -(-COLD_BYTES // size)) - 1)]
    return time_calls([lambda arguments=arguments: run(*arguments) for arguments in sets])


def copy_rate() -> float:
    """Bytes a second, read and written."""
    source = torch.empty(512 << 20, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_calls([lambda: target.copy_(source)]) * 1e6


def all_cases() -> list[Case]:
    cases = [case for model in MODELS for tokens in (*BATCHES, PREFILL) for case in layer_cases(model, tokens)]
    cases += [case for model in MODELS for rows in BATCHES for case in vocabulary_cases(model, rows)]
    cases += [case for tokens in (256, PREFILL) for case in opt_cases(tokens)]
    cases += [case for rows in (8, 256, 1024) for case in batch_cases(rows)]
    return sorted(cases, key=lambda case: case.op)


def main() -> int:
    torch.manual_seed(0)
    wanted = sys.argv[1:]
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {rate / 1e12:.2f} TB/s")
    print(f"{'op':20} {'shape':28} {'error':>8} {'us':>9} {'GB/s':>6} {'share':>6}")
    wrong = 0
    for case in all_cases():
        if wanted and case.op not in wanted:
            continue
        error = difference(case)
        if not error <= TOLERANCE:
            wrong += 1
            print(f"{case.op:20} {case.label:28} {error:8.1e} WRONG, not timed", flush=True)
            continue
        duration = measure(case)
        speed = case.num_bytes / duration * 1e6
        figures = f"{error:8.1e} {duration:9.2f} {speed / 1e9:6.0f} {speed / rate:6.1%}"
        print(f"{case.op:20} {case.label:28} {figures}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
