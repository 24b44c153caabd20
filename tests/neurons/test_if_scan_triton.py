"""The fused scan: the bits of the loop in PyTorch, and its gradients up to rounding.

Without a CUDA device the same tests run on Triton's interpreter, in a process of their own.
"""

import subprocess
import sys

import pytest
import torch

from kernels import DEVICE, INTERPRETED, fused, needs_triton, not_interpreted, on_the_interpreter
from spikeform.neurons import scan as core
from spikeform.neurons.if_ import integrate_and_fire, scan

on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def parameters(size, seed):
    """Threshold in 0.3 to 0.8, initial potential in 0 to 0.15, the potential at which it fires in 0.15 to 0.8."""
    theta, initial, level = torch.rand((3, *size), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return 0.3 + 0.5 * theta, 0.15 * initial, (0.3 + 0.5 * theta) * (0.5 + 0.5 * level)


@fused
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("steps", "dtype"), [(1, torch.float32), (8, torch.bfloat16), (8, torch.float32)])
@pytest.mark.parametrize("size", [(), (13,), (5, 13), (5, 1), (2, 1, 13), (2, 5, 13)])
def test_forward_has_the_same_bits(signed, steps, size, dtype, axis):
    from spikeform.neurons.triton import if_scan

    x = random(*((steps, 2) if axis == 0 else (2, steps)), 5, 13, seed=1).to(dtype)
    theta, initial, fire = parameters(size, 2)
    rule = core.Rule(1.0, signed, axis)
    for out in (torch.int8, torch.float32):
        spikes, v = if_scan.forward(x, theta, initial, fire, rule, out)
        expected, potential = core.run(x.cpu(), theta.cpu(), initial.cpu(), fire.cpu(), rule, out)
        assert spikes.dtype == out
        assert torch.equal(spikes.cpu(), expected)
        assert torch.equal(v.cpu(), potential)
    assert bool(spikes.any())


@fused
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("steps", "size"), [(1, ()), (8, (13,)), (8, (5, 1)), (5, (2, 5, 13)), (64, (5, 13))])
def test_backward_agrees(signed, steps, size, axis):
    from spikeform.neurons.triton import if_scan

    x = random(*((steps, 2) if axis == 0 else (2, steps)), 5, 13, seed=3)
    theta, initial, fire = parameters(size, 4)
    saved, rule = (x, theta, initial, fire, 0.8 * theta), core.Rule(1.0, signed, axis)
    for grad in (random(*x.shape, seed=5), None):
        v = random(*x.select(axis, 0).shape, seed=6)
        mine = if_scan.backward(saved, grad, v, rule)
        # the reference in fp64: the rounding of fp32 grows along the recursion
        exact = core._adjoint(tuple(t.double().cpu() for t in saved), _double(grad), v.double().cpu(), rule)
        single = core._adjoint(tuple(t.cpu() for t in saved), None if grad is None else grad.cpu(), v.cpu(), rule)
        for a, b, c in zip(mine, exact, single, strict=True):
            error, usual = (float((t.cpu().double() - b).abs().max()) for t in (a, c))
            assert error <= 10 * usual + 1e-5 * float(b.abs().max()) + 1e-6  # incoming gradients are of order 1


def _double(grad):
    return None if grad is None else grad.double().cpu()


@fused
def test_many_blocks_with_a_ragged_end_and_the_longest_window():
    from spikeform.neurons.triton import if_scan

    x = random(3, core.FUSED_STEPS, 1111, seed=7)
    theta, initial, fire = parameters((1111,), 8)
    for signed in (False, True):
        rule = core.Rule(1.0, signed, 1)
        spikes, v = if_scan.forward(x, theta, initial, fire, rule, torch.int8)
        expected, potential = core.run(x.cpu(), theta.cpu(), initial.cpu(), fire.cpu(), rule, torch.int8)
        assert torch.equal(spikes.cpu(), expected)
        assert torch.equal(v.cpu(), potential)


@needs_triton
@not_interpreted
def test_on_the_interpreter():
    on_the_interpreter(__file__)


def test_without_triton_a_warning_names_it(monkeypatch):
    from spikeform.neurons import triton as package

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "spikeform.neurons.triton.if_scan", raising=False)
    monkeypatch.delattr(package, "if_scan", raising=False)
    core.fused_kernels.cache_clear()
    with pytest.warns(UserWarning, match="pip install triton"):
        assert core.fused_kernels() is None
    core.fused_kernels.cache_clear()


def test_importing_the_neurons_does_not_import_triton():
    code = "import sys, spikeform.neurons.if_, spikeform.neurons.qcfs; print('triton' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "False"


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scan_takes_the_kernels_and_does_not_wait(signed, dtype):
    x = random(16 * 8, 6, 1000, seed=9).to(dtype)
    theta, initial, level = parameters((6, 1000), 10)
    level = level / theta
    own = [leaf.clone().requires_grad_() for leaf in (x, theta, initial, level)]
    other = [leaf.cpu().clone().requires_grad_() for leaf in (x, theta, initial, level)]
    weight = random(*x.shape, seed=11)
    scan(x, theta, initial, level, steps=8, signed=signed)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        hard = scan(x, theta, initial, level, steps=8, signed=signed)
        scan(x, 0.7, 0.35, 0.5, steps=8, signed=signed)
        soft = scan(*own, steps=8, signed=signed, surrogate=1.0)
        (soft * weight).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = scan(*other, steps=8, signed=signed, surrogate=1.0)
    (expected * weight.cpu()).sum().backward()
    assert torch.equal(hard.cpu().float(), expected)
    assert torch.equal(soft.cpu(), expected)
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=2e-3, atol=2e-3 * float(b.grad.abs().max()))


@pytest.mark.gpu
@on_gpu
def test_what_the_kernels_do_not_take_runs_in_pytorch():
    x = random(72, 33, seed=12)
    for each, kwargs in ((x.double(), {}), (x, {"leak": 0.9})):
        fired = integrate_and_fire(each, 0.8, 0.4, **kwargs)
        expected = integrate_and_fire(each.cpu(), 0.8, 0.4, **kwargs)
        assert torch.equal(fired.spikes.cpu(), expected.spikes)
    assert torch.equal(scan(x, 0.8, 0.4, steps=72).cpu(), scan(x.cpu(), 0.8, 0.4, steps=72))
