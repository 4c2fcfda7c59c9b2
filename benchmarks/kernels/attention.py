"""Times paged attention: python benchmarks/kernels/attention.py [decode|ragged|prefill|mixed|sweep ...] [--json FILE]

Before anything is timed, some of its rows are compared with the op's reference; a wrong one ends the run. Times are
medians over replays of a CUDA graph of many calls, which go round sets of rows that exceed the L2 cache together;
blocks lie in random order. Decode is shown as the share of the read rate that the same run measures, prefill beside
torch's own attention over dense copies. "sweep" tries ways to build the kernels and prints the best one first.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from shoal.kernels.registry import load_op
from shoal.kernels.triton import paged_attention as kernels

DEVICE = "cuda"
DTYPE = torch.bfloat16
TOLERANCE = 0.02
COLD_BYTES = 400 << 20  # of all sets together: several times an H100's L2
CALLS = 16
REPLAYS = 7
SHAPES = ((16, 8, 128), (32, 8, 128), (32, 8, 64))
DECODE = (
    *((batch, context) for batch in (128, 256, 512) for context in (1024, 2048, 4096)),
    *((128, 256), (128, 512), (256, 256), (256, 512), (64, 660), (256, 660), (8, 4096), (16, 4096), (32, 4096)),
    *((1, 512), (1, 4096), (8, 1024), (32, 1024), (64, 4096)),
)
RAGGED = ((128, 1024), (128, 2048), (256, 1024), (256, 4096), (512, 2048), (128, 512))
SWEEP_DECODE = ((128, 256), (128, 512), (256, 1024), (128, 4096), (8, 4096), (32, 4096), (64, 660), (1, 4096))
PREFILL = ((1, 1024, 0), (1, 2048, 0), (1, 4096, 0), (1, 8192, 0), (8, 1024, 0), (4, 2048, 0), (2, 8192, 0),
           (1, 1024, 7168), (16, 256, 0))  # fmt: skip
SWEEP_PREFILL = ((1, 1024, 0), (1, 4096, 0), (8, 1024, 0), (2, 8192, 0))
MIXED = ((1, 2048, 64, 1024), (1, 2048, 256, 1024), (1, 512, 256, 660), (4, 500, 500, 660))
DECODE_CONFIGS = [
    kernels.DecodeConfig(*each)
    for each in (
        *((32, 2, 3, 4), (32, 2, 4, 4), (32, 4, 3, 3), (32, 4, 4, 3), (32, 4, 4, 4), (32, 1, 3, 6), (16, 1, 4, 8)),
        *((64, 4, 2, 3), (64, 4, 3, 2), (64, 4, 3, 3), (64, 4, 4, 2), (64, 2, 3, 2), (64, 2, 3, 3), (64, 8, 3, 2)),
        *((128, 4, 2, 2), (128, 4, 3, 1), (128, 8, 3, 1), (64, 4, 3, 4), (64, 4, 4, 3), (64, 4, 3, 3, 64)),
    )
]
PREFILL_CONFIGS = [
    kernels.PrefillConfig(*each)
    for each in (
        *((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (128, 32, 8, 4)),
        *((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (256, 64, 8, 2)),
    )
]


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    size: int
    block_size: int

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads}x{self.size} block {self.block_size}"


@dataclass(frozen=True)
class Rows:
    """Arguments of one call of the op."""

    query: torch.Tensor
    caches: torch.Tensor
    starts: torch.Tensor
    seq_lens: torch.Tensor
    tables: torch.Tensor
    longest_query: int
    longest: int
    own: tuple[torch.Tensor, ...]

    def arguments(self) -> tuple[Any, ...]:
        scale = self.query.shape[2] ** -0.5
        lengths = (self.starts, self.seq_lens, self.tables)
        return self.query, self.caches[0], self.caches[1], *lengths, scale, self.longest_query, self.longest, *self.own

    def for_kernel(self, out: torch.Tensor) -> tuple[Any, ...]:
        scale_log2 = self.query.shape[2] ** -0.5 * math.log2(math.e)
        return self.query, self.caches[0], self.caches[1], self.starts, self.seq_lens, self.tables, out, scale_log2


def make_sets(shape: Shape, rows: Sequence[tuple[int, int]], most: int = CALLS) -> list[Rows]:
    """Sets of rows (query tokens, context), each with blocks of its own, scattered over one pool."""
    needs = [-(-context // shape.block_size) for _, context in rows]
    block_bytes = shape.block_size * shape.kv_heads * shape.size * 2 * 2
    count = max(1, min(most, -(-COLD_BYTES // (sum(needs) * block_bytes))))
    pool = torch.randperm(count * sum(needs), device=DEVICE).int()
    caches = torch.empty(2, len(pool), shape.block_size, shape.kv_heads, shape.size, dtype=DTYPE, device=DEVICE)
    caches.normal_()
    starts = torch.tensor([0, *(tokens for tokens, _ in rows)], device=DEVICE).cumsum(0).int()
    seq_lens = torch.tensor([context for _, context in rows], dtype=torch.int32, device=DEVICE)
    width = -(-max(needs) // 16) * 16
    inside = torch.arange(width, device=DEVICE) < torch.tensor(needs, device=DEVICE).unsqueeze(1)
    sets = []
    for part in pool.view(count, -1):
        tables = torch.full((len(rows), width), -1, dtype=torch.int32, device=DEVICE)
        tables[inside] = part
        query = torch.randn(int(starts[-1]), shape.heads, shape.size, device=DEVICE).to(DTYPE)
        longest_query, longest = (max(column) for column in zip(*rows, strict=True))
        # Keys and values of the query tokens side by side, as the model has them.
        size, at = shape.block_size, [torch.arange(end - new, end, device=DEVICE) for new, end in rows]
        slots = [table[i // size].long() * size + i % size for table, i in zip(tables, at, strict=True)]
        own = tuple(cache.flatten(0, 1)[torch.cat(slots)] for cache in caches)
        sets.append(Rows(query, caches, starts, seq_lens, tables, longest_query, longest, own))
    return sets


def check(rows: Rows, found: torch.Tensor) -> None:
    """The first, the last and some other rows against the reference."""
    count = len(rows.seq_lens)
    for row in sorted({0, count // 3, count // 2, count - 2, count - 1} & set(range(count))):
        first, last = rows.starts[row].item(), rows.starts[row + 1].item()
        lengths = (rows.starts[row : row + 2] - first, rows.seq_lens[row : row + 1], rows.tables[row : row + 1])
        one = Rows(rows.query[first:last], rows.caches, *lengths, last - first, rows.longest, ())
        expected = load_op("paged_attention").reference(*one.arguments())
        error = (found[first:last].float() - expected.float()).abs().max().item()
        if not error <= TOLERANCE:
            raise SystemExit(f"row {row} of {count} is wrong by {error}")


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


def time_op(sets: list[Rows]) -> float:
    run = load_op("paged_attention").get("triton")
    check(sets[0], run(*sets[0].arguments()))
    return time_calls([lambda rows=rows: run(*rows.arguments()) for rows in sets])


@triton.jit
def read_kernel(source_ptr, sink_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        total += tl.load(source_ptr + first + tl.arange(0, BLOCK))
    if tl.max(total, 0) == 1.5:  # never: it holds zeros
        tl.store(sink_ptr, 1.0)


def read_rate() -> float:
    """Bytes a second that a kernel reads when it does nothing else: the best of a few ways to read."""
    source = torch.zeros(1 << 29, device=DEVICE)
    sink = torch.zeros(1, device=DEVICE)
    count = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    ways: list[Callable[[], Any]] = [source.sum, source.amax]
    for programs in (4, 8, 16):
        for block in (2048, 4096):
            ways.append(lambda n=programs, b=block: read_kernel[(count * n,)](source, sink, len(source), BLOCK=b))
    return max(source.nbytes / time_calls([way]) for way in ways) * 1e6


def kv_bytes(shape: Shape, rows: Sequence[tuple[int, int]]) -> int:
    return sum(context for _, context in rows) * shape.kv_heads * shape.size * 2 * 2


def flops(shape: Shape, rows: Sequence[tuple[int, int]]) -> float:
    seen = sum(tokens * (context - tokens) + tokens * (tokens + 1) / 2 for tokens, context in rows)
    return 4.0 * shape.heads * shape.size * seen


def ragged_lengths(batch: int, context: int) -> list[int]:
    """0.25 to 1.75 times the context, in random order."""
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(batch)).tolist()
    return [max(1, int(context * (0.25 + 1.5 * (i + 0.5) / batch))) for i in order]


# ---- the sections ----------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, block_size: int, seconds: float) -> None:
        self.shapes = [Shape(*shape, block_size) for shape in SHAPES]
        self.seconds = seconds
        self.records: list[dict[str, Any]] = []
        self.rate = read_rate()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, ", end="")
        print(f"read {self.rate / 1e12:.3f} TB/s", flush=True)

    def record(self, section: str, shape: Shape, label: str, text: str, **figures: Any) -> None:
        print(f"{section:8} {shape!s:18} {label:26} {text}", flush=True)
        self.records.append({"section": section, "shape": asdict(shape), "label": label} | figures)

    def share(self, shape: Shape, rows: Sequence[tuple[int, int]], microseconds: float) -> float:
        return kv_bytes(shape, rows) / microseconds * 1e6 / self.rate

    def decode(self) -> None:
        for shape in self.shapes:
            for batch, context in DECODE:
                rows = [(1, context)] * batch
                sets = make_sets(shape, rows)
                duration = time_op(sets)
                share = self.share(shape, rows, duration)
                peers = {"sdpa": sdpa_decode(shape, batch, context), "fa3": fa3_decode(sets)}
                beside = [f"{name} {self.share(shape, rows, t):5.1%}" for name, t in peers.items() if t]
                text = f"{duration:9.1f} us {share:6.1%}   {'  '.join(beside)}"
                self.record("decode", shape, f"{batch} x {context}", text, us=duration, share=share, peers=peers)

    def ragged(self) -> None:
        for shape in self.shapes:
            for batch, context in RAGGED:
                rows = [(1, length) for length in ragged_lengths(batch, context)]
                duration = time_op(make_sets(shape, rows))
                share = self.share(shape, rows, duration)
                equal = [(1, context)] * batch
                gain = share - self.share(shape, equal, time_op(make_sets(shape, equal)))
                text = f"{duration:9.1f} us {share:6.1%}   {100 * gain:+.1f} points from equal lengths"
                self.record("ragged", shape, f"{batch} x about {context}", text, us=duration, share=share, gain=gain)

    def prefill(self) -> None:
        for shape in self.shapes:
            for count, tokens, cached in PREFILL:
                rows = [(tokens, cached + tokens)] * count
                duration = time_op(make_sets(shape, rows, most=4))
                rate = flops(shape, rows) / duration / 1e6
                peers = {} if cached else sdpa_prefill(shape, count, tokens)
                beside = [f"{name} {t:.1f} us ({t / duration:.0%})" for name, t in peers.items()]
                label = f"{count} x {tokens}" + (f" after {cached}" if cached else "")
                text = f"{duration:9.1f} us {rate:5.0f} TFLOP/s   {'  '.join(beside)}"
                self.record("prefill", shape, label, text, us=duration, tflops=rate, peers=peers)

    def mixed(self) -> None:
        for shape in self.shapes:
            for chunks, tokens, decoding, context in MIXED:
                parts = [(tokens, tokens)] * chunks, [(1, context)] * decoding
                both = time_op(make_sets(shape, [*parts[1], *parts[0]], most=4))
                alone = [time_op(make_sets(shape, part, most=4)) for part in parts]
                label = f"{chunks} x {tokens} + {decoding} x {context}"
                text = f"{both:9.1f} us, apart {alone[0]:.1f} + {alone[1]:.1f}"
                self.record("mixed", shape, label, text, us=both, apart=alone)

    def sweep(self) -> None:
        """Every config in every cell, as far as the time allows; the configs are built in parallel first."""
        started = time.perf_counter()
        jobs = [(shape, config) for shape in self.shapes for config in (*DECODE_CONFIGS, *PREFILL_CONFIGS)]
        processes = max(1, min(14, (os.cpu_count() or 1) - 2))
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            built = dict(zip(jobs, pool.map(build, jobs), strict=True))
        print(f"sweep: built in {time.perf_counter() - started:.0f} s", flush=True)
        cells = [(shape, cell) for cell in (*SWEEP_DECODE, *SWEEP_PREFILL) for shape in self.shapes]
        for shape, cell in cells:
            if time.perf_counter() - started > self.seconds:
                print("sweep: out of time", flush=True)
                return
            decoding = len(cell) == 2
            rows = [(1, cell[1])] * cell[0] if decoding else [(cell[1], cell[1])] * cell[0]
            sets = make_sets(shape, rows)
            times = {}
            for config in DECODE_CONFIGS if decoding else PREFILL_CONFIGS:
                if built[shape, config]:
                    times[config] = time_config(sets, config)
            label = " x ".join(map(str, cell[:2]))
            for config in sorted(times, key=times.__getitem__):
                figure = self.share(shape, rows, times[config]) if decoding else flops(shape, rows) / times[config]
                text = f"{times[config]:9.1f} us " + (f"{figure:6.1%}" if decoding else f"{figure / 1e6:5.0f} TFLOP/s")
                values = " ".join(f"{key}={value}" for key, value in asdict(config).items())
                self.record("sweep", shape, label, f"{text}   {values}", us=times[config], config=asdict(config))


# ---- peers -----------------------------------------------------------------------------------------------------


def dense(shape: Shape, batch: int, tokens: int, context: int) -> list[torch.Tensor]:
    heads = ((shape.heads, tokens), (shape.kv_heads, context), (shape.kv_heads, context))
    return [torch.randn(batch, n, size, shape.size, device=DEVICE, dtype=DTYPE) for n, size in heads]


def sdpa_decode(shape: Shape, batch: int, context: int) -> float | None:
    """torch's own choice of kernel over dense, equally long contexts; large ones are left out."""
    if batch * context > 1 << 19:
        return None
    query, key, value = dense(shape, batch, 1, context)
    group = shape.heads // shape.kv_heads
    query = query.view(batch, shape.kv_heads, group, shape.size)  # the heads that share keys as query tokens
    return time_calls([lambda: scaled_dot_product_attention(query, key, value)])


