"""What to compile decoding with."""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.compiler import skip_guard_on_all_nn_modules_unsafe
from transformers import CompileConfig

_NUMBERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_COUNT = count()


def compile_config(model: nn.Module, *, fullgraph: bool = True, together: bool = True) -> CompileConfig:
    """How ``generate`` should compile a converted model, if nobody changes the model meanwhile.

    As transformers does by itself, but that a call does not look at every attribute of every module before it begins,
    nor at the strides of what each operator gives. A spiking model has more of them than the dense one: with 32 layers,
    looking takes longer than many a GPU takes for the token. The price: a model that is changed after its first
    compiled call (converted, tuned, given other thresholds) may go on as it was before. Call
    ``torch.compiler.reset()`` after a change. Weights that change in their place are always seen.

    Args:
        model: What is compiled. Nothing else must be compiled with this: it would be taken for this model.
        fullgraph: Raise an error where a step is not one graph.
        together: Put together what decodes one row: products of one input, what makes and encodes it, the cache
            (:mod:`spikeform.layers.joined`); on a CPU all of that into one operator (:mod:`spikeform.layers.chained`).

    Returns:
        For ``model.generate(..., cache_implementation="static", compile_config=...)``, or ``model.get_compiled_call``.
    """
    from spikeform.layers.joined import Joined  # Inductor takes a second to import

    number = _NUMBERS.setdefault(model, next(_COUNT))
    options: dict[str, Any] = {
        "guard_filter_fn": skip_guard_on_all_nn_modules_unsafe,
        "triton.cudagraphs": True,  # what transformers' own mode, "reduce-overhead", comes to
        # Every operator's result is asked for its strides and place else, at each call.
        "size_asserts": False,
        "alignment_asserts": False,
        # Differs from model to model, so that what was compiled for one is not taken for another: no guard says so.
        "post_grad_custom_pre_pass": Joined(number, together),
    }
    return CompileConfig(fullgraph=fullgraph, mode=None, options=options)  # type: ignore[arg-type]  # one excludes the other
