"""Operators of the ``spikeform`` namespace: one schema, a kernel for each device, and a shape for ``torch.compile``.

An operator is opaque to the compiler, so a model keeps one graph. None of them has a gradient: layers call them only
where none flows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "spikeform"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, fake: Callable[..., Any], cpu: str, cuda: str) -> Any:
    """Define ``spikeform::<schema>`` and return it.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor``.
        fake: Same arguments; empty tensors of the right shape, dtype and device.
        cpu: ``package.module:function`` of the CPU kernel, imported when it is first called.
        cuda: The same for CUDA.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for key, place in (("CPU", cpu), ("CUDA", cuda)):
        _LIBRARY.impl(name, _when_called(place), key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    direct: dict[bool, Callable[..., Any]] = {}

    def call(x: torch.Tensor, *args: Any) -> Any:
        # The dispatcher takes as long as a small kernel: only what it has to see goes through it.
        if type(x) is not torch.Tensor or not (x.is_cpu or x.is_cuda) or torch.compiler.is_compiling():
            return operator(x, *args)
        run = direct.get(x.is_cpu)
        if run is None:
            run = direct[x.is_cpu] = _imported(cpu if x.is_cpu else cuda)
        return run(x, *args)

    return call


def fixed(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, of which CUDA graphs now know that it stays where it is: they need not copy it at each replay."""
    if tensor.is_cuda:
        import torch._dynamo

        torch._dynamo.mark_static_address(tensor)
    return tensor


def _imported(place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)


def _when_called(place: str) -> Callable[..., Any]:
    found: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        if not found:
            found.append(_imported(place))
        return found[0](*args)

    return run
