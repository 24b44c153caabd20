"""What to compile decoding with."""

from __future__ import annotations

from typing import Any

from torch.compiler import skip_guard_on_all_nn_modules_unsafe
from transformers import CompileConfig


def compile_config(*, fullgraph: bool = True, together: bool = True) -> CompileConfig:
    """How ``generate`` should compile a converted model, if nobody changes the model meanwhile.

    As transformers does by itself, but that a call does not look at every attribute of every module before it begins,
    nor at the strides of what each operator gives.
    A spiking model has more of them than the dense one: with 32 layers, looking takes longer than many a GPU takes for
    the token. The price: a model that is changed after its first compiled call (converted, tuned, given other
    thresholds) may go on as it was before. Call ``torch.compiler.reset()`` after a change. Weights that change in their
    place are always seen.

    Args:
        fullgraph: Raise an error where a step is not one graph.
        together: On a GPU, put together what decodes one row: products of one input, what makes and encodes it, the
            cache (:mod:`spikeform.layers.joined`).

    Returns:
        For ``model.generate(..., cache_implementation="static", compile_config=...)``, or ``model.get_compiled_call``.
    """
    options: dict[str, Any] = {
        "guard_filter_fn": skip_guard_on_all_nn_modules_unsafe,
        "triton.cudagraphs": True,  # what transformers' own mode, "reduce-overhead", comes to
        # Every operator's result is asked for its strides and place else, at each call.
        "size_asserts": False,
        "alignment_asserts": False,
    }
    if together:
        from spikeform.layers.joined import Joined  # Inductor takes a second to import

        options["post_grad_custom_pre_pass"] = Joined()
    return CompileConfig(fullgraph=fullgraph, mode=None, options=options)  # type: ignore[arg-type]  # one excludes the other
