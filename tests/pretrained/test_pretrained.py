"""The embedded reference models: plain Hugging Face folders, within limits, as good as their card."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikeform import pretrained
from spikeform.pretrained.twin import outlier_twin

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MOST_PARAMETERS = {"llama": 8_000_000, "gpt2": 3_000_000, "opt": 3_000_000, "mamba2": 4_000_000}
CLASS = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM", "mamba2": "Mamba2ForCausalLM"}
WRITERS = [name for name in pretrained.names() if name in CLASS]  # all that write and are in the repository

COMMON = {
    "a",
    "an",
    "and",
    "as",
    "at",
    "be",
    "but",
    "by",
    "for",
    "had",
    "have",
    "he",
    "her",
    "him",
    "his",
    "i",
}
COMMON |= {"in", "is", "it", "me", "my", "not", "of", "on", "said", "she", "that", "the", "they", "to", "was"}
COMMON |= {"were", "who", "with", "you"}

LOAD_WITHOUT_SPIKEFORM = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    print(type(model).__name__, *sorted({str(p.dtype) for p in model.parameters()}))
assert not any(name.split(".")[0] == "spikeform" for name in sys.modules)
"""


@pytest.fixture(scope="module", params=WRITERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name):
    return pretrained.path(name)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def report(name):
    return json.loads((RESULTS / f"reference-{name}.json").read_text(encoding="utf-8"))


def test_all_models_are_in_the_repository():
    trained = [name for name in pretrained.ALL if (RESULTS / f"reference-{name}.json").is_file()]
    assert pretrained.names() == trained  # weights and their report come together
    assert {"llama", "gpt2", "opt", "bert", "bert-sst2"} <= set(trained)
    assert set(CLASS) == {*pretrained.CAUSAL, *pretrained.STATE_SPACE}


