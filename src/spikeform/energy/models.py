"""What one operation and one byte cost: named cost models, each with its source. All of them are estimates.

Every figure is from one table: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC
2014, 45 nm, 0.9 V. In pJ: add int8 0.03, int32 0.1, fp16 0.4, fp32 0.9; multiply int8 0.2, int32 3.1, fp16
1.1, fp32 3.7; 64-bit read of an 8 KB / 32 KB / 1 MB SRAM 10 / 20 / 100; 64-bit DRAM read 1300 to 2600.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from spikeform.errors import SpikeformError

HOROWITZ = "M. Horowitz, Computing's energy problem, ISSCC 2014, 45 nm 0.9 V"
SRAM_PER_BYTE = 100 / 8  # pJ; 64-bit read of a 1 MB SRAM
DRAM_PER_BYTE = 1300 / 8  # pJ; 64-bit DRAM read, the low end of 1300 to 2600


@dataclass(frozen=True)
class CostModel:
    """Energy of one operation, pJ, and of one byte moved, pJ.

    Args:
        name: How reports call it.
        multiply: One multiplication of two numbers of ``significand`` bits.
        add: One accumulation, in the accumulator that a MAC of this model uses too.
        compare: One comparison of a membrane potential with a threshold; a subtraction, so ``add`` by
            default.
        significand: Operand width of the multiplier array: 24 of fp32, 11 of fp16, 8 of int8.
        widens: Whether operands wider than ``significand`` cost more (integers), or are rounded to it
            (floats).
        weight_bytes: Bytes of one weight.
        activation_bytes: Bytes of one activation of the dense network.
        sram_per_byte: On-chip memory: activations, spikes, codes, potentials, a layer's weights while it
            runs.
        dram_per_byte: Off-chip memory: weights, once for each forward call.
        source: Where the figures come from.

    Raises:
        SpikeformError: A negative figure, or a width below one.
    """

    name: str
    multiply: float
    add: float
    significand: int
    weight_bytes: float
    activation_bytes: float
    compare: float | None = None
    widens: bool = False
    sram_per_byte: float = SRAM_PER_BYTE
    dram_per_byte: float = DRAM_PER_BYTE
    source: str = HOROWITZ

    def __post_init__(self) -> None:
        figures = asdict(self)
        for key in (
            "multiply",
            "add",
            "compare",
            "weight_bytes",
            "activation_bytes",
            "sram_per_byte",
            "dram_per_byte",
        ):
            if figures[key] is not None and not figures[key] >= 0:
                raise SpikeformError(f"cost model {self.name!r}: {key} must be 0 or more, got {figures[key]!r}")
        if self.significand < 1:
            raise SpikeformError(f"cost model {self.name!r}: significand must be 1 or more, got {self.significand!r}")

    @property
    def mac(self) -> float:
        """One multiply-accumulate of the dense network."""
        return self.multiply + self.add

    @property
    def ac(self) -> float:
        """One accumulate; with binary step weights a shift-add, whose shift is wiring."""
        return self.add

    @property
    def comparison(self) -> float:
        """``compare``, or ``add`` where it is not given."""
        return self.add if self.compare is None else self.compare

    @property
    def break_even(self) -> float:
        """Accumulations per MAC at which an accumulate-only network costs what the dense one does."""
        return self.mac / self.ac if self.ac else float("inf")

    def quantised_multiply(self, bits_a: float, bits_b: float | None = None) -> float:
        """One multiplication in the quantised network: the array shrinks with the width of each operand.

        ``multiply * (bits_a / significand) * (bits_b / significand)``; ``bits_b`` None is a real weight,
        full width. The same table supports it: int32 over int8 is 3.1 / 0.2 = 15.5, the widths' product says 16. A
        float multiplier rounds wider operands to its significand; an integer one must grow.

        Args:
            bits_a: Width of the activation; a mean where channels differ.
            bits_b: Width of the second operand, or None for a real weight.
        """
        factor = 1.0
        for bits in (bits_a, self.significand if bits_b is None else bits_b):
            width = bits / self.significand
            factor *= width if self.widens else min(1.0, width)
        return self.multiply * factor

    def to_dict(self) -> dict:
        """All figures, with what follows from them."""
        derived = {"mac": self.mac, "ac": self.ac, "compare": self.comparison, "break_even": self.break_even}
        return asdict(self) | derived


FP32 = CostModel("45nm-fp32", multiply=3.7, add=0.9, significand=24, weight_bytes=4, activation_bytes=4)
FP16 = CostModel("45nm-fp16", multiply=1.1, add=0.4, significand=11, weight_bytes=2, activation_bytes=2)
# 8-bit products of a whole row need a 32-bit accumulator. The often quoted 0.2 + 0.03 pJ has an 8-bit one,
# which overflows; here MAC and AC alike accumulate in int32 (0.1), so neither network gets a cheaper adder.
INT8 = CostModel(
    "45nm-int8", multiply=0.2, add=0.1, significand=8, weight_bytes=1, activation_bytes=1, widens=True,
    source=HOROWITZ + "; int8 multiply 0.2, int32 accumulate 0.1",
)  # fmt: skip

COST_MODELS: dict[str, CostModel] = {model.name: model for model in (FP32, FP16, INT8)}


def resolve(models: dict | list | tuple | None) -> list[CostModel]:
    """Cost models from names, instances or a mapping of them; None gives the three built in.

    Raises:
        SpikeformError: An unknown name, something that is no cost model, or two models of one name.
    """
    if models is None:
        return list(COST_MODELS.values())
    chosen = []
    for item in models.values() if isinstance(models, dict) else models:
        if isinstance(item, str) and item not in COST_MODELS:
            raise SpikeformError(f"no cost model named {item!r}; known: {', '.join(COST_MODELS)}")
        model = COST_MODELS[item] if isinstance(item, str) else item
        if not isinstance(model, CostModel):
            raise SpikeformError(f"a cost model must be a name or a CostModel, got {item!r}")
        chosen.append(model)
    if not chosen or len({model.name for model in chosen}) != len(chosen):
        raise SpikeformError("cost_models must name at least one cost model, each name once")
    return chosen
