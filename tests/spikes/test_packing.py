"""Bit packing: the layout, the exact size, and the way back."""

import pytest
import torch

from spikeform.spikes.packing import pack_bits, packed_bytes, unpack_bits


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 192, 1001])
@pytest.mark.parametrize("bits", range(1, 17))
def test_round_trip(bits, count):
    generator = torch.Generator().manual_seed(bits)
    values = torch.randint(0, 1 << bits, (3, 2, count), generator=generator)
    values[..., :1] = (1 << bits) - 1
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 2, packed_bytes(count, bits))
    assert packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, count).long(), values)


@pytest.mark.parametrize("bits", [1, 3, 4, 5, 8])
def test_layout(bits):
    """Bit by bit, in plain Python: a row is one long number, the first value lowest."""
    values = torch.randint(0, 1 << bits, (11,), generator=torch.Generator().manual_seed(0))
    number = sum(int(v) << (i * bits) for i, v in enumerate(values))
    assert bytes(pack_bits(values, bits).tolist()) == number.to_bytes(packed_bytes(11, bits), "little")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_any_integer_dtype(dtype):
    values = torch.tensor([5, 0, 127, 64], dtype=dtype)
    assert unpack_bits(pack_bits(values, 7), 7, 4).tolist() == values.tolist()


def test_errors():
    with pytest.raises(ValueError, match="values from 0 to 16 do not fit 4"):
        pack_bits(torch.tensor([0, 16]), 4)
    with pytest.raises(ValueError, match="values from -1 to 3"):
        pack_bits(torch.tensor([-1, 3]), 4)
    with pytest.raises(ValueError, match="only integers"):
        pack_bits(torch.ones(3), 4)
    for bits in (0, 17, True, 2.0):
        with pytest.raises(ValueError, match="bits must be an integer from 1 to 16"):
            packed_bytes(3, bits)
    with pytest.raises(ValueError, match="10 values of 3 bits are 4 bytes a row, got 5"):
        unpack_bits(torch.zeros(2, 5, dtype=torch.uint8), 3, 10)
    with pytest.raises(ValueError, match=r"got 4 of torch\.int8"):
        unpack_bits(torch.zeros(2, 4, dtype=torch.int8), 3, 10)
