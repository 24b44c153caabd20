import pytest

from spikeform.energy.models import COST_MODELS, FP16, FP32, INT8, CostModel, resolve
from spikeform.errors import SpikeformError


def test_published_figures() -> None:
    assert FP32.mac == pytest.approx(4.6)
    assert FP32.break_even == pytest.approx(5.11, abs=0.005)
    assert FP16.mac == pytest.approx(1.5)
    assert (INT8.mac, INT8.ac) == (pytest.approx(0.3), 0.1)
    assert FP32.dram_per_byte * 8 == 1300
    assert FP32.sram_per_byte * 8 == 100
    assert all("Horowitz" in model.source for model in COST_MODELS.values())


def test_quantised_multiplier_shrinks_with_its_operands() -> None:
    assert INT8.quantised_multiply(8) == pytest.approx(0.2)
    assert INT8.quantised_multiply(4) == pytest.approx(0.1)
    assert INT8.quantised_multiply(4, 4) == pytest.approx(0.05)
    assert INT8.quantised_multiply(32, 32) == pytest.approx(3.1, rel=0.04)  # the table's int32 multiplier
    assert FP32.quantised_multiply(12) == pytest.approx(1.85)
    assert FP32.quantised_multiply(40) == pytest.approx(3.7)  # a float multiplier rounds, it does not grow


def test_overriding() -> None:
    mine = CostModel("mine", multiply=1, add=1, significand=8, weight_bytes=1, activation_bytes=1, compare=0.5)
    assert resolve(["45nm-int8", mine]) == [INT8, mine]
    assert resolve({"any": mine}) == [mine]
    assert mine.comparison == 0.5
    assert resolve(None) == [FP32, FP16, INT8]
    assert mine.to_dict()["break_even"] == 2


@pytest.mark.parametrize("models", [["3nm"], [42], [], [FP32, FP32]])
def test_bad_models(models) -> None:
    with pytest.raises(SpikeformError):
        resolve(models)


def test_bad_figures() -> None:
    with pytest.raises(SpikeformError, match="'bad': add must be 0 or more"):
        CostModel("bad", multiply=1, add=-1, significand=8, weight_bytes=1, activation_bytes=1)
