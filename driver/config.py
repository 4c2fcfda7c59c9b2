"""EngineConfig: what the user said, checked as far as it can be without looking at the model or the cluster."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shoal.driver.secrecy import is_secret

GIB = 1 << 30

# Names that users of vLLM know and this version does not do. Refused by name, never ignored.
NOT_SUPPORTED = {
    "quantization": "quantized execution",
    "quantization_config": "quantized execution",
    "enable_lora": "LoRA",
    "max_loras": "LoRA",
    "max_lora_rank": "LoRA",
    "speculative_config": "speculative decoding",
    "spec_method": "speculative decoding",
    "spec_model": "speculative decoding",
    "spec_tokens": "speculative decoding",
    "structured_outputs_config": "structured outputs",
    "pooler_config": "pooling models",
    "convert": "pooling models",
    "limit_mm_per_prompt": "multimodal inputs",
    "mm_processor_kwargs": "multimodal inputs",
    "mm_processor_cache_gb": "multimodal inputs",
    "enable_prompt_embeds": "prompt embeddings",
    "cpu_offload_gb": "weights in host memory",
    "kv_offloading_size": "KV in host memory",
    "data_parallel_size": "this name for replicas= (of LLM, and --replicas)",
    "compilation_config": "compiled execution",
    "cudagraph_capture_sizes": "CUDA graphs",
    "attention_backend": "choice of attention kernels",
}


Count = int | Literal["auto"]
"""Of replicas; auto: as many as the cluster has room for, at any time."""


class UnknownArgumentError(TypeError, ValueError):
    """A keyword that EngineConfig does not know: TypeError as a wrong call is, ValueError as every config error."""


class EngineConfig(BaseModel):
    """Engine arguments, under vLLM's names. None means: chosen from the model and the device."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,  # they are the help of the command line's flags
    )

    model: str
    """Local folder, one .gguf file, or a hub id; an existing local path wins."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; default: the model's own."""
    tokenizer_mode: Literal["auto", "hf", "slow"] = "auto"
    """"slow" asks for the Python tokenizer where a model has both."""
    skip_tokenizer_init: bool = False
    """No tokenizer at all: token ids in, token ids out."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model's config or tokenizer."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    tokenizer_revision: str | None = None
    """The same for the tokenizer; default: `revision`."""
    hf_token: str | None = Field(default=None, repr=False)
    """Hub token; default: what huggingface_hub finds (HF_TOKEN)."""
    hf_overrides: dict[str, Any] | Callable[[Any], Any] | None = None
    """Changes to the model's config: a dict (nested dicts go into nested configs), or a function config -> config."""
    download_dir: str | None = None
    """Hub cache folder; default: huggingface_hub's (HF_HOME)."""
    load_format: Literal["auto", "safetensors", "pt", "gguf", "dummy"] = "auto"
    """How weights are read; "dummy" makes random ones."""
    runner: Literal["auto", "generate"] = "auto"
    """What the model is used for."""
    dtype: Literal["auto", "float32", "float", "float16", "half", "bfloat16"] = "auto"
    """Of weights and activations. auto: the checkpoint's own; float32 checkpoints and GGUF become bfloat16 on a GPU."""
    kv_cache_dtype: Literal["auto"] = "auto"
    """The KV cache has the model's dtype."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs when the Ray cluster has any, else CPU."""
    seed: int = Field(default=0, ge=0)
    """Of everything random that a request does not seed itself."""
    chat_template: str | None = None
    """Jinja text or a path to it, in place of the tokenizer's."""
    allowed_local_path: str | None = None
    """Folder whose files chat_template and a job's prompt_template may name, beside the working directory."""
    generation_config: str = "auto"
    """"auto": generation_config.json beside the model gives default sampling parameters; "vllm" or "shoal": none does;
    else a folder that holds one."""
    override_generation_config: dict[str, Any] = Field(default_factory=dict)
    """Keys laid over generation_config."""
    max_logprobs: int = Field(default=20, ge=-1)
    """Most logprobs a request may ask for; -1: no limit."""
    logits_processors: list[Any] = Field(default_factory=list)
    """Classes, or "module:Class" names, that change logits (interface: shoal.workers.sampler.LogitsProcessor)."""

    max_model_len: int | None = Field(default=None, ge=-1)
    """Longest prompt + output. None: from the model; -1: the longest that fits the KV cache."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Rows that run at once. None: 256, and 1024 on GPUs of 70 GiB or more."""
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Tokens a step may compute. None: 2048 on a CPU, 8192 on a GPU, 16384 on GPUs of 70 GiB or more."""
    long_prefill_token_threshold: int = Field(default=0, ge=0)
    """Longest chunk of one prompt a step takes; 0: no limit but the budget."""
    block_size: int = Field(default=16, ge=1, le=1024)
    """Tokens a KV block holds."""
    enable_prefix_caching: bool = True
    """Reuse KV blocks of equal prefixes."""
    enable_chunked_prefill: bool = True
    """Let a prompt enter over several steps. False: max_num_batched_tokens must cover max_model_len."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """Order of admission: input order, or `priority` (lower first) and then input order."""
    async_scheduling: bool = True
    """Plan the next step before the last one's results are back. False is `lookahead=0`."""
    lookahead: int = Field(default=2, ge=0, le=16)
    """Plans in flight beyond those that run (one in each pipeline stage). 0: one plan at a time."""
    decode_burst: int | None = Field(default=None, ge=1, le=256)
    """Decode steps granted in one plan when nothing else is to do. None: 8; 4 on a CPU; 1 with pipeline stages, which
    work on one step of a burst in turn."""
    gpu_memory_utilization: float = Field(default=0.92, gt=0, le=1)
    """Share of the GPU's whole memory this engine may use."""
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """KV cache of each rank, in bytes, in place of what profiling finds."""
    num_gpu_blocks_override: int | None = Field(default=None, ge=1)
    """KV blocks, whatever memory there is (tests of preemption)."""
    enforce_eager: bool = False
    """Launch decode steps kernel by kernel on a GPU, in place of recorded CUDA graphs."""
    enable_sleep_mode: bool = False
    """Allow sleep() and wake_up()."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each layer; one Ray worker each."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Stages of consecutive layers, each of tensor_parallel_size ranks, for models beyond one node."""
    disable_custom_all_reduce: bool = False
    """Sum over tensor-parallel ranks by NCCL alone, where GPUs of one host could write to each other's memory."""
    distributed_executor_backend: Literal["ray"] | None = None
    """Ray is the only one."""
    address: str | None = None
    """Ray cluster to join when this process has none; default: RAY_ADDRESS, else a local one is started."""
    step_channel: Literal["auto", "socket", "ray"] = "auto"
    """How plans travel: a socket each rank (auto), or plain actor calls."""
    placement_timeout_s: float = Field(default=30.0, gt=0)
    """How long to wait for the cluster to place the ranks before saying what is missing; 10 seconds at most for what
    its nodes could not hold if they were empty."""
    wait_for_nodes: bool = False
    """The cluster may grow (autoscaling): wait all of placement_timeout_s, also for what its nodes cannot hold now."""
    tensor_parallel_across_nodes: bool = False
    """Let the tensor-parallel ranks of a stage be on several nodes, where one has no place for all of them."""
    step_timeout_s: float | None = Field(default=None, gt=0)
    """Seconds after which a step that does not end counts as the ranks' death; four times that for the first steps of
    new ranks, which compile. None: 300 on a GPU, 3600 on a CPU."""
    max_rank_restarts: int = Field(default=10, ge=0)
    """Times in a row, with no request finished in between, that dead ranks, or a dead driver, are made anew; then the
    engine is dead."""
    restart_backoff_s: float = Field(default=0.5, ge=0)
    """Wait before the second restart in a row; doubled each time, up to 30 seconds."""
    max_solo_deaths: int = Field(default=3, ge=1)
    """Times the ranks must die with a request alone in them before that request ends with an error."""

    disable_log_stats: bool = False
    """True: no metrics in outputs nor for Prometheus, get_metrics() refuses."""
    use_tqdm_on_load: bool = True
    """A bar while weights load."""

    @field_validator("model")
    @classmethod
    def _model_named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("model must name a folder, a .gguf file or a hub id, got an empty string")
        return os.path.expanduser(value)

    @field_validator("allowed_local_path")
    @classmethod
    def _folder_there(cls, value: str | None) -> str | None:
        if value is not None and not os.path.isdir(os.path.expanduser(value)):
            raise ValueError(f"allowed_local_path must be a folder, got {value!r}")
        return value

    @field_validator("async_scheduling", "enable_prefix_caching", "enable_chunked_prefill", mode="before")
    @classmethod
    def _none_is_default(cls, value: Any) -> Any:
        return True if value is None else value

    @model_validator(mode="after")
    def _budgets(self) -> EngineConfig:
        tokens, rows = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and rows is not None and tokens < rows:
            raise ValueError(
                f"max_num_batched_tokens ({tokens}) must be greater than or equal to max_num_seqs ({rows}): "
                "a step computes at least one token of every running row"
            )
        if self.max_model_len == 0:
            raise ValueError("max_model_len must be at least 1, or -1 for the longest that fits, got 0")
        return self


