"""What all tests share: Ray's settings, tiny checkpoints, and an engine without Ray."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import secrets
import sys
import tempfile
import threading
import zlib

# Before anything imports ray: its token authentication turns on once a token file exists anywhere it looks.
_TOKEN = pathlib.Path(tempfile.mkdtemp(prefix="shoal-tests-")) / "ray_token"
_TOKEN.write_text(secrets.token_hex(32))
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ["RAY_AUTH_TOKEN_PATH"] = str(_TOKEN)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["SHOAL_CPU_KVCACHE_SPACE"] = "0.25"

import pytest  # noqa: E402

_ALONE = ("data", "jobs", "faults")  # what is in these kills processes, times them and looks for those that are left


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Where two processes share the tests, a file's stay in one, with the engines they share; examples share none."""
    here = pathlib.Path(__file__).parent
    for item in items:
        path = item.path.relative_to(here)
        if path.parts[0] in _ALONE:
            item.add_marker("alone")
        if path.name != "test_examples.py":
            item.add_marker(pytest.mark.xdist_group(str(path)))


FAMILIES = ("llama", "qwen3", "granite", "gpt2", "opt", "opt-post-norm")
VOCAB = 384


def _config(family: str, **changes):
    import transformers

    common = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    gqa = common | {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    if family == "llama":
        return transformers.LlamaConfig(**gqa | changes)
    if family == "mistral":
        return transformers.MistralConfig(**gqa | {"sliding_window": None} | changes)
    if family == "qwen3":
        return transformers.Qwen3Config(**gqa | {"head_dim": 16, "tie_word_embeddings": True} | changes)
    if family == "granite":
        multipliers = {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.0,
        }
        return transformers.GraniteConfig(**gqa | multipliers | changes)
    if family == "gpt2":
        return transformers.GPT2Config(
            **common | {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256} | changes
        )
    opt = common | {
        "hidden_size": 48,
        "ffn_dim": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 48,
    }
    if family == "opt-post-norm":
        opt |= {"do_layer_norm_before": False, "word_embed_proj_dim": 32}
    return transformers.OPTConfig(**opt | changes)


def _tokenizer():
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<bos>", "<eos>", *alphabet]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("a", "n")]
    names += ["".join(pair) for pair in merges]
    names += [f"<extra{i}>" for i in range(VOCAB - len(names))]
    model = tokenizers.models.BPE({name: i for i, name in enumerate(names)}, merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=256
    )
    fast.chat_template = (
        "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
    )
    return fast


@pytest.fixture
def overcommit(monkeypatch) -> None:
    """Engines of this process let requests in as long as there is room now: a small cache then makes preemptions."""
    from shoal.driver.forecast import Admission

    monkeypatch.setattr(Admission, "lets_in", lambda self, *_: True)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """tiny_checkpoint(family, **config changes) -> folder of a random float32 checkpoint with a tokenizer."""
    made: dict[str, str] = {}

    def make(family: str, *, std: float = 0.15, dtype: str = "float32", **changes) -> str:
        import torch
        import transformers

        key = repr((family, std, dtype, sorted(changes.items())))
        if key not in made:
            folder = str(tmp_path_factory.mktemp(family))
            torch.manual_seed(zlib.crc32(key.encode()))  # the same weights whichever tests run
            config = _config(family, **changes)
            config.initializer_range = std  # spread logits, so that greedy choices are not ties
            config.init_std = std
            model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
            model.generation_config = transformers.GenerationConfig(eos_token_id=2, bos_token_id=1, pad_token_id=0)
            model.save_pretrained(folder)
            _tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


class LocalEngine:
    """The engine in this process: the same scheduler, frames, runner and stop strings, without Ray.

    On the CPU unless device="cuda" is asked for. Ops are switched for all of the process: the newest engine runs.
    """

    def __init__(self, config, model, tokenizer_json) -> None:
        from collections import deque
        from dataclasses import replace

        import torch

        from shoal.driver import resolve
        from shoal.driver.actor import Collected
        from shoal.driver.draft import SchedulerLimits
        from shoal.driver.model_config import resolve_dtype
        from shoal.driver.request import finished_request
        from shoal.driver.scheduler import Scheduler
        from shoal.driver.stop_strings import StopStrings
        from shoal.kernels.registry import use_implementation
        from shoal.workers.config import WorkerConfig
        from shoal.workers.parallel import TensorParallel
        from shoal.workers.runner import ModelRunner

        self._collected, self._to_finished, self._inflight, self._out = Collected, finished_request, deque(), []
        length = resolve.check_model_len(config, model.spec)
        rows, tokens = resolve.resolve_budgets(config, length, [{}])
        device = "cuda" if config.device == "cuda" else "cpu"
        use_implementation("triton" if device == "cuda" else "reference")
        dtype = resolve_dtype(config.dtype, model.spec, device, model.load.load_format == "gguf")
        worker = WorkerConfig(
            model.spec, model.load, 0, 1, device, dtype, config.block_size, length, rows, tokens, config.enforce_eager
        )
        torch.set_num_threads(1)
        with torch.inference_mode():
            self.runner = ModelRunner(worker, TensorParallel(0, 1), tuple(config.logits_processors))
            self.runner.load()
            blocks, length = resolve.count_blocks(
                config, config.kv_cache_memory_bytes or 64 << 20, self.runner.block_bytes(), length
            )
            self.runner.allocate_kv(blocks)
        steady = bool(config.logits_processors)
        burst = 1 if steady else config.decode_burst or 4
        limits = SchedulerLimits(
            length, rows, tokens, blocks, config.block_size, burst, config.long_prefill_token_threshold,
            config.enable_prefix_caching, config.enable_chunked_prefill, config.scheduling_policy == "priority",
        )  # fmt: skip
        self._stops = StopStrings(tokenizer_json)
        self.scheduler = Scheduler(limits, self._stops.check)
        self.lookahead = config.lookahead if config.async_scheduling and not steady else 0
        self.resolved = resolve.ResolvedConfig(
            config.model, model.spec.architecture, device, dtype, 1, length, rows, tokens, config.block_size, blocks,
            blocks * self.runner.block_bytes(), self.runner.weight_bytes(), 0.0, burst, self.lookahead,
        )  # fmt: skip
        assert replace(worker) == worker

    @classmethod
    def start(cls, config, get_model):
        model, _, tokenizer_json = get_model()
        return cls(config, model, tokenizer_json)

    num_replicas = 1

    @property
    def window(self):
        return 2 * self.resolved.max_num_seqs

    def submit(self, requests) -> None:
        for request in requests:
            self.scheduler.add(request)

    def collect(self, timeout: float):
        while not self._out and self.scheduler.num_unfinished:
            self._step()
        self._take(self.scheduler.take_ended())
        out, self._out = self._out, []
        pool = self.scheduler.kv.pool
        return self._collected(
            out, 0, len(self.scheduler.running), self.scheduler.num_waiting, pool.num_used / pool.num_blocks
        )

    def _step(self) -> None:
        import torch

        from shoal.workers.plan import SchedulerOutput, StepOutput

        while len(self._inflight) <= self.lookahead and (plan := self.scheduler.schedule()) is not None:
            self._inflight.append((plan, plan.output.encode()))
        self._take(self.scheduler.take_ended())
        if self._inflight:
            plan, frame = self._inflight.popleft()
            with torch.inference_mode():
                output = StepOutput.decode(self.runner.execute(SchedulerOutput.decode(frame)).wait().encode())
            self._take(self.scheduler.update(plan, output))

    def _take(self, requests) -> None:
        for request in requests:
            self._stops.forget(request)
            self._out.append(self._to_finished(request))

    def abort(self, numbers) -> None:
        self.scheduler.abort(numbers)
        while self._inflight:
            self._step()
        self._take(self.scheduler.take_ended())
        self._out = [f for f in self._out if f.number not in set(numbers)]

    def call_workers(self, method, timeout, args, kwargs):
        return [getattr(self.runner, method)(*args, **kwargs)]

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return self.scheduler.kv.reset()

    def metrics(self):
        from shoal.driver.metrics import EngineMetrics

        return EngineMetrics().read(self.scheduler)

    def shutdown(self) -> None:
        self.runner = None


@pytest.fixture
def local_llm(monkeypatch):
    """local_llm(model, **engine arguments) -> LLM whose engine runs in this process."""
    from shoal import LLM
    from shoal.driver import engine
    from shoal.kernels.registry import use_implementation

    def make(model: str, **arguments):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "Engine", LocalEngine)
            return LLM(model, **({"dtype": "float32"} | arguments))

    yield make
    use_implementation("reference")


