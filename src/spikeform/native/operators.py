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
    direct = {"cpu": _when_called(cpu), "cuda": _when_called(cuda)}

    def call(x: torch.Tensor, *args: Any) -> Any:
        # The dispatcher takes as long as a small kernel: only what it has to see goes through it.
        run = direct.get(x.device.type)
        if run is None or type(x) is not torch.Tensor or torch.compiler.is_compiling():
            return operator(x, *args)
        return run(x, *args)

    return call


def fixed(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, of which CUDA graphs now know that it stays where it is: they need not copy it at each replay."""
    if tensor.is_cuda:
        import torch._dynamo

        torch._dynamo.mark_static_address(tensor)
    return tensor


def _when_called(place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    found: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(module), function))
        return found[0](*args)

    return run
