"""RMS norms that keep fp64: the families' own compute in fp32 whatever they are given, and hide what is exact."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


@pytest.fixture
def norms_keep_fp64(monkeypatch):
    def forward(norm, x, offset=0.0):
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (norm.weight + offset)

    for kind in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(kind, "forward", forward)
    monkeypatch.setattr(GemmaRMSNorm, "forward", lambda norm, x: forward(norm, x, 1.0))
