"""LLM over an engine that counts: feeding, order, errors, interrupts, progress."""

import re

import pytest

from shoal import BeamSearchParams, SamplingParams

VOCAB, EOS, MAX_LEN, MAX_SEQS = 259, 2, 64, 4  # as the engine of conftest.py has them
POISON = 200  # it refuses prompts that end with this
QUIET = {"use_tqdm": False}
SHORT = SamplingParams(max_tokens=3)


def count(start, length):
    return [(start + 1 + i) % VOCAB for i in range(length)]


def tokens(outputs):
    return [one.token_ids for output in outputs for one in output.outputs]


def is_clean(llm):
    """Nothing is left in the driver, and the next call answers."""
    assert llm._engine.waiting == {}
    assert llm._client.feed.num_unfinished == 0
    assert tokens(llm.generate([[50]], SHORT, **QUIET)) == [count(50, 3)]
    return True


def test_order_ids_and_window(llm, counting):
    outputs = llm.generate([[20 + i % 50] for i in range(1000)], SHORT, **QUIET)
    assert tokens(outputs) == [count(20 + i % 50, 3) for i in range(1000)]
    assert [output.request_id for output in outputs] == [str(i) for i in range(1000)]
    assert counting.made.most == 2 * MAX_SEQS
    assert [r.number for r in counting.made.submitted] == list(range(1000))
    assert llm.generate("ab", SHORT, **QUIET)[0].request_id == "1000"
    assert outputs[0].metrics.arrival_time <= outputs[-1].metrics.arrival_time


def test_feeding_is_lazy(llm):
    outputs = llm.generate([[20]] * 3000, SHORT, **QUIET)
    first_finish = min(output.metrics.last_token_ts for output in outputs)
    assert first_finish < max(output.metrics.arrival_time for output in outputs)


def test_texts_and_forms(llm, counting):
    outputs = llm.generate(["ab", {"prompt": "b", "cache_salt": "s"}, {"prompt_token_ids": [70]}], SHORT, **QUIET)
    assert [output.prompt for output in outputs] == ["ab", "b", None]
    assert outputs[0].outputs[0].text == "cde"
    assert [r.cache_salt for r in counting.made.submitted] == [None, "s", None]
    assert llm.generate([], SHORT, **QUIET) == []
    assert len(llm.generate([70, 71], SHORT, **QUIET)) == 1


def test_parameters_for_each_row(llm):
    params = [SamplingParams(max_tokens=i) for i in (1, 4, 2)]
    assert [len(ids) for ids in tokens(llm.generate([[9]] * 3, params, **QUIET))] == [1, 4, 2]
    with pytest.raises(ValueError, match=r"The lengths of prompts \(2\) and params \(3\) must be the same"):
        llm.generate([[9]] * 2, params, **QUIET)
    with pytest.raises(TypeError, match="params must be SamplingParams"):
        llm.generate([[9]], {"max_tokens": 3}, **QUIET)
    with pytest.raises(TypeError, match="BeamSearchParams"):
        llm.generate([[9]], [BeamSearchParams(2, 2)], **QUIET)


def test_more_children_than_the_window(llm, counting):
    (output,) = llm.generate([[9]], SamplingParams(n=30, seed=1, max_tokens=2), **QUIET)
    assert [one.index for one in output.outputs] == list(range(30))
    assert tokens([output]) == [[9 + 2 + i, 9 + 2 * (2 + i)] for i in range(30)]  # child i runs on stream seed + i
    assert counting.made.most == 2 * MAX_SEQS


def test_children_of_many_rows(llm, counting):
    outputs = llm.generate([[9]] * 5, [SamplingParams(n=1 + i, seed=0, max_tokens=1) for i in range(5)], **QUIET)
    assert [len(output.outputs) for output in outputs] == [1, 2, 3, 4, 5]
    assert [r.number for r in counting.made.submitted] == list(range(15))


def test_stops(llm):
    outputs = llm.generate([[0], [3], [9]], SamplingParams(max_tokens=5, stop_token_ids=[11]), **QUIET)
    ends = [(one.outputs[0].finish_reason, one.outputs[0].stop_reason) for one in outputs]
    assert ends == [("stop", None), ("stop", 5), ("stop", 11)]
    (output,) = llm.generate("a", SamplingParams(stop="de", max_tokens=9), **QUIET)
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("bc", "de")


def test_generation_config_gives_defaults_only_when_none_is_passed(make_llm):
    llm = make_llm({"max_new_tokens": 2, "eos_token_id": [EOS, 90]})
    assert llm.get_default_sampling_params().max_tokens == 2
    assert [len(ids) for ids in tokens(llm.generate([[9]], **QUIET))] == [2]
    assert [len(ids) for ids in tokens(llm.generate([[9]], SamplingParams(max_tokens=6), **QUIET))] == [6]
    (output,) = llm.generate([[88]], SamplingParams(max_tokens=6), **QUIET)
    assert (output.outputs[0].token_ids, output.outputs[0].stop_reason) == ([89, 90], 90)


