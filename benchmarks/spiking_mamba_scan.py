"""Mamba-2's scan in chunks, as matrix products in plain PyTorch, in place of transformers' own.

Some releases of transformers (5.17 is one) write the products of the scan as sums over tensors of tokens x chunk x
heads x state, gigabytes a layer at the batches of these scripts, and repeat what the heads of a group share. Here
are the same sums as products; nothing is larger than tokens x chunk x heads. `install` puts the function in place for
a process; numbers differ by the order of sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def install() -> None:
    """Let Mamba-2 models of transformers in this process use :func:`chunk_scan` where no fused kernel is installed.

    Raises:
        RuntimeError: This release of transformers has no function of that name.
    """
    from transformers.models.mamba2 import modeling_mamba2

    if not hasattr(modeling_mamba2, "mamba2_chunk_scan"):
        raise RuntimeError("this release of transformers scans in another way: use one from 5.17 on")
    modeling_mamba2.mamba2_chunk_scan = chunk_scan


def chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """``S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T``,  ``y_t = S_t C_t + D x_t`` (arXiv 2405.21060, section 6).

    Within a chunk of Q tokens ``y = (C B^T . L) (dt x)`` with ``L_ts = exp(sum of dt A over s+1 .. t)``; each chunk
    adds what the state at its beginning still gives.

    Args:
        hidden_states: x, ``[batch, T, H, P]``.
        dt: Step sizes ``[batch, T, H]``, before ``dt_bias`` and softplus.
        A: ``[H]``, negative.
        B: ``[batch, T, G, N]``, shared by the H / G heads of a group.
        C: As B.
        chunk_size: Q.
        D: ``[H]`` or None.
        dt_bias: ``[H]`` or None.
        initial_states: ``[batch, H, P, N]`` or None for zeros.
        dt_softplus: Whether step sizes are ``softplus(dt + dt_bias)``.
        dt_limit: Least and greatest step size.
        return_final_states: Also return the state after the last token.

    Returns:
        ``[batch, T, H, P]`` in fp32, and the state ``[batch, H, P, N]`` if asked for.
    """
    batch, length, heads, width = hidden_states.shape
    groups, size = B.shape[2:]
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (F.softplus(dt.float()) if dt_softplus else dt.float()).clamp(*dt_limit)
    x = hidden_states.float()
    skipped = None if D is None else D.float()[:, None] * x
    short = -length % chunk_size
    count = (length + short) // chunk_size
    # b batch, c chunk, q and s places in it, g group, h head of the group, p its width, n state
    x = _padded(x * dt[..., None], short).view(batch, count, chunk_size, groups, -1, width)
    B, C = (_padded(m.float(), short).view(batch, count, chunk_size, groups, size) for m in (B, C))
    decay = _padded(A.float() * dt, short).view(batch, count, chunk_size, groups, -1)
    log = decay.cumsum(2).permute(0, 1, 3, 4, 2)  # bcghq: of the decay since the chunk's beginning
    future = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
    within = (log[..., :, None] - log[..., None, :]).masked_fill(future, -torch.inf).exp()
    attention = torch.einsum("bcqgn,bcsgn->bcgqs", C, B).float()[:, :, :, None] * within
    y = torch.einsum("bcghqs,bcsghp->bcqghp", attention, x)

    left = (log[..., -1:] - log).exp().permute(0, 1, 4, 2, 3)  # bcqgh: of a token at the chunk's end
    added = torch.einsum("bcqghp,bcqgn->bcghpn", x * left[..., None], B).float()
    state = added.new_zeros(batch, groups, heads // groups, width, size)
    if initial_states is not None:
        state = initial_states.to(added.dtype).view_as(state)
    kept = log[..., -1].exp()[..., None, None]
    begins = []
    for chunk in range(count):
        begins.append(state)
        state = state * kept[:, chunk] + added[:, chunk]
    old = torch.einsum("bcqgn,bcghpn->bcqghp", C, torch.stack(begins, 1))
    y = y + old * log.exp().permute(0, 1, 4, 2, 3)[..., None]
    y = y.reshape(batch, -1, heads, width)[:, :length].float()
    y = y if skipped is None else y + skipped
    return (y, state.reshape(batch, heads, width, size)) if return_final_states else y


def _padded(x: Tensor, short: int) -> Tensor:
    """``[batch, T, ...]`` with so many zeros more at the end of T."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, short)) if short else x
