"""LLM over an engine that counts: enqueue, chat, beam search, control and lifecycle."""

import dataclasses
import itertools

import pytest

from shoal import LLM, BeamSearchParams, SamplingParams

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


def test_enqueue_and_wait(llm, counting):
    first = llm.enqueue([[9]] * 40, SHORT, **QUIET)
    assert counting.made.submitted  # it began
    assert len(counting.made.waiting) <= 2 * MAX_SEQS
    second = llm.enqueue_chat([{"role": "user", "content": "a"}], SHORT, **QUIET)
    assert first + second == [str(i) for i in range(41)]
    assert tokens(llm.generate([[30]], SHORT, **QUIET)) == [count(30, 3)]
    outputs = llm.wait_for_completion(**QUIET)
    assert [output.request_id for output in outputs] == first + second
    assert outputs[-1].outputs[0].text == "bcd"
    assert llm.wait_for_completion(**QUIET) == []
    assert counting.made.most <= 2 * MAX_SEQS


def test_a_bad_row_when_enqueuing(llm):
    kept = llm.enqueue([[9]], SHORT, **QUIET)
    with pytest.raises(ValueError, match="prompt 300: Token id"):
        llm.enqueue([[9]] * 300 + [[VOCAB]], SHORT, **QUIET)
    outputs = llm.wait_for_completion(**QUIET)
    assert [output.request_id for output in outputs] == kept
    assert is_clean(llm)


def test_chat(llm):
    outputs = llm.chat([[{"role": "user", "content": "a"}], [{"role": "user", "content": "f"}]], SHORT, **QUIET)
    assert [output.outputs[0].text for output in outputs] == ["bcd", "ghi"]
    assert [output.prompt for output in outputs] == ["a", "f"]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    with pytest.raises(ValueError, match="conversation 1: Unsupported chat content part type: 'image_url'"):
        llm.chat([[{"role": "user", "content": "a"}], image], SHORT, **QUIET)
    returned = llm.chat([image, [{"role": "user", "content": "a"}]], SHORT, on_error="return", **QUIET)
    assert "image_url" in returned[0].error
    assert returned[1].outputs[0].text == "bcd"
    assert llm.chat([], SHORT, **QUIET) == []


def test_skip_tokenizer_init(make_llm):
    llm = make_llm(skip_tokenizer_init=True)
    (output,) = llm.generate([[9]], SamplingParams(max_tokens=2, logprobs=1), **QUIET)
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", count(9, 2))
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        llm.generate("text", **QUIET)
    with pytest.raises(ValueError, match="Tokenizer not available when `skip_tokenizer_init=True`"):
        llm.get_tokenizer()


def test_beam_search(llm, counting):
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    outputs = llm.beam_search([[60], {"prompt": "ab"}], params)
    assert len(outputs) == 2
    best, second = outputs[0].sequences
    assert best.tokens == [60, 61, 62, 63]
    assert best.cum_logprob == pytest.approx(-1.5)
    assert best.cum_logprob >= second.cum_logprob
    assert len(best.logprobs) == 3
    assert len(best.logprobs[0]) == 4  # 2 * beam_width candidates
    assert best.finish_reason == "length"
    assert best.text == llm.get_tokenizer().decode(best.tokens)
    assert best.orig_prompt == {"prompt_token_ids": [60]}
    assert outputs[1].sequences[0].text == "abcde"
    assert all(r.params.max_tokens == 1 and r.params.logprobs == 4 for r in counting.made.submitted)


def test_beams_against_an_exhaustive_search(llm):
    """Scores by depth are fixed in this engine, so the best sequences can be enumerated."""
    depth, width = 3, 4
    (output,) = llm.beam_search([[60]], BeamSearchParams(beam_width=width, max_tokens=depth))
    paths = itertools.product(range(2 * width), repeat=depth)
    scores = sorted((-0.5 * sum(1 + i for i in path) for path in paths), reverse=True)
    assert [one.cum_logprob for one in output.sequences] == pytest.approx(scores[:width])


def test_beams_end_at_eos(llm):
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    (output,) = llm.beam_search([[EOS - 1]], params)
    ended = [one for one in output.sequences if one.finish_reason == "stop"]
    assert ended
    assert ended[0].tokens == [EOS - 1]
    assert ended[0].stop_reason == EOS
    with_eos = dataclasses.replace(params, include_stop_str_in_output=True)
    (output,) = llm.beam_search([[EOS - 1]], with_eos)
    assert [EOS - 1, EOS] in [one.tokens for one in output.sequences]
    (output,) = llm.beam_search([[EOS - 1]], BeamSearchParams(2, 4, ignore_eos=True))
    assert {one.finish_reason for one in output.sequences} == {"length"}


