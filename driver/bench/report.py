"""The table that a benchmark prints, and what it says of where it ran."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import shoal

_MOST_KERNELS = 20  # printed; the JSON has them all
_PACKAGES = ("ray", "transformers", "numpy")


def collect_versions() -> dict[str, str | None]:
    """Of Shoal, its source and the packages that this process uses; None where there is none to tell."""
    found: dict[str, str | None] = {"shoal": str(shoal.__version__), "commit": _commit()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # on the path, but not installed
            found[name] = None
    return found


def _commit() -> str | None:
    """The commit of the source tree, with a mark if files were changed; None outside a git checkout."""
    root = Path(shoal.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except FileNotFoundError:  # no git here
        return None
    return head.stdout.strip() or None


def print_table(result: dict[str, Any]) -> None:
    """All figures of one result."""
    work, engine, floor = result["workload"], result["engine"], result["floor"]
    print(
        f"\n{work['name']}: {work['num_requests']} requests, {work['num_input_tokens']:,} tokens in, "
        f"{work['num_output_tokens']:,} out, seed {work['workload_seed']}; {result['model']} ({engine['dtype']}) on "
        f"{len(result['ranks'])} x {result['ranks'][0]['device']}\n"
    )
    _print_runs(result)
    print(
        f"\nfloor {floor['seconds']:.3f} s = {floor['output_tokens_per_s']:,.0f} output tok/s: prefill "
        f"{floor['prefill_s']:.3f}, weights {floor['weights_s']:.3f}, KV {floor['kv_s']:.3f}, logits "
        f"{floor['logits_s']:.3f} s; {floor['overlapped_seconds']:.3f} s if reading and computing overlapped"
    )
    rates = result["rates"][0]
    print(
        f"measured on rank 0: read {rates['read_bytes_per_s'] / 1e9:,.0f} GB/s, copy "
        f"{rates['copy_bytes_per_s'] / 1e9:,.0f} GB/s, product {rates['matmul_flops_per_s'] / 1e12:,.2f} TFLOP/s"
    )
    print(f"start-up {result['startup_s']:.1f} s; run 1 / run 2: {result['run1_over_run2']:.2f}")
    if "peer" in result:
        peer = result["peer"]
        print(f"{peer['name']} {peer['version']}: start-up {peer['startup_s']:.1f} s")
    if "error" in result.get("profile", {}):
        print(f"no profile: {result['profile']['error']}")
    elif "profile" in result:
        _print_profile(result["profile"], on_gpu=engine["device"] == "cuda")


def _print_runs(result: dict[str, Any]) -> None:
    rows = (
        ("seconds", "seconds", "{:.2f}"),
        ("output tok/s", "output_tokens_per_s", "{:,.0f}"),
        ("total tok/s", "total_tokens_per_s", "{:,.0f}"),
        ("requests/s", "requests_per_s", "{:,.2f}"),
        ("share of the floor", "share_of_floor", "{:.1%}"),
        ("mean batch", "mean_batch", "{:.1f}"),
        ("steps", "num_steps", "{:,}"),
        ("preemptions", "num_preemptions", "{:,}"),
        ("cached prompt tokens", "num_cached_prompt_tokens", "{:,}"),
        ("KV read, GB/s", "kv_read_gb_per_s", "{:,.1f}"),
    )
    columns = [(f"run {i}", one) for i, one in enumerate(result["runs"], 1)]
    if "peer" in result:
        peer = result["peer"]
        columns += [(f"{peer['name']} {i}", one) for i, one in enumerate(peer["runs"], 1)]
    print(line("", (name for name, _ in columns)))
    for label, key, form in rows:
        print(line(label, (form.format(one[key]) if key in one else "-" for _, one in columns)))


def _print_profile(profile: dict[str, Any], on_gpu: bool) -> None:
    what, idle = ("kernel", "GPU idle") if on_gpu else ("operation", "outside operations")
    print(
        f"\n{profile['num_rows']} rows decoding for {profile['seconds']:.2f} s under the profiler: "
        f"{profile['step_ms']:.2f} ms a step, {idle} {profile['idle_share']:.1%}; without it the host took "
        f"{profile['host_ms_per_step']:.3f} ms a step to enqueue ({profile['num_host_steps']} steps)\n"
    )
    print(f"{what:<72}{'calls':>9}{'total ms':>11}{'share':>8}")
    for kernel in profile["kernels"][:_MOST_KERNELS]:
        name = kernel["name"] if len(kernel["name"]) <= 70 else kernel["name"][:67] + "..."
        print(f"{name:<72}{kernel['calls']:>9,}{kernel['total_ms']:>11.2f}{kernel['share']:>8.1%}")


def line(label: str, cells: Iterable[str]) -> str:
    """A row of the table."""
    return f"{label:<22}" + "".join(f"{cell:>16}" for cell in cells)
