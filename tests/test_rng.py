"""Randomness: equal keys are equal streams, different keys are different ones, and a row depends on its own."""

import pytest
import torch

from ancestral.errors import OptionError
from ancestral.rng import rand, randn, stream, streams


def test_equal_keys_give_equal_numbers_and_different_keys_different_ones():
    assert torch.equal(randn((5,), stream(3, 4)), randn((5,), stream(3, 4)))
    keys = [(0,), (0, 0), (0, 0, 0), (7,), (7, 0), (2**32 + 3,), (3, 1), (1, 3), (5,), (5 + 2**32,), (-1,)]
    first = [stream(*key).integers(2**63) for key in keys]
    assert len(set(first)) == len(keys)


def test_no_two_of_many_examples_share_a_stream():
    """Two hundred thousand streams of one seed begin differently: the chance of a 63-bit collision is one in 10^8."""
    first = {stream(0, i).integers(2**63) for i in range(200_000)}
    assert len(first) == 200_000


def test_neighbouring_streams_are_independent():
    x = torch.stack([randn((4000,), stream(0, i), dtype=torch.float64) for i in range(20)])
    correlation = torch.corrcoef(x).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / 4000**0.5
    assert abs(float(x.mean())) < 4 / 80_000**0.5
    assert float(x.var()) == pytest.approx(1, abs=4 * (2 / 80_000) ** 0.5)


@pytest.mark.parametrize("draw", [rand, randn])
def test_a_row_depends_on_its_own_stream(draw):
    rows = draw((4, 3), streams(9, 4))
    assert torch.equal(draw((2, 3), streams(9, 2, start=2)), rows[2:])
    assert rows.unique().numel() == 12


def test_what_is_no_source_of_randomness_is_refused():
    with pytest.raises(OptionError, match="give a generator"):
        randn((2, 3), 0)
    with pytest.raises(OptionError, match="2 seeds for 3"):
        streams([1, 2], 3)
