"""Client: what stands between the LLM class and one engine. It numbers requests, checks whole calls and runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from shoal.driver.beam_search import BeamSearcher
from shoal.driver.binding import Binder, default_params
from shoal.driver.detokenize import Detokenizer, SlowDetokenizer, TextDecoder
from shoal.driver.feed import EngineClient, Feed
from shoal.driver.inputs import InputProcessor, Prompt, check_form, parse_prompt, split_prompts
from shoal.driver.outputs import BeamSearchOutput, RequestOutput
from shoal.driver.params import BeamSearchParams, SamplingParams
from shoal.driver.progress import Progress
from shoal.driver.rows import OnError, RowBatch, RowTools

if TYPE_CHECKING:
    from shoal.driver.config import EngineConfig

UseTqdm = bool | Callable[..., Any]


class Spec(Protocol):
    """What the client needs to know of the model."""

    @property
    def vocab_size(self) -> int:
        """Ids the model can take and sample."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids of the model's config."""


class Client:
    """One engine's user. For one thread."""

    def __init__(
        self,
        engine: EngineClient,
        config: EngineConfig,
        spec: Spec,
        generation_config: Mapping[str, Any],
        tokenizer: Any,
        tokenizer_json: str | None,
        *,
        max_model_len: int,
        max_num_seqs: int,
    ) -> None:
        """`tokenizer`: a Hugging Face one or None; `tokenizer_json`: its fast backend, serialized, or None."""
        eos = generation_config.get("eos_token_id")
        others = () if eos is None else [eos] if isinstance(eos, int) else eos
        decoder: TextDecoder | None = None
        if tokenizer_json is not None:
            decoder = Detokenizer(tokenizer_json)
        elif tokenizer is not None:
            decoder = SlowDetokenizer(tokenizer)
        self.config = config
        self.decoder = decoder
        self.max_model_len, self.max_num_seqs = max_model_len, max_num_seqs
        self.feed = Feed(engine)
        self.inputs = InputProcessor(tokenizer, tokenizer_json, spec.vocab_size, max_model_len)
        self.binder = Binder(
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            max_logprobs=config.max_logprobs,
            seed=config.seed,
            tokenizer=tokenizer,
            has_fast_tokenizer=tokenizer_json is not None,
            eos_token_ids=[*spec.eos_token_ids, *others],
        )
        self._tools = RowTools(self.inputs, self.binder, decoder, log_stats=not config.disable_log_stats)
        self._generation_config = generation_config
        self._next_request = 0
        self._next_sequence = 0
        self._queued: list[RowBatch] = []

    def default_params(self) -> SamplingParams:
        """What generation_config says, over SamplingParams()."""
        return default_params(self._generation_config)

    def batch(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
        split: Callable[[Any], Sequence[Any]] = split_prompts,
        parse: Callable[[Any], Prompt] = parse_prompt,
        check: Callable[[Any], None] = check_form,
        special_tokens: bool = True,
        noun: str = "prompt",
    ) -> RowBatch:
        """A call's rows. Raises what is wrong with the call as a whole, and cheap-to-see faults of single rows."""
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error must be 'raise' or 'return', got {on_error!r}")
        rows = split(prompts)
        per_row = self._params(params, len(rows))
        priorities = self._priorities(priority, len(rows))
        options = self.inputs.options(tokenization_kwargs, special_tokens)
        if on_error == "raise":
            for index in range(len(rows)):
                try:
                    check(rows[index])
                except (TypeError, ValueError) as error:
                    error.args = (f"{noun} {index}: {error}",)
                    raise
        batch = RowBatch(
            self._tools,
            rows,
            per_row,
            parse=parse,
            options=options,
            priorities=priorities,
            on_error=on_error,
            numbers=(self._next_request, self._next_sequence),
            noun=noun,
        )
        self._next_request += len(rows)
        self._next_sequence += batch.num_sequences
        return batch

    def run(self, batch: RowBatch, use_tqdm: UseTqdm) -> list[RequestOutput]:
        """Runs a batch to its end: outputs in input order."""
        with Progress(use_tqdm, batch.num_sequences) as progress:
            self.feed.run([batch], progress)
        return _outputs(batch)

    def enqueue(self, batch: RowBatch, use_tqdm: UseTqdm) -> list[str]:
        """Makes a batch ready and starts it; its request ids. `wait` gives the outputs."""
        with Progress(use_tqdm, len(batch.request_ids), "Adding requests") as progress:
            self.feed.start(batch, progress)
        self._queued.append(batch)
        return batch.request_ids

    def wait(self, use_tqdm: UseTqdm) -> list[RequestOutput]:
        """Outputs of all enqueued batches, by request id. However it ends, none stays enqueued."""
        batches, self._queued = self._queued, []
        with Progress(use_tqdm, sum(batch.num_sequences for batch in batches)) as progress:
            self.feed.run(batches, progress)
        return [output for batch in batches for output in _outputs(batch)]

    def beam_search(
        self, prompts: Any, params: BeamSearchParams, use_tqdm: UseTqdm, concurrency_limit: int | None
    ) -> list[BeamSearchOutput]:
        """Best sequences of each prompt."""
        rows = split_prompts(prompts)
        if not len(rows):
            raise ValueError("You must pass at least one prompt")
        parsed = []
        for index in range(len(rows)):
            row = rows[index]
            if isinstance(row, Mapping) and row.get("prompt_embeds") is not None:
                raise NotImplementedError("Embedding prompt not supported for beam search")
            try:
                prompt = parse_prompt(row)
                (ids,) = self.inputs.tokenize([prompt], self.inputs.options(None))
                if isinstance(ids, Exception):
                    raise ids
            except (TypeError, ValueError) as error:
                error.args = (f"prompt {index}: {error}",)
                raise
            parsed.append((prompt, ids))
        # More prompts at once than run together would only push each other's prefixes out of the cache.
        group = max(1, self.max_num_seqs // params.beam_width) if concurrency_limit is None else concurrency_limit
        with Progress(use_tqdm, len(rows), "Beam search") as progress:
            return BeamSearcher(self.feed, self._tools, params, self._take_number).run(parsed, group, progress)

    def _take_number(self) -> int:
        self._next_sequence += 1
        return self._next_sequence - 1

    def _params(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> SamplingParams | Sequence[SamplingParams]:
        if params is None:
            return self.default_params()
        if isinstance(params, SamplingParams):
            return params
        if isinstance(params, (str, bytes, Mapping)) or not isinstance(params, Sequence):
            raise TypeError(f"params must be SamplingParams or a list of them, but got {type(params).__name__}")
        for one in params:
            if not isinstance(one, SamplingParams):
                raise TypeError(f"params must be SamplingParams or a list of them, but got {type(one).__name__} in it")
        if len(params) != count:
            raise ValueError(f"The lengths of prompts ({count}) and params ({len(params)}) must be the same.")
        return params

    def _priorities(self, priority: Sequence[int] | None, count: int) -> Sequence[int] | None:
        if priority is None:
            return None
        if len(priority) != count:
            raise ValueError(f"The lengths of prompts ({count}) and priority ({len(priority)}) must be the same.")
        for one in priority:
            if isinstance(one, bool) or not hasattr(one, "__index__"):
                raise TypeError(f"priority must be a list of integers, got {one!r} in it")
        if self.config.scheduling_policy != "priority" and any(priority):
            raise ValueError(
                "Got a priority but Priority scheduling is not enabled: pass scheduling_policy='priority' to LLM"
            )
        return [int(one) for one in priority]


def _outputs(batch: RowBatch) -> list[RequestOutput]:
    outputs = [output for output in batch.outputs if output is not None]
    assert len(outputs) == len(batch.outputs), "a done batch has all its outputs"
    return outputs
