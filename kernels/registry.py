"""Every op, by name: what is switched from references to kernels when a rank starts."""

from __future__ import annotations

import importlib
from typing import Any

from shoal.kernels.op import Op

OPS = {
    "activation": "shoal.kernels.ops.activation:activation",
    "activation_and_mul": "shoal.kernels.ops.activation_and_mul:activation_and_mul",
    "append_decode": "shoal.kernels.ops.decode_step:append_decode",
    "best_of_part": "shoal.kernels.ops.best_of_part:best_of_part",
    "decode_attention": "shoal.kernels.ops.decode_attention:decode_attention",
    "embed": "shoal.kernels.ops.embed:embed",
    "gated_linear": "shoal.kernels.ops.gated_linear:gated_linear",
    "greedy": "shoal.kernels.ops.sampling:greedy",
    "layer_norm": "shoal.kernels.ops.layer_norm:layer_norm",
    "linear": "shoal.kernels.ops.linear:linear",
    "linear_add_norm": "shoal.kernels.ops.linear_add_norm:linear_add_norm",
    "logprobs_of": "shoal.kernels.ops.logprobs_of:logprobs_of",
    "paged_attention": "shoal.kernels.ops.paged_attention:paged_attention",
    "penalise": "shoal.kernels.ops.penalise:penalise",
    "prepare_decode": "shoal.kernels.ops.decode_step:prepare_decode",
    "qk_norm_rope_store": "shoal.kernels.ops.qk_norm_rope_store:qk_norm_rope_store",
    "rms_norm": "shoal.kernels.ops.rms_norm:rms_norm",
    "rotary": "shoal.kernels.ops.rotary:rotary",
    "sample": "shoal.kernels.ops.sampling:sample",
    "sample_filtered": "shoal.kernels.ops.sampling:sample_filtered",
    "sample_nucleus": "shoal.kernels.ops.sampling:sample_nucleus",
    "sample_rows": "shoal.kernels.ops.sample_rows:sample_rows",
    "store_kv": "shoal.kernels.ops.store_kv:store_kv",
    "sum_add_norm": "shoal.kernels.ops.sum_add_norm:sum_add_norm",
    "top_ids": "shoal.kernels.ops.top_ids:top_ids",
}


def load_op(name: str) -> Op[Any, Any]:
    """The op of a row of OPS."""
    module, _, attribute = OPS[name].partition(":")
    op: Op[Any, Any] = getattr(importlib.import_module(module), attribute)
    return op


def use_implementation(name: str) -> None:
    """Run every op by its implementation of that name ("reference", "triton"), those without one by their reference."""
    for op in map(load_op, OPS):
        op.use(name if name in op.implementations else "reference")