def test_beams_end_at_max_model_len(llm):
    (output,) = llm.beam_search([[60] * (MAX_LEN - 2)], BeamSearchParams(beam_width=2, max_tokens=10))
    assert {len(one.tokens) for one in output.sequences} == {MAX_LEN}


def test_bad_beam_searches(llm):
    params = BeamSearchParams(2, 2)
    with pytest.raises(ValueError, match="You must pass at least one prompt"):
        llm.beam_search([], params)
    with pytest.raises(NotImplementedError, match="Embedding prompt not supported for beam search"):
        llm.beam_search([{"prompt_embeds": [1.0]}], params)
    with pytest.raises(TypeError, match="params must be BeamSearchParams"):
        llm.beam_search([[9]], SamplingParams())
    with pytest.raises(ValueError, match="prompt 1: Token id"):
        llm.beam_search([[9], [VOCAB]], params)
    with pytest.raises(ValueError, match="it cannot fit the KV cache"):
        llm.beam_search([[9], [POISON]], params)
    assert is_clean(llm)


def test_refused_by_name(llm):
    with pytest.raises(ValueError, match=r"Got lora_request=.*LoRA is not supported"):
        llm.generate("a", lora_request="adapter")
    with pytest.raises(ValueError, match="mm_processor_kwargs"):
        llm.chat([{"role": "user", "content": "a"}], mm_processor_kwargs={"x": 1})


def test_control(make_llm, counting):
    llm = make_llm(enable_sleep_mode=True)
    engine = counting.made
    assert llm.collective_rpc("method", 3.0, (1,), {"k": 2}) == ["rank 0", "rank 1"]
    llm.apply_model(len)
    llm.sleep(2, "wait")
    llm.wake_up(["weights"])
    assert engine.calls == [
        ("method", 3.0, (1,), {"k": 2}),
        ("apply_model", None, (len,), {}),
        ("sleep", 2, "wait"),
        ("wake_up", ["weights"]),
    ]
    assert llm.reset_prefix_cache() is True
    assert llm.get_metrics() == ["a metric"]
    assert llm.get_world_size() == 2
    for wrong in ({"level": 3}, {"mode": "now"}):
        with pytest.raises(ValueError, match=r"level must be|mode must be"):
            llm.sleep(**wrong)
    with pytest.raises(ValueError, match="tags must be among"):
        llm.wake_up(["brain"])


def test_control_that_is_switched_off(make_llm):
    llm = make_llm(disable_log_stats=True)
    with pytest.raises(ValueError, match="enable_sleep_mode"):
        llm.sleep()
    with pytest.raises(AssertionError, match="Stat logging disabled"):
        llm.get_metrics()
    assert llm.generate([[9]], SHORT, **QUIET)[0].metrics is None


def test_repr(llm):
    assert repr(llm) == "LLM(model='some-model', dtype='float32', tensor_parallel_size=2, kv_cache_tokens=160)"


def test_shutdown(make_llm, counting):
    with make_llm() as llm:
        engine = counting.made
        llm.generate([[9]], SHORT, **QUIET)
    assert engine.closed == 1
    llm.shutdown()
    assert engine.closed == 1
    for call in (
        lambda: llm.generate("a"),
        lambda: llm.chat([]),
        lambda: llm.enqueue("a"),
        lambda: llm.wait_for_completion(),
        lambda: llm.beam_search("a", BeamSearchParams(1, 1)),
        llm.get_tokenizer,
        llm.get_metrics,
        llm.reset_prefix_cache,
        lambda: llm.collective_rpc("x"),
    ):
        with pytest.raises(RuntimeError, match="the engine is shut down"):
            call()
    assert "shut down" in repr(llm)


def test_a_dropped_llm_shuts_its_engine_down(make_llm, counting):
    llm = make_llm()
    engine = counting.made
    del llm
    assert engine.closed == 1


def test_constructor_errors(make_llm):
    with pytest.raises(TypeError, match="'max_model_length'; did you mean 'max_model_len'"):
        make_llm(max_model_length=5)
    with pytest.raises(ValueError, match="quantization='awq'"):
        make_llm(quantization="awq")


def test_from_engine_args(make_llm, monkeypatch):
    config = make_llm(seed=7).config
    monkeypatch.setattr(LLM, "_start", lambda self, config, replicas: setattr(self, "config", config))
    assert LLM.from_engine_args(config).config.seed == 7
