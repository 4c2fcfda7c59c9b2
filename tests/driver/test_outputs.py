"""FinishedRequests to RequestOutputs."""

import numpy as np
import pytest

from shoal.driver.outputs import CompletionOutput, RequestOutput, make_output
from shoal.driver.params import SamplingParams
from shoal.driver.request import FinishedRequest, RequestStateStats
from shoal.workers.plan import TokenLogprobs


class Letters:
    """Ids are letters: 0 is "a"."""

    def text(self, prompt_token_ids, token_ids, skip_special_tokens=True, spaces_between_special_tokens=True):
        return "".join(map(self.token_text, token_ids)) + ("" if skip_special_tokens else "!")

    def token_text(self, token_id):
        return chr(97 + token_id)


def entries(*rows):
    """(ids, logprobs, rank) of each token."""
    ids, logprobs, ranks = zip(*rows, strict=True)
    return TokenLogprobs(np.array(ids, np.int32), np.array(logprobs, np.float32), np.array(ranks, np.int32))


def output(*children, params=None, log_stats=True, decoder=None):
    children = children or (FinishedRequest(0, [1, 2, 3], "length"),)
    return make_output("7", "text", [5, 6], params or SamplingParams(), children, decoder or Letters(), log_stats)


def test_plain():
    result = output(FinishedRequest(0, [1, 2, 3], "length", num_cached_tokens=1))
    assert (result.request_id, result.prompt, result.prompt_token_ids) == ("7", "text", [5, 6])
    assert result.finished
    assert result.error is None
    assert result.num_cached_tokens == 1
    (completion,) = result.outputs
    assert (completion.index, completion.text, completion.token_ids) == (0, "bcd", [1, 2, 3])
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert completion.cumulative_logprob is None
    assert completion.logprobs is None
    assert completion.finished()
    assert result.prompt_logprobs is None


def test_keyword_construction():
    assert RequestOutput(request_id="0", prompt=None, prompt_token_ids=None).outputs == []
    assert not CompletionOutput(index=0, text="", token_ids=[]).finished()


@pytest.mark.parametrize("stop_reason", [None, 3])
def test_what_ended_a_row_is_in_ids_but_not_in_text(stop_reason):
    child = FinishedRequest(0, [1, 2, 3], "stop", stop_reason)
    assert output(child).outputs[0].text == "bc"
    assert output(child).outputs[0].token_ids == [1, 2, 3]
    assert output(child).outputs[0].stop_reason == stop_reason
    shown = SamplingParams(include_stop_str_in_output=True)
    assert output(child, params=shown).outputs[0].text == "bcd"


def test_text_of_a_stop_string_is_the_drivers():
    child = FinishedRequest(0, [1, 2, 3], "stop", "cd", stop_text="b")
    completion = output(child, params=SamplingParams(stop="cd")).outputs[0]
    assert (completion.text, completion.stop_reason, completion.token_ids) == ("b", "cd", [1, 2, 3])
    empty = FinishedRequest(0, [1], "stop", "b", stop_text="")
    assert output(empty, params=SamplingParams(stop="b")).outputs[0].text == ""


def test_no_text():
    found = entries(([1, 2], [-0.5, -1.0], 1))
    child = FinishedRequest(0, [1], "length", logprobs=found)
    completion = output(child, params=SamplingParams(detokenize=False, logprobs=1)).outputs[0]
    assert completion.text == ""
    assert completion.logprobs[0][1].decoded_token is None


def test_special_tokens_are_passed_on():
    assert output(params=SamplingParams(skip_special_tokens=False)).outputs[0].text == "bcd!"


def test_logprobs():
    found = entries(
        (
            [4, 4, 1, -1],
            [-0.1, -0.1, -2.0, 0.0],
            1,
        ),  # the sampled one is among the 2 best; a column of others' is unused
        ([3, 1, 2, -1], [-9.0, -0.5, -0.6, 0.0], 8),
    )
    completion = output(
        FinishedRequest(0, [4, 3], "length", logprobs=found), params=SamplingParams(logprobs=2)
    ).outputs[0]
    first, second = completion.logprobs
    assert list(first) == [4, 1]
    assert [(one.rank, one.decoded_token) for one in first.values()] == [(1, "e"), (2, "b")]
    assert list(second) == [3, 1, 2]
    assert [one.rank for one in second.values()] == [8, 1, 2]
    assert second[3].logprob == -9.0
    assert completion.cumulative_logprob == pytest.approx(-9.1)


def test_logprobs_zero_is_the_sampled_token():
    found = entries(([4, 1], [-0.5, -0.1], 2))
    completion = output(FinishedRequest(0, [4], "length", logprobs=found), params=SamplingParams(logprobs=0)).outputs[0]
    assert list(completion.logprobs[0]) == [4]


def test_logprobs_of_the_whole_vocabulary():
    found = entries(([2, 0, 1, 2], [-3.0, -0.1, -1.0, -3.0], 3))
    completion = output(FinishedRequest(0, [2], "length", logprobs=found), params=SamplingParams(logprobs=-1)).outputs[
        0
    ]
    assert {token: one.rank for token, one in completion.logprobs[0].items()} == {2: 3, 0: 1, 1: 2}


def test_prompt_logprobs():
    found = entries(([6, 1], [-1.0, -0.5], 2))
    child = FinishedRequest(0, [1], "length", prompt_logprobs=found)
    result = output(child, params=SamplingParams(prompt_logprobs=1))
    assert result.prompt_logprobs[0] is None
    assert list(result.prompt_logprobs[1]) == [6, 1]
    alone = output(FinishedRequest(0, [1], "length"), params=SamplingParams(prompt_logprobs=1))
    assert alone.prompt_logprobs == [None]


def test_children_are_joined():
    stats = [RequestStateStats(2, 10.0, 10.5, 11.0, 12.0, 13.0, 1), RequestStateStats(3, 9.0, 9.5, 11.5, 12.5, 15.0, 0)]
    children = [
        FinishedRequest(3, [1, 2], "length", metrics=stats[0], num_cached_tokens=0),
        FinishedRequest(4, [2, 2, 2], "stop", metrics=stats[1], num_cached_tokens=2),
    ]
    result = output(*children, params=SamplingParams(n=2))
    assert [(one.index, one.finish_reason) for one in result.outputs] == [(0, "length"), (1, "stop")]
    assert result.metrics == RequestStateStats(5, 9.0, 9.5, 11.0, 12.0, 15.0, 1)
    assert result.num_cached_tokens == 0


def test_metrics():
    child = FinishedRequest(0, [1], "length", metrics=RequestStateStats(arrival_time=1.0, first_token_ts=3.5))
    assert output(child).metrics.first_token_latency == 2.5
    assert output(child, log_stats=False).metrics is None
    assert output(FinishedRequest(0, [1], "length")).metrics is None


def test_an_error_takes_the_row():
    children = [FinishedRequest(0, [1], "length"), FinishedRequest(1, [], "error", error="too big for the cache")]
    result = output(*children, params=SamplingParams(n=2))
    assert result.error == "too big for the cache"
    assert result.outputs == []
    assert result.finished
    assert result.prompt_token_ids == [5, 6]