def _load(name: str):
    """A module of tests/stub, once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).parent / "stub" / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def parallel_jobs():
    """The module tests/stub/parallel_jobs.py."""
    return _load("parallel_jobs")


@pytest.fixture(scope="session")
def stub_ranks():
    """The module tests/stub/stub_ranks.py."""
    return _load("stub_ranks")


@pytest.fixture(scope="session")
def stub_model(stub_ranks, tmp_path_factory):
    """Folder of what the client side needs of a model whose ranks are stubs."""
    return stub_ranks.make_model(tmp_path_factory.mktemp("stub-model"))


@pytest.fixture(scope="session")
def processes():
    """Finds processes of this test run's Ray: processes.named("ray::StubWorker") -> pids."""
    return _load("processes")


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray with 2 CPUs for the session; engines join it."""
    import ray

    from shoal.driver import engine

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, logging_level="WARNING", object_store_memory=200 << 20
    )
    engine._inherited_env.update(engine.environment())  # as where an engine starts Ray: its processes start sooner
    yield
    ray.shutdown()


@pytest.fixture
def held_cpus(ray_cluster):
    """`with held_cpus(1.7):` an actor holds so many CPUs meanwhile; with `seconds=3`, for so long and no longer."""
    import ray

    class Holder:
        def ready(self):
            pass

    @contextlib.contextmanager
    def hold(cpus, seconds=None):
        holder = ray.remote(num_cpus=cpus)(Holder).remote()
        ray.get(holder.ready.remote(), timeout=60)
        timer = threading.Timer(seconds or 0, ray.kill, [holder])
        if seconds is not None:
            timer.start()
        yield
        timer.cancel()
        ray.kill(holder)

    return hold