def fa3_decode(sets: list[Rows]) -> float | None:
    try:
        from flash_attn_interface import flash_attn_with_kvcache
    except ImportError:
        return None

    def call(rows: Rows) -> Any:
        query = rows.query.unsqueeze(1)
        return flash_attn_with_kvcache(
            query, *rows.caches, cache_seqlens=rows.seq_lens, page_table=rows.tables, causal=True
        )

    return time_calls([lambda rows=rows: call(rows) for rows in sets])


def sdpa_prefill(shape: Shape, batch: int, tokens: int) -> dict[str, float]:
    query, key, value = dense(shape, batch, tokens, tokens)
    group = shape.heads // shape.kv_heads
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    times = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash2", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            times[name] = time_calls([lambda: scaled_dot_product_attention(query, key, value, is_causal=True)])
    return times


# ---- building configs ------------------------------------------------------------------------------------------


def run_config(rows: Rows, config: Any, out: torch.Tensor) -> None:
    if isinstance(config, kernels.DecodeConfig):
        kernels.decode(*rows.for_kernel(out), rows.longest, mixed=False, config=config)
    else:
        kernels.prefill(*rows.for_kernel(out), "all", config=config)


def build(job: tuple[Shape, Any]) -> bool:
    """Compile a config in another process: the main one then finds it in Triton's cache. False where it cannot be."""
    shape, config = job
    rows = make_sets(shape, [(16, 64)] * 16 if isinstance(config, kernels.PrefillConfig) else [(1, 64)] * 16, most=1)[0]
    try:
        run_config(rows, config, torch.empty_like(rows.query))
        torch.cuda.synchronize()
    except triton.runtime.errors.OutOfResources as error:
        print(f"{shape} {config}: {error}", flush=True)
        return False
    return True


def time_config(sets: list[Rows], config: Any) -> float:
    outs = [torch.full_like(rows.query, float("nan")) for rows in sets]
    run_config(sets[0], config, outs[0])
    check(sets[0], outs[0])
    return time_calls(
        [lambda rows=rows, out=out: run_config(rows, config, out) for rows, out in zip(sets, outs, strict=True)]
    )


SECTIONS = {
    section.__name__: section for section in (Bench.decode, Bench.ragged, Bench.prefill, Bench.mixed, Bench.sweep)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all but sweep if none is given")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a KV block (16)")
    parser.add_argument("--sweep-seconds", type=float, default=150, help="a sweep starts no cell after that long (150)")
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown section {unknown.pop()!r}, known: {', '.join(SECTIONS)}")
    torch.manual_seed(0)
    bench = Bench(options.block_size, options.sweep_seconds)
    for section in options.sections or [name for name in SECTIONS if name != "sweep"]:
        SECTIONS[section](bench)
    if options.json:
        header = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        with open(options.json, "w") as file:
            json.dump(header | {"read_bytes_per_s": bench.rate, "records": bench.records}, file, indent=1)


if __name__ == "__main__":
    main()
