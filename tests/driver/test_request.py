"""Requests and results as they travel: packed as plain tuples, the same when they arrive."""

import pickle

import numpy as np
from ray import cloudpickle

from shoal.driver.actor import Collected
from shoal.driver.params import SamplingParams
from shoal.driver.request import EngineRequest, FinishedRequest, RequestBatch, RequestStateStats
from shoal.workers.plan import TokenLogprobs


def test_requests_arrive_as_they_were():
    one, other = SamplingParams(max_tokens=3), SamplingParams(max_tokens=4, seed=1)
    requests = [
        EngineRequest(0, [1, 2], one, (2,), (2,), (), 2**64 - 1, -3, "salt", 1.5),
        EngineRequest(1, [3], other, (), (), ((5, 6),)),
        EngineRequest(2, [4], one, (2,), (2,)),
        EngineRequest(3, [4], one, (2, 9), (2,)),
    ]
    arrived = pickle.loads(cloudpickle.dumps(RequestBatch(requests)))
    assert type(arrived) is list
    assert arrived == requests
    assert arrived[0].params is arrived[2].params, "shared parameters travel once"


def test_results_arrive_as_they_were():
    logprobs = TokenLogprobs(np.array([[7]]), np.array([[-0.5]], np.float32), np.array([1]))
    stats = RequestStateStats(3, 1.0, 2.0, 3.0, 4.0, 5.0, 1)
    plain = FinishedRequest(4, [7, 8], "stop", "x", "text", None, 5, None, None, stats)
    failed = FinishedRequest(5, [], "error", error="why")
    rich = FinishedRequest(6, [7], "length", logprobs=logprobs)
    arrived = pickle.loads(cloudpickle.dumps(Collected([plain, failed, rich], 9, 1, 2, 0.5, 77)))
    assert arrived.finished[:2] == [plain, failed]
    assert arrived.finished[2].logprobs.ids.tolist() == [[7]]
    assert (arrived.mark, arrived.num_running, arrived.num_waiting) == (9, 1, 2)
    assert (arrived.kv_cache_usage, arrived.num_made_tokens) == (0.5, 77)