def test_priority(make_llm, counting):
    llm = make_llm(scheduling_policy="priority")
    outputs = llm.generate([[10], [20], [30]], SHORT, priority=[2, 1, 1], **QUIET)
    assert [r.prompt_token_ids for r in counting.made.submitted] == [[20], [30], [10]]
    assert [r.priority for r in counting.made.submitted] == [1, 1, 2]
    assert [r.number for r in counting.made.submitted] == [1, 2, 0]
    assert tokens(outputs)[0] == count(10, 3)
    with pytest.raises(ValueError, match=r"prompts \(1\) and priority \(2\)"):
        llm.generate([[10]], SHORT, priority=[1, 2], **QUIET)
    with pytest.raises(ValueError, match="Priority scheduling is not enabled"):
        make_llm().generate([[10]], SHORT, priority=[1], **QUIET)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (5.5, TypeError, "prompt 20: Prompt should be a string"),
        ([VOCAB], ValueError, "prompt 20: Token id 259 is out of vocabulary"),
        ("x" * 100, ValueError, "prompt 20: This model's maximum context length is 64"),
        ([], ValueError, "prompt 20: The decoder prompt cannot be empty"),
        ("\ud800", ValueError, "prompt 20: .*lone surrogate"),
        ([9, POISON], ValueError, "prompt 20: it cannot fit the KV cache"),
    ],
)
def test_a_bad_row(llm, bad, error, message):
    prompts = [[9]] * 20 + [bad] + [[9]] * 20
    with pytest.raises(error, match=message):
        llm.generate(prompts, SHORT, **QUIET)
    assert is_clean(llm)
    outputs = llm.generate(prompts, SHORT, on_error="return", **QUIET)
    assert outputs[20].outputs == []
    assert re.search(message.removeprefix("prompt 20: "), outputs[20].error)
    assert outputs[20].finished
    assert [output.error for output in outputs[:20] + outputs[21:]] == [None] * 40
    assert tokens(outputs) == [count(9, 3)] * 40
    first = int(outputs[0].request_id)
    assert [output.request_id for output in outputs] == [str(first + i) for i in range(41)]


def test_types_are_seen_before_anything_is_sent(llm, counting):
    with pytest.raises(TypeError, match="prompt 4999"):
        llm.generate([[9]] * 4999 + [None], SHORT, **QUIET)
    assert counting.made.submitted == []


def test_parameters_the_model_cannot_do(llm):
    wrong = SamplingParams(allowed_token_ids=[VOCAB])
    with pytest.raises(ValueError, match=r"prompt 1: .*allowed_token_ids contain out-of-vocab"):
        llm.generate([[9]] * 2, [SHORT, wrong], **QUIET)
    with pytest.raises(ValueError, match="allowed_token_ids"):
        llm.generate([[9]], wrong, on_error="return", **QUIET)
    outputs = llm.generate([[9]] * 2, [SHORT, wrong], on_error="return", **QUIET)
    assert outputs[0].error is None
    assert "out-of-vocab" in outputs[1].error
    with pytest.raises(ValueError, match="on_error must be"):
        llm.generate([[9]], on_error="ignore", **QUIET)


def test_interrupt(llm, counting):
    counting.made.interrupt_after = 30
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[9]] * 100, SHORT, **QUIET)
    assert is_clean(llm)


def test_interrupt_spares_what_is_enqueued(llm, counting):
    llm.enqueue([[9]] * 5, SamplingParams(max_tokens=2), **QUIET)
    counting.made.interrupt_after = 6
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[60]] * 50, SHORT, **QUIET)
    assert tokens(llm.wait_for_completion(**QUIET)) == [count(9, 2)] * 5
    assert is_clean(llm)


class Bar:
    """What a caller's bar sees."""

    def __init__(self, **arguments):
        self.arguments, self.n, self.updates, self.closed = arguments, 0, 0, False
        Bar.last = self

    def update(self, by):
        self.n += by
        self.updates += 1

    def refresh(self):
        self.drawn = True

    def set_postfix_str(self, text, refresh=True):
        self.postfix = text

    def close(self):
        self.closed = True


def test_progress(llm):
    llm.generate([[9], [9], [259]], SamplingParams(n=3, max_tokens=2), use_tqdm=Bar, on_error="return")
    assert (Bar.last.n, Bar.last.arguments["total"], Bar.last.closed) == (9, 9, True)
    assert Bar.last.arguments["desc"] == "Processed prompts"
    assert "est. speed input: " in Bar.last.postfix
    assert " toks/s, output: " in Bar.last.postfix
    with pytest.raises(TypeError, match="use_tqdm must be a bool or a callable"):
        llm.generate([[9]], SHORT, use_tqdm="yes")


def test_the_bar_is_drawn_before_work_begins(llm, monkeypatch, capsys):
    drawn = []
    real = llm._client.inputs.tokenize
    monkeypatch.setattr(
        llm._client.inputs,
        "tokenize",
        lambda *args: drawn.append("Processed" in capsys.readouterr().err) or real(*args),
    )
    llm.generate(["a"] * 600, SHORT)
    assert drawn[0] is True
    assert len(drawn) >= 3
