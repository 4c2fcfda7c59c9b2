"""Philox against its published vectors, and the noise made of it."""

import math

import pytest
import torch
from scipy import stats

from shoal.kernels.ops import philox
from shoal.kernels.ops.philox import gumbel_noise, gumbel_noise_at, philox4x32

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def tensors(values):
    return tuple(torch.tensor([value]) for value in values)


def python_words(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert [int(word) for word in philox4x32(tensors(counter), tensors(key))] == expected


def test_broadcast_words_equal_python_integers():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 1 << 32, (6, 5), generator=generator)
    c0, c1 = words[0].unsqueeze(0), words[1].unsqueeze(1)
    got = philox4x32((c0, c1, words[2, :1], words[3, :1]), (words[4].unsqueeze(1), words[5].unsqueeze(1)))
    for i in range(5):
        for j in range(5):
            counter = [int(words[0, j]), int(words[1, i]), int(words[2, 0]), int(words[3, 0])]
            expected = python_words(counter, [int(words[4, i]), int(words[5, i])])
            assert [int(word.expand(5, 5)[i, j]) for word in got] == expected


def test_noise_is_the_documented_function_of_stream_position_and_id():
    stream, position = 0xFEDCBA9876543210, 77
    noise = gumbel_noise(torch.tensor([stream - (1 << 64)]), torch.tensor([position]), 11)
    for v in range(11):
        word = python_words([v // 4, position, 0, 0], [stream & 0xFFFFFFFF, stream >> 32])[v % 4]
        u = (word + 0.5) * 2**-32
        assert float(noise[0, v]) == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-5, abs=1e-6)


def test_frozen_values():
    """A change of these numbers changes every seeded result ever produced."""
    noise = gumbel_noise(torch.tensor([0, 12345]), torch.tensor([0, 3]), 5)
    expected = [
        [0.67484039, -0.75358742, -0.28571922, 0.07247372, -1.27653623],
        [1.81090868, 1.20088732, 0.22691078, 2.02677250, 0.27114630],
    ]
    torch.testing.assert_close(noise, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_noise_is_bit_equal_in_any_layout():
    generator = torch.Generator().manual_seed(1)
    streams = torch.randint(-(2**63), 2**63 - 1, (33,), generator=generator)
    positions = torch.randint(0, 5000, (33,), generator=generator)
    whole = gumbel_noise(streams, positions, 5003)
    assert torch.equal(gumbel_noise(streams[7:8], positions[7:8], 5003), whole[7:8])
    assert torch.equal(gumbel_noise(streams[3:20], positions[3:20], 4099), whole[3:20, :4099])
    assert torch.equal(gumbel_noise(streams.flip(0), positions.flip(0), 5003), whole.flip(0))
    for k in (1, 3, 64, 777):
        ids = torch.randint(0, 5003, (33, k), generator=generator)
        assert torch.equal(gumbel_noise_at(streams, positions, ids), whole.gather(1, ids))


def test_extreme_words_give_finite_noise():
    """(2**32 - 0.5) / 2**32 is 1 in float32."""
    noise = philox._gumbel_of_words(torch.tensor([0.0, 2.0**31, 2.0**32 - 256, 2.0**32]))
    assert torch.isfinite(noise).all()
    assert noise[0] == pytest.approx(33 * math.log(2), rel=1e-6)
    assert (noise[1:].diff() <= 0).all()


def test_noise_is_gumbel_and_streams_are_unrelated():
    streams = torch.arange(40)
    noise = gumbel_noise(streams, torch.zeros(40, dtype=torch.int64), 1000)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    later = gumbel_noise(streams, torch.ones(40, dtype=torch.int64), 1000)
    for other in (noise.roll(1, 0), later, noise.roll(1, 1), gumbel_noise(streams << 32, streams * 0, 1000).roll(1, 0)):
        correlation = stats.pearsonr(noise.flatten().numpy(), other.flatten().numpy())
        assert correlation.pvalue > 1e-3
        assert not torch.isclose(noise, other, atol=1e-7).sum() > 5
