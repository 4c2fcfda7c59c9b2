"""Ranks without a model: the real driver, scheduler and step channel, over workers that make tokens up.

A row's tokens follow from its random stream and the position, so that a row that is run again comes out the same. A
row says by `extra_args` in its sampling parameters what it does: {"length": n} ends it after n tokens, {"kill": true}
ends the process. SHOAL_STUB_STEP_S is how long one decode step takes, or the path of a file that says so, read at
every step; SHOAL_STUB_TOKENS, a folder where each rank
leaves the number of tokens it made. SHOAL_STUB_OCCUPANCY, a folder where each rank leaves, at every admission of rows,
the rows admitted so far, the seconds since the first, and the share of slots that were full in that time.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from shoal.driver import engine as engine_module
from shoal.driver import worker_group
from shoal.driver.actor import Driver
from shoal.driver.jobs.model import RowModel
from shoal.driver.jobs.state import digest
from shoal.workers.actor import ACTOR_OPTIONS, Worker, whereabouts
from shoal.workers.plan import StepOutput

EOS = 2
FIRST_TOKEN, NUM_TOKENS = 10, 200


def token_at(stream: int, position: int) -> int:
    """The made-up token of a row at a position; never EOS."""
    mixed = (stream ^ (position * 0x9E3779B97F4A7C15)) & ((1 << 64) - 1)
    return FIRST_TOKEN + (mixed * 0xBF58476D1CE4E5B9 >> 40) % NUM_TOKENS


class StubRunner:
    """What a rank computes: nothing."""

    def __init__(self, step_s: str, tokens_file: int | None, slots: int = 1, slots_file: Path | None = None) -> None:
        self._step_file = None if step_s[:1].isdigit() else Path(step_s)
        self._step_s = float(step_s) if self._step_file is None else 0.0
        self._tokens_file = tokens_file
        self._slots, self._slots_file = slots, slots_file
        self._began = self._last = 0.0
        self._running = self._admitted = 0
        self._area = 0.0  # of rows that ran, in row seconds
        self._rows: dict[int, list] = {}  # stream, tokens made, length, stops
        self._made = 0
        self._most_tokens = int(os.environ.get("SHOAL_STUB_MOST_TOKENS", "1000000"))

    def allocate_kv(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def _note(self, plan) -> None:
        now = time.monotonic()
        self._began = self._began or now
        self._area += self._running * (now - self._last)
        self._last, self._running = now, len(plan.rows)
        self._admitted += len(plan.new_rows)
        if plan.new_rows and now > self._began:
            share = self._area / (now - self._began) / self._slots
            self._slots_file.write_text(f"{self._admitted} {now - self._began:.2f} {share:.4f}")

    def free_memory(self) -> None:
        pass

    def execute(self, plan):
        if self._slots_file is not None:
            self._note(plan)
        tokens = int(plan.num_scheduled_tokens.sum())
        if tokens > self._most_tokens:
            raise MemoryError(f"{tokens} tokens in a step, and there is memory for {self._most_tokens}")
        for new in plan.new_rows:
            sampling = new.sampling
            if sampling.extra_args.get("kill"):
                os._exit(9)
            if sampling.extra_args.get("greedy"):
                raise MemoryError("a row that fits no memory")
            if sampling.extra_args.get("hang"):
                time.sleep(3600)
            length = sampling.extra_args.get("length", 1 << 30)
            made = len(new.token_ids) - new.num_prompt_tokens
            self._rows[new.row] = [sampling.stream, made, length, EOS in sampling.stop_ids]
        places = np.flatnonzero(plan.samples)
        out = np.full((len(places), plan.num_steps), -1, np.int32)
        for i, place in enumerate(places.tolist()):
            row = self._rows[int(plan.rows[place])]
            stream, made, length, stops = row
            for step in range(int(plan.row_steps[place])):
                if stops and made + 1 >= length:
                    out[i, step] = EOS
                    made += 1
                    break
                out[i, step] = token_at(stream, made)
                made += 1
            row[1] = made
        self._made += int((out >= 0).sum())
        if self._tokens_file is not None:
            os.pwrite(self._tokens_file, b"%020d" % self._made, 0)  # whole, whenever the process is killed
        if self._step_file is not None:
            self._step_s = float(self._step_file.read_text())
        return StubPending(StepOutput(plan.step_id, out), time.monotonic() + self._step_s * plan.num_steps)


class StubPending:
    """Results that are there at a certain time."""

    def __init__(self, output: StepOutput, when: float) -> None:
        self._output, self._when = output, when

    def wait(self) -> StepOutput:
        time.sleep(max(0.0, self._when - time.monotonic()))
        return self._output


class Told:
    """Stands for an actor class whose actors get first of all what this process's environment has for stubs.

    In place of a runtime_env, with which Ray needs two seconds, and not one, for an actor's process. The cluster's
    processes have the rest of the environment already: they were started by a process that has it. Where a
    runtime_env is what a test is about, SHOAL_STUB_RUNTIME_ENV says so.
    """

    def __init__(self, actor_class, **options) -> None:
        self._class, self._options = actor_class, options

    def options(self, runtime_env=None, **options):
        if "SHOAL_STUB_RUNTIME_ENV" in os.environ:
            options["runtime_env"] = runtime_env
        return Told(self._class, **options)

    def remote(self, *arguments):
        told = {name: value for name, value in os.environ.items() if name.startswith("SHOAL_STUB_")}
        return self._class.options(**self._options).remote(told, *arguments)


class StubWorker(Worker):
    """A rank that never imports torch."""

    def __init__(self, told: dict[str, str], rank: int) -> None:
        os.environ.update(told)
        super().__init__(rank)

    def probe(self, device):
        return whereabouts() | {"num_cpus": 1, "gpus": ray.get_gpu_ids()}

    def try_steps(self) -> None:
        pass

    def setup(self, config, processors, init_method, timeout_s):
        folder = os.environ.get("SHOAL_STUB_TOKENS")
        tokens_file = None
        if folder is not None and not config.rank:
            tokens_file = os.open(Path(folder, f"{os.getpid()}"), os.O_CREAT | os.O_WRONLY, 0o644)
        slots = os.environ.get("SHOAL_STUB_OCCUPANCY")
        slots_file = None if slots is None or config.rank else Path(slots, f"{os.getpid()}")
        step_s = os.environ.get("SHOAL_STUB_STEP_S", "0.002")
        self.runner = StubRunner(step_s, tokens_file, config.max_num_seqs, slots_file)
        return {"load_s": 0.0, "weight_bytes": 1, "block_bytes": 1024}

    def _loop(self) -> None:
        while isinstance(job := self._jobs.get(), tuple):  # what is none is the sign to stop
            kind, *rest = job
            if kind is None:
                self._step_in_order(*rest)
            elif isinstance(kind, str):
                frame, connection = rest
                self._answers.put((self._execute(frame), connection))
            else:
                self._call(kind, *rest)


class StubDriver(Driver):
    """The real driver, whose ranks are stubs."""

    def __init__(self, told: dict[str, str], *arguments) -> None:
        os.environ.update(told)
        worker_group.RemoteWorker = Told(ray.remote(**ACTOR_OPTIONS)(StubWorker))
        if os.environ.get("SHOAL_STUB_SPARE_RANKS"):  # those that are given up live on, as if they could not be reached
            worker_group.WorkerGroup.kill = lambda group: None
            worker_group.WorkerGroup.discard = spare
        super().__init__(*arguments)

    def rank_pids(self) -> list[int]:
        return [probe["pid"] for probe in self._gang.group.probes]

    def rank_places(self) -> list[tuple[str, list[int]]]:
        """Node and GPUs of each rank."""
        return [(probe["node_id"], probe["gpus"]) for probe in self._gang.group.probes]

    def captured(self) -> bool:
        """Whether this actor is in somebody's placement group."""
        return ray.util.get_current_placement_group() is not None


def spare(group) -> None:
    if group._channel is not None:
        group._channel.close()


def install() -> Any:
    """Engines that this process starts have stub ranks from now on; what they had before."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors' processes do not know this folder
    digest._RECORDS, digest._AT_ONCE = 64, 16  # jobs of tests have few rows, and ends of all kinds
    before = engine_module.RemoteDriver
    engine_module.RemoteDriver = remote_driver()
    return before


def remote_driver() -> Told:
    return Told(ray.remote(num_cpus=0, max_restarts=0, max_concurrency=16)(StubDriver))


class StubModel(RowModel):
    """A model whose engines have stub ranks, in whatever process they are started."""

    def starter(self, solo_deaths, silence_s=None):
        start = super().starter(solo_deaths, silence_s)

        def begin(place=None):
            engine_module.RemoteDriver = remote_driver()
            return start(place)

        return begin


def make_model(folder: Path) -> str:
    """A folder with what the client side needs of a model: config and tokenizer, no weights."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<bos>", "<eos>", *alphabet]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=len(names), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    made.save_pretrained(folder)
    config.save_pretrained(folder)
    return str(folder)
