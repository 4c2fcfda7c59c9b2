"""Prompt forms, their refusal, and tokenizing within limits."""

import json
import time

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from shoal.driver.inputs import InputProcessor, Prompt, check_form, most_chars_per_token, parse_prompt, split_prompts

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
BOS = 1


def make_backend(**changes) -> Tokenizer:
    names = ["<unk>", "<s>", "</s>", *ALPHABET, *map("".join, MERGES)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.fixture
def tokenizer():
    from tokenizers.processors import TemplateProcessing

    backend = make_backend()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def inputs(tokenizer):
    return InputProcessor(tokenizer, tokenizer.backend_tokenizer.to_str(), vocab_size=262, max_model_len=32)


def ids_of(inputs, raw, kwargs=None, **options):
    (found,) = inputs.tokenize([parse_prompt(raw)], inputs.options(kwargs, **options))
    if isinstance(found, Exception):
        raise found
    return found


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ("one", 1),
        (["one", "two"], 2),
        ([1, 2, 3], 1),
        ((1, 2, 3), 1),
        ([[1, 2], [3]], 2),
        ({"prompt": "one"}, 1),
        ([{"prompt": "one"}, [1, 2], "three"], 3),
        (np.array([1, 2, 3]), 1),
        (np.array([[1, 2], [3, 4]]), 2),
        ([np.array([1, 2]), np.array([3])], 2),
        (np.array(["a", "b"]), 2),
        ([np.int64(5), np.int32(6)], 1),
        ([], 0),
        ((text for text in ("a", "b")), 2),
        ([1.5, 2], 1),
    ],
)
def test_one_or_many(prompts, count):
    assert len(split_prompts(prompts)) == count


@pytest.mark.parametrize("prompts", [None, 5, b"text", object()])
def test_what_is_no_prompt_at_all(prompts):
    with pytest.raises(TypeError, match="Prompt should be a string, list of tokens, or dictionary"):
        split_prompts(prompts)


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        (None, TypeError, "Prompt should be a string, list of tokens, or dictionary"),
        (5, TypeError, "Prompt should be a string, list of tokens, or dictionary"),
        ([1, "a"], TypeError, "Token prompt should be a list of integers, got 'a' at position 1"),
        ([1, True], TypeError, "Token prompt should be a list of integers"),
        (np.array([1.5]), TypeError, "Token prompt should be a list of integers"),
        ([], ValueError, "decoder prompt cannot be empty"),
        ({}, TypeError, "Prompt dictionary must contain text, tokens, or embeddings"),
        ({"text": "a"}, TypeError, "must contain text, tokens, or embeddings.*'text'"),
        ({"prompt": 5}, TypeError, "Prompt text should be a string, got int"),
        ({"prompt_token_ids": "abc"}, TypeError, "Token prompt should be a list of integers"),
        ({"prompt_token_ids": []}, ValueError, "decoder prompt cannot be empty"),
        ({"prompt_token_ids": ["a"]}, TypeError, "Token prompt should be a list of integers"),
        ({"prompt_embeds": [0.5]}, ValueError, "prompt_embeds.*not supported"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, ValueError, "multi_modal_data.*not supported"),
        ({"prompt": "a", "mm_processor_kwargs": {"x": 1}}, ValueError, "mm_processor_kwargs.*not supported"),
        ({"prompt_token_ids": [1], "token_type_ids": [0]}, ValueError, "token_type_ids.*not supported"),
        ({"data": 1}, ValueError, "data.*not supported"),
        (
            {"encoder_prompt": "a", "decoder_prompt": "b"},
            TypeError,
            "Cannot pass encoder-decoder prompt to decoder-only models",
        ),
        ({"prompt": "a", "cache_salt": ""}, ValueError, "cache_salt must be a non-empty string"),
        ("a\ud800b", ValueError, r"lone surrogate, U\+D800 at character 1"),
    ],
)
def test_wrong_prompts(raw, error, message):
    with pytest.raises(error, match=message):
        parse_prompt(raw)


