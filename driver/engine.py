"""The client's end of a replica: finds or starts Ray, creates the driver actor, and speaks to it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from shoal.driver.actor import Collected, RemoteDriver
from shoal.driver.config import EngineConfig
from shoal.driver.healing import EngineDeadError, Restarts
from shoal.driver.log import LOGGER, set_up_logging
from shoal.driver.placement import remove_orphans
from shoal.driver.replica import Place
from shoal.driver.request import EngineRequest, RequestBatch
from shoal.driver.resolve import ResolvedConfig, check_model_len
from shoal.driver.secrecy import is_secret
from shoal.driver.worker_group import end_actor

if TYPE_CHECKING:
    from shoal.driver.metrics import Metric
    from shoal.driver.model_config import ResolvedModel

# Settings of the user's environment that the ranks' processes need, wherever they run.
_ENV_PREFIXES = ("HF_", "HUGGINGFACE_", "NCCL_", "SHOAL_", "VLLM_CPU_KVCACHE_SPACE", "VLLM_ALLOW_LONG_MAX_MODEL_LEN")
DRIVER_SILENT_S = 120.0  # a driver that has not answered this long is stopped, or its node is
GetModel = Callable[[], tuple["ResolvedModel", Any, str | None]]
_DRIVER_GONE = (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError)
_started_ray = False  # by this module, in this process
_inherited_env: dict[str, str] = {}  # of those settings, what that Ray's processes got
_num_users = 0  # engines that are up, and those who hold Ray
_lock = threading.Lock()  # engines may start and end in threads


def connect(address: str | None) -> None:
    """Use the Ray this process already has; else join `address` or RAY_ADDRESS; else start a local one.

    Never the guess of a bare `ray.init()`, which reads an address from a file and can hang on a stale one.
    """
    global _started_ray
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is not None and address != "local":
        ray.init(address=address, logging_level="WARNING")
        return
    # Ray would start a Python process for each core at once; an engine needs two, and waits for them among the others.
    config = {"prestart_worker_first_driver": False}
    ray.init(address="local", include_dashboard=False, logging_level="WARNING", _system_config=config)
    _started_ray = True
    _inherited_env.update(environment())


def hold_ray(address: str | None) -> None:
    """Connects, and keeps Ray until `release_ray`, whatever engines come and go meanwhile."""
    connect(address)
    _count_users(1)


def release_ray() -> None:
    """The end of what `hold_ray` began."""
    _count_users(-1)
    _stop_ray_if_last()


def _count_users(by: int) -> None:
    global _num_users
    with _lock:
        _num_users += by


def environment() -> dict[str, str]:
    """What goes to other processes as their runtime_env: no secrets, for Ray logs and shows runtime_envs."""
    return {name: value for name, value in os.environ.items() if name.startswith(_ENV_PREFIXES) and not is_secret(name)}


def ask(reference: Any, timeout: float | None = None) -> Any:
    """`ray.get`, with the driver's own exception in place of Ray's wrapping of it."""
    try:
        return ray.get(reference, timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        if isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, Exception):
            cause = cause.cause  # raised in a rank and passed on by the driver
        raise cause from None


class Engine:
    """One replica, seen from the client. Every method raises EngineDeadError once the replica is dead.

    A driver whose process dies or freezes is replaced by a new one, which gets the requests whose results had not come;
    after too many in a row, or with `revives=False`, the error is raised.
    """

    def __init__(
        self, config: EngineConfig, get_model: GetModel, revives: bool, place: Place, silence_s: float | None
    ) -> None:
        self._config, self._get_model, self._revives, self._silence_s = config, get_model, revives, silence_s
        self._restarts = Restarts(config.max_rank_restarts, config.restart_backoff_s)
        self._pending: dict[int, EngineRequest] = {}  # what the driver has and has not given back
        self._mark = 0
        self._driver: Any
        self._process: dict[str, Any]
        self._place = place
        self._create()
        _count_users(1)

    @classmethod
    def start(
        cls,
        config: EngineConfig,
        get_model: GetModel,
        revives: bool = True,
        place: Place | None = None,
        silence_s: float | None = None,
    ) -> Engine:
        """Create the replica and wait until it is ready. `get_model` is called once its processes are on their way.

        `place`: where it is to go at first; None: where Ray finds room. `silence_s`: it ends by itself when nobody has
        asked for results for so long, and not, as Ray would have it, killed with this process: Ray keeps the placement
        group of an actor that it killed so.
        """
        place = place or Place()
        if place.timeout_s is not None:
            config = config.model_copy(update={"placement_timeout_s": place.timeout_s})
        set_up_logging()
        connect(config.address)
        try:
            return cls(config, get_model, revives, place, silence_s)
        except BaseException:
            _stop_ray_if_last()
            raise

    def _create(self) -> None:
        config = self._config
        env = environment()
        if env == _inherited_env:
            env = {}  # every process of this Ray has it already, and Ray starts processes faster without
        # What may need torch to unpack travels as a reference; the driver passes it on to the ranks.
        custom = tuple(config.logits_processors)
        processors = [ray.put(custom) if custom else (), len(custom)]
        # The hub's token goes to the ranks in LoadConfig, and nowhere else.
        plain = config.model_copy(update={"hf_overrides": None, "logits_processors": [], "hf_token": None})
        # A process does not end while an actor that outlives it holds a reference of its own.
        detached = self._silence_s is not None and not custom
        driver = RemoteDriver.options(
            lifetime="detached" if detached else "non_detached",
            runtime_env={"env_vars": env} if env else None,
            scheduling_strategy="DEFAULT",  # else a placement group of the caller's would take it in, and end with it
        ).remote(plain, processors, env, detached)
        try:
            placing = driver.place.remote(self._place)
            model, _, tokenizer_json = self._get_model()
            check_model_len(config, model.spec)
            model.spec.check_tensor_parallel(config.tensor_parallel_size)  # before that many processes have started
            model.spec.check_pipeline_parallel(config.pipeline_parallel_size)
            self._process = ask(placing)
            self.resolved: ResolvedConfig = ask(driver.start.remote(model.spec, model.load, tokenizer_json))
            if self._silence_s is not None:
                driver.end_when_silent.remote(self._silence_s)
        except BaseException:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(driver.shutdown.remote(), timeout=10)
            ray.kill(driver)
            raise
        self._driver, self._mark = driver, 0
        self._place = replace(self._place, node_id=None)  # a later one goes where there is room
        LOGGER.info("%s: %s", config.model, self.resolved)

    @property
    def window(self) -> int:
        """Sequences that may be unfinished in it."""
        return 2 * self.resolved.max_num_seqs

    @property
    def num_replicas(self) -> int:
        """It is one."""
        return 1

    def end_when_silent(self, seconds: float) -> None:
        """See Driver.end_when_silent. Only asks for it: this process may be on its way out."""
        self._driver.end_when_silent.remote(seconds)

    def submit(self, requests: list[EngineRequest]) -> None:
        """Queue requests."""
        self._pending.update({request.number: request for request in requests})
        try:
            ask(self._driver.submit.remote(RequestBatch(requests)), DRIVER_SILENT_S)
        except _DRIVER_GONE as error:
            self._revive(error)

    def collect(self, timeout: float) -> Collected:
        """Finished requests, as soon as there are any or after `timeout` seconds."""
        try:
            collected: Collected = ask(self._driver.collect.remote(self._mark, timeout), timeout + DRIVER_SILENT_S)
        except _DRIVER_GONE as error:
            self._revive(error)
            return Collected()
        self._mark = collected.mark
        for death in collected.deaths:
            for number, alone in death.tried:
                if number in self._pending:
                    self._pending[number].num_solo_deaths += alone
        for result in collected.finished:
            self._pending.pop(result.number, None)
        if collected.finished:
            self._restarts.progress()
        return collected

    def abort(self, numbers: list[int]) -> None:
        """End these requests; none of them comes out of a later `collect`."""
        for number in numbers:
            self._pending.pop(number, None)
        try:
            if numbers:
                self._wait(self._driver.abort.remote(numbers))
        except _DRIVER_GONE as error:
            self._revive(error)

    def _wait(self, reference: Any) -> Any:
        """An answer that may take long, from a driver that must be alive meanwhile."""
        while True:
            try:
                return ask(reference, DRIVER_SILENT_S)
            except ray.exceptions.GetTimeoutError:
                ask(self._driver.pid.remote(), DRIVER_SILENT_S)

    def _revive(self, error: Exception) -> None:
        """A new driver with the requests that the dead one had; what that one may still do reaches nobody."""
        if not self._revives:
            raise error
        reason = f"the driver (pid {self._process['pid']} on {self._process['node_ip']}) died: {error}"
        while (wait := self._restarts.next_wait()) is not None:
            LOGGER.error("%s; starting another", reason)
            end_actor(self._driver, self._process)
            time.sleep(wait)
            try:
                self._create()
                if self._pending:
                    ask(self._driver.submit.remote(RequestBatch(self._pending.values())))
                return
            except (ray.exceptions.RayError, RuntimeError) as again:
                reason = f"starting another driver failed: {type(again).__name__}: {again}"
        raise EngineDeadError(self._restarts.refusal("the driver", reason)) from error

    def call_workers(
        self, method: str | Callable[..., Any], timeout: float | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any]:
        """A method of Worker or ModelRunner (by name), or a function of the Worker, on every rank; in rank order."""
        payload = [ray.put((method, args, kwargs))]
        return [ask(reference) for reference in ask(self._driver.call_workers.remote(payload, timeout))]

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget cached prefixes; False while blocks are held."""
        return bool(ask(self._driver.reset_prefix_cache.remote(reset_running_requests)))

    def sleep(self, level: int, mode: str) -> None:
        """See Driver.sleep."""
        ask(self._driver.sleep.remote(level, mode))

    def wake_up(self, tags: list[str] | None) -> None:
        """See Driver.wake_up."""
        ask(self._driver.wake_up.remote(tags))

    def driver_pid(self) -> int:
        """Process id of the driver actor, on its node."""
        return int(ask(self._driver.pid.remote()))

    def metrics(self) -> list[Metric]:
        """Counts and distributions since the start."""
        return list(ask(self._driver.metrics.remote()))

    def num_made_tokens(self) -> int:
        """Tokens sampled since the start; known as long as the driver's process lives, whatever the ranks do."""
        return int(ask(self._driver.num_made_tokens.remote()))

    def shutdown(self) -> None:
        """End driver and ranks, give their resources back; stop Ray if it was started here and no engine is left."""
        if self._driver is None:
            return
        driver, self._driver = self._driver, None
        _count_users(-1)
        if ray.is_initialized():
            try:
                ray.get(driver.shutdown.remote(), timeout=60)
                ray.kill(driver)
            except ray.exceptions.RayError:  # it died, or is stopped: Ray ends its ranks with it
                end_actor(driver, self._process)
                remove_orphans()
        _stop_ray_if_last()


def _stop_ray_if_last() -> None:
    global _started_ray
    if _started_ray and _num_users == 0:
        ray.shutdown()
        _started_ray = False
        _inherited_env.clear()
