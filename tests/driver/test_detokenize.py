"""Detokenizer and StopChecker, with byte-level, metaspace and word-piece tokenizers."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from shoal.driver.detokenize import Detokenizer, StopChecker

LINES = ["the quick brown fox jumps over the lazy dog", "héllo wörld — naïve café", "日本語のテキスト 😀 emoji"] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens(["日本", "<tool>"])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIAL + fallback, show_progress=False)
    tokenizer.train_from_iterator(LINES[:1] * 3, trainer)
    data = tokenizer.to_str().replace('"special":true', '"special":false')
    tokenizer = Tokenizer.from_str(data)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([*LINES, "it 's , don 't ! ."], trainer)
    return tokenizer


KINDS = {"byte_level": byte_level, "metaspace": metaspace, "word_piece": word_piece}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def random_ids(tokenizer, seed, length=40):
    return random.Random(seed).choices(range(tokenizer.get_vocab_size()), k=length)


def pieces(detokenizer, prompt, ids, **options):
    stream = detokenizer.stream(prompt, **options)
    return [*map(stream.push, ids), stream.flush()]


@pytest.mark.parametrize("options", [(True, True), (False, True), (False, False)])
def test_whole_equals_pieces(tokenizer, options):
    detokenizer = Detokenizer(tokenizer.to_str())
    for seed in range(60):
        prompt, ids = random_ids(tokenizer, seed, 10), random_ids(tokenizer, 1000 + seed)
        names = dict(zip(("skip_special_tokens", "spaces_between_special_tokens"), options, strict=True))
        assert detokenizer.text(prompt, ids, **names) == "".join(pieces(detokenizer, prompt, ids, **names))


def test_byte_level_is_plain_decoding():
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer.to_str())
    for seed in range(100):
        ids = random_ids(tokenizer, seed)
        for skip in (True, False):
            assert detokenizer.text([5, 6], ids, skip) == tokenizer.decode(ids, skip_special_tokens=skip)
            assert "".join(pieces(detokenizer, [], ids, skip_special_tokens=skip)) == detokenizer.text([], ids, skip)


def test_metaspace_keeps_the_space_after_the_prompt():
    tokenizer = metaspace()
    detokenizer = Detokenizer(tokenizer.to_str())
    ids = tokenizer.encode("the quick brown fox", add_special_tokens=False).ids
    for cut in range(1, len(ids)):
        prompt, output = ids[:cut], ids[cut:]
        expected = tokenizer.decode(ids)[len(tokenizer.decode(prompt)) :]
        assert detokenizer.text(prompt, output) == expected
        assert "".join(pieces(detokenizer, prompt, output)) == expected
    brown = [tokenizer.token_to_id("▁brown")]
    assert tokenizer.decode(brown) == "brown"
    assert detokenizer.text(tokenizer.encode("the").ids, brown) == " brown"
    assert detokenizer.text([], ids) == "the quick brown fox"


def test_context_is_only_the_end_of_a_long_prompt():
    tokenizer = metaspace()
    detokenizer = Detokenizer(tokenizer.to_str())
    prompt = tokenizer.encode("the lazy dog " * 50).ids
    output = tokenizer.encode("jumps over").ids
    assert detokenizer.text(prompt, output) == detokenizer.text(prompt[-24:], output) == " jumps over"


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_characters_appear_when_complete(make):
    tokenizer = make()
    detokenizer = Detokenizer(tokenizer.to_str())
    ids = tokenizer.encode("é😀x", add_special_tokens=False).ids
    shown = pieces(detokenizer, tokenizer.encode("the").ids, ids)
    assert all("\ufffd" not in piece for piece in shown)
    assert "".join(shown).strip() == "é😀x"
    assert any(piece == "" for piece in shown[:-1])  # some tokens were only part of a character


def test_unfinished_character_at_the_end():
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer.to_str())
    ids = tokenizer.encode("a😀").ids
    assert detokenizer.text([], ids[:-1]) == "a\ufffd"
    assert pieces(detokenizer, [], ids[:-1])[-1] == "\ufffd"


def test_bytes_that_are_no_character_do_not_spoil_what_is_shown():
    tokenizer = metaspace()
    detokenizer = Detokenizer(tokenizer.to_str())
    byte = {b: tokenizer.token_to_id(f"<0x{b:02X}>") for b in (0xE4, 0xB8, 0xAD)}
    ids = [byte[0xE4], byte[0xB8], byte[0xAD], byte[0xE4], tokenizer.token_to_id("x")]
    assert "".join(pieces(detokenizer, [], ids)) == "中\ufffdx" == detokenizer.text([], ids)


def test_garbage_comes_out_at_last():
    tokenizer = metaspace()
    stream = Detokenizer(tokenizer.to_str()).stream([])
    shown = [stream.push(tokenizer.token_to_id("<0xE4>")) for _ in range(100)]
    assert len("".join(shown)) >= 80
    assert len(stream._window) <= 48  # what it keeps does not grow with the output


def test_special_tokens():
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer.to_str())
    ids = [*tokenizer.encode("fox").ids, tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<tool>")]
    assert detokenizer.text([], ids) == "fox<tool>"
    assert detokenizer.text([], ids, skip_special_tokens=False) == "fox</s><tool>"


def test_spaces_between_special_tokens():
    tokenizer = word_piece()
    detokenizer = Detokenizer(tokenizer.to_str())
    ids = [tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>"), tokenizer.token_to_id("</s>")]
    assert detokenizer.text([], ids, False, True) == "<s> </s> </s>"
    assert detokenizer.text([], ids, False, False) == "<s></s></s>"


def test_token_text():
    tokenizer = metaspace()
    detokenizer = Detokenizer(tokenizer.to_str())
    assert detokenizer.token_text(tokenizer.token_to_id("▁the")) == " the"
    assert detokenizer.token_text(tokenizer.token_to_id("</s>")) == "</s>"
    assert detokenizer.token_text(tokenizer.token_to_id("<0xE4>")) == "\ufffd"
    plain = byte_level()
    assert Detokenizer(plain.to_str()).token_text(plain.token_to_id("Ġthe")) == " the"


def oracle(detokenizer, prompt, ids, stop, include, min_tokens, skip):
    """Token by token, over the whole text every time."""
    shown = pieces(detokenizer, prompt, ids, skip_special_tokens=skip)[:-1]
    for count in range(1, len(ids) + 1):
        text, before = "".join(shown[:count]), len("".join(shown[: count - 1]))
        if count <= min_tokens:
            continue
        found = []
        for place, string in enumerate(stop):
            starts = [s for s in range(len(text)) if text.startswith(string, s) and s + len(string) > before]
            found += [(s, place) for s in starts]
        if found:
            start, place = min(found)
            return count, stop[place], text[: start + (len(stop[place]) if include else 0)]
    return None


@pytest.mark.parametrize("burst", [1, 3, 8, 100])
@pytest.mark.parametrize("include", [False, True])
def test_stop_checker_against_an_oracle(tokenizer, burst, include):
    detokenizer = Detokenizer(tokenizer.to_str())
    ended = 0
    for seed in range(80):
        rng = random.Random(seed)
        prompt, ids = random_ids(tokenizer, seed, 6), random_ids(tokenizer, 500 + seed)
        text = detokenizer.text(prompt, ids)
        start = rng.randrange(max(1, len(text) - 4))
        stop = [text[start : start + rng.randrange(1, 5)] or "x", "zzzz", "e" + text[start : start + 1]]
        stop = [string for string in stop if "\ufffd" not in string] or ["th"]
        minimum, skip = rng.choice([0, 0, 5, 20]), rng.random() < 0.7
        expected = oracle(detokenizer, prompt, ids, stop, include, minimum, skip)
        checker = StopChecker(detokenizer, prompt, stop, include, minimum, skip)
        found, seen = None, 0
        while found is None and seen < len(ids):
            found = checker.feed(ids[seen : seen + burst])
            seen += found.num_tokens if found else burst
        assert (None if found is None else (seen, found.stop_string, found.text)) == expected
        if found is not None:
            ended += 1
            assert detokenizer.text(prompt, ids[:seen], skip).startswith(found.text)
    assert ended > 20


def test_stop_string_across_tokens_and_inside_a_burst():
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer.to_str())
    ids = tokenizer.encode("a b END c d").ids
    match = StopChecker(detokenizer, [], ["END"]).feed(ids)
    assert match is not None
    assert match.text == "a b "
    assert tokenizer.decode(ids[: match.num_tokens]) == "a b END"
    assert StopChecker(detokenizer, [], ["END"], include_stop_str_in_output=True).feed(ids).text == "a b END"


def test_min_tokens_hides_earlier_matches_but_not_later_ones():
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer.to_str())
    ids = [tokenizer.token_to_id(char) for char in "axbxcx"]
    assert StopChecker(detokenizer, [], ["x"]).feed(ids).num_tokens == 2
    assert StopChecker(detokenizer, [], ["x"], min_tokens=2).feed(ids) == (4, "x", "axb")
    assert StopChecker(detokenizer, [], ["x"], min_tokens=6).feed(ids) is None


def test_stop_string_in_a_special_token_needs_it_shown():
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer.to_str())
    ids = [*tokenizer.encode("fox").ids, tokenizer.token_to_id("</s>")]
    assert StopChecker(detokenizer, [], ["</s>"]).feed(ids) is None
    assert StopChecker(detokenizer, [], ["</s>"], skip_special_tokens=False).feed(ids).text == "fox"
