"""One token's attention over a short cache, which its key and value are put into first, by one kernel or by several.

Without a CUDA device the same tests run on Triton's interpreter, in a process of their own.
"""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from attention_cases import Case, agrees, gif_layer, gif_parameters, oat_layer, oat_parameters
from kernels import DEVICE, INTERPRETED, fused, let_bounds_be_scalars, needs_triton, not_interpreted, on_the_interpreter


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    if INTERPRETED:
        let_bounds_be_scalars(monkeypatch)


class Step(Case):
    """A case of one query, before whose attention the cache gets a token at ``place``; later keys are hidden."""

    def __init__(self, place, keys, *args, turn=True, **how):
        super().__init__(1, keys, *args, **how)
        dtype, least = self.q.dtype, torch.finfo(self.q.dtype).min
        if self.mask is not None:
            self.mask[..., place + 1 :] = least
        self.place = torch.tensor(place, device=DEVICE)
        # As projections leave them; outliers too.
        token = torch.randn(2, 1, 2, self.groups, self.size, generator=self.generator).to(DEVICE, dtype)
        token.view(-1)[::7] *= 4
        self.own_key, self.own_value = (x.transpose(1, 2) for x in token.unbind(2))
        angle = torch.arange(self.size // 2).repeat(2) * 0.1 + 0.3
        self.turn = (
            [f(angle).to(DEVICE, dtype).view(1, 1, 1, -1) for f in (torch.cos, torch.sin)] if turn else (None,) * 2
        )

    def caches(self, spiking):
        return [x.clone() for x in self.cached(spiking)]

    def own(self):
        return self.place, self.own_key, self.own_value, *self.turn

    @torch.no_grad()
    def expected(self, spiking):
        """The layer's own operations, and the caches that they leave."""
        q, key = self.q, self.own_key
        if self.turn[0] is not None:
            q, key = apply_rotary_pos_emb(q, key, *(x[:, 0] for x in self.turn))
        packed = spiking.pack(key, self.own_value)
        caches = [x.index_copy_(2, self.place[None], y) for x, y in zip(self.caches(spiking), packed, strict=True)]
        spiking._fused = lambda *_: None
        return spiking(q, *caches, self.mask, self.scaling), caches


def check(case, spiking, run, parameters, unit):
    wanted, packed = case.expected(spiking)
    caches = case.caches(spiking)
    found = run(case.q, *caches, case.mask, case.scaling, *parameters(spiking), *case.own())
    assert all(torch.equal(a, b) for a, b in zip(packed, caches, strict=True))
    if bool(wanted.any()):
        agrees(found, wanted, unit, case.v)
    assert bool((found[~wanted.flatten(1).any(1)] == 0).all())  # a row that sees nothing
    return found


# place, keys, size, then of the case
CASES = {
    "last": ((39, 40, 16), {"heads": 2}),
    "first": ((0, 70, 24), {"heads": 2, "padding": 0}),
    "in the middle": ((33, 70, 40), {"heads": 2, "dtype": torch.bfloat16}),
    "nothing is hidden": ((20, 40, 64), {"heads": 2, "padding": None, "turn": False}),
    "nothing is seen": ((9, 20, 16), {"heads": 2, "padding": 20}),
    "groups": ((280, 300, 64), {"heads": 6, "dtype": torch.bfloat16}),
    "groups, as it is": ((270, 300, 24), {"heads": 20, "turn": False, "per_head": True}),
    "longer": ((500, 515, 16), {"heads": 2, "padding": 300}),
}


@fused
@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
@pytest.mark.parametrize("name", CASES)
def test_a_token_is_put_and_met(name, together, monkeypatch):
    from spikeform.layers.triton import attention, short

    place, how = CASES[name]
    if not together:
        monkeypatch.setattr(short, "suits", lambda *_: False)
    case = Step(*place, **how)
    for spiking in (oat_layer(True, "nearest", 8, 8), oat_layer(False, "strict", 16, 0)):
        check(case, spiking, attention.oat_appended, oat_parameters, float(spiking.probability.quantum().max()))
    for steps in (2, 1):
        spiking = gif_layer(case, steps, False)
        check(case, spiking, attention.gif_appended, gif_parameters, 1 / spiking.probability.coding.limit)


@fused
@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
def test_a_full_cache_is_left_as_it_is(together, monkeypatch):
    from spikeform.layers.triton import attention, short

    if not together:
        monkeypatch.setattr(short, "suits", lambda *_: False)
    case = Step(39, 40, 16, heads=2)
    case.place += 1
    for spiking, run, parameters in (
        (oat_layer(True, "nearest", 8, 8), attention.oat_appended, oat_parameters),
        (gif_layer(case, 2, False), attention.gif_appended, gif_parameters),
    ):
        # The caches begin rooms that go on behind them: what lies there is somebody else's.
        rooms = [torch.nn.functional.pad(x, (0, 0, 0, 2), value=3) for x in case.caches(spiking)]
        before = [x.clone() for x in rooms]
        caches = [x[:, :, :-2] for x in rooms]
        run(case.q, *caches, case.mask, case.scaling, *parameters(spiking), *case.own())
        assert all(torch.equal(a, b) for a, b in zip(rooms, before, strict=True))


@fused
def test_rotated_queries_are_met_by_kernels_of_their_own():
    from spikeform.layers.triton import attention

    case = Step(33, 40, 32, heads=2, turn=False)
    spiking = gif_layer(case, 2, True)
    wanted = None
    case_key, signs = case.own_key, spiking.signs
    with torch.no_grad():
        wanted, packed = case.expected(spiking)
        case.own_key = spiking._rotated(case_key)
    caches = case.caches(spiking)
    assert spiking.signs is signs
    found = attention.gif_appended(case.q, *caches, case.mask, case.scaling, *gif_parameters(spiking), *case.own())
    assert all(torch.equal(a, b) for a, b in zip(packed, caches, strict=True))
    agrees(found, wanted, 1 / spiking.probability.coding.limit, case.v, True)


@fused
@pytest.mark.parametrize("sizes", [{"block": 16, "step": 32, "channels": 16}, {"block": 128, "step": 256, "warps": 4}])
@pytest.mark.parametrize("name", ["in the middle", "groups"])
def test_sizes_of_programs(name, sizes, monkeypatch):
    from spikeform.layers.triton import attention, short

    usual = short.form_of
    monkeypatch.setattr(short, "form_of", lambda *args: usual(*args)._replace(**sizes))
    place, how = CASES[name]
    case = Step(*place, **how)
    spiking = oat_layer(True, "nearest", 8, 8)
    check(case, spiking, attention.oat_appended, oat_parameters, float(spiking.probability.quantum().max()))
    spiking = gif_layer(case, 2, False)
    check(case, spiking, attention.gif_appended, gif_parameters, 1 / spiking.probability.coding.limit)


@fused
@pytest.mark.parametrize("parts", [1, 4], ids=["values", "bytes"])
@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
def test_codes_of_what_is_left(parts, together, monkeypatch):
    from spikeform.layers.triton import attention, short
    from spikeform.synapses.triton.row import row_oat

    if not together:
        monkeypatch.setattr(short, "suits", lambda *_: False)
    case = Step(41, 50, 40, heads=6)
    case.q, case.own_key, case.own_value, case.mask = (x[:1] for x in (case.q, case.own_key, case.own_value, case.mask))
    case.k, case.v = case.k[:1], case.v[:1]
    spiking = oat_layer(True, "nearest", 8, 8)
    line = [torch.tensor([0.4, 3.0], device=DEVICE)], (), 2**12 - 1, 2**12, 0, parts
    given = case.mask, case.scaling, *oat_parameters(spiking), *case.own()
    caches, others = case.caches(spiking), case.caches(spiking)
    context = attention.oat_appended(case.q, *caches, *given)
    codes = attention.row_appended(case.q, *others, *given, *line)
    wanted = row_oat(context.flatten(), *line)
    used = 6 * 40 if parts == 1 else 2 * 2 * 60 + 2  # not what pads a line
    assert torch.equal(codes[:, :used], wanted[:, :used])
    assert all(torch.equal(a, b) for a, b in zip(caches, others, strict=True))


@needs_triton
@not_interpreted
def test_on_the_interpreter():
    on_the_interpreter(__file__)
