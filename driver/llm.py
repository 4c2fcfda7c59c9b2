"""LLM: offline generation. Calls and meanings are vLLM's; docs say where they are not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shoal.driver.chat import ChatRenderer, ContentFormat, check_conversation, split_conversations
from shoal.driver.client import Client, UseTqdm
from shoal.driver.config import Count, EngineConfig, make_config
from shoal.driver.outputs import BeamSearchOutput, RequestOutput
from shoal.driver.params import BeamSearchParams, SamplingParams
from shoal.driver.rows import OnError, RowBatch

if TYPE_CHECKING:
    from shoal.driver.engine import Engine
    from shoal.driver.fleet import Fleet
    from shoal.driver.metrics import Metric
    from shoal.driver.resolve import ResolvedConfig
    from shoal.workers.models.spec import ModelSpec

SLEEP_MODES = ("abort", "wait", "keep")
WAKE_TAGS = ("weights", "kv_cache", "scheduling")
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model, loaded on a Ray cluster (or a local Ray that it starts), that answers lists of prompts.

    Every keyword but `replicas` is a field of `EngineConfig`: a number of engines that share the rows, or "auto" for as
    many as the cluster has room for, at any time. One thread at a time may call it. `shutdown()`, or leaving it as a
    context manager, ends its actors and frees their memory.
    """

    _engine: Engine | Fleet | None = None  # also where __init__ failed: __del__ runs then too

    def __init__(
        self,
        model: str,
        *,
        runner: str = "auto",
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        replicas: Count = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        chat_template: str | None = None,
        seed: int | None = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        hf_token: str | None = None,
        hf_overrides: dict[str, Any] | Callable[[Any], Any] | None = None,
        kv_cache_memory_bytes: int | None = None,
        logits_processors: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads the model: `model` is a local folder, one .gguf file, or a hub id.

        Raises ValueError for a wrong value or a model that cannot be used, TypeError for an unknown keyword, and
        RuntimeError when the engine cannot start.
        """
        config = make_config(
            model=model,
            runner=runner,
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            chat_template=chat_template,
            seed=0 if seed is None else seed,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            hf_token=hf_token,
            hf_overrides=hf_overrides,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            logits_processors=list(logits_processors or ()),
            **kwargs,
        )
        self._start(config, replicas)

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig, replicas: Count = 1) -> LLM:
        """An LLM from a ready EngineConfig."""
        llm = cls.__new__(cls)
        llm._start(engine_args, replicas)
        return llm

    def _start(self, config: EngineConfig, replicas: Count) -> None:
        # Here, not at the top: `import shoal` stays free of Ray, and of transformers until a model is resolved.
        from shoal.driver.fleet import start_engines
        from shoal.driver.model_config import resolve_all

        with ThreadPoolExecutor(1) as pool:  # Ray's processes start while the model's files are read
            resolving = pool.submit(resolve_all, config)
            engine = start_engines(config, replicas, resolving.result)
        self._engine = engine
        model, self._tokenizer, tokenizer_json = resolving.result()
        self.config: EngineConfig = config
        """What the user said."""
        self.resolved: ResolvedConfig = engine.resolved
        """What the engine made of it: device, dtype, max_model_len, max_num_seqs, KV blocks."""
        self.model_config: ModelSpec = model.spec
        """The model's numbers."""
        self._client = Client(
            engine,
            config,
            model.spec,
            model.generation_config,
            self._tokenizer,
            tokenizer_json,
            max_model_len=engine.resolved.max_model_len,
            max_num_seqs=engine.resolved.max_num_seqs * engine.num_replicas,
        )

    def generate(
        self,
        prompts: Any,
        sampling_params: Params = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Continues each prompt: str, list of token ids, TextPrompt or TokensPrompt; one or many. Order is kept.

        `sampling_params`: for all prompts, or a list with one for each; None: the model's generation_config.
        `on_error`: "raise" aborts the call at the first prompt that cannot be answered (the message has its index);
        "return" puts a RequestOutput with `error` set and no outputs in its place. `use_tqdm` may be a callable that
        makes the bar. Raises TypeError and ValueError for bad prompts and parameters.
        """
        self._require_open()
        _refuse(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        batch = self._client.batch(
            prompts, sampling_params, priority=priority, tokenization_kwargs=tokenization_kwargs, on_error=on_error
        )
        return self._client.run(batch, use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
        *,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Answers conversations: one list of messages, or a list of such lists. The rest is as in `generate`.

        A template's text has its special tokens already, so none are added when it is tokenized.
        """
        self._require_open()
        _refuse(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        renderer = ChatRenderer(
            self._tokenizer,
            chat_template or self.config.chat_template,
            chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            allowed_folder=self.config.allowed_local_path,
        )
        batch = self._chat_batch(messages, sampling_params, renderer, tokenization_kwargs, on_error)
        return self._client.run(batch, use_tqdm)

    def enqueue(
        self,
        prompts: Any,
        sampling_params: Params = None,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        use_tqdm: UseTqdm = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
        *,
        on_error: OnError = "raise",
    ) -> list[str]:
        """Begins what `generate` does and returns the request ids; `wait_for_completion` gives the outputs."""
        self._require_open()
        _refuse(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        batch = self._client.batch(
            prompts, sampling_params, priority=priority, tokenization_kwargs=tokenization_kwargs, on_error=on_error
        )
        return self._client.enqueue(batch, use_tqdm)

    def enqueue_chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
        *,
        on_error: OnError = "raise",
    ) -> list[str]:
        """Begins what `chat` does and returns the request ids."""
        self._require_open()
        _refuse(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        renderer = ChatRenderer(
            self._tokenizer,
            chat_template or self.config.chat_template,
            chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            allowed_folder=self.config.allowed_local_path,
        )
        batch = self._chat_batch(messages, sampling_params, renderer, tokenization_kwargs, on_error)
        return self._client.enqueue(batch, use_tqdm)

    def wait_for_completion(
        self, output_type: type[RequestOutput] | None = None, *, use_tqdm: UseTqdm = True
    ) -> list[RequestOutput]:
        """Outputs of everything enqueued, by request id; [] when nothing is."""
        self._require_open()
        if output_type not in (None, RequestOutput):
            raise TypeError(f"output_type must be RequestOutput or None, got {output_type!r}")
        return self._client.wait(use_tqdm)

    def beam_search(
        self,
        prompts: Any,
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: UseTqdm = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt, best first; `concurrency_limit` prompts at a time."""
        self._require_open()
        _refuse(lora_request=lora_request)
        if not isinstance(params, BeamSearchParams):
            raise TypeError(f"params must be BeamSearchParams, but got {type(params).__name__}")
        if concurrency_limit is not None and concurrency_limit < 1:
            raise ValueError(f"concurrency_limit must be at least 1, got {concurrency_limit}")
        return self._client.beam_search(prompts, params, use_tqdm, concurrency_limit)

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        self._require_open()
        if self._tokenizer is None:
            raise ValueError("Tokenizer not available when `skip_tokenizer_init=True`")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when given none: the model's generation_config over SamplingParams()."""
        self._require_open()
        return self._client.default_params()

    def get_world_size(self, include_dp: bool = True) -> int:
        """Ranks of all replicas that are up now, or of one."""
        return self.resolved.world_size * (self._require_open().num_replicas if include_dp else 1)

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Calls a worker's method by name, or a function of the worker, on every rank between steps.

        Results by rank, replica by replica; later ones miss it. TimeoutError after `timeout` s; raises ranks' errors.
        """
        return self._require_open().call_workers(method, timeout, tuple(args), dict(kwargs or {}))

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """`func(model)` on every rank, with that rank's torch module; results by rank."""
        return self._require_open().call_workers("apply_model", None, (func,), {})

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forgets cached prefixes. False while requests hold blocks, unless these may be computed again."""
        _refuse(reset_connector=reset_connector or None)
        return self._require_open().reset_prefix_cache(reset_running_requests)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Frees memory between uses. 0: only stops scheduling; 1: weights go to host memory, KV is dropped; 2: both go.

        `mode` says what becomes of requests at work: "abort", "wait" for them, or "keep" them for after `wake_up`.
        """
        engine = self._require_open()
        if not self.config.enable_sleep_mode:
            raise ValueError("sleep() needs the engine argument enable_sleep_mode=True, got False")
        if level not in (0, 1, 2):
            raise ValueError(f"level must be 0, 1 or 2, got {level!r}")
        if mode not in SLEEP_MODES:
            raise ValueError(f"mode must be one of {', '.join(SLEEP_MODES)}, got {mode!r}")
        engine.sleep(level, mode)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Undoes `sleep`, in whole or for some of "weights", "kv_cache", "scheduling"."""
        engine = self._require_open()
        if not self.config.enable_sleep_mode:
            raise ValueError("wake_up() needs the engine argument enable_sleep_mode=True, got False")
        for tag in tags or ():
            if tag not in WAKE_TAGS:
                raise ValueError(f"tags must be among {', '.join(WAKE_TAGS)}, got {tag!r}")
        engine.wake_up(tags)

    def get_metrics(self) -> list[Metric]:
        """Counters, gauges and histograms; of replicas the sums, and each one's own with the label "replica"."""
        engine = self._require_open()
        if self.config.disable_log_stats:
            raise AssertionError("Stat logging disabled: get_metrics() needs disable_log_stats=False")
        return engine.metrics()

    def shutdown(self) -> None:
        """Ends the engine's actors and frees what they hold. Other methods then raise RuntimeError."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # at the interpreter's end Ray's own exit handlers clean up
            self.shutdown()

    def __repr__(self) -> str:
        if self._engine is None:
            return "LLM(shut down)"
        r = self.resolved
        return (
            f"LLM(model={self.config.model!r}, dtype={r.dtype!r}, tensor_parallel_size={r.tensor_parallel_size}, "
            f"kv_cache_tokens={r.num_blocks * r.block_size})"
        )

    @property
    def llm_engine(self) -> Engine | Fleet:
        """The replica, or the replicas, behind it; RuntimeError once it is shut down."""
        return self._require_open()

    def _require_open(self) -> Engine | Fleet:
        if self._engine is None:
            raise RuntimeError("the engine is shut down: make a new LLM")
        return self._engine

    def _chat_batch(
        self,
        messages: Any,
        params: Params,
        renderer: ChatRenderer,
        tokenization_kwargs: Mapping[str, Any] | None,
        on_error: OnError,
    ) -> RowBatch:
        return self._client.batch(
            messages,
            params,
            tokenization_kwargs=tokenization_kwargs,
            on_error=on_error,
            split=split_conversations,
            parse=renderer,
            check=check_conversation,
            special_tokens=False,
            noun="conversation",
        )


def _refuse(**arguments: object) -> None:
    """ValueError for arguments whose feature this version does not have."""
    what = {"lora_request": "LoRA", "mm_processor_kwargs": "multimodal input", "reset_connector": "KV connectors"}
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"Got {name}={value!r:.80} but {what[name]} is not supported by this version of Shoal")
