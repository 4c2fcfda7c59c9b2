"""Prints the least time that steps, prompts and the workloads of `shoal bench throughput` can take on a card.

python benchmarks/floors.py [--read-gb-per-s X --product-tflops X [--attention-tflops X] --memory-gb X]

Without figures of a card: an H100 and an H200 with their nominal bandwidth.
"""

import argparse

from shoal.driver.bench.floors import (
    CARDS,
    Ceilings,
    decode_seconds,
    kv_room,
    prefill_seconds,
    serial_floor,
)
from shoal.driver.bench.models import model_spec
from shoal.driver.bench.workloads import WORKLOADS

ITEM_BYTES = 2
MODELS = ("qwen3-0.6b", "llama-3.1-8b")
MAX_ROWS = 1024


def print_steps(ceilings):
    for name in MODELS:
        spec = model_spec(name)
        print(f"\n{name}: milliseconds of a decode step (thousand tokens/s)")
        print(f"{'context':>10}" + "".join(f"{f'{rows} rows':>18}" for rows in (32, 128, 256, 512)))
        for context in (256, 1024, 4096):
            cells = []
            for rows in (32, 128, 256, 512):
                seconds = sum(decode_seconds(spec, ceilings, rows, rows * context, ITEM_BYTES))
                cells.append(f"{seconds * 1e3:.2f} ({rows / seconds / 1e3:.1f})")
            print(f"{context:>10}" + "".join(f"{cell:>18}" for cell in cells))
        rates = [f"{n} tokens {n / prefill_seconds(spec, ceilings, n) / 1e3:,.0f}" for n in (256, 1024, 4096, 16384)]
        print("prompts, thousand tokens/s: " + ", ".join(rates))


def print_workloads(ceilings, memory):
    print(
        f"\n{'workload':<12}{'seconds':>10}{'output tok/s':>14}{'prefill':>10}{'weights':>10}{'KV':>10}{'logits':>10}"
    )
    for name, work in WORKLOADS.items():
        spec, requests = model_spec(work.model), work.draw(work)
        floor = serial_floor(
            spec,
            ceilings,
            requests,
            item_bytes=ITEM_BYTES,
            max_rows=MAX_ROWS,
            kv_tokens=kv_room(spec, memory, ITEM_BYTES),
        )
        rate = sum(request.num_output for request in requests) / floor.seconds
        parts = (floor.prefill_s, floor.weights_s, floor.kv_s, floor.logits_s)
        print(f"{name:<12}{floor.seconds:>10.2f}{rate:>14,.0f}" + "".join(f"{part:>10.3f}" for part in parts))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read-gb-per-s", type=float, metavar="X")
    parser.add_argument("--product-tflops", type=float, metavar="X")
    parser.add_argument("--attention-tflops", type=float, metavar="X", help="default: as products")
    parser.add_argument("--memory-gb", type=float, metavar="X")
    args = parser.parse_args()
    needed = [args.read_gb_per_s, args.product_tflops, args.memory_gb]
    given = [value for value in (*needed, args.attention_tflops) if value is not None]
    if given and (None in needed or min(given) <= 0):
        parser.error("a card needs --read-gb-per-s, --product-tflops and --memory-gb, all above 0")
    return args


def main():
    args = parse_args()
    cards = CARDS
    if args.memory_gb:
        product = args.product_tflops * 1e12
        attention = args.attention_tflops * 1e12 if args.attention_tflops else product
        cards = {"this card": (Ceilings(args.read_gb_per_s * 1e9, product, attention), args.memory_gb * 1e9)}
    for name, (ceilings, memory) in cards.items():
        print(
            f"\n==== {name}: reads {ceilings.read_bytes_per_s / 1e9:,.0f} GB/s, products "
            f"{ceilings.matmul_flops_per_s / 1e12:,.0f} TFLOP/s, {memory / 1e9:,.0f} GB; bfloat16"
        )
        print_steps(ceilings)
        print_workloads(ceilings, memory)


if __name__ == "__main__":
    main()
