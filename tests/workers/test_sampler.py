"""The sampler: every parameter acts, and nothing depends on the company a row keeps."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.workers.plan import RowSampling
from shoal.workers.sampler import LogitsProcessor, Sampler, SamplingState

VOCAB = 50
INF = float("inf")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Batch:
    token_ids: torch.Tensor
    num_prompt_tokens: torch.Tensor
    num_tokens: torch.Tensor


class Engine:
    """A persistent batch with its sampler, as the runner drives them."""

    def __init__(self, max_num_seqs=8, vocab_size=VOCAB, logits_processors=()):
        counts = [torch.zeros(max_num_seqs, dtype=torch.int32) for _ in range(2)]
        self.batch = Batch(torch.zeros(max_num_seqs, 64, dtype=torch.int32), *counts)
        self.state = SamplingState(max_num_seqs, vocab_size, torch.device("cpu"), logits_processors)
        self.sampler = Sampler(self.state, self.batch)

    def add(self, row, sampling, prompt=(1, 2), output=()):
        tokens = np.array([*prompt, *output], np.int32)
        self.batch.token_ids[row, : len(tokens)] = torch.from_numpy(tokens)
        self.batch.num_prompt_tokens[row] = len(prompt)
        self.batch.num_tokens[row] = len(tokens)
        tokens.flags.writeable = False  # as they come out of a frame
        self.state.add(row, sampling, tokens, len(prompt))

    def step(self, logits, rows, append=False):
        device_rows = torch.tensor(rows)
        before = logits.clone()
        out = self.sampler(logits, device_rows, list(rows))
        assert torch.equal(logits.nan_to_num(), before.nan_to_num()), (
            "the model's logits are not the sampler's to change"
        )
        if append:
            self.batch.token_ids[device_rows, self.batch.num_tokens[device_rows].long()] = out.token_ids.int()
            self.batch.num_tokens[device_rows] += 1
            self.sampler.observe(device_rows, out.token_ids)
        return out


def one(logits, prompt=(1, 2), output=(), processors=(), **parameters):
    """The token that one row with these parameters gets."""
    engine = Engine(logits_processors=processors)
    engine.add(3, RowSampling(**{"temperature": 0.0, **parameters}), prompt, output)
    return int(engine.step(torch.as_tensor(logits).unsqueeze(0), [3]).token_ids)


def ranked(*ids):
    """Logits that fall along these ids; all others are far below."""
    logits = torch.full((VOCAB,), -20.0)
    for i, token_id in enumerate(ids):
        logits[token_id] = 5.0 - i
    return logits


def drawn(logits, rows=300, **parameters):
    """The set of ids that many streams draw."""
    engine = Engine(rows)
    for row in range(rows):
        engine.add(row, RowSampling(stream=row, **parameters))
    return set(engine.step(logits.expand(rows, -1), list(range(rows))).token_ids.tolist())


class TestEachParameter:
    def test_greedy_takes_the_lowest_of_equals(self):
        assert one(ranked(7)) == 7
        assert one(torch.zeros(VOCAB)) == 0

    def test_allowed_token_ids(self):
        assert one(ranked(7, 8, 9), allowed_token_ids=(9, 30)) == 9

    def test_bad_word_of_one_token(self):
        assert one(ranked(7, 8, 9), bad_words=((7,), (8,))) == 9

    @pytest.mark.parametrize(
        ("prompt", "output", "expected"),
        [
            ((1, 2), (4, 5, 6), 8),  # the output ends in the prefix
            ((1, 2), (5, 6), 8),
            ((1, 2), (6,), 7),  # too short
            ((1, 2), (5, 6, 3), 7),  # not at the end
            ((4, 5, 6), (), 7),  # the prompt is no history
            ((4, 5), (6,), 7),  # nor a part of it
        ],
    )
    def test_bad_word_of_several_tokens(self, prompt, output, expected):
        assert one(ranked(7, 8), prompt, output, bad_words=((5, 6, 7), (30, 7), (31, 32, 33, 7))) == expected

    def test_min_tokens_masks_stop_ids(self):
        parameters = {"min_tokens": 2, "stop_ids": (8, 7)}
        assert one(ranked(7, 8, 9), **parameters) == 9
        assert one(ranked(7, 8, 9), output=(3,), **parameters) == 9
        assert one(ranked(7, 8, 9), output=(3, 3), **parameters) == 7

    def test_logit_bias(self):
        assert one(ranked(7, 8), logit_bias=((8, 1.5),)) == 8
        assert one(ranked(7, 8), logit_bias=((7, -1.5),)) == 8
        assert one(ranked(7, 8), logit_bias=((8, 0.5),)) == 7

    def test_repetition_penalty(self):
        logits = ranked(7, 8)  # 5.0 and 4.0
        assert one(logits, prompt=(7,), repetition_penalty=1.3) == 8
        assert one(logits, output=(7,), repetition_penalty=1.3) == 8
        assert one(logits, prompt=(7,), repetition_penalty=1.2) == 7
        assert one(logits, prompt=(7, 7, 7), output=(7,), repetition_penalty=1.2) == 7  # once, however often seen
        negative = logits - 10  # -5.0 and -6.0: multiplied
        assert one(negative, prompt=(7,), repetition_penalty=1.3) == 8
        assert one(negative, prompt=(8,), repetition_penalty=0.5) == 8

    def test_frequency_penalty(self):
        assert one(ranked(7, 8), output=(7, 7, 7), frequency_penalty=0.4) == 8
        assert one(ranked(7, 8), output=(7, 7), frequency_penalty=0.4) == 7
        assert one(ranked(7, 8), prompt=(7, 7, 7), frequency_penalty=0.4) == 7  # output alone counts
        assert one(ranked(7, 8), output=(8, 8, 8), frequency_penalty=-0.4) == 8

    def test_presence_penalty(self):
        assert one(ranked(7, 8), output=(7,), presence_penalty=1.1) == 8
        assert one(ranked(7, 8), output=(7, 7, 7), presence_penalty=0.9) == 7
        assert one(ranked(7, 8), prompt=(7,), presence_penalty=1.1) == 7

    def test_temperature(self):
        logits = ranked(7, 8, 9)
        assert drawn(logits, temperature=0.01) == {7}
        assert drawn(logits, temperature=2.0) >= {7, 8, 9}
        assert drawn(logits, temperature=0.0) == {7}

    def test_top_k(self):
        logits = ranked(7, 8, 9, 10)
        assert drawn(logits, temperature=2.0, top_k=2) == {7, 8}
        assert drawn(torch.zeros(VOCAB), top_k=3) == {0, 1, 2}  # exactly k; equals go by id
        assert len(drawn(torch.zeros(VOCAB), top_k=0)) > 40
        assert len(drawn(torch.zeros(VOCAB), top_k=VOCAB + 5)) > 40

    def test_top_p(self):
        logits = torch.full((VOCAB,), -INF)
        logits[[7, 8, 9, 10]] = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
        assert drawn(logits, top_p=0.6) == {7, 8}
        assert drawn(logits, top_p=0.8) == {7, 8, 9}
        assert drawn(logits, top_p=1e-6) == {7}
        assert drawn(logits) == {7, 8, 9, 10}
        # After top_k, the mass is that of what top_k left: 0.5, 0.25 of 0.75.
        assert drawn(logits, top_k=2, top_p=0.65) == {7}
        assert drawn(logits, top_k=2, top_p=0.7) == {7, 8}

    def test_min_p(self):
        logits = torch.full((VOCAB,), -INF)
        logits[[7, 8, 9, 10]] = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
        assert drawn(logits, min_p=0.4) == {7, 8}
        assert drawn(logits, min_p=0.25) == {7, 8, 9}
        assert drawn(logits, min_p=1.0) == {7}
        assert drawn(logits, min_p=0.4, top_k=40, top_p=0.999) == {7, 8}
        assert drawn(logits, temperature=0.5, min_p=0.4) == {7}  # of the probabilities after temperature

    def test_stream(self):
        assert len(drawn(torch.zeros(VOCAB), temperature=1.0)) == VOCAB
        first = [one(torch.zeros(VOCAB), temperature=1.0, stream=s) for s in (5, 5, (1 << 64) - 1, (1 << 64) - 1)]
        assert first[0] == first[1]
        assert first[2] == first[3]

    def test_stop_ids_end_the_row_once_min_tokens_are_there(self):
        engine = Engine()
        engine.add(0, RowSampling(temperature=0.0, stop_ids=(9, 7)))
        engine.add(1, RowSampling(temperature=0.0, stop_ids=(8,)))
        engine.add(2, RowSampling(temperature=0.0))
        engine.add(3, RowSampling(temperature=0.0, stop_ids=(7, 10**9), min_tokens=3, allowed_token_ids=(7,)))
        rows = [0, 1, 2, 3]
        logits = ranked(7, 8).expand(4, -1)
        assert [engine.step(logits, rows, append=True).ended.tolist() for _ in range(3)] == [
            [True, False, False, False],
            [True, False, False, False],
            [True, False, False, True],  # the third token: min_tokens with it
        ]


class BanAndForce(LogitsProcessor):
    def for_request(self, extra_args):
        if "ban" not in extra_args:
            return None

        def process(prompt_ids, output_ids, logits):
            assert isinstance(prompt_ids, list)
            assert logits.shape == (self.vocab_size,)
            assert logits.dtype == torch.float32
            if output_ids == extra_args.get("after"):
                logits[extra_args["force"]] = INF
            logits[extra_args["ban"]] = -INF
            return logits

        return process


class WrongShape(LogitsProcessor):
    def for_request(self, extra_args):
        return lambda prompt_ids, output_ids, logits: logits[:-1]


class TestProcessors:
    def test_changes_the_logits_of_requests_that_ask(self):
        use = {"processors": [BanAndForce]}
        assert one(ranked(7, 8), **use) == 7
        assert one(ranked(7, 8), extra_args={"ban": 7}, **use) == 8
        extra = {"ban": 7, "after": [3, 4], "force": 30}
        assert one(ranked(7, 8), output=(3,), extra_args=extra, **use) == 8
        for sampling in ({}, {"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.5}, {"temperature": 9, "top_k": 9}):
            assert one(ranked(7, 8), output=(3, 4), extra_args=extra, **sampling, **use) == 30

    def test_runs_after_penalties_and_its_result_is_checked(self):
        assert (
            one(ranked(7, 8), output=(8,), presence_penalty=-2.0, extra_args={"ban": 8}, processors=[BanAndForce]) == 7
        )
        with pytest.raises(ValueError, match=r"must return a tensor of shape \(50,\), got \(49,\)"):
            one(ranked(7), processors=[WrongShape])

    def test_class_names(self):
        Engine(logits_processors=["shoal.workers.sampler:LogitsProcessor", BanAndForce])

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ("no_colon", "module:Class"),
            ("no.such.module:Class", "cannot load"),
            ("shoal.workers.sampler:Nothing", "cannot load"),
            (int, "for_request"),
            (7, "must be a class"),
        ],
    )
    def test_bad_entries(self, entry, message):
        with pytest.raises(ValueError, match=message):
            Engine(logits_processors=[entry])


class TestNothingLeft:
    """Every id masked: the best allowed one is taken."""

    @pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 3}, {"top_p": 0.5}])
    def test_takes_the_best_allowed_id(self, sampling):
        temperature = {"temperature": 1.0, **sampling}
        both = {"allowed_token_ids": (20, 8, 7), "bad_words": ((8,), (20,)), "min_tokens": 2, "stop_ids": (7,)}
        assert one(ranked(9, 8, 7), **both, **temperature) == 8
        assert one(ranked(9, 8, 7), output=(1, 1), **both, **temperature) == 7

    def test_leaves_the_others_alone(self):
        engine = Engine()
        engine.add(0, RowSampling(stream=5, allowed_token_ids=(4,), bad_words=((4,),)))
        engine.add(1, RowSampling(stream=6, bad_words=((8,),), top_p=0.5))
        out = engine.step(torch.stack([ranked(7), ranked(8, 9)]), [0, 1])
        assert out.token_ids.tolist() == [4, 9]


MIXED = [
    {},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1, "temperature": 0.7},
    {"top_k": 20, "top_p": 0.7, "frequency_penalty": 1.0},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5},
    {"temperature": 0.0, "frequency_penalty": 1.5},
    {"temperature": 0.0, "bad_words": ((3,), (5, 6)), "min_tokens": 3, "stop_ids": (1, 2)},
    {"logit_bias": ((4, 2.0), (9, -3.0)), "allowed_token_ids": tuple(range(0, 40, 2)), "top_p": 0.9},
    {"num_logprobs": 3, "repetition_penalty": 0.8},
]


def logits_of(stream, step, dtype=torch.float32):
    """What a model would say: of the row and the step alone."""
    generator = torch.Generator().manual_seed(stream % 10**9 * 1000 + step)
    return (torch.randn(VOCAB, generator=generator) * 2).to(dtype)


def generate(engine, requests, steps, dtype=torch.float32):
    """requests: {row: (stream, parameters)}. Tokens of each row, decoded together."""
    for row, (stream, parameters) in requests.items():
        engine.add(row, RowSampling(stream=stream, **parameters), prompt=(stream % VOCAB, 3))
    rows = list(requests)
    out = {row: [] for row in rows}
    for step in range(steps):
        logits = torch.stack([logits_of(requests[row][0], step, dtype) for row in rows])
        for row, token in zip(rows, engine.step(logits, rows, append=True).token_ids.tolist(), strict=True):
            out[row].append(token)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_gets_the_same_tokens_in_any_company(dtype):
    streams = [17, (1 << 64) - 5, 1 << 63, *range(100, 161)]
    alone = []
    for i, stream in enumerate(streams):
        alone.append(generate(Engine(), {i % 8: (stream, MIXED[i % len(MIXED)])}, 6, dtype)[i % 8])
    rows = torch.randperm(70, generator=torch.Generator().manual_seed(3))[:64].tolist()
    requests = {row: (streams[i], MIXED[i % len(MIXED)]) for i, row in enumerate(rows)}
    together = generate(Engine(70), requests, 6, dtype)
    assert [together[row] for row in rows] == alone
    assert len({tuple(tokens) for tokens in alone}) > 50


def test_observed_steps_equal_a_preempted_row_that_comes_back():
    """Penalty counts, bad-words history, min_tokens and the noise's position are those of an undisturbed run."""
    requests = {row: (200 + row, parameters) for row, parameters in enumerate(MIXED)}
    whole = generate(Engine(len(MIXED)), requests, 8)
    for cut in (1, 4, 7):
        engine = Engine(2 * len(MIXED))
        generate(engine, requests, 2)  # leftovers in the rows
        moved = {}
        for row, (stream, parameters) in requests.items():
            moved[row] = (row * 5 + cut) % len(MIXED)
            engine.add(moved[row], RowSampling(stream=stream, **parameters), (stream % VOCAB, 3), whole[row][:cut])
        for step in range(cut, 8):
            logits = torch.stack([logits_of(requests[row][0], step) for row in moved])
            out = engine.step(logits, list(moved.values()), append=True)
            assert out.token_ids.tolist() == [whole[row][step] for row in moved]