def test_cheap_check_does_not_read_tokens():
    check_form([1, "a"])  # its kind is right; tokens are looked at when the row is made ready
    with pytest.raises(TypeError, match="Prompt should be"):
        check_form(7.5)


def test_forms():
    assert parse_prompt("hi") == Prompt("hi")
    assert parse_prompt(np.array([1, 2])) == Prompt(None, [1, 2])
    assert type(parse_prompt([np.int64(7)]).token_ids[0]) is int
    assert parse_prompt({"prompt": "hi", "cache_salt": "s", "multi_modal_data": {}}) == Prompt("hi", None, "s")
    assert parse_prompt({"prompt_token_ids": [1], "prompt": "x"}) == Prompt("x", [1])
    ids = [1, 2]
    assert parse_prompt(ids).token_ids is not ids


def test_text_and_tokens(inputs, tokenizer):
    the = tokenizer.convert_tokens_to_ids("the")
    assert ids_of(inputs, "the") == [BOS, the]
    assert ids_of(inputs, "the", {"add_special_tokens": False}) == [the]
    assert ids_of(inputs, "the", add_special_tokens=False) == [the]
    assert ids_of(inputs, [the, the]) == [the, the]
    assert ids_of(inputs, "THE", {"do_lower_case": True}) == [BOS, the]


def test_lengths(inputs):
    assert len(ids_of(inputs, "x" * 30)) == 31
    with pytest.raises(ValueError, match=r"length 32\) plus the number of requested output tokens \(at least 1\)"):
        ids_of(inputs, "x" * 31)
    with pytest.raises(ValueError, match=r"maximum context length is 32 tokens.*33 input tokens"):
        ids_of(inputs, "x" * 32)
    with pytest.raises(ValueError, match="maximum context length is 32"):
        ids_of(inputs, [5] * 40)
    with pytest.raises(ValueError, match="decoder prompt cannot be empty"):
        ids_of(inputs, "", {"add_special_tokens": False})


@pytest.mark.parametrize("bad", [262, -1, 10**12])
def test_vocabulary(inputs, bad):
    with pytest.raises(ValueError, match=f"Token id {bad} is out of vocabulary"):
        ids_of(inputs, [5, bad])


def test_text_that_cannot_fit_is_not_tokenized(inputs, tokenizer, monkeypatch):
    def called(*args, **kwargs):
        raise AssertionError("tokenized")

    monkeypatch.setattr(type(tokenizer), "__call__", called)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"maximum context length is 32 tokens.*5000000 characters \(more than 160"):
        ids_of(inputs, "x" * 5_000_000)
    assert time.perf_counter() - started < 2


def test_truncation(inputs, tokenizer):
    x, y = (tokenizer.convert_tokens_to_ids(char) for char in "xy")
    text = "x" * 50 + "y" * 50
    assert ids_of(inputs, text, {"truncate_prompt_tokens": 4}) == [BOS, y, y, y]
    assert ids_of(inputs, text, {"truncate_prompt_tokens": 4, "truncation_side": "right"}) == [BOS, x, x, x]
    assert len(ids_of(inputs, text, {"truncate_prompt_tokens": -1})) == 31
    assert len(ids_of(inputs, text, {"truncation": True, "max_length": 6})) == 6
    assert ids_of(inputs, [x] * 50 + [y] * 50, {"truncate_prompt_tokens": 2}) == [y, y]
    assert ids_of(inputs, [x] + [y] * 50, {"truncate_prompt_tokens": 2, "truncation_side": "right"}) == [x, y]
    assert ids_of(inputs, "xy", {"truncate_prompt_tokens": 4}) == [BOS, x, y]
    assert len(ids_of(inputs, "x" * 20)) == 21  # the tokenizer keeps none of it


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"truncate_prompt_tokens": 33}, ValueError, "truncate_prompt_tokens=33 cannot be greater than"),
        ({"truncate_prompt_tokens": 0}, ValueError, "truncate_prompt_tokens must be at least 1"),
        ({"truncate_prompt_tokens": 1.5}, TypeError, "truncate_prompt_tokens must be an integer"),
        ({"padding": True}, ValueError, "padding"),
        ({"truncation_side": "up"}, ValueError, "truncation_side"),
    ],
)
def test_wrong_tokenization_kwargs(inputs, kwargs, error, message):
    with pytest.raises(error, match=message):
        inputs.options(kwargs)


