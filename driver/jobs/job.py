"""A batch job from its start to its end: validating → in_progress → finalizing → completed, failed or cancelled."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.driver.jobs.accounts import Accounts
from shoal.driver.jobs.committer import Committer, recover
from shoal.driver.jobs.config import JobConfig
from shoal.driver.jobs.cycles import rare_search
from shoal.driver.jobs.display import Display
from shoal.driver.jobs.events import Hooks
from shoal.driver.jobs.files import with_columns
from shoal.driver.jobs.forms.base import make_form
from shoal.driver.jobs.held_ray import HeldRay
from shoal.driver.jobs.history import Samples
from shoal.driver.jobs.identity import JOB_FILE, differences, job_identity, salt
from shoal.driver.jobs.intake import Intake
from shoal.driver.jobs.keys import RowKeys
from shoal.driver.jobs.model import MakeModel, ModelTools, RowModel
from shoal.driver.jobs.outcome import Exit, JobError, Status
from shoal.driver.jobs.own_files import job_inputs, make_folders, refuse_inputs
from shoal.driver.jobs.parts import Parts
from shoal.driver.jobs.pipeline import Recipe, import_library, prepared_tables, wait_for_room
from shoal.driver.jobs.prefix import Position, versions
from shoal.driver.jobs.publish import GaveUpError, Publisher, plan_output
from shoal.driver.jobs.report.write import write_report
from shoal.driver.jobs.runner import Runner
from shoal.driver.jobs.scan import Duplicates, Scanner, detect_form, validate
from shoal.driver.jobs.state.ledger import Ledger, SupersededError
from shoal.driver.jobs.state.open_store import open_store
from shoal.driver.jobs.state.store import NO_ROOM
from shoal.driver.jobs.status import STATUS_FILE, StatusFile
from shoal.driver.jobs.stop import StopRequest
from shoal.driver.jobs.telemetry import JobTelemetry
from shoal.driver.local_files import read_template
from shoal.driver.log import LOGGER, set_up_logging
from shoal.driver.placement import PlacementError
from shoal.driver.secrecy import masked

if TYPE_CHECKING:
    from shoal.driver.resolve import ResolvedConfig

_STATUS_S, _REMOTE_STATUS_S = 1.0, 15.0
_ENGINES_END_S = 30.0
_FULL_RETRY_S = 2.0
_SHORT_S = 1.0  # a validation that takes less has no Ray started beside it: it may be all there is to do


def run_job(config: JobConfig, make_model: MakeModel = RowModel.find) -> Exit:
    """Runs a job to its end; what it came to. ValueError for what is wrong with the job itself."""
    set_up_logging()
    with rare_search(), StopRequest(config.drain_s) as stop, HeldRay(config.engine.address) as held_ray:
        job = Job(config, make_model, stop, held_ray)
        try:
            return job.run()
        except SupersededError as error:
            LOGGER.error("%s", error)
            return Exit.SUPERSEDED
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            LOGGER.error("there is no room for the job's state: %s", error)
            return Exit.FAILED


class Job:
    """One run of one job."""

    def __init__(self, config: JobConfig, make_model: MakeModel, stop: StopRequest, held_ray: HeldRay) -> None:
        """Finds input, output and model, and compares them with those of an earlier run. Takes nothing over yet."""
        self._config, self._stop, self._held_ray = config, stop, held_ray
        self._files = job_inputs(config)
        self._form_name = detect_form(self._files, config.max_line_bytes) if config.form == "auto" else config.form
        self._form = make_form(self._form_name, config)
        self._files = with_columns(self._files, self._form.reads())
        self._plan = plan_output(config, self._files[0].format, self._form.separate_errors)
        refuse_inputs(config, self._plan, self._files)
        make_folders(self._plan)
        self._store = open_store(
            self._plan.filesystem,
            self._plan.state_path,
            local=self._plan.local,
            rows=config.object_rows,
            seconds=config.object_seconds,
        )
        if not config.fresh and self._store.get(JOB_FILE) is not None:
            held_ray.begin()  # whoever resumes waits for rows, and whatever else there is to do takes as long
        self._model = make_model(config.engine)
        self._model.check(config.sampling_params)
        self._identity = job_identity(config, self._form_name, self._files, self._model.resolved)
        self._keys = RowKeys(salt(self._identity))
        self._accounts, self._samples = Accounts(), Samples()
        self._display = Display(self._accounts, config.progress_s)
        self._runner: Runner
        self._num_faults = 0  # rows that validation found to be errors
        self._validated = False  # by this run, or by one whose rows can be kept
        self._telemetry: JobTelemetry | None = None  # until there is a Ray

    def run(self) -> Exit:
        """All of it."""
        try:
            earlier = self._compare()
            self._validated = earlier is not None and (earlier.get("validated", False) or earlier["rows"] is not None)
            if self._config.fresh:  # the answers there were are kept until it is clear that there will be others
                self._look_through()
        except JobError as error:
            LOGGER.error("%s", error)
            return error.code
        if self._config.fresh and self._stop.asked:
            return self._stop.code
        self._ledger = Ledger(self._store, fresh=self._config.fresh)
        every_s = _STATUS_S if self._plan.local else _REMOTE_STATUS_S
        self._status = StatusFile(
            self._store, self._ledger, self._config, self._accounts, self._samples, every_s
        )  # fmt: skip
        self._committer = Committer(self._ledger, self._form, self._accounts, self._config.commit_rows)
        self._publisher = Publisher(self._plan, self._ledger, self._committer.where, self._config.order)
        self._parts: Parts | None = None
        if self._plan.is_folder:
            config = self._config
            self._parts = Parts(self._plan, self._publisher, self._store, config.rows_per_part, config.order)
        if earlier is not None:  # until the ledger has been read
            self._accounts.durable = self._counted_before()
        try:
            return self._live(earlier)
        except GaveUpError:
            return self._cancel()
        except JobError as error:
            return self._fail(error)
        except OSError as error:
            if error.errno not in NO_ROOM:
                self._status.enter(Status.FAILED, f"{type(error).__name__}: {error}")
                raise
            return self._fail(JobError(Exit.FAILED, f"there is no room for the job's state: {error}"))
        except SupersededError:
            raise
        except Exception as error:  # nobody foresaw it; whoever reads the status must not take the job for a live one
            self._status.enter(Status.FAILED, f"{type(error).__name__}: {error}")
            raise
        finally:
            self._display.close()
            self._ledger.close()
            self._store.close()

    def _live(self, earlier: dict[str, Any] | None) -> Exit:
        self._status.enter(Status.VALIDATING)
        if earlier is not None:
            self._accounts.total_rows = earlier["rows"]
        if not self._validated:
            self._look_through()
        if self._stop.asked:
            return self._cancel()
        self._since = self._describe(earlier)
        self._status.enter(Status.IN_PROGRESS)
        if not self._work(same_job=earlier is not None):
            return self._cancel()
        self._status.enter(Status.FINALIZING)
        self._publisher.give_up = lambda: self._stop.due
        self._publish()
        self._status.enter(Status.COMPLETED)
        self._display.close()
        accounts = self._accounts
        LOGGER.info("completed: %d rows answered, %d errors; %s", accounts.ok, accounts.errors, self._config.output)
        self._report()
        return Exit.COMPLETED

    def _describe(self, earlier: dict[str, Any] | None) -> int:
        """Says what the job is; the epoch from which on the ledger is about the input files as they are now."""
        now, epoch = versions(self._files), self._ledger.epoch
        if earlier is not None and earlier.get("versions") == now:
            epoch = earlier["epoch"]
        description = {"identity": self._identity, "rows": self._accounts.total_rows, "versions": now, "epoch": epoch}
        description["validated"] = True
        self._store.put(JOB_FILE, json.dumps(description).encode())
        return epoch

    def _compare(self) -> dict[str, Any] | None:
        """What an earlier run left, where its rows can be kept. JobError where it was another job."""
        found = self._store.get(JOB_FILE)
        if found is None or self._config.fresh:
            return None
        earlier: dict[str, Any] = json.loads(found)
        changes = differences(earlier["identity"], self._identity)
        if not changes:
            return earlier
        listed = "".join(f"\n  {change}" for change in changes)
        if not self._config.accept_changes:
            raise JobError(
                Exit.CHANGED,
                f"{self._config.output} was begun by another job:{listed}\nfresh starts over; accept_changes keeps "
                "rows that did not change and computes the others again; or choose another output",
            )
        LOGGER.warning("going on with changes; rows that they touch are computed again:%s", listed)
        return None

    def _look_through(self) -> None:
        self._accounts.total_rows = self._validate()
        self._validated = True

    def _validate(self) -> int | None:
        """Reads the input without a model; the number of its rows, None where it has more than were looked at."""
        config = self._config
        scanner = Scanner(self._form)
        ray_from = time.monotonic() + _SHORT_S

        def give_up() -> bool:
            if time.monotonic() > ray_from:
                self._held_ray.begin()  # its seconds and those of a long input go by together
            return self._stop.asked

        result = validate(self._files, scanner, config.validate_rows, config.max_line_bytes, give_up)
        if self._stop.asked:
            return None
        self._num_faults = result.num_faults
        if result.num_faults and config.on_invalid == "stop":
            raise JobError(Exit.INVALID_INPUT, f"{result}\nCorrect them, or let on_invalid=continue make them errors")
        if result.num_faults:
            LOGGER.warning("%s", result)
        return result.num_rows if result.complete else None

    def _counted_before(self) -> tuple[int, int]:
        """Answers and errors of which an earlier run of this job has told."""
        found = self._store.get(STATUS_FILE)
        counts = {} if found is None else json.loads(found)["request_counts"]
        return counts.get("completed", 0), 0 if self._config.retry_errors else counts.get("failed", 0)

    def _work(self, same_job: bool) -> bool:
        """Answers what has no answer yet; False where it was stopped."""
        from shoal.driver.cluster import find_places

        config = self._config
        with ThreadPoolExecutor(1) as reader:  # a long ledger takes as long to read as Ray takes to start
            reading = reader.submit(recover, self._ledger, self._accounts, config.retry_errors, self._since)
            importing = reader.submit(import_library)
            warm = self._held_ray.wait()
            self._stop.take_back()
            recovered = reading.result()
            importing.result()
        if not same_job:  # rows that changed are computed again: the others count once they are met
            self._accounts.found(0, {})
        self._accounts.mark_durable()
        if len(recovered.done):
            unread = 0 if recovered.prefix is None else recovered.prefix.end.index
            LOGGER.info(
                "going on from an earlier run, which settled %d rows; the first %d are not read again",
                len(recovered.done),
                unread,
            )
        self._wait_for_room()
        tools: Future[ModelTools] = Future()
        if not config.engine.disable_log_stats:
            self._telemetry = JobTelemetry(masked(config.output), masked(config.engine.model), self._accounts)
        model = self._model.portable()
        template = config.prompt_template
        if template is not None:
            template = read_template("prompt_template", template, config.engine.allowed_local_path)
        plain = config.model_copy(update={"engine": model.config, "prompt_template": template})
        prefix, recovered.prefix = recovered.prefix, None
        recipe = Recipe(
            plain, self._form_name, self._files, salt(self._identity), model, recovered.done.keys_only(),
            Position() if prefix is None else prefix.end,
        )  # fmt: skip
        intake = Intake(
            lambda: prepared_tables(recipe, warm),
            [file.name for file in self._files],
            Duplicates(self._keys, None if prefix is None else prefix.ids),
            recovered.done,
            recovered.tries,
            tools,
            prefix,
        )
        places = partial(find_places, config.engine)
        start = self._model.starter(config.solo_deaths)
        hooks = Hooks(start, places, self._make_tools, self._tick, self._settled)
        self._runner = Runner(config, intake, tools, self._committer, self._accounts, self._samples, self._stop, hooks)
        known = self._accounts.total_rows
        try:
            needy = known is not None and known - self._num_faults > len(recovered.done)
            if needy and not self._stop.asked:
                self._runner.start_engines()  # there is work for them, however far in the input
            self._runner.run()
        finally:
            self._runner.end_engines(min(_ENGINES_END_S, self._stop.left_s))
            self._held_ray.end()
        self._committer.sync(force=True)
        return not self._stop.asked

    def _wait_for_room(self) -> None:
        try:
            wait_for_room(self._config, lambda: self._stop.asked)
        except PlacementError as lack:
            raise JobError(Exit.FAILED, str(lack)) from None

    def _make_tools(self, resolved: ResolvedConfig) -> ModelTools:
        tools = self._model.tools(resolved.max_model_len)
        gc.freeze()  # what imports have brought meanwhile
        self._committer.decoder = tools.decoder
        return tools

    def _settled(self, indices: Sequence[int]) -> None:
        if self._parts is not None:
            self._parts.settled(indices)

    def _tick(self) -> None:
        if self._stop.asked and self._status.status == Status.IN_PROGRESS:
            self._status.enter(Status.CANCELLING)
        self._status.refresh()
        if self._telemetry is not None:
            self._telemetry.tick(self._runner.num_up)
        self._display.tick(self._runner.replicas.values(), starting=not self._samples.engines)

    def _publish(self) -> None:
        """Every row of the input has its record now."""
        num_rows = self._accounts.total_rows
        assert num_rows is not None
        assert self._accounts.settled == num_rows, f"{self._accounts.settled} of {num_rows} rows are accounted for"
        while True:
            try:
                if self._parts is not None:
                    self._parts.finish(num_rows)
                else:
                    self._publisher.publish(num_rows)
                return
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                LOGGER.error("the output cannot be written yet: %s. Make room, and the job goes on by itself", error)
                if self._stop.asked:
                    raise JobError(Exit.FAILED, f"the output could not be written: {error}") from None
                time.sleep(_FULL_RETRY_S)

    def _cancel(self) -> Exit:
        self._committer.sync(force=True)
        self._status.enter(Status.CANCELLED)
        self._publisher.give_up = lambda: self._stop.at_once
        with contextlib.suppress(GaveUpError):
            self._partial()
        LOGGER.info("cancelled with %d rows settled; the same command resumes", self._accounts.settled)
        return self._stop.code

    def _fail(self, error: JobError) -> Exit:
        LOGGER.error("the job failed: %s", error)
        try:
            self._committer.sync(force=True)
            self._status.enter(Status.FAILED, str(error))
            self._partial()
        except OSError as full:
            if full.errno not in NO_ROOM:
                raise
            LOGGER.error("what there is so far cannot be written: %s", full)
        return error.code

    def _partial(self) -> None:
        """What there is, beside the state; a folder output has its complete parts already."""
        if self._parts is None and self._accounts.settled:
            self._publisher.publish_partial(max(self._accounts.rows_read, self._accounts.total_rows or 0))
        self._report()

    def _report(self) -> None:
        """The job is over and its rows are safe: a report that cannot be written changes nothing about that."""
        if self._stop.at_once:  # the command `shoal report` makes it later
            return
        try:
            page = write_report(self._store)
        except OSError as error:
            LOGGER.warning("the report could not be written: %s", error)
            return
        LOGGER.info("report: %s/%s", self._plan.state_path, page)