def test_observe_ignores_no_token_and_rows_without_penalties():
    engine = Engine()
    engine.add(0, RowSampling(temperature=0.0, presence_penalty=2.0))
    engine.add(1, RowSampling(temperature=0.0))
    engine.add(2, RowSampling(temperature=0.0, presence_penalty=2.0))
    engine.sampler.observe(torch.tensor([0, 1, 2]), torch.tensor([-1, 7, -1]))
    for last in (0, VOCAB - 1):
        assert engine.step(ranked(last, 8).expand(2, -1), [0, 2]).token_ids.tolist() == [last, last]
    logits = ranked(7, 8).expand(2, -1)
    assert engine.step(logits, [0, 1]).token_ids.tolist() == [7, 7]
    engine.sampler.observe(torch.tensor([1, 0]), torch.tensor([7, 7]))
    assert engine.step(logits, [0, 1]).token_ids.tolist() == [8, 7]


def test_a_reused_row_forgets_all_of_its_last_request():
    for parameters in MIXED:
        engine = Engine(2)
        generate(engine, {0: (1, {**parameters, "stop_ids": (1, 2, 3, 4)}), 1: (2, MIXED[6])}, 3)
        again = generate(engine, {0: (3, {}), 1: (4, {"temperature": 0.0})}, 4)
        assert again == generate(Engine(2), {0: (3, {}), 1: (4, {"temperature": 0.0})}, 4)
        assert len(engine.state.penalties) == 0
        engine.add(0, RowSampling(temperature=0.0, stop_ids=(9,)))
        assert not engine.step(ranked(2).unsqueeze(0), [0]).ended.any()


