import pytest
import torch

from spikeform.energy.codings import activation_bits, additions, comparisons, magnitudes, wire_bits
from spikeform.energy.count import Counter
from spikeform.neurons import OAT, FixedPointHG
from spikeform.neurons.few_spike import FewSpikePattern, FewSpikeTrain
from spikeform.spikes import Burst, Coding, MultiThreshold, Radix2, SignedDigit, SpikeTrain, Thermometer
from spikeform.spikes.trace import Firing, Product, observe
from spikeform.synapses import executor

CODINGS = [
    Radix2(8),
    SignedDigit(8),
    MultiThreshold(8, 2),
    MultiThreshold(6, 4),
    Thermometer(7),
    Burst(4, 15),
]
IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(2))


def train(codes: list, coding: Coding = Radix2(4)) -> SpikeTrain:  # noqa: B008
    return SpikeTrain(torch.tensor(codes), torch.ones(1), coding)


def count(*events: Product | Firing) -> Counter:
    counter = Counter()
    for event in events:
        counter(event)
    return counter


def test_linear_by_hand() -> None:
    # popcounts 2, 1, 0 / 4, 1, 1; five targets each
    spikes = train([[3, -4, 0], [15, 1, 2]])
    tally = count(Product("l", "linear", (spikes,), (5,), 30)).products["l", "linear"]
    assert (tally.accumulations, tally.macs, tally.level_additions, tally.running_sums) == (9 * 5, 30, 0, 0)
    # channels spike 6, 2, 1 times: each row read at most once in a step of the window of 4
    assert (tally.rows, tally.rows_fetched, tally.rows_read) == (3, 3, 4 + 2 + 1)
    assert tally.operands[0].signed
    assert tally.operands[0].slots == 6 * 4


def test_masked_matmul_by_hand() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    a, b = train([[1, 3], [7, 0]]), train([[1, 0], [0, 15]])  # spikes of A's rows: 3, 3; of B's columns: 1, 4
    event = Product("a.scores", "matmul", (a, b), (2, 2), 8, mask=mask)
    tally = count(event).products["a.scores", "matmul"]
    assert tally.accumulations == (3 * 1 + 3 * 2) + (1 * 2 + 4 * 1)
    assert tally.running_sums == 6 + 5
    assert tally.macs == 3 * 2
    turned = Product("a.scores", "matmul", (a, train([[1, 0], [0, 15]])), (2, 2), 8, mask=mask, transposed=True)
    assert count(turned).products["a.scores", "matmul"].accumulations == tally.accumulations


def test_a_causal_mask_reaches_softmax_and_context(toy_attention) -> None:
    model, length = toy_attention(Radix2(6)), 5
    counter = Counter()
    with torch.no_grad(), observe(counter):
        model(IDS[:1, :length])
    pairs = length * (length + 1) // 2
    products = counter.products
    assert products["a.scores", "matmul"].macs == pairs * 3
    assert products["a.softmax", "hadamard"].macs == pairs
    assert products["a.context", "matmul"].macs == pairs * 3
    assert products["a.context", "matmul"].operands[0].elements == pairs
    assert products["a.softmax", "hadamard"].operands[0].elements == pairs
    # the row sum's single spike (code 1) reaches every visible key of its row, and no hidden one
    softmax = products["a.softmax", "hadamard"]
    assert softmax.accumulations == softmax.operands[0].spikes + pairs
    assert counter.firings["a.probability", "identity"].sent.elements == 2 * pairs


def test_a_mask_ends_with_its_attention(toy_attention) -> None:
    counter = Counter()
    with torch.no_grad(), observe(counter):
        toy_attention(Radix2(6))(IDS[:1, :3])
        OAT(Radix2(6), (1.0, 4.0), site="later")(torch.ones(1, 3, 3))
    assert counter.firings["later", "identity"].sent.elements == 9


# The units of a burst share a step: its literal spikes are amplitudes, not to be told apart.
@pytest.mark.parametrize("coding", CODINGS[:-1], ids=repr)
@pytest.mark.parametrize("toy", ["toy_linear", "toy_attention"])
def test_counts_are_the_spikes_that_the_temporal_executor_sends(toy, coding, request) -> None:
    counter, oracle = Counter(), []
    model = request.getfixturevalue(toy)(coding)
    with torch.no_grad(), executor("temporal"), observe(lambda event: (counter(event), oracle.append(event))):
        model(IDS)
    assert counter.products
    for tally in counter.products.values():
        assert tally.sent == sum(operand.spikes for operand in tally.operands)
    literal = sum(int((e.train.unroll() != 0).sum()) for e in oracle if isinstance(e, Firing))
    assert literal == sum(tally.sent.spikes for tally in counter.firings.values()) > 0


def test_executors_count_alike(toy_linear) -> None:
    def tallies(name: str) -> dict:
        counter = Counter()
        with torch.no_grad(), executor(name), observe(counter):
            toy_linear(Radix2(8))(IDS)
        for tally in counter.products.values():
            tally.sent = None
        return counter.products

    assert tallies("temporal") == tallies("collapsed") == tallies("event")


