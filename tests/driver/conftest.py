"""An LLM over an engine that counts: no Ray, no model."""

import itertools
import sys
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shoal import LLM
from shoal.driver.detokenize import Detokenizer, StopChecker
from shoal.driver.request import FinishedRequest, RequestStateStats
from shoal.workers.plan import TokenLogprobs

VOCAB, EOS, MAX_LEN, MAX_SEQS = 259, 2, 64, 4
POISON = 200  # a prompt that ends with it is refused by the engine


def make_tokenizer():
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


class CountingEngine:
    """Each token is the one before plus one (and plus the stream of seeded rows); two rows finish at a time."""

    made: "CountingEngine"

    def __init__(self, tokenizer_json):
        self.waiting, self.most, self.submitted, self.aborted, self.calls = {}, 0, [], [], []
        self.closed, self.interrupt_after = 0, None
        self.detokenizer = None if tokenizer_json is None else Detokenizer(tokenizer_json)
        self.resolved = SimpleNamespace(
            max_model_len=MAX_LEN,
            max_num_seqs=MAX_SEQS,
            dtype="float32",
            num_blocks=10,
            block_size=16,
            tensor_parallel_size=2,
            world_size=2,
        )

    window, num_replicas = 2 * MAX_SEQS, 1

    @classmethod
    def start(cls, config, get_model):
        cls.made = cls(get_model()[2])
        return cls.made

    def submit(self, requests):
        assert requests
        for request in requests:
            assert request.number not in self.waiting
            self.waiting[request.number] = request
            self.submitted.append(request)
        self.most = max(self.most, len(self.waiting))

    def collect(self, timeout):
        if self.interrupt_after is not None and len(self.submitted) >= self.interrupt_after:
            self.interrupt_after = None
            taken = list(itertools.islice(self.waiting, 2))
            for number in taken:  # finished, but the answer got lost on its way
                del self.waiting[number]
            raise KeyboardInterrupt
        numbers = list(itertools.islice(self.waiting, 2))[::-1]
        finished = [self.answer(self.waiting.pop(number)) for number in numbers]
        return SimpleNamespace(finished=finished, num_running=len(self.waiting), num_waiting=0, kv_cache_usage=0.5)

    def answer(self, request):
        prompt, params = request.prompt_token_ids, request.params
        if prompt[-1] == POISON:
            return FinishedRequest(request.number, [], "error", error="it cannot fit the KV cache")
        step = 1 + (request.stream % 97 if params.seed is not None else 0)
        ids, reason, stop, text = [], "length", None, None
        checker = StopChecker(self.detokenizer, prompt, params.stop) if params.stop else None
        while len(ids) < min(params.max_tokens, MAX_LEN - len(prompt)):
            ids.append(((ids or prompt)[-1] + step) % VOCAB)
            if ids[-1] in request.stop_ids:
                reason, stop = "stop", None if ids[-1] in request.eos_ids else ids[-1]
                break
            found = checker.feed(ids[-1:]) if checker else None
            if found:
                reason, stop, text = "stop", found.stop_string, found.text
                break
        stats = RequestStateStats(len(ids), request.arrival_time, last_token_ts=time.time())
        result = FinishedRequest(request.number, ids, reason, stop, text, num_cached_tokens=0, metrics=stats)
        if params.logprobs is not None:
            best = [[(token + i) % VOCAB for i in (0, *range(params.logprobs))] for token in ids]
            values = [[-0.5, *(-0.5 * (1 + i) for i in range(params.logprobs))]] * len(ids)
            ranks = np.ones(len(ids), np.int32)
            result.logprobs = TokenLogprobs(np.array(best, np.int32), np.array(values, np.float32), ranks)
        return result

    def abort(self, numbers):
        self.aborted += numbers
        for number in numbers:
            self.waiting.pop(number, None)

    def call_workers(self, method, timeout, args, kwargs):
        self.calls.append((method, timeout, args, kwargs))
        return ["rank 0", "rank 1"]

    def reset_prefix_cache(self, reset_running_requests=False):
        return not reset_running_requests

    def sleep(self, level, mode):
        self.calls.append(("sleep", level, mode))

    def wake_up(self, tags):
        self.calls.append(("wake_up", tags))

    def metrics(self):
        return ["a metric"]

    def shutdown(self):
        self.closed += 1


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def make_llm(monkeypatch, tokenizer):
    def make(generation_config=None, **arguments):
        spec = SimpleNamespace(vocab_size=VOCAB, eos_token_ids=(EOS, 5))
        resolved = SimpleNamespace(spec=spec, generation_config=generation_config or {})
        engine, config = ModuleType("engine"), ModuleType("model_config")
        engine.start_engines = lambda config, replicas, get_model: CountingEngine.start(config, get_model)
        text = tokenizer.backend_tokenizer.to_str()
        config.resolve_all = lambda config: (
            resolved,
            *((None, None) if config.skip_tokenizer_init else (tokenizer, text)),
        )
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "shoal.driver.fleet", engine)
            patch.setitem(sys.modules, "shoal.driver.model_config", config)
            return LLM("some-model", **arguments)

    return make


@pytest.fixture
def llm(make_llm):
    return make_llm()


@pytest.fixture
def counting():
    """The engine's class; `counting.made` is the engine made last."""
    return CountingEngine