class _LargestFloat(TorchDispatchMode):
    """The most float32 elements any operation gave."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize(
    ("parameters", "rows_copied"), [(({},) * 8, 0), (({"logit_bias": ((1, 1.0),)}, *({},) * 7), 1)]
)
def test_greedy_rows_are_never_copied_to_float32(parameters, rows_copied):
    vocab_size = 2048
    engine = Engine(8, vocab_size)
    for row, extra in enumerate(parameters):
        engine.add(row, RowSampling(temperature=0.0, **extra))
    logits = torch.randn(8, vocab_size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with _LargestFloat() as seen:
        ids = engine.sampler(logits, torch.arange(8), list(range(8))).token_ids
    assert seen.elements <= max(rows_copied * vocab_size, 64)
    assert ids[1:].tolist() == np.argmax(logits[1:].float().numpy(), axis=1).tolist()


def test_penalty_slots_grow_and_are_reused():
    engine = Engine(40)
    generate(engine, {row: (row, MIXED[6]) for row in range(40)}, 2)
    assert len(engine.state.penalties) == 40
    for row in range(0, 40, 2):
        engine.add(row, RowSampling())
    assert len(engine.state.penalties) == 20
    requests = {row: (500 + row, MIXED[5]) for row in range(40)}
    assert generate(engine, requests, 3) == generate(Engine(40), requests, 3)
