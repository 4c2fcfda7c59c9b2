"""The loop of a job: rows to engines, answers to the ledger. One thread decides; others put events into its inbox."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from shoal.driver.dispatch import Dispatcher
from shoal.driver.healing import EngineDeadError
from shoal.driver.jobs.accounts import Accounts
from shoal.driver.jobs.committer import Committer
from shoal.driver.jobs.config import JobConfig
from shoal.driver.jobs.events import Exhausted, Hooks, NeedEngine
from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.feeder import Feeder
from shoal.driver.jobs.history import Samples
from shoal.driver.jobs.outcome import Exit, JobError, brief, brief_error
from shoal.driver.jobs.state.store import LedgerFullError
from shoal.driver.jobs.stop import StopRequest
from shoal.driver.jobs.work import Chunk, Work
from shoal.driver.log import LOGGER
from shoal.driver.replica import Down, News, Replica, Up
from shoal.driver.replicas import Replicas

if TYPE_CHECKING:
    from shoal.driver.jobs.intake import Intake
    from shoal.driver.jobs.model import ModelTools
    from shoal.driver.request import Death, EngineRequest

TICK_S = 0.1
_CHUNKS_AHEAD = 4
_FULL_RETRY_S = 1.0
_PERCENT_FROM = 200  # rows read before a share of errors means anything


@dataclass(slots=True)
class _Sent:
    """A sequence in an engine."""

    work: Work
    child: int
    replica: int


class Runner:
    """Runs one job's rows to their end, or to a stop."""

    def __init__(
        self,
        config: JobConfig,
        intake: Intake,
        tools: Future[ModelTools],
        committer: Committer,
        accounts: Accounts,
        samples: Samples,
        stop: StopRequest,
        hooks: Hooks,
    ) -> None:
        self._config, self._committer, self._accounts, self._samples = config, committer, accounts, samples
        self._stop, self._hooks = stop, hooks
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._dispatcher: Dispatcher[Work] = Dispatcher(
            config.solo_deaths,
            config.engine.block_size,
            by_prefix=config.replicas != 1 and config.engine.enable_prefix_caching,
        )
        self._engines = Replicas(config.replicas, hooks.start_engine, hooks.find_places, self._inbox)
        self._offer = tools
        self._tools: ModelTools | None = None
        self._feeder = Feeder(intake, tools, self._inbox)
        self._sent: dict[int, _Sent] = {}
        self._next_number = 0
        self._deaths_in_a_row = 0
        self._exhausted = False
        self._unsynced: list[int] = []  # indices of rows that are in the ledger's memory only
        self._full_since = 0.0
        self._drained = False

    @property
    def replicas(self) -> dict[int, Replica]:
        """Engines, by number."""
        return self._engines.alive

    def run(self) -> None:
        """Until all rows are settled and durable, or a stop was obeyed. JobError where it cannot go on."""
        while not self._ended():
            self._take_events()
            self._sync()
            self._feed()
            self._observe()
            self._hooks.tick()

    def start_engines(self) -> None:
        """Starts all replicas, unless they were started before."""
        if not self.replicas:
            self._start(self._engines.begin)

    def end_engines(self, timeout_s: float) -> None:
        """Ends what `start_engines` and `run` began, waits until it holds nothing, and takes engines' last counts."""
        self._feeder.stop()
        self._engines.stop()
        deadline = time.monotonic() + timeout_s
        for replica in self._engines.join(timeout_s):
            self._committer.made(replica.session, self._made(replica))
        self._feeder.join(max(0.0, deadline - time.monotonic()))
        self._dispatcher.lanes.clear()
        self._samples.finish()
        self._observe()

    @property
    def num_up(self) -> int:
        """Engines that can take rows."""
        return len(self._dispatcher.lanes)

    def _ended(self) -> bool:
        """Nothing is left to do, or a stop was asked for and obeyed; and what was done is durable."""
        finished = self._exhausted and not self._dispatcher.num_waiting and not self._dispatcher.num_open
        if not (finished or self._stopped()):
            return False
        self._sync(force=True)
        return not self._full_since or self._stop.due

    def _stopped(self) -> bool:
        if not self._stop.asked:
            return False
        if not self._drained:
            self._drained = True
            self._begin_drain()
        return not self._dispatcher.num_open or self._stop.due

    def _begin_drain(self) -> None:
        """Rows that cannot be running yet go back; what runs may finish."""
        LOGGER.info("stopping: rows at work get %.0f s to finish; ask again to end now", self._stop.left_s)
        self._samples.event("stop", f"a stop was asked for; rows at work get {self._stop.left_s:.0f} s to finish")
        self._feeder.stop()
        for number, lane in self._dispatcher.lanes.items():
            excess, unstarted = lane.num_sequences - lane.slots, []
            for work in reversed(lane.works.values()):
                if excess <= 0 or work.results:
                    break
                excess -= work.size
                unstarted.append(work)
            for work in unstarted:
                self._dispatcher.done(number, work)
            self._withdraw(number, unstarted)

    # ---- events ------------------------------------------------------------------------------------------------

    def _take_events(self) -> None:
        try:
            event = self._inbox.get(timeout=TICK_S)
            while True:
                self._handle(event)
                event = self._inbox.get_nowait()
        except Empty:
            pass

    def _handle(self, event: Any) -> None:
        if isinstance(event, News):
            self._on_news(event)
        elif isinstance(event, Chunk):
            self._on_chunk(event)
        elif isinstance(event, Up):
            self._on_up(event.replica)
        elif isinstance(event, Down):
            self._on_down(event)
        elif isinstance(event, NeedEngine):
            self.start_engines()
        else:
            assert isinstance(event, Exhausted)
            if event.error is not None:
                raise event.error
            self._exhausted = True
            self._accounts.total_rows = event.num_rows
            self._accounts.forget_unmet()

    def _on_news(self, event: News) -> None:
        for death in event.collected.deaths:
            self._on_death(event.replica, death)
        for result in event.collected.finished:
            sent = self._sent.pop(result.number, None)
            if sent is None:  # of a row that was moved to another engine
                continue
            work = sent.work
            work.results[sent.child] = result
            event.replica.received += len(result.token_ids)
            if len(work.results) == work.size:
                self._dispatcher.done(sent.replica, work)
                self._committer.answer(work)
                self._unsynced.append(work.index)
                if "engine_killed" in [one.error_code for one in work.results.values()]:
                    self._committer.cleared()
                    self._accounts.quarantined += 1
                    self._samples.event("quarantine", f"row {work.row_id} is put aside: the ranks died with it")
                else:
                    self._deaths_in_a_row = 0
                self._check_errors()

    def _on_death(self, replica: Replica, death: Death) -> None:
        """Ranks died. Their engine deals with it, or gives up; what it found out is made to outlive it."""
        said = f"replica {replica.number}: its ranks died with {len(death.tried)} rows in them: {brief(death.reason)}"
        LOGGER.warning("%s", said)
        self._samples.event("engine_death", said)
        for number, alone in death.tried:
            sent = self._sent.get(number)
            if sent is not None:
                sent.work.tries.add(alone, of_ranks=True)
                self._committer.tried(sent.work, alone, of_ranks=True)
        self._sync(force=True)
        self._count_death(death.reason)

    def _count_death(self, reason: str) -> None:
        self._accounts.engine_deaths += 1
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > self._config.max_restarts:
            raise JobError(
                Exit.FAILED,
                f"engines died {self._deaths_in_a_row} times with no row answered in between (max_restarts "
                f"{self._config.max_restarts}); the last time: {brief(reason)}",
            )

    def _on_chunk(self, chunk: Chunk) -> None:
        self._feeder.received()
        self._accounts.rows_read += chunk.num_rows
        self._committer.reached(chunk)
        self._unsynced += self._committer.settle(chunk)
        self._hooks.settled(chunk.settled_before)
        for work in chunk.work:
            self._dispatcher.add(work)
            assert self._tools is not None
            self._accounts.begun_rows += 1
            self._accounts.begun_limit += work.size * self._tools.binder.room(work.row)
        self._check_errors()

    def _on_up(self, replica: Replica) -> None:
        self._engines.came_up(replica)
        self._samples.engines[replica.number] = dataclasses.asdict(replica.engine.resolved)
        self._samples.event("engine_up", f"replica {replica.number} is up")
        if self._stop.asked:
            return
        if self._tools is None:
            self._tools = self._hooks.make_tools(replica.engine.resolved)
            self._offer.set_result(self._tools)
        resolved = replica.engine.resolved
        self._dispatcher.open_lane(replica.number, resolved.max_num_seqs, resolved.kv_cache_tokens)

    def _on_down(self, event: Down) -> None:
        replica, error = event.replica, event.error
        self._committer.made(replica.session, self._made(replica))
        if error is None or self._stop.due:
            return
        if not event.booted:
            self._accounts.boot_failures += 1
            self._samples.event("boot_failure", f"replica {replica.number} did not start: {brief_error(error)}")
            self._replace(event, error)
            return
        verdict = self._dispatcher.died(replica.number)
        LOGGER.warning("replica %d died with %d rows in it: %s", replica.number, len(verdict.tried), brief_error(error))
        said = f"replica {replica.number} died with {len(verdict.tried)} rows in it: {brief_error(error)}"
        self._samples.event("engine_death", said)
        self._sent = {n: sent for n, sent in self._sent.items() if sent.replica != replica.number}
        for work, alone in verdict.tried:
            self._committer.tried(work, alone)
        if verdict.guilty is not None:
            self._put_aside(verdict.guilty, error)
        self._sync(force=True)
        if not isinstance(error, EngineDeadError):  # else it has told of the death already
            self._count_death(brief_error(error))
        self._replace(event, error)

    def _replace(self, event: Down, error: Exception) -> None:
        if not self._stop.asked:
            self._start(lambda: self._engines.went_down(event, error))

    def _start(self, start: Callable[[], None]) -> None:
        try:
            start()
        except (ValueError, TypeError) as wrong:  # the user's: trying again changes nothing
            raise JobError(Exit.USAGE, str(wrong)) from None
        except RuntimeError as lack:
            raise JobError(Exit.FAILED, str(lack)) from None

    def _put_aside(self, work: Work, error: BaseException) -> None:
        message = work.tries.story(brief_error(error))
        LOGGER.warning("row %s is put aside: %s", work.row_id, message)
        self._samples.event("quarantine", f"row {work.row_id} is put aside: {message}")
        self._committer.error(work, Fault("engine_killed", "engine", message))
        self._committer.cleared()
        self._unsynced.append(work.index)
        self._accounts.quarantined += 1
        self._check_errors()

    def _check_errors(self) -> None:
        accounts = self._accounts
        if self._config.max_errors is None:
            return
        rows = accounts.rows_read if accounts.total_rows is None else accounts.total_rows
        if self._config.max_errors.endswith("%") and accounts.total_rows is None and rows < _PERCENT_FROM:
            return
        if accounts.errors > self._config.error_limit(rows):
            codes = ", ".join(f"{count} {code}" for code, count in accounts.error_codes.most_common(5))
            raise JobError(
                Exit.FAILED,
                f"{accounts.errors} rows ended in an error, more than max_errors={self._config.max_errors} ({codes})",
            )

    # ---- giving out --------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        if self._stop.asked or self._full_since:
            return
        self._dispatcher.report({n: replica.take_report() for n, replica in self.replicas.items()})
        if self._dispatcher.num_waiting:
            self._engines.tick()
        window = sum(lane.window for lane in self._dispatcher.lanes.values())
        if self._dispatcher.num_fresh < 512 + window // 2:
            self._feeder.allow(_CHUNKS_AHEAD)
        for number in list(self._dispatcher.lanes):
            self._submit(number, self._dispatcher.take(number))
        for number in self._dispatcher.share():
            self._submit(number, self._dispatcher.take(number))
        while self._exhausted and (move := self._dispatcher.rebalance()) is not None:
            self._withdraw(move.source, move.works)
            self._submit(move.target, move.works)

    def _submit(self, number: int, works: list[Work]) -> None:
        assert self._tools is not None
        requests: list[EngineRequest] = []
        for work in works:
            work.row.first_sequence = self._next_number  # numbers are never used twice: late answers find no owner
            self._next_number += work.size
            for child, request in enumerate(self._tools.binder.requests(work.row, 0, work.size)):
                self._sent[request.number] = _Sent(work, child, number)
                request.num_solo_deaths = work.tries.ranks_alone
                requests.append(request)
        if requests:
            self.replicas[number].submit(requests)

    def _withdraw(self, number: int, works: list[Work]) -> None:
        numbers = [work.row.first_sequence + child for work in works for child in range(work.size)]
        for one in numbers:
            del self._sent[one]
        if numbers:
            self.replicas[number].abort(numbers)

    def _sync(self, force: bool = False) -> None:
        """A full disk pauses the job: nothing is given out until there is room again."""
        if self._full_since and not force and time.monotonic() - self._full_since < _FULL_RETRY_S:
            return
        if force or self._committer.is_due():  # a kill may come at any time, and tokens are to add up after it
            for replica in self.replicas.values():
                self._committer.made(replica.session, self._made(replica))
        try:
            tried = self._committer.sync(force)
        except LedgerFullError as error:
            if not self._full_since:
                LOGGER.error("paused, nothing is lost: %s. Make room, and the job goes on by itself", error)
                self._samples.event("paused", str(error))
            self._full_since = time.monotonic()
            return
        if self._full_since and tried:
            LOGGER.info("there is room again: the job goes on")
            self._samples.event("resumed", "there is room again")
            self._full_since = 0.0
        if self._unsynced and not self._committer.ledger.num_unsynced:
            settled, self._unsynced = self._unsynced, []
            self._hooks.settled(settled)

    def _observe(self) -> None:
        accounts, replicas = self._accounts, list(self.replicas.values())
        at_work = [replica for replica in replicas if replica.number in self._dispatcher.lanes]
        for replica in at_work:
            accounts.generated[replica.session] = self._made(replica)
        accounts.in_flight_tokens = sum(self._made(replica) - replica.received for replica in at_work)
        accounts.mark()
        self._samples.add(
            settled=accounts.settled,
            errors=accounts.errors,
            committed_tokens=accounts.committed_tokens,
            generated_tokens=accounts.generated_tokens,
            prompt_tokens=accounts.prompt_tokens,
            cached_tokens=accounts.cached_tokens,
            running=sum(replica.num_running for replica in at_work),
            waiting=sum(replica.num_waiting for replica in at_work),
            slots=sum(lane.slots for lane in self._dispatcher.lanes.values()),
            kv_cache_usage=max((replica.kv_cache_usage for replica in at_work), default=0.0),
            preemptions=sum(replica.num_preemptions for replica in replicas),
            deaths=accounts.engine_deaths,
        )

    def _made(self, replica: Replica) -> int:
        return max(replica.generated, replica.received)
