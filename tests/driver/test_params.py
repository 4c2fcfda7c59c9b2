"""SamplingParams and BeamSearchParams: every field, right and wrong."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from shoal.driver.params import BeamSearchParams, SamplingParams

NAN, INF = math.nan, math.inf

VALID = [
    ("n", 3, 3),
    ("n", np.int64(2), 2),
    ("presence_penalty", -2, -2.0),
    ("frequency_penalty", 2.0, 2.0),
    ("repetition_penalty", 0.1, 0.1),
    ("temperature", 2, 2.0),
    ("temperature", np.float32(0.5), 0.5),
    ("top_p", 1, 1.0),
    ("top_p", 0.001, 0.001),
    ("top_k", -1, 0),
    ("top_k", 5, 5),
    ("min_p", 0, 0.0),
    ("min_p", 1.0, 1.0),
    ("seed", -1, None),
    ("seed", 2**70, 2**70),
    ("stop", "end", ["end"]),
    ("stop", ("a", "b"), ["a", "b"]),
    ("stop", None, []),
    ("stop_token_ids", np.array([3, 4]), [3, 4]),
    ("stop_token_ids", None, []),
    ("ignore_eos", True, True),
    ("max_tokens", None, None),
    ("max_tokens", 1, 1),
    ("min_tokens", 16, 16),
    ("logprobs", True, 1),
    ("logprobs", False, None),
    ("logprobs", -1, -1),
    ("logprobs", 0, 0),
    ("prompt_logprobs", 5, 5),
    ("detokenize", False, False),
    ("skip_special_tokens", False, False),
    ("spaces_between_special_tokens", False, False),
    ("include_stop_str_in_output", True, True),
    ("logit_bias", {5: 1}, {5: 1.0}),
    ("logit_bias", {5: -INF}, {5: -INF}),
    ("allowed_token_ids", (1, 2), [1, 2]),
    ("bad_words", ["no"], ["no"]),
    ("extra_args", {"a": [1]}, {"a": [1]}),
    ("skip_reading_prefix_cache", None, False),
    ("skip_reading_prefix_cache", True, True),
]

INVALID = [
    ("n", 0, ValueError, "n must be at least 1, got 0"),
    ("n", 16385, ValueError, "n must be at most 16384, got 16385"),
    ("n", 2.0, TypeError, "n must be an integer.*float"),
    ("n", True, ValueError, "n must be an int"),
    ("presence_penalty", 2.1, ValueError, r"presence_penalty must be in \[-2, 2\], got 2.1"),
    ("presence_penalty", NAN, ValueError, "presence_penalty"),
    ("frequency_penalty", -3, ValueError, r"frequency_penalty must be in \[-2, 2\], got -3"),
    ("frequency_penalty", "1", TypeError, "frequency_penalty must be a number"),
    ("repetition_penalty", 0, ValueError, "repetition_penalty must be greater than zero"),
    ("repetition_penalty", INF, ValueError, "repetition_penalty must be a finite number"),
    ("temperature", NAN, ValueError, "temperature must be a finite number, got nan"),
    ("temperature", INF, ValueError, "temperature must be a finite number"),
    ("temperature", -0.1, ValueError, "temperature must be non-negative, got -0.1"),
    ("temperature", 2.5, ValueError, r"temperature must be in \[0, 2\], got 2.5"),
    ("temperature", None, TypeError, "temperature must be a number"),
    ("top_p", 0, ValueError, r"top_p must be in \(0, 1\], got 0"),
    ("top_p", 1.1, ValueError, r"top_p must be in \(0, 1\], got 1.1"),
    ("top_k", -2, ValueError, r"top_k must be 0 \(disable\), or at least 1, got -2"),
    ("top_k", 5.0, TypeError, "top_k must be an integer"),
    ("min_p", 1.5, ValueError, r"min_p must be in \[0, 1\], got 1.5"),
    ("min_p", NAN, ValueError, "min_p"),
    ("seed", "7", TypeError, "seed must be an integer"),
    ("stop", ["a", ""], ValueError, "stop cannot contain an empty string"),
    ("stop", [1], TypeError, "stop must contain only strings"),
    ("stop", 5, TypeError, "stop must be a list"),
    ("stop", "\ud800", ValueError, "stop has a string with a lone surrogate"),
    ("stop_token_ids", [1, "a"], ValueError, "stop_token_ids must contain only integers, got 'a'"),
    ("stop_token_ids", 5, TypeError, "stop_token_ids must be a list"),
    ("ignore_eos", 1, TypeError, "ignore_eos must be a bool"),
    ("max_tokens", 0, ValueError, "max_tokens must be at least 1, got 0"),
    ("max_tokens", 1.5, TypeError, "max_tokens must be an integer"),
    ("min_tokens", -1, ValueError, "min_tokens must be greater than or equal to 0, got -1"),
    ("min_tokens", 17, ValueError, "min_tokens must be less than or equal to max_tokens=16, got 17"),
    ("logprobs", -2, ValueError, "logprobs must be non-negative or -1, got -2"),
    ("prompt_logprobs", -2, ValueError, "prompt_logprobs must be non-negative or -1, got -2"),
    ("detokenize", None, TypeError, "detokenize must be a bool"),
    ("skip_special_tokens", "yes", TypeError, "skip_special_tokens must be a bool"),
    ("spaces_between_special_tokens", 0, TypeError, "spaces_between_special_tokens must be a bool"),
    ("include_stop_str_in_output", 1, TypeError, "include_stop_str_in_output must be a bool"),
    ("logit_bias", {"5": 1.0}, TypeError, "key of logit_bias must be an integer"),
    ("logit_bias", {5: NAN}, ValueError, "logit_bias must have finite values.*token id 5"),
    ("logit_bias", {5: INF}, ValueError, "logit_bias must have finite values"),
    ("logit_bias", [5], TypeError, "logit_bias must be a dict"),
    ("allowed_token_ids", [], ValueError, "allowed_token_ids is not None and empty!"),
    ("allowed_token_ids", range(1025), ValueError, "at most 1024 ids, got 1025"),
    ("bad_words", ["a", ""], ValueError, "bad_words cannot contain an empty string"),
    ("extra_args", [1], TypeError, "extra_args must be a dict"),
    ("skip_reading_prefix_cache", 1, TypeError, "skip_reading_prefix_cache"),
    ("structured_outputs", {"json": "{}"}, ValueError, "structured_outputs.*not supported by this version of Shoal"),
    ("guided_decoding", {"json": "{}"}, ValueError, "guided_decoding.*not supported"),
    ("logprob_token_ids", [1], ValueError, "logprob_token_ids.*not supported"),
    ("flat_logprobs", True, ValueError, "flat_logprobs.*not supported"),
    ("thinking_token_budget", 5, ValueError, "thinking_token_budget.*not supported"),
    ("repetition_detection", {}, ValueError, "repetition_detection.*not supported"),
    ("output_kind", 2, ValueError, "output_kind.*not supported"),
    ("best_of", 2, ValueError, "best_of.*not supported"),
    ("logits_processors", [print], ValueError, r"logits_processors.*LLM\(logits_processors"),
    ("truncate_prompt_tokens", 5, ValueError, "truncate_prompt_tokens.*tokenization_kwargs"),
]


@pytest.mark.parametrize(("name", "value", "kept"), VALID)
def test_valid(name, value, kept):
    found = getattr(SamplingParams(**{name: value}), name)
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize(("name", "value", "error", "message"), INVALID)
def test_invalid(name, value, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**{name: value})


def test_wrong_types_are_value_errors_too():
    with pytest.raises(ValueError, match="top_k"):
        SamplingParams(top_k=1.5)


def test_every_field_has_a_case():
    fields = set(SamplingParams.__init__.__annotations__) - {"return"}
    assert fields == {name for name, *_ in VALID + INVALID}


@pytest.mark.parametrize("name", ["structured_outputs", "flat_logprobs", "logprob_token_ids", "output_kind"])
def test_unsupported_fields_may_be_unset(name):
    assert SamplingParams(**{name: None}) == SamplingParams()


def test_flat_logprobs_false_is_the_default():
    assert SamplingParams(flat_logprobs=False) == SamplingParams()


def test_unknown_keyword_names_the_nearest():
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=0.5)
    with pytest.raises(TypeError, match="'beam_with'; did you mean 'beam_width'"):
        BeamSearchParams(beam_with=3, max_tokens=3)


def test_low_temperatures_are_raised_with_a_warning():
    with pytest.warns(UserWarning, match=r"0\.005 is below 0\.01"):
        params = SamplingParams(temperature=0.005)
    assert params.temperature == 0.01


def test_greedy_drops_what_it_does_not_use():
    params = SamplingParams(temperature=1e-6, top_p=0.5, top_k=7, min_p=0.1)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    with pytest.raises(ValueError, match="n must be 1 when using greedy sampling, got 2"):
        SamplingParams(temperature=0, n=2)


def test_stop_needs_text():
    with pytest.raises(ValueError, match="stop strings are only supported when detokenize is True"):
        SamplingParams(stop="x", detokenize=False)


def test_limit_of_n_from_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_MAX_N_SEQUENCES", "4")
    assert SamplingParams(n=4).n == 4
    with pytest.raises(ValueError, match=r"n must be at most 4, got 5.*VLLM_MAX_N_SEQUENCES"):
        SamplingParams(n=5)


def test_lists_are_copies_and_fields_are_frozen():
    stop = ["a"]
    params = SamplingParams(stop=stop)
    stop.append("b")
    assert params.stop == ["a"]
    with pytest.raises(AttributeError):
        params.n = 2


def test_prompt_logprobs_skip_the_prefix_cache():
    params = SamplingParams(prompt_logprobs=0)
    assert params.skip_reading_prefix_cache is True
    assert params.replace(prompt_logprobs=None).skip_reading_prefix_cache is False
    assert SamplingParams().replace(prompt_logprobs=2).skip_reading_prefix_cache is True
    assert SamplingParams(prompt_logprobs=1, skip_reading_prefix_cache=False).skip_reading_prefix_cache is False


def test_copies():
    params = SamplingParams(stop=["a"], seed=4, logit_bias={1: 2.0})
    clone = params.clone()
    assert clone == params
    assert clone.stop is not params.stop
    assert params.replace(seed=5).seed == 5
    with pytest.raises(ValueError, match="top_p"):
        params.replace(top_p=3)
    assert pickle.loads(pickle.dumps(params)) == params


def test_from_optional():
    params = SamplingParams.from_optional(temperature=None, logit_bias={"7": 500, "8": -500}, max_tokens=None, n=None)
    assert params.temperature == 1.0
    assert params.logit_bias == {7: 100.0, 8: -100.0}
    assert params.max_tokens is None


def test_beam_search_params():
    params = BeamSearchParams(3, 10)
    assert (params.beam_width, params.max_tokens, params.temperature, params.length_penalty) == (3, 10, 0.0, 1.0)
    for wrong, message in [
        ({"beam_width": 0}, "beam_width must be at least 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": 3}, "temperature must be in"),
        ({"length_penalty": NAN}, "length_penalty must be a finite"),
        ({"ignore_eos": 1}, "ignore_eos must be a bool"),
        ({"include_stop_str_in_output": None}, "include_stop_str_in_output must be a bool"),
        ({"structured_outputs": {}}, "structured_outputs.*not supported"),
    ]:
        with pytest.raises(ValueError, match=message):
            BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, **wrong})


def test_unpickling_needs_neither_torch_nor_transformers():
    data = pickle.dumps(SamplingParams(stop="x", extra_args={"k": 1}))
    code = (
        f"import pickle, sys; p = pickle.loads({data!r}); assert p.stop == ['x']; "
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_logit_bias_that_is_no_mapping_is_said_so():
    """Of a row's JSON: an AttributeError would end the whole job."""
    with pytest.raises(ValueError, match="logit_bias must be a dict of token id to number, but is of type list"):
        SamplingParams.from_optional(logit_bias=[5])