def test_unknown_tokenization_kwargs_are_warned_of(inputs):
    with pytest.warns(UserWarning, match="unknown tokenization_kwargs are ignored: foo"):
        inputs.options({"foo": 1})


def calling(tokenizer, function):
    """Inputs whose tokenizer is of a class of its own, which calls that function."""
    tokenizer.__class__ = type("Own", (type(tokenizer),), {"__call__": function})
    return InputProcessor(tokenizer, None, vocab_size=262, max_model_len=32)


def test_one_bad_text_does_not_spoil_its_chunk(tokenizer):
    real = type(tokenizer).__call__

    def fragile(self, texts, **kwargs):
        if any("boom" in text for text in texts):
            raise RuntimeError("no such text")
        return real(self, texts, **kwargs)

    inputs = calling(tokenizer, fragile)
    found = inputs.tokenize([Prompt("a"), Prompt("boom"), Prompt(None, [5]), Prompt("b")], inputs.options(None))
    assert [isinstance(one, Exception) for one in found] == [False, True, False, False]
    assert "no such text" in str(found[1])


def test_texts_go_to_the_tokenizer_together(tokenizer):
    sizes = []
    real = type(tokenizer).__call__

    def counting(self, texts, **kwargs):
        sizes.append(len(texts))
        return real(self, texts, **kwargs)

    inputs = calling(tokenizer, counting)
    inputs.tokenize([Prompt("a")] * 50, inputs.options(None))
    assert sizes == [50]


def test_without_a_tokenizer():
    inputs = InputProcessor(None, None, 10, 32)
    assert ids_of(inputs, [1, 2]) == [1, 2]
    with pytest.raises(ValueError, match="skip_tokenizer_init=True"):
        ids_of(inputs, "text")


def test_bounds_of_characters():
    longest = 5  # "<unk>"
    assert most_chars_per_token(make_backend().to_str()) == (longest, False)
    composing = make_backend(normalizer=normalizers.NFC())
    assert most_chars_per_token(composing.to_str()) == (4 * longest, False)
    stripping = make_backend()
    data = json.loads(stripping.to_str())
    token = {"id": 2, "content": "</s>", "rstrip": True, "lstrip": False}
    data["added_tokens"] = [{**token, "single_word": False, "normalized": False, "special": True}]
    assert most_chars_per_token(json.dumps(data)) == (longest, True)
    # Nothing is known where characters may vanish.
    for vanishing in (
        make_backend(normalizer=normalizers.Strip()),
        make_backend(normalizer=normalizers.Replace("  ", " ")),
        make_backend(pre_tokenizer=pre_tokenizers.Whitespace()),
        Tokenizer(models.WordPiece({"<unk>": 0}, unk_token="<unk>")),
    ):
        assert most_chars_per_token(vanishing.to_str())[0] is None
    assert most_chars_per_token(None)[0] is None


def test_the_short_way_to_the_backend_gives_the_same_ids(inputs, tokenizer):
    """Also after a call that truncates or pads, which a tokenizer remembers."""
    assert inputs._backend is not None
    tokenizer.pad_token = "</s>"
    texts = ["the other thing", "<s>in the </s> end", "é \U0001f600", "the a"]
    prompts = [Prompt(text) for text in texts]
    for special in (True, False):
        expected = tokenizer(texts, add_special_tokens=special)["input_ids"]
        tokenizer(texts, padding=True, truncation=True, max_length=5)
        assert inputs.tokenize(prompts, inputs.options(None, special)) == expected
        cut = inputs.tokenize(prompts, inputs.options({"truncate_prompt_tokens": 3}, special))
        assert [len(ids) for ids in cut] == [3] * 4
    tokenizer.__class__ = type("Other", (type(tokenizer),), {"_encode_plus": lambda self, *a, **k: None})
    assert InputProcessor(tokenizer, None, 262, 32)._backend is None, "what a class does by itself is respected"
