"""What every CPU kernel is told about a real tensor."""

from __future__ import annotations

import torch

KINDS = {torch.float32: 0, torch.bfloat16: 1}  # other dtypes take PyTorch's own operations