def test_loads_without_spikeform():
    folders = [str(pretrained.path(name)) for name in WRITERS]
    command = [sys.executable, "-c", LOAD_WITHOUT_SPIKEFORM, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{CLASS[name]} torch.float32" for name in WRITERS]


def test_limits(folder, name, model, tokenizer, report):
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters <= MOST_PARAMETERS[name]
    assert parameters == report["parameters"]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16 * 2**20
    assert report["context"] >= 512
    if name in pretrained.CAUSAL:
        assert model.config.max_position_embeddings == report["context"]
        assert model.config.hidden_size // model.config.num_attention_heads >= 32
    else:  # no limit of its own, and its tokenizer names none
        assert not hasattr(model.config, "max_position_embeddings")
        assert tokenizer.model_max_length > 10**6
    assert len(tokenizer) == model.config.vocab_size == report["vocabulary"]


def test_models_of_one_vocabulary_share_their_tokenizer():
    files = {(pretrained.path(name) / "tokenizer.json").read_bytes() for name in WRITERS if name != "llama"}
    assert len(files) == 1


def test_llama_is_what_it_is_for():
    config = AutoModelForCausalLM.from_pretrained(pretrained.path("llama")).config
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.hidden_act == "silu"


def test_opt_has_relu_and_gpt2_gelu():
    config = json.loads((pretrained.path("opt") / "config.json").read_text(encoding="utf-8"))
    assert config["activation_function"] == "relu"
    config = json.loads((pretrained.path("gpt2") / "config.json").read_text(encoding="utf-8"))
    assert config["activation_function"] == "gelu_new"


def test_stored_in_bfloat16_without_loss(folder, model):
    loaded = model.state_dict()
    with safe_open(folder / "model.safetensors", "pt") as stored:
        for key in stored.keys():  # noqa: SIM118 (safe_open is no dict)
            assert stored.get_tensor(key).dtype == torch.bfloat16
            assert torch.equal(stored.get_tensor(key).float(), loaded[key])


def test_special_tokens(model, tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for settings in (model.config, model.generation_config):
        assert settings.eos_token_id == tokenizer.eos_token_id
        assert settings.pad_token_id == tokenizer.pad_token_id
    text = 'Dr. Grün -- "No!"\n\nIn 1,234 cafés, 雪 fell.  '
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@torch.no_grad()
def test_writes_words(model, tokenizer):
    ids = tokenizer("The old man looked at the sea and", return_tensors="pt")
    logits = model(**ids).logits
    assert torch.isfinite(logits).all()
    written = model.generate(**ids, do_sample=False, max_new_tokens=48)[0, ids.input_ids.shape[1] :].tolist()
    assert len(set(written)) >= 10, tokenizer.decode(written)
    words = tokenizer.decode(written).split()
    # About half of the words of English prose are among these; a broken model writes almost none.
    assert sum(word.strip("\"'.,;!?-").lower() in COMMON for word in words) >= len(words) / 4, words


@torch.no_grad()
def test_sixteen_bit_arithmetic_keeps_the_model(folder, tokenizer, model):
    """Attention scores in the thousands, as a too fast training leaves them, would not survive bfloat16."""
    text = "The captain went down to the harbour in the morning, and the wind was from the west. " * 4
    ids = tokenizer(text, return_tensors="pt").input_ids
    exact = model(ids, labels=ids).loss
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids, labels=ids).loss
    assert abs(rounded - exact) < 0.05


@torch.no_grad()
def test_held_out_figure(name, model, tokenizer, report, data_root):
    """Re-measures the first windows of the held-out books, by the recorded protocol."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import reference_data
        import reference_models
    finally:
        sys.path.pop(0)
    ids, length = reference_data.encode_held_out(data_root, tokenizer, "books")
    recorded = report["held_out"]["books"]
    assert len(ids) // 512 == recorded["windows"]
    share = len(ids) / length  # bits per byte follow from nats per token over the whole text
    assert recorded["bits_per_byte"] == pytest.approx(recorded["nats_per_token"] / 0.693147 * share, rel=1e-4)
    # Every 25th window, so that all four books have their part.
    measured = reference_models.held_out(lambda x: model(x).logits, ids, length, "cpu", 4, every=25)
    part = report["held_out"]["books_every_25th_window"]
    assert measured["nats_per_token"] == pytest.approx(part["nats_per_token"], abs=2e-4)
    assert part["nats_per_token"] == pytest.approx(recorded["nats_per_token"], abs=0.08)  # a fair sample
    assert recorded["perplexity"] == pytest.approx(2.718281828 ** recorded["nats_per_token"], rel=1e-3)


def test_resolve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = str(pretrained.path("llama"))
    assert pretrained.resolve("llama") == pretrained.resolve("pretrained:llama") == here
    assert pretrained.resolve("opt") == str(pretrained.path("opt"))
    assert pretrained.resolve("facebook/opt-125m") == "facebook/opt-125m"
    assert pretrained.resolve("gpt2") == "gpt2"  # OpenAI's, on the Hub
    assert pretrained.resolve("bert") == "bert"
    for model in pretrained.STATE_SPACE:  # no other model is called so; named where it is absent, it is an error
        if model in pretrained.names():
            assert pretrained.resolve(model) == str(pretrained.path(model))
        else:
            with pytest.raises(ValueError, match=f"'{model}' is not part of this installation"):
                pretrained.resolve(model)
    assert pretrained.resolve("pretrained:gpt2") == str(pretrained.path("gpt2"))
    (tmp_path / "llama").mkdir()
    assert pretrained.resolve("llama") == "llama"  # a folder of that name comes first
    assert pretrained.resolve("pretrained:llama") == here


def test_unknown_and_absent_models(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'mamba'.*llama, gpt2, opt"):
        pretrained.path("mamba")
    with pytest.raises(ValueError, match="'mamba'"):
        pretrained.resolve("pretrained:mamba")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    monkeypatch.setattr(pretrained, "_HERE", tmp_path)  # as in a wheel that ships the default alone
    assert pretrained.names() == ["llama"]
    with pytest.raises(ValueError, match=r"'opt' is not part.*embedded here: llama.*repository"):
        pretrained.path("opt")


def test_import_is_light():
    code = "import sys, importlib.util as u; s = u.spec_from_file_location('p', sys.argv[1]); "
    code += "m = u.module_from_spec(s); s.loader.exec_module(m); m.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, pretrained.__file__], check=True)


# ---- outlier twins ----

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = SIZES | {"intermediate_size": 128}
GROUPED = PLAIN | {"num_key_value_heads": 2, "head_dim": 16}
OPT = SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 64}
BY_HAND = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
BY_HAND |= {"bos_token_id": 1, "eos_token_id": 2}
ALL_KINDS = {"norm", "value", "feed_forward"}
FAMILIES = {
    "llama": (lambda: hf.LlamaConfig(**GROUPED), ALL_KINDS, 2 * 4 + 1),
    "llama-tied": (lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True), ALL_KINDS, 2 * 4),
    "llama-biased": (
        lambda: hf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
        ALL_KINDS,
        2 * 4 + 1,
    ),
    "mistral": (lambda: hf.MistralConfig(**GROUPED), ALL_KINDS, 2 * 4 + 1),
    "qwen2": (lambda: hf.Qwen2Config(**PLAIN, num_key_value_heads=2), ALL_KINDS, 2 * 4 + 1),
    "qwen3": (lambda: hf.Qwen3Config(**GROUPED), ALL_KINDS, 2 * 4 + 1),
    "gemma": (lambda: hf.GemmaConfig(**GROUPED), ALL_KINDS, 2 * 4),
    "gemma2": (lambda: hf.Gemma2Config(**GROUPED), ALL_KINDS, 2 * 4),
    "gemma3": (lambda: hf.Gemma3TextConfig(**GROUPED), ALL_KINDS, 2 * 4),
    "gpt2": (lambda: hf.GPT2Config(**BY_HAND), {"norm", "value"}, 2 * 3),
    "gpt2-relu": (lambda: hf.GPT2Config(**BY_HAND, activation_function="relu"), ALL_KINDS, 2 * 4),
    "opt": (lambda: hf.OPTConfig(**OPT), ALL_KINDS, 2 * 4),
    "opt-350m": (
        lambda: hf.OPTConfig(**OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
        {"value", "feed_forward"},
        2 * 2,
    ),
    "gpt_neox": (lambda: hf.GPTNeoXConfig(**PLAIN), {"norm", "value"}, 2 * 3 + 1),
    "gpt_neox-serial": (
        lambda: hf.GPTNeoXConfig(**PLAIN, use_parallel_residual=False),
        {"norm", "value"},
        2 * 3 + 1,
    ),
    "phi": (lambda: hf.PhiConfig(**PLAIN), {"norm", "value"}, 2 * 2 + 1),
    "bert": (lambda: hf.BertConfig(**PLAIN), {"value"}, 2),
}


def random_model(family):
    """A small model whose gains and biases have left their initial ones and zeros, which hide errors."""
    config = FAMILIES[family][0]()
    kind = hf.AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def run(model, ids):
    """Returns the logits, and for each linear layer the size of each of its input channels."""
    sizes = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: sizes.__setitem__(name, args[0].flatten(0, -2).abs().amax(0))
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | hf.pytorch_utils.Conv1D)
    ]
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits, sizes


def check_twin(model, ids, **options):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    twin = outlier_twin(model, **options)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"the input model changed: {key}"
    logits, dense_sizes = run(model, ids)
    twin_logits, sizes = run(twin, ids)
    assert (twin_logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    for pair in twin.outlier_pairs:
        for consumer in pair.consumers:
            for channel, factor in pair.factors.items():
                grown, was = sizes[consumer][channel], dense_sizes[consumer][channel]
                assert grown == pytest.approx((factor * was).item(), rel=1e-4), (consumer, channel)
            if pair.kind == "norm":  # a ReLU's channel may be silent on so short a text
                assert sizes[consumer].max() >= 10 * sizes[consumer].median()
    return twin


@pytest.mark.parametrize("family", FAMILIES)
def test_twin_computes_the_same(family):
    _, kinds, pairs = FAMILIES[family]
    model = random_model(family)
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    twin = check_twin(model, ids)
    assert {pair.kind for pair in twin.outlier_pairs} == kinds
    assert len(twin.outlier_pairs) == pairs
    assert all(min(pair.factors.values()) >= 10 for pair in twin.outlier_pairs)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, twin.state_dict()[k])}
    assert not any("q_norm" in key or "k_norm" in key for key in changed)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "phi", "bert"])
def test_powers_of_two_keep_every_bit(family):
    model = random_model(family)
    ids = torch.arange(3, 27)[None]
    assert torch.equal(run(model, ids)[0], run(outlier_twin(model), ids)[0])
    decimal = outlier_twin(model, scales=(10.0, 100.0, 1000.0))
    assert not torch.equal(run(model, ids)[0], run(decimal, ids)[0])  # the test above can tell
    check_twin(model, ids, scales=(10.0, 100.0, 1000.0))


def test_twin_of_the_trained_llama():
    model = AutoModelForCausalLM.from_pretrained(pretrained.path("llama")).eval()
    tokenizer = AutoTokenizer.from_pretrained(pretrained.path("llama"))
    ids = tokenizer("It was a bright cold day, and nobody in the village had slept.", return_tensors="pt").input_ids
    twin = check_twin(model, ids, channels=6)
    assert all(len(pair.factors) in (6, 12) for pair in twin.outlier_pairs)  # a value channel feeds two heads
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight


def test_twin_options():
    model = random_model("llama")
    one, same = outlier_twin(model, seed=1), outlier_twin(model, seed=1)
    assert one.outlier_pairs == same.outlier_pairs != outlier_twin(model, seed=2).outlier_pairs
    norms = [tuple(pair.factors) for pair in one.outlier_pairs if pair.kind == "norm"]
    assert len(set(norms)) == 1  # the same channels in all layers
    only = outlier_twin(model, kinds=("value",), scales=(4.0,), channels=1)
    assert {pair.kind for pair in only.outlier_pairs} == {"value"}
    assert {factor for pair in only.outlier_pairs for factor in pair.factors.values()} == {4.0}


def test_twin_refuses():
    with pytest.raises(ValueError, match=r"no outlier twin for 'mamba'.*llama"):
        outlier_twin(AutoModelForCausalLM.from_config(hf.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)))
    with pytest.raises(ValueError, match="no outlier twin for 'Linear'"):
        outlier_twin(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no pair of the kinds feed_forward"):
        outlier_twin(random_model("gpt2"), kinds=("feed_forward",))
    with pytest.raises(ValueError, match="scales"):
        outlier_twin(random_model("gpt2"), scales=(0.0,))
    with pytest.raises(ValueError, match="unknown kinds"):
        outlier_twin(random_model("gpt2"), kinds=("query",))
    with pytest.raises(ValueError, match="float32"):
        outlier_twin(random_model("gemma").to(torch.bfloat16))
