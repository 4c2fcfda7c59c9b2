"""Parameters against model and tokenizer; random streams; requests of a row's children."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from shoal.driver.binding import Binder, Row, default_params, stream_key
from shoal.driver.params import SamplingParams

EOS = 2


class Words:
    """A tokenizer of one id for a character, 100 for a leading space."""

    eos_token_id = EOS

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [100 if char == " " else ord(char) for char in text]


def make(**changes):
    arguments = {
        "vocab_size": 200,
        "max_model_len": 64,
        "max_logprobs": 20,
        "seed": 0,
        "tokenizer": Words(),
        "has_fast_tokenizer": True,
        "eos_token_ids": (EOS, 7, 8),
    }
    return Binder(**{**arguments, **changes})


def row(binder, params, length=10, number=3):
    return Row(0, number, 40, None, list(range(length)), binder.bind(params))


def test_eos_and_stop_ids():
    bound = make().bind(SamplingParams(stop_token_ids=[9, EOS]))
    assert bound.eos_ids == (EOS,)
    assert bound.stop_ids == (EOS, 7, 8, 9)


def test_ignore_eos_keeps_only_the_users_stop_ids():
    bound = make().bind(SamplingParams(stop_token_ids=[9, EOS], ignore_eos=True))
    assert bound.eos_ids == ()
    assert bound.stop_ids == (9, EOS)


def test_eos_without_a_tokenizer_is_the_models_first():
    bound = make(tokenizer=None, has_fast_tokenizer=False, eos_token_ids=(7, 8)).bind(SamplingParams())
    assert (bound.eos_ids, bound.stop_ids) == ((7,), (7, 8))


def test_the_tokenizers_eos_counts_where_the_config_names_others():
    bound = make(tokenizer=SimpleNamespace(eos_token_id=5), eos_token_ids=(7,)).bind(SamplingParams())
    assert (bound.eos_ids, bound.stop_ids) == ((5,), (5, 7))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {200: 1.0}}, r"token_id\(s\) \[200\] in logit_bias contain out-of-vocab.*size: 200"),
        ({"allowed_token_ids": [1, -1]}, "allowed_token_ids contain out-of-vocab"),
        ({"stop_token_ids": [500]}, "stop_token_ids contain out-of-vocab"),
        ({"logprobs": 21}, "Requested sample logprobs of 21, which is greater than max allowed: 20"),
        ({"logprobs": -1}, "Requested sample logprobs of 200"),
        ({"prompt_logprobs": 25}, "Requested prompt logprobs of 25, which is greater than max allowed: 20"),
        ({"bad_words": ["é"]}, r"vocabulary size is 200, but the following tokens were specified as bad: \[233\]"),
    ],
)
def test_what_the_model_does_not_have(params, message):
    with pytest.raises(ValueError, match=message):
        make().bind(SamplingParams(**params))


def test_logprobs_without_limit_end_at_the_vocabulary():
    binder = make(max_logprobs=-1)
    binder.bind(SamplingParams(logprobs=-1, prompt_logprobs=200))
    with pytest.raises(ValueError, match="max allowed: 200"):
        binder.bind(SamplingParams(logprobs=201))


def test_stop_strings_need_a_fast_tokenizer():
    with pytest.raises(ValueError, match="no fast backend"):
        make(has_fast_tokenizer=False).bind(SamplingParams(stop="x"))
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        make(tokenizer=None, has_fast_tokenizer=False).bind(SamplingParams(stop="x"))
    with pytest.raises(ValueError, match=r"bad_words.*need a tokenizer"):
        make(tokenizer=None, has_fast_tokenizer=False).bind(SamplingParams(bad_words=["x"]))


def test_bad_words_with_and_without_their_space():
    assert make().bind(SamplingParams(bad_words=["ab", " c"])).bad_words == (
        (97, 98),
        (100, 97, 98),
        (99,),
        (100, 99),
    )


def test_streams():
    assert stream_key(0, 5, 2, seed=10) == 12
    assert stream_key(1, 6, 2, seed=10) == 12
    assert stream_key(0, 0, 1, seed=2**64 - 1) == 0
    keys = {stream_key(engine, key, sample, None) for engine in (0, 1) for key in range(20) for sample in range(5)}
    assert len(keys) == 200
    assert all(0 <= key < 2**64 for key in keys)


def test_streams_are_the_same_in_another_process():
    code = "from shoal.driver.binding import stream_key; print(stream_key(3, 4, 5, None))"
    out = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True).stdout
    assert int(out) == stream_key(3, 4, 5, None)


def test_children():
    binder = make(seed=11)
    requests = binder.requests(row(binder, SamplingParams(n=3, seed=5)), 1, 2)
    assert [request.number for request in requests] == [41, 42]
    assert [request.stream for request in requests] == [6, 7]
    unseeded = binder.requests(row(binder, SamplingParams(n=2)), 0, 2)
    assert [request.stream for request in unseeded] == [stream_key(11, 3, 0, None), stream_key(11, 3, 1, None)]


def test_max_tokens_none_is_what_is_left():
    binder = make()
    (request,) = binder.requests(row(binder, SamplingParams(max_tokens=None)), 0, 1)
    assert request.params.max_tokens == 54
    wanting = row(binder, SamplingParams(max_tokens=None, min_tokens=60))
    with pytest.raises(ValueError, match=r"min_tokens must be less than or equal to max_tokens=54.*got 60"):
        binder.check_length(wanting)


def test_prompt_logprobs_are_computed_once_for_n_children():
    binder = make()
    requests = binder.requests(row(binder, SamplingParams(n=3, prompt_logprobs=2)), 0, 3)
    assert [request.params.prompt_logprobs for request in requests] == [2, None, None]
    assert [request.params.skip_reading_prefix_cache for request in requests] == [True, False, False]


def test_equal_parameters_share_an_object():
    binder, params = make(), SamplingParams(max_tokens=None)
    first, second = (binder.requests(row(binder, params), 0, 1)[0].params for _ in range(2))
    assert first is second
    given = SamplingParams()
    assert binder.requests(row(binder, given), 0, 1)[0].params is given


def test_generation_config():
    params = default_params({"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 33, "eos_token_id": 2, "top_k": None})
    assert (params.temperature, params.top_p, params.max_tokens, params.top_k) == (0.6, 0.9, 33, 0)
    assert default_params({}) == SamplingParams()
