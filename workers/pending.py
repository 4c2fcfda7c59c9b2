"""A plan's results on their way to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from shoal.workers.plan import Int32, SchedulerOutput, StepOutput, TokenLogprobs, concat_logprobs

if TYPE_CHECKING:
    from shoal.workers.logprobs import LogprobsTensors


class PendingOutput:
    """Filled step by step, in stream order; `start_copy` ends that, and `wait`, on any thread, gives the output.

    On a GPU nothing here waits for the device before `wait` does, so the next plan can be enqueued meanwhile.
    """

    def __init__(self, plan: SchedulerOutput, device: torch.device) -> None:
        self.step_id = plan.step_id
        self.sampling_index: Int32 = np.cumsum(plan.samples, dtype=np.int32) - np.int32(1)
        self._device = device
        shape = (plan.num_steps, int(plan.samples.sum()))
        self._tokens = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._logprobs: list[tuple[Int32, LogprobsTensors]] = []
        self.prompt_logprobs: dict[int, tuple[int, TokenLogprobs]] = {}
        self._host = self._tokens
        self._event: torch.cuda.Event | None = None

    def put(self, places: Int32, step: int, token_ids: torch.Tensor) -> None:
        """Tokens (any integer dtype, [n]) that the sampling rows `places` [n] got in a step."""
        line = self._tokens[step]
        if len(places) == line.shape[0]:
            line.copy_(token_ids)
        else:
            line[to_device(places.astype(np.int64), self._device)] = token_ids.to(torch.int32)

    def put_logprobs(self, places: Int32, entries: LogprobsTensors) -> None:
        """Log-probabilities of a step, keyed by index among `places`."""
        self._logprobs.append((places, entries))

    def start_copy(self) -> PendingOutput:
        """Everything is enqueued: let the results travel."""
        if self._device.type == "cuda":
            self._host = torch.empty(self._tokens.shape, dtype=torch.int32, pin_memory=True)
            self._host.copy_(self._tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        return self

    def wait(self) -> StepOutput:
        """The output, once the device has got this far."""
        if self._event is not None:
            self._event.synchronize()
        parts: dict[int, list[TokenLogprobs]] = {}
        for places, entries in self._logprobs:
            for index, entry in entries.to_host().items():
                parts.setdefault(int(places[index]), []).append(entry)
        logprobs = {place: concat_logprobs(found) for place, found in parts.items()}
        return StepOutput(self.step_id, self._host.numpy().T, logprobs, self.prompt_logprobs)


def to_device(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy on the device that never waits for it."""
    tensor = torch.tensor(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
