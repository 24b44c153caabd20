"""Are the fused products right? The part of ``gpu_products.py`` that compares them with PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F

from spikeform.neurons import GIF, OAT
from spikeform.spikes import Radix2, SpikeTrain
from spikeform.synapses import IntegerWeight, linear
from spikeform.synapses.fused import pack_nibbles
from spikeform.synapses.triton import products

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
failed: Counter[str] = Counter()
errors: list[str] = []


def input_of(rows: int, inner: int, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(rows, inner, generator=generator, device=DEVICE)
    return (x * (1 + 20 * (torch.arange(inner, device=DEVICE) % 97 == 0))).to(dtype)


def guarded(label: str, run: Callable[[], object]) -> object:
    """What ``run`` gives, or None and a count of its error: one bad cut must not end the search."""
    try:
        return run()
    except Exception as error:
        failed[label] += 1
        if len(errors) < 12:
            errors.append(f"{label}: {str(error)[:160]!r}")
        return None


def check_size(rows: int, columns: int, inner: int) -> list[str]:
    """Compares each kernel with the executors in PyTorch on a CPU; what is wrong."""
    wrong = []
    x = input_of(rows, inner, torch.float32)
    x[:, ::7] = (x[:, ::7] * 32).round() / 32
    codes = torch.randint(-128, 128, (columns, inner), device=DEVICE).to(torch.int8)
    scale = torch.rand(columns, device=DEVICE)
    weight = IntegerWeight(codes.cpu(), scale.cpu()[None], torch.zeros(1, columns, dtype=torch.int16), None, 8)
    for steps in (7, 8, 15, 16):
        oat = OAT(Radix2(steps), (3.3, 50.1))
        train = oat.encode(x.cpu())
        exact = SpikeTrain(train.codes.int(), train.quantum, train.coding, train.branch, exact=True)
        args = (oat.threshold.to(DEVICE), 2**steps - 1, 2**steps, 0)
        y = guarded("check", lambda a=args: products.oat_linear_int(x, codes, scale, None, *a))
        if y is None or not torch.equal(y.cpu(), linear(exact, weight)):
            wrong.append(f"oat_linear_int {rows} {columns} {inner} T={steps}")
        real = codes.bfloat16() / 64
        args = (oat.threshold.to(DEVICE), None, 2**steps - 1, 2**steps, 0, False)
        y = guarded("check", lambda a=args, w=real: products.oat_linear(x.bfloat16(), w, None, *a))
        expected = F.linear(oat.encode(x.cpu().bfloat16()).decode().double(), real.cpu().double())
        if y is None or float((y.cpu() - expected).abs().max() / expected.abs().max()) > 2**-7 * (1 + 3 * (not CUDA)):
            wrong.append(f"oat_linear {rows} {columns} {inner} T={steps}")
    for steps in (1, 2, 4):
        gif = GIF(4, (inner,), steps=steps)
        gif.set_times(torch.tensor([2 ** (i % steps.bit_length()) for i in range(inner)], dtype=torch.uint8))
        top, multiple = (t.to(DEVICE) for t in gif.tables()[1:3])
        expected = linear(gif.encode(x.cpu()), weight)
        args = (None, None, None, top, multiple, 15, steps)
        y = guarded("check", lambda a=args: products.gif_linear(x, codes, scale, *a))
        if y is None or not torch.equal(y.cpu(), expected):
            wrong.append(f"gif_linear int8 {rows} {columns} {inner} T={steps}")
        zero = (torch.arange(columns, device=DEVICE) % 16).to(torch.int16)
        nibbles = (codes.to(torch.int16) + 128) // 16
        small = (nibbles - zero[:, None]).to(torch.int8)
        weight4 = IntegerWeight(small.cpu(), scale.cpu()[None], zero.cpu()[None], None, 4)
        args = (pack_nibbles(nibbles), zero, None, top, multiple, 15, steps)
        y = guarded("check", lambda a=args, w=small: products.gif_linear(x, w, scale, *a))
        if y is None or not torch.equal(y.cpu(), linear(gif.encode(x.cpu()), weight4)):
            wrong.append(f"gif_linear int4 {rows} {columns} {inner} T={steps}")
    if rows <= 4:
        v = torch.where(x.abs() > 1, x.round().clamp(-100, 100), 0).to(torch.int8)
        width = columns // 64 * 64 or 64
        row = torch.randint(-8, 8, (inner, width), device=DEVICE).to(torch.int8)
        expected = (v.cpu().double() @ row.cpu().double()).float()
        for values, stored in ((v, row), (v.float(), row.bfloat16()), (v, pack_nibbles(row + 8))):
            y = guarded("check", lambda a=values, b=stored: products.event_product(a, b, None, width))
            if y is None or not torch.equal(y.cpu(), expected):
                wrong.append(f"event_product {rows} {stored.dtype}")
    return wrong
