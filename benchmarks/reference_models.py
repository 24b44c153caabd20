"""Architectures of the reference models, and how they are measured, rounded and saved.

All but two are embedded. gpt2-1m and gpt2-8m are gpt2 smaller and larger, for what should be seen at three sizes;
`train_reference.py` makes them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig

GPT2 = {"gpt2-1m": (3, 128), "gpt2": (5, 192), "gpt2-8m": (9, 256)}  # layers, width; the larger the deeper, as GPT-2's
NAMES = ("llama", *GPT2, "opt", "mamba2")
VOCABULARY = dict.fromkeys(NAMES, 3072) | {"llama": 8192}  # all but llama share one tokenizer
CONTEXT = dict.fromkeys(NAMES, 512) | {"llama": 1024}  # of training; mamba2 has no limit of its own
WINDOW = 512  # of the held-out protocol
NO_LIMIT = int(1e30)  # what transformers writes for a tokenizer without a longest text


def build(name: str, bos: int, eos: int, pad: int) -> nn.Module:
    """Returns a freshly initialised model with tied embeddings and no dropout of its own.

    Every width is a multiple of 64, so group-wise quantization at the usual sizes divides it. Every head is 32
    wide; those of mamba2, like its state and its chunks, are 64.
    """
    import transformers as hf

    special = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad, "tie_word_embeddings": True}
    if name == "llama":
        config = hf.LlamaConfig(
            vocab_size=VOCABULARY[name],
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT[name],
            **special,
        )
        return hf.LlamaForCausalLM(config)
    if name in GPT2:
        layers, width = GPT2[name]
        config = hf.GPT2Config(
            vocab_size=VOCABULARY[name],
            n_embd=width,
            n_layer=layers,
            n_head=width // 32,
            n_positions=CONTEXT[name],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        )
        return hf.GPT2LMHeadModel(config)
    if name == "opt":
        config = hf.OPTConfig(
            vocab_size=VOCABULARY[name],
            hidden_size=192,
            word_embed_proj_dim=192,
            ffn_dim=768,
            num_hidden_layers=5,
            num_attention_heads=6,
            max_position_embeddings=CONTEXT[name],
            dropout=0.0,
            **special,
        )
        return hf.OPTForCausalLM(config)
    if name == "mamba2":
        config = hf.Mamba2Config(
            vocab_size=VOCABULARY[name],
            hidden_size=256,
            num_hidden_layers=7,
            num_heads=8,
            head_dim=64,
            state_size=64,
            n_groups=1,
            chunk_size=64,
            initializer_range=0.02,  # the default of 0.1 makes the first logits of a tied head far too large
            **special,
        )
        model = hf.Mamba2ForCausalLM(config)
        # As rescale_prenorm_residual does; but with that option in the config, transformers 5.17 to 5.23 divide again
        # each time the weights are loaded.
        for block in model.backbone.layers:
            block.mixer.out_proj.weight.data /= math.sqrt(config.num_hidden_layers)
        return model
    raise ValueError(f"unknown model {name!r}: one of {', '.join(NAMES)}")


def use_plain_attention(model: nn.Module, causal: bool = True) -> list[torch.Tensor]:
    """Lets attention go without a mask tensor, so that the fused kernel without one runs.

    Training sequences are full and never padded. While a model is compiled, transformers would build a mask.

    Returns:
        A list to which each layer, while training, appends the mean square of its attention scores, mean over
        its heads. It is computed from the sizes of queries and keys alone, as if their directions were
        independent: the fused kernel never shows the scores. The caller empties the list.
    """
    from transformers import AttentionInterface

    sizes: list[torch.Tensor] = []

    def attention(module, query, key, value, attention_mask, scaling=None, **_):
        if module.training:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            q, k = (x.float().square().mean((0, 2, 3)) for x in (query, key))
            groups = q.shape[0] // k.shape[0]
            sizes.append((q * k.repeat_interleave(groups)).mean() * query.shape[-1] * scale**2)
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None

    name = "plain_causal" if causal else "plain_full"
    AttentionInterface.register(name, attention)
    model.set_attn_implementation(name)
    return sizes


def add_residual_dropout(model: nn.Module, p: float) -> None:
    """Adds dropout to what each block writes into the residual stream, the same way in all models.

    It lives in forward hooks, so nothing of it is saved.
    """
    if p:
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "down_proj", "c_proj", "out_proj", "fc2")):
                module.register_forward_hook(lambda m, _, out: F.dropout(out, p, m.training))


@torch.no_grad()
def held_out(forward, ids: np.ndarray, bytes_: int, device: str, rows: int = 32, every: int = 1) -> dict:
    """Measures a held-out text in non-overlapping windows of 512 tokens.

    In each window the first token is context only and the other 511 are predicted; a last part shorter than a
    window is left out.

    Args:
        forward: Takes token ids [rows, window] and returns logits.
        ids: The token ids of the whole text.
        bytes_: The text's length in UTF-8 bytes, which turns nats per token into bits per byte.
        device: Where to put the ids.
        rows: Windows in one forward pass.
        every: Measure only each so many-th window.

    Returns:
        nats_per_token, perplexity, bits_per_byte, predicted_tokens, windows.
    """
    windows = torch.from_numpy(np.asarray(ids[: len(ids) // WINDOW * WINDOW])).view(-1, WINDOW)[::every]
    total = 0.0
    for start in range(0, len(windows), rows):
        batch = windows[start : start + rows].to(device)
        logits = forward(batch)[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    predicted = len(windows) * (WINDOW - 1)
    nats = total / predicted
    return {
        "nats_per_token": round(nats, 5),
        "perplexity": round(math.exp(nats), 4),
        "bits_per_byte": round(nats / math.log(2) * len(ids) / bytes_, 5),
        "predicted_tokens": predicted,
        "windows": len(windows),
    }


def round_to_bfloat16(model: nn.Module) -> None:
    """Rounds every parameter to the nearest bfloat16 value, kept in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()


def save_folder(model: nn.Module, tokenizer, folder: Path) -> None:
    """Writes a folder that transformers' Auto classes load without spikeform.

    The weights are stored in bfloat16 (the model must have been rounded to it, so nothing is lost) while the
    configuration says float32: `from_pretrained` follows the configuration, and gives float32 parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    config.dtype = torch.float32
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        special = {f"{token}_token_id": getattr(config, f"{token}_token_id") for token in ("bos", "eos", "pad")}
        GenerationConfig(**special).save_pretrained(folder)
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", NO_LIMIT)
    tokenizer.save_pretrained(folder)
    tied = set(model._tied_weights_keys or ())
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read
    compact(folder / "tokenizer.json")
    settings = folder / "tokenizer_config.json"
    kept = json.loads(settings.read_text(encoding="utf-8"))
    kept = {key: value for key, value in kept.items() if key not in ("is_local", "local_files_only", "backend")}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older releases know, too
    settings.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def compact(path: Path) -> None:
    """Rewrites a JSON file without indentation: a tokenizer's merges take half the room."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
