"""Driver: the actor that owns the queue, the scheduler and the ranks. Its process never imports torch.

Scheduler and block pool belong to one plain thread, the step loop. Actor methods run on other threads and only put
things into its inbox and wait; their order of arrival means nothing, since the client numbers its requests.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import ray

from shoal.driver.config import EngineConfig
from shoal.driver.draft import Plan
from shoal.driver.engine_telemetry import EngineTelemetry
from shoal.driver.gang import Gang
from shoal.driver.healing import EngineDeadError, Healer
from shoal.driver.lease import Lease
from shoal.driver.log import LOGGER, set_up_logging
from shoal.driver.metrics import EngineMetrics, Metric
from shoal.driver.replica import Place
from shoal.driver.request import (
    Death,
    EngineRequest,
    FinishedRequest,
    Request,
    finished_request,
    pack_results,
    unpack_results,
)
from shoal.driver.resolve import ResolvedConfig
from shoal.driver.scheduler import Scheduler
from shoal.driver.secrecy import masked
from shoal.driver.stop_strings import StopStrings
from shoal.driver.worker_group import RankDiedError
from shoal.workers.actor import whereabouts
from shoal.workers.config import LoadConfig
from shoal.workers.models.spec import ModelSpec
from shoal.workers.plan import StepOutput

_START_S = 3600.0  # how long a detached driver may take to start, while nobody asks for results


@dataclass(slots=True)
class Collected:
    """What `collect` gives: finished requests and deaths, the mark to acknowledge them with, how the engine stands."""

    finished: list[FinishedRequest] = field(default_factory=list)
    mark: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_made_tokens: int = 0
    num_preemptions: int = 0
    deaths: list[Death] = field(default_factory=list)

    def __reduce__(self) -> tuple[Any, ...]:
        counts = (self.mark, self.num_running, self.num_waiting, self.kv_cache_usage, self.num_made_tokens)
        return _unpack_collected, (pack_results(self.finished), *counts, self.num_preemptions, self.deaths)


def _unpack_collected(rows: list[tuple[Any, ...]], *counts: Any) -> Collected:
    return Collected(unpack_results(rows), *counts)


@dataclass(slots=True)
class _Control:
    """Something the loop does between steps, with no plan in flight."""

    action: Callable[[], Any]
    future: Future[Any]
    when_idle: bool = False  # only once no request is left


@dataclass(frozen=True, slots=True)
class _RanksDied:
    """What the watchdog of an epoch found."""

    epoch: int
    reason: str


class Driver:
    """One replica. Plain class: `RemoteDriver` is the actor."""

    def __init__(
        self, config: EngineConfig, processors: list[Any], env: dict[str, str], detached: bool = False
    ) -> None:
        """`detached`: Ray does not end it with whoever made it; it ends itself when that one is silent."""
        self._config = config
        self._gang = Gang(config, processors, env, lambda epoch, reason: self._inbox.put(_RanksDied(epoch, reason)))
        self._metrics = EngineMetrics()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._controls: deque[_Control] = deque()
        self._inflight: deque[Plan] = deque()
        self._outbox: list[FinishedRequest | Death] = []
        self._lease = Lease(_START_S, self.shutdown) if detached else None
        self._acknowledged = 0  # what has left the outbox
        self._news = threading.Condition()
        self._failure: str | None = None
        self._paused = False
        self._closing = threading.Event()
        self._stop_strings: StopStrings
        self._scheduler: Scheduler
        self._healer: Healer
        self._telemetry: EngineTelemetry
        self._thread: threading.Thread | None = None

    # ---- start and stop ----------------------------------------------------------------------------------------

    def place(self, place: Place) -> dict[str, Any]:
        """Get the ranks their places and their processes started, with no model yet. Says where this process is."""
        set_up_logging()  # a cluster that has no place is waited for aloud
        self._gang.place(place)
        return whereabouts()

    def start(self, spec: ModelSpec, load: LoadConfig, tokenizer_json: str | None) -> ResolvedConfig:
        """Load the weights, size the cache and begin, once placed. Errors of the user's are ValueErrors."""
        self._stop_strings = StopStrings(tokenizer_json)
        resolved = self._gang.load(spec, load)
        self._scheduler = Scheduler(self._gang.limits(), self._stop_strings.check, self._config.max_solo_deaths)
        self._healer = Healer(self._config, self._gang, self._scheduler, self._inflight, self._tell, self._closing)
        tags = {"model": masked(self._config.model), "engine": ray.get_runtime_context().get_actor_id()}
        self._telemetry = EngineTelemetry(self._scheduler, self._metrics, tags)
        if not self._config.disable_log_stats:
            self._telemetry.start()
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)
        self._thread.start()
        return resolved

    def shutdown(self) -> None:
        """End the ranks and give their resources back; requests that run are lost."""
        self._closing.set()
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join(timeout=30)
            self._telemetry.close()
        self._gang.shutdown()

    # ---- called by clients, on any thread ----------------------------------------------------------------------

    def submit(self, requests: list[EngineRequest]) -> None:
        """Queue requests."""
        self._check_alive()
        if self._gang.asleep:
            raise RuntimeError("the engine sleeps: call wake_up() first")
        self._inbox.put(requests)

    def end_when_silent(self, seconds: float) -> None:
        """End everything, this process too, when `collect` is not called for so long."""
        if self._lease is None:
            self._lease = Lease(seconds, self.shutdown)
        self._lease.change(seconds)

    def collect(self, mark: int, timeout: float) -> Collected:
        """Finished requests, as soon as there are any or after `timeout` seconds. They are kept until the caller gives
        their mark back, so an interrupted call takes nothing away from the next."""
        if self._lease is not None:
            self._lease.renew()
        with self._news:
            del self._outbox[: max(0, mark - self._acknowledged)]
            self._acknowledged = max(mark, self._acknowledged)
            self._news.wait_for(lambda: self._outbox or self._failure, timeout)
            news = list(self._outbox)
            mark = self._acknowledged + len(news)
        if not news:
            self._check_alive()
        finished = [item for item in news if isinstance(item, FinishedRequest)]
        deaths = [item for item in news if isinstance(item, Death)]
        scheduler = self._scheduler
        pool, running, waiting = scheduler.kv.pool, len(scheduler.running), scheduler.num_waiting
        kv_usage, preemptions = pool.num_used / pool.num_blocks, scheduler.stats.num_preemptions
        return Collected(finished, mark, running, waiting, kv_usage, self.num_made_tokens(), preemptions, deaths)

    def num_made_tokens(self) -> int:
        """Tokens that were sampled since the start, those that were cut off again too. A dead engine still tells."""
        stats = self._scheduler.stats
        return stats.num_generation_tokens + stats.num_wasted_tokens

    def abort(self, numbers: list[int]) -> None:
        """End these requests; when this returns they are gone and none of them will be collected."""
        gone = set(numbers)

        def action() -> None:
            self._scheduler.abort(numbers)
            self._publish(self._scheduler.take_ended())
            with self._news:
                kept = [f for f in self._outbox if isinstance(f, Death) or f.number not in gone]
                self._outbox, self._acknowledged = kept, self._acknowledged + len(self._outbox) - len(kept)

        self._control(action)

    def call_workers(self, payload: list[Any], timeout: float | None) -> list[Any]:
        """A call on every rank; `payload` holds a reference, and references come back: nothing is unpacked here."""
        return list(self._control(lambda: self._gang.group.run_payload(payload[0], timeout)))

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget cached prefixes. False while blocks are held, unless running requests are to start over."""

        def action() -> bool:
            if reset_running_requests:
                self._scheduler.preempt_all()
            return self._scheduler.kv.reset()

        return bool(self._control(action))

    def sleep(self, level: int, mode: str) -> None:
        """Level 0: stop scheduling. 1 and 2: also give KV and weights back, once `mode` has dealt with requests."""
        if mode == "abort":
            self._control(lambda: self._scheduler.abort(self._scheduler.unfinished_numbers()))

        def action() -> None:
            self._paused = True
            if level == 0:
                return
            self._scheduler.preempt_all()
            self._scheduler.kv.reset()
            self._gang.sleep(level)

        self._control(action, when_idle=mode == "wait")

    def wake_up(self, tags: list[str] | None) -> None:
        """Bring back what `sleep` gave away; scheduling goes on once everything is there."""
        wanted = {"weights", "kv_cache", "scheduling"} if tags is None else set(tags)

        def action() -> None:
            back = wanted & self._gang.asleep
            self._gang.wake_up(back)
            if not self._gang.asleep and (tags is None or "scheduling" in wanted or back):
                self._paused = False

        self._control(action)

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def metrics(self) -> list[Metric]:
        """Counts and distributions since the start."""
        return list(self._control(lambda: self._metrics.read(self._scheduler, self._healer.restarts.total)))

    def _control(self, action: Callable[[], Any], when_idle: bool = False) -> Any:
        self._check_alive()
        control = _Control(action, Future(), when_idle)
        self._inbox.put(control)
        return control.future.result()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(f"the engine is dead: {self._failure}")

    # ---- the step loop -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        set_up_logging()
        try:
            while not self._closing.is_set():
                try:
                    self._step()
                except RankDiedError as error:
                    self._telemetry.lost()
                    self._healer.heal(error)
                    self._publish(self._scheduler.take_ended())
        except EngineDeadError as error:
            self._fail(str(error))
        except Exception as error:  # nothing may end this thread silently: every waiting caller must hear of it
            LOGGER.error("the step loop failed:\n%s", traceback.format_exc())
            reason = f"{type(error).__name__}: {error}"
            self._tell([Death(reason)])
            self._fail(reason)

    def _step(self) -> None:
        """Schedule → execute → update. Ranks execute while the next plans are made and older results are taken."""
        self._take_inbox()
        scheduler = self._scheduler
        while self._may_schedule() and (plan := scheduler.schedule()) is not None:
            self._inflight.append(plan)
            self._telemetry.sent()
            self._gang.channel.send(plan.output.step_id, plan.output.encode())
        finished = scheduler.take_ended()
        if self._inflight:
            output = self._receive()
            self._telemetry.received()
            finished += scheduler.update(self._inflight.popleft(), output)
            self._healer.good_step()
        self._publish(finished)
        self._run_controls()

    def _receive(self) -> StepOutput:
        while True:
            output = StepOutput.decode(self._gang.channel.receive())
            if output.step_id >= self._gang.first_step:
                return output  # else it comes from ranks that were given up

    def _may_schedule(self) -> bool:
        return len(self._inflight) <= self._gang.resolved.lookahead and not self._paused and not self._controls_due()

    def _take_inbox(self) -> None:
        """Everything that has come in; waits when there is nothing else to do."""
        idle = not self._inflight and not self._controls_due() and (self._paused or not self._scheduler.num_unfinished)
        while idle or not self._inbox.empty():
            item = self._inbox.get()
            idle = False
            if isinstance(item, _Control):
                self._controls.append(item)
            elif isinstance(item, _RanksDied):
                if item.epoch == self._gang.epoch:
                    raise RankDiedError(item.reason)
            elif item is not None:
                for request in item:
                    self._scheduler.add(request)

    def _controls_due(self) -> bool:
        return bool(self._controls) and not (self._controls[0].when_idle and self._scheduler.num_unfinished)

    def _run_controls(self) -> None:
        while self._controls_due() and not self._inflight:
            control = self._controls.popleft()
            try:
                control.future.set_result(control.action())
            except Exception as error:  # belongs to the caller
                control.future.set_exception(error)
            self._publish(self._scheduler.take_ended())

    def _publish(self, requests: list[Request]) -> None:
        if not requests:
            return
        results = []
        for request in requests:
            self._metrics.finished(request)
            self._telemetry.finished(request)
            self._stop_strings.forget(request)
            results.append(finished_request(request))
            if request.finish_reason in ("stop", "length"):
                self._healer.restarts.progress()
        self._tell(results)

    def _tell(self, news: Sequence[FinishedRequest | Death]) -> None:
        with self._news:
            self._outbox += news
            self._news.notify_all()

    def _fail(self, reason: str) -> None:
        with self._news:
            self._failure = reason
            self._news.notify_all()
        self._gang.discard()
        waiting = list(self._controls)
        while not self._inbox.empty():
            item = self._inbox.get()
            waiting += [item] if isinstance(item, _Control) else []
        for control in waiting:
            control.future.set_exception(EngineDeadError(f"the engine is dead: {reason}"))


RemoteDriver = ray.remote(num_cpus=0, max_restarts=0, max_concurrency=16)(Driver)
