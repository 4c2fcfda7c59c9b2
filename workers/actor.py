"""Worker: the actor around one rank. The only file of workers/ that imports ray.

`__init__` stores arguments. One loop thread sets the device and inference mode and then does everything: it loads,
executes the plans that come through the step channel, and between them the calls that other actors make.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Client, Connection
from typing import TYPE_CHECKING, Any

import ray

from shoal.workers.config import WorkerConfig
from shoal.workers.host import born, is_out_of_memory, keep_freed_memory
from shoal.workers.plan import EPOCH_SHIFT

if TYPE_CHECKING:
    import torch

STOP = object()


def whereabouts() -> dict[str, Any]:
    """This process, so that it can be told from all others, and ended."""
    node = ray.get_runtime_context().get_node_id()
    return {"pid": os.getpid(), "born": born(os.getpid()), "node_id": node, "node_ip": ray.util.get_node_ip_address()}


class Worker:
    """One rank. Methods are called by the driver; `run` is the door to everything the loop thread does."""

    def __init__(self, rank: int) -> None:
        keep_freed_memory()  # before any thread allocates
        self.rank = rank
        self.runner: Any = None
        self._tp: Any = None
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._frames: dict[int, tuple[bytes, Future[bytes]]] = {}
        self._next_frame = 0
        self._failure: Exception | None = None  # of a step
        self._device, self._gpu = "cpu", 0
        self._answers_driver = rank == 0
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._answer, name="answers", daemon=True).start()
        self._thread = threading.Thread(target=self._loop, name=f"rank-{rank}", daemon=True)
        self._thread.start()

    # ---- called from any thread --------------------------------------------------------------------------------

    def run(self, method: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of this class (by name), of the runner, or a function (with this Worker first), in the loop."""
        future: Future[Any] = Future()
        self._jobs.put((future, method, args, kwargs))
        return future.result()

    def run_payload(self, payload: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Any:
        """`run` with its arguments in one object, which the driver passes on without unpacking it."""
        method, args, kwargs = payload
        return self.run(method, *args, **kwargs)

    def step(self, step_id: int, frame: bytes) -> bytes:
        """The step channel over plain calls: runs frames in the order of their ids, however the calls arrive."""
        future: Future[bytes] = Future()
        self._jobs.put((None, step_id, frame, future))
        return future.result()

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def watch(self) -> None:
        """Never returns: its caller learns of this process's death at once."""
        threading.Event().wait()

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def alive(self) -> None:
        """Returns as long as this process runs, whatever the loop does."""

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def stacks(self) -> str:
        """What every thread of this process is doing."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames().items()
        return "\n".join(f"{names.get(i, i)}:\n{''.join(traceback.format_stack(frame))}" for i, frame in frames)

    # ---- called in the loop thread -----------------------------------------------------------------------------

    def probe(self, device: str) -> dict[str, Any]:
        """What this rank runs on."""
        import torch

        info = whereabouts()
        info["num_cpus"] = len(os.sched_getaffinity(0))
        if device == "cuda":
            self._device, self._gpu = device, self._gpu_index()
            torch.cuda.set_device(self._gpu)
            free, total = torch.cuda.mem_get_info()
            capability = torch.cuda.get_device_capability()
            info |= {"gpu": torch.cuda.get_device_name(), "free": free, "total": total, "capability": capability}
        return info

    def free_address(self) -> str:
        """A TCP address on this node that nobody listens on now, for the process group's rendezvous."""
        with socket.socket() as probe:
            probe.bind((ray.util.get_node_ip_address(), 0))
            host, port = probe.getsockname()
        return f"tcp://{host}:{port}"

    def setup(self, config: WorkerConfig, processors: Any, init_method: str, timeout_s: float) -> dict[str, Any]:
        """Join the process group and load this rank's weights."""
        import torch

        from shoal.kernels.registry import use_implementation
        from shoal.workers.parallel import TensorParallel
        from shoal.workers.pipeline import Pipeline, Stage
        from shoal.workers.runner import ModelRunner

        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        use_implementation("triton" if config.device == "cuda" else "reference")
        stages = config.num_stages
        self._tp = TensorParallel.init(config.rank, config.world_size, init_method, config.device, timeout_s, stages)
        stage = Stage(config.rank // self._tp.world_size, stages)
        self._answers_driver = stage.last and self._tp.rank == 0
        pipeline = Pipeline.init(stage, self._tp.rank, self._tp.world_size, self._torch_device())
        self.runner = ModelRunner(config, self._tp, processors, pipeline)
        seconds = self.runner.load()
        if config.device == "cuda":
            from shoal.workers.warm_up import compile_kernels

            compile_kernels(self.runner)
        return {"load_s": seconds, "weight_bytes": self.runner.weight_bytes(), "block_bytes": self.runner.block_bytes()}

    def try_steps(self) -> None:
        """Once there is a cache: what the first steps would have to wait for. Custom processors see real rows only, and
        stages of a pipeline would have to be told."""
        from shoal.workers.warm_up import try_steps

        if self.runner.stage.count == 1 and not self.runner.sampling.has_processors:
            try_steps(self.runner)

    def free_memory(self) -> None:
        """Take plans again after one that did not fit the memory; the next ones tell of all rows anew."""
        self._failure = None
        self.runner.free_memory()

    def connect(self, address: Any, family: str, secret: bytes) -> None:
        """Take plans from the driver's listener from now on; the first rank of the last stage answers there."""
        connection: Connection = Client(address, family, authkey=secret)
        connection.send_bytes(str(self.rank).encode())
        threading.Thread(target=self._read, args=(connection,), name="step-channel", daemon=True).start()

    def close(self) -> None:
        """Leave the process group and end the loop."""
        self.runner = None
        if self._tp is not None:
            self._tp.destroy()
        self._jobs.put(STOP)
        self._answers.put(STOP)

    # ---- the loop ----------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        import torch

        with torch.inference_mode():
            while (job := self._jobs.get()) is not STOP:
                kind, *rest = job
                if kind is None:
                    self._step_in_order(*rest)
                elif isinstance(kind, Future):
                    self._call(kind, *rest)
                else:
                    frame, connection = rest
                    self._answers.put((self._execute(frame), connection))

    def _read(self, connection: Connection) -> None:
        """Frames from the socket to the loop; ends when the driver goes."""
        try:
            while True:
                self._jobs.put(("frame", connection.recv_bytes(), connection))
        except (EOFError, OSError):
            connection.close()

    def _call(self, future: Future[Any], method: str | Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            if callable(method):
                result = method(self, *args, **kwargs)
            else:
                owner = self if hasattr(type(self), method) else self.runner
                if not hasattr(owner, method):
                    raise AttributeError(f"neither Worker nor ModelRunner has a method {method!r}")
                result = getattr(owner, method)(*args, **kwargs)
        except Exception as error:  # whatever it is, it belongs to the caller
            future.set_exception(error)
        else:
            future.set_result(result)

    def _step_in_order(self, step_id: int, frame: bytes, future: Future[bytes]) -> None:
        self._frames[step_id & ((1 << EPOCH_SHIFT) - 1)] = (frame, future)
        while self._next_frame in self._frames:
            due, answer = self._frames.pop(self._next_frame)
            self._next_frame += 1
            answer.set_result(self._execute(due)())

    def _execute(self, frame: bytes) -> Callable[[], bytes]:
        """Run a frame, on a GPU only enqueue it; what it gives back waits for the answer."""
        from shoal.workers.plan import SchedulerOutput

        plan = SchedulerOutput.decode(frame)
        if self._failure is not None:  # plans that were on their way build on what was lost
            report = self._report(self._failure, plan.step_id)
            return lambda: report
        try:
            pending = self.runner.execute(plan)
        except Exception as error:  # the driver must learn of it: this rank's state is lost
            report = self._report(error, plan.step_id)
            return lambda: report
        return lambda: self._encode(pending, plan.step_id)

    def _encode(self, pending: Any, step_id: int) -> bytes:
        try:
            return bytes(pending.wait().encode())
        except Exception as error:  # a kernel failed: seen only when its results are waited for
            return self._report(error, step_id)

    def _report(self, error: Exception, step_id: int) -> bytes:
        self._failure = error
        report = {"rank": self.rank, "step_id": step_id, "out_of_memory": is_out_of_memory(error)}
        return ERROR + json.dumps(report | {"traceback": "".join(traceback.format_exception(error))}).encode()

    def _answer(self) -> None:
        """Results to the driver as the device gets there, while the loop enqueues what comes next."""
        while (item := self._answers.get()) is not STOP:
            wait, connection = item
            if self._device == "cuda":
                import torch

                torch.cuda.set_device(self._gpu)
            frame = wait()
            if self._answers_driver or frame.startswith(ERROR):
                try:
                    connection.send_bytes(frame)
                except OSError:
                    return  # the driver is gone

    def _torch_device(self) -> torch.device:
        import torch

        return torch.device("cuda", self._gpu) if self._device == "cuda" else torch.device("cpu")

    def _gpu_index(self) -> int:
        """Every rank sees all GPUs of its host; Ray says which one is its own."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        own = str(ray.get_gpu_ids()[0])
        names = visible.split(",") if visible else []
        return names.index(own) if own in names else int(own)


ERROR = b"ERROR:"  # a StepOutput's frame starts with its header's length, which is never this large

ACTOR_OPTIONS: dict[str, Any] = {"max_restarts": 0, "max_concurrency": 8, "concurrency_groups": {"watch": 4}}
RemoteWorker = ray.remote(**ACTOR_OPTIONS)(Worker)