def test_firing_by_hand() -> None:
    x = torch.tensor([0.5, 100.0, -0.25, 0.0])
    counter = Counter()
    with observe(counter):
        OAT(Radix2(4), (1.0, 8.0), site="n")(x)
        FixedPointHG("square", Radix2(4), low=-2, high=2, site="h")(torch.tensor([0.75, 1.0, 3.0]))
    tally = counter.firings["n", "identity"]
    # codes 8, 15 (saturated), -4, 0: 1 + 4 + 1 spikes; 4 elements, 4 steps, and a gate of two
    assert (tally.sent.spikes, tally.comparisons, tally.additions, tally.saturated) == (6, 4 * 4 + 4, 6, 1)
    hg = counter.firings["h", "square"]
    assert hg.saturated == 1  # 9 lies above 2^2
    assert hg.additions == 2 * hg.sent.spikes
    assert hg.comparisons == 3 * (4 + 2)  # four binades: two gate comparisons


def test_multi_level_spikes_pay_for_every_set_bit() -> None:
    coding = MultiThreshold(4, 4)
    spikes = train([5, 7, 4, 0], coding)  # at the last step amplitude = code: 101, 111, 100
    assert spikes.count().tolist() == [1, 1, 1, 0]
    assert additions(spikes, spikes.count()).tolist() == [2, 3, 1, 0]
    tally = count(Product("l", "linear", (spikes,), (10,), 40)).products["l", "linear"]
    assert (tally.accumulations, tally.level_additions) == (30, 30)
    assert comparisons(spikes, (4,), 3) == 4 * 4 * 4


@pytest.mark.parametrize(
    ("coding", "signed", "bits"),
    [
        (Thermometer(7), False, 3),  # ceil(log2(T + 1)), the mapping of arXiv 2409.08290
        (Thermometer(8), False, 4),
        (Radix2(8), False, 8),
        (Radix2(8), True, 9),
        (SignedDigit(8), True, 9),
        (Burst(4, 15), False, 6),
    ],
)
def test_quantised_rival_has_as_many_levels(coding, signed, bits) -> None:
    assert activation_bits(coding, signed) == bits


@pytest.mark.parametrize("coding", CODINGS, ids=repr)
def test_magnitudes_are_those_that_unroll_carries(coding) -> None:
    codes = torch.arange(coding.limit + 1)
    weights = torch.tensor(coding.weights()).view(-1, 1)
    carried = (coding.unroll(coding.nearest_code(codes)).long() * weights).sum(0)
    assert len(carried.unique()) == magnitudes(coding)


def test_wire_is_the_shorter_of_bitmap_and_addresses() -> None:
    few = train([0] * 63 + [1], Radix2(8))
    assert wire_bits(few, (64,), 1, signed=False) == 6  # one address of 64 channels
    assert wire_bits(few, (64,), 400, signed=False) == 64 * 8
    assert wire_bits(few, (64,), 400, signed=True) == 64 * 9
    assert wire_bits(train([1] * 64, SignedDigit(8)), (64,), 400, signed=True) == 64 * 9 * 2


def test_hooks_count_what_stays_real(toy_linear) -> None:
    model, counter = toy_linear(Radix2(8)), Counter()
    with torch.no_grad(), counter.watch(model):
        model(IDS)
    head, norm = counter.dense["head"], counter.dense["norm"]
    tokens = IDS.numel()
    assert (head.macs, head.additions, head.weights) == (tokens * 6 * 5, tokens * 5, 30)
    assert (norm.macs, norm.multiplications, norm.additions) == (0, tokens * 5, tokens * 5)
    assert set(counter.dense) == {"head", "norm"}
    assert not model.head._forward_hooks
    assert not model.head._forward_pre_hooks


@pytest.mark.parametrize(
    ("steps", "spikes"),
    [(16, 6.46)],  # LAS as released on N(0, 1), threshold 10
)
def test_oat_on_gaussian_input_sends_the_known_number_of_spikes(steps, spikes) -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    counter = Counter()
    with observe(counter):
        OAT(Radix2(steps), (10.0, 500.0), rounding="strict", site="n")(x)
    sent = counter.firings["n", "identity"].sent
    assert sent.spikes / sent.elements == pytest.approx(spikes, abs=0.02)
    assert sent.spikes / sent.slots == pytest.approx(0.40, abs=0.01)


def test_learned_step_weights_multiply() -> None:
    pattern = FewSpikePattern(4)
    spikes = FewSpikeTrain(torch.tensor([5, 1]), torch.rand(1, 4), pattern, torch.zeros(2, dtype=torch.int16))
    tally = count(Product("h", "hadamard", (spikes, train([3, 0])), (1, 1), 2)).products["h", "hadamard"]
    assert (tally.accumulations, tally.scalings, tally.running_sums) == (3 + 2, 3, 3 + 2)