def make_config(**arguments: Any) -> EngineConfig:
    """EngineConfig from keyword arguments of either vLLM generation; errors name the field, its value and what fits."""
    try:
        return EngineConfig(**_translate(arguments))
    except ValidationError as error:
        # Short and in our words: pydantic's own text lists every branch of a union.
        raise ValueError("invalid engine arguments: " + "; ".join(map(_say, error.errors()))) from None


def _translate(arguments: dict[str, Any]) -> dict[str, Any]:
    """Aliases of older names, refusals by name, and the nearest name for a wrong one."""
    data = dict(arguments)
    if "swap_space" in data:
        warnings.warn("swap_space has no effect: preempted rows are recomputed", DeprecationWarning, stacklevel=4)
        del data["swap_space"]
    if "task" in data:
        warnings.warn("task= is the old name of runner=", DeprecationWarning, stacklevel=4)
        data.setdefault("runner", data.pop("task"))
    if data.get("convert") in (None, "auto", "none"):
        data.pop("convert", None)
    for name in set(data) - set(EngineConfig.model_fields):
        if name not in NOT_SUPPORTED:
            near = difflib.get_close_matches(name, [*EngineConfig.model_fields, *NOT_SUPPORTED], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnknownArgumentError(f"unknown engine argument {name!r}{hint}")
        value = data.pop(name)
        if value not in (None, False, 0) and not (name == "data_parallel_size" and value == 1):
            raise ValueError(f"{name}={value!r}: {NOT_SUPPORTED[name]} is not supported by this version of Shoal")
    return data


def _say(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}{got(error)}" if where else message


def got(error: Any) -> str:
    """What a field was given, for an error's message; nothing where it may be a secret."""
    hidden = any(is_secret(str(part)) for part in error["loc"])
    return "" if hidden else f" (got {_short(error['input'])})"


def check_count(value: Any) -> Count:
    """A number of replicas, or "auto". ValueError for anything else."""
    if value == "auto":
        return "auto"
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'replicas must be a number from 1 on, or "auto", got {value!r}')
    return value


def cpu_kvcache_bytes() -> int:
    """KV cache of a CPU rank: SHOAL_CPU_KVCACHE_SPACE or VLLM_CPU_KVCACHE_SPACE in GiB, default 4."""
    for name in ("SHOAL_CPU_KVCACHE_SPACE", "VLLM_CPU_KVCACHE_SPACE"):
        text = os.environ.get(name)
        if text is None:
            continue
        try:
            gib = float(text)
        except ValueError:
            gib = -1.0
        if not 0 < gib < float("inf"):
            raise ValueError(f"{name} must be a positive number of GiB, got {text!r}")
        return int(gib * GIB)
    return 4 * GIB


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
