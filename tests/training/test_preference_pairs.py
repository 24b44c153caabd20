"""Making, saving and loading preference pairs."""

import json
import random
from collections import Counter

import pytest
import torch

import preferences
from spikeform.errors import ConfigError, ForeignFolderError
from spikeform.training import TrainingError
from spikeform.training.preference import PairOptions, Pairs, load_pairs, preference_pairs
from spikeform.training.preference.corruption import corrupt, words

QUICK = {"count": 40, "prompt_tokens": 8, "response_tokens": 12}
SAID = "".join(f" {word}" for word in "abcdefghijkl")
OTHERS, UNIGRAMS = [" x y z", " p q r"], [" u", " v"]


@pytest.fixture(scope="module")
def tokenizer():
    return preferences.tokenizer()


@pytest.fixture(scope="module")
def made(tokenizer):
    return preference_pairs(preferences.dense(), tokenizer, preferences.texts(), PairOptions(**QUICK))


def test_the_seed_says_it_all(made, tokenizer):
    again = preference_pairs(preferences.dense(), tokenizer, preferences.texts(), PairOptions(**QUICK))
    assert again == made
    other = preference_pairs(preferences.dense(), tokenizer, preferences.texts(), PairOptions(**QUICK, seed=1))
    assert other.train != made.train


def test_draws_leave_the_global_generator_alone(tokenizer):
    model = preferences.dense()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    preference_pairs(model, tokenizer, preferences.texts(), PairOptions(**QUICK))
    assert torch.equal(torch.get_rng_state(), before)


def test_parts_have_other_prompts_and_rejected_responses_differ(made):
    prompts = [{row["prompt"] for row in part} for part in (made.train, made.held_out)]
    assert not prompts[0] & prompts[1]
    assert len(made.train) + len(made.held_out) + made.card["dropped"] == QUICK["count"]
    assert len(made.held_out) == pytest.approx(8, abs=1)
    assert all(row["chosen"] != row["rejected"] for row in [*made.train, *made.held_out])
    assert set(made.card["corruptions"]["train"]) == {"shuffle", "replace", "repeat", "foreign"}
    chosen = {row["chosen"] for row in made.train}
    assert all(row["rejected"] in chosen for row in made.train if row["corruption"] == "foreign")
    assert not made.end_token


def test_the_texts_own_continuation(tokenizer):
    texts = preferences.texts()
    made = preference_pairs(preferences.dense(), tokenizer, texts, PairOptions(**QUICK, chosen="text", shuffle=0))
    assert made.train
    assert all(any(row["prompt"] + row["chosen"] in text for text in texts) for row in made.train)
    assert "shuffle" not in made.card["corruptions"]["train"]


def test_prompts_of_the_models_own(tokenizer):
    made = preference_pairs(preferences.dense(), tokenizer, None, PairOptions(**QUICK))
    assert made.card["prompts"] == "the model's own samples"
    assert len(made.train) > 5


def test_responses_follow_the_models_distribution(tokenizer):
    """At a low temperature the chosen response is the likeliest one, word by word."""
    model = preferences.dense()
    made = preference_pairs(model, tokenizer, preferences.texts(), PairOptions(**QUICK, temperature=1e-3))
    row = made.train[0]
    ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
    whole = torch.tensor([tokenizer(row["prompt"] + row["chosen"])["input_ids"]])
    with torch.no_grad():
        best = model(whole).logits[0].argmax(-1)
    start = ids.shape[1] + 1  # its first word still belongs to the text
    assert whole[0, start:].tolist() == best[start - 1 : -1].tolist()


def only(kind, **strength):
    return PairOptions(
        **{name: float(name == kind) for name in ("shuffle", "replace", "repeat", "foreign")}, **strength
    )


def test_shuffle_stays_in_its_window():
    parts = [words(SAID)[i : i + 3] for i in range(0, 12, 3)]
    for share, least, most in ((0.0, 1, 1), (1.0, 2, 4)):
        options = only("shuffle", shuffle_words=3, shuffle_share=share)
        worse, kind = corrupt(SAID, OTHERS, UNIGRAMS, options, random.Random(0))
        found = [words(worse)[i : i + 3] for i in range(0, 12, 3)]
        assert kind == "shuffle"
        assert [Counter(part) for part in found] == [Counter(part) for part in parts]
        assert least <= sum(a != b for a, b in zip(found, parts, strict=True)) <= most


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 1, 1), (0.5, 4.5, 8), (1.0, 12, 12)])
def test_replace_by_its_share(share, low, high):
    rng, options = random.Random(0), only("replace", replace_share=share)
    drawn = [corrupt(SAID, OTHERS, UNIGRAMS, options, rng)[0] for _ in range(50)]
    changed = [sum(a != b for a, b in zip(words(SAID), words(worse), strict=True)) for worse in drawn]
    assert low <= sum(changed) / 50 <= high
    assert {word for worse in drawn for word in words(worse)} <= {*words(SAID), *UNIGRAMS}


def test_repeat_says_a_span_twice():
    said = words(corrupt(SAID, OTHERS, UNIGRAMS, only("repeat", repeat_share=0.25), random.Random(0))[0])
    assert len(said) == 12
    (start,) = [i for i in range(7) if said[i : i + 3] == said[i + 3 : i + 6]]
    assert said[: start + 3] == words(SAID)[: start + 3]
    assert said[start + 6 :] == words(SAID)[start + 6 :]


def test_foreign_and_hopeless():
    assert corrupt(SAID, OTHERS, UNIGRAMS, only("foreign"), random.Random(0))[0] in OTHERS
    assert corrupt(" a a a a", OTHERS, UNIGRAMS, only("shuffle"), random.Random(0)) is None


def test_saved_and_loaded(made, tmp_path):
    made.save(tmp_path / "pairs")
    assert load_pairs(tmp_path / "pairs") == made
    assert json.loads((tmp_path / "pairs" / "train.jsonl").read_text().split("\n")[0]) == made.train[0]
    with pytest.raises(ForeignFolderError, match="not an empty folder"):
        made.save(tmp_path / "pairs")


def test_a_file_of_pairs_is_split_by_prompt(tmp_path):
    rows = [{"prompt": f"p{i % 10}", "chosen": "good", "rejected": f"bad {i}"} for i in range(40)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_pairs(file, held_out=0.2)
    assert (len(found.train), len(found.held_out), found.end_token) == (32, 8, True)
    assert not {row["prompt"] for row in found.train} & {row["prompt"] for row in found.held_out}


def test_chats_are_written_by_the_template(tmp_path):
    tokenizer = preferences.tokenizer()
    asked = [{"role": "user", "content": "w1"}]
    answers = [[{"role": "assistant", "content": word}] for word in ("w2", "w3")]
    rows = [{"prompt": asked, "chosen": answers[0], "rejected": answers[1]}]
    rows += [{"chosen": asked + answers[0], "rejected": asked + answers[1]}]  # the prompt is what they share
    rows += [{"prompt": "w1", "chosen": asked + answers[0], "rejected": asked + answers[1]}]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TrainingError, match="no chat template"):
        load_pairs(file, tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} <end>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = load_pairs(file, tokenizer, held_out=0)
    assert found.train == [{"prompt": "user: w1 <end>assistant: ", "chosen": "w2 <end>", "rejected": "w3 <end>"}] * 3
    assert not found.end_token


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "row 1: a pair has a prompt, a chosen and a rejected response"),
        ('{"prompt": "a", "chosen": "b"}', "row 1: a pair"),
        ('{"prompt": "a", "chosen": "", "rejected": "c"}', "row 1: a pair"),
        ("not json", "no file of preference pairs"),
    ],
)
def test_files_that_are_no_pairs(tmp_path, content, message):
    file = tmp_path / "pairs.jsonl"
    file.write_text(content)
    with pytest.raises(TrainingError, match=message):
        load_pairs(file)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(TrainingError, match="there are no preference pairs at"):
        load_pairs(tmp_path / "none.jsonl")
    with pytest.raises(TrainingError, match=r"no folder of preference pairs: its card\.json"):
        load_pairs(tmp_path)
    with pytest.raises(TrainingError, match=r"no preference pairs 'someone/pairs'.*the Hugging Face Hub gave none"):
        load_pairs("someone/pairs")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["w1 w2"], {}, "the texts hold 0 windows of 8 tokens, and 40 pairs are wanted"),
        (None, {"chosen": "text"}, "need texts"),
        (["w1 " * 900], {"chosen": "text"}, "only 1 of 40 continuations"),
    ],
)
def test_refused_texts(tokenizer, texts, options, message):
    with pytest.raises(TrainingError, match=message):
        preference_pairs(preferences.dense(), tokenizer, texts, PairOptions(**(QUICK | options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chosen": "best"}, "chosen must be one of sampled, text"),
        ({"shuffle": 0, "replace": 0, "repeat": 0, "foreign": 0}, "must be above 0"),
        ({"repeat_share": 0.6}, "repeat_share must be at most 0.5"),
        ({"held_out": 1.0}, "held_out is a share"),
        ({"shuffle_words": 1}, "shuffle_words must be a whole number of at least 2"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ConfigError, match=message):
        PairOptions(**options)
    assert PairOptions.from_dict(PairOptions(count=7).to_dict()) == PairOptions(count=7)


def test_pairs_need_a_tokenizers_words():
    assert words("a  b\n c ") == ["a", "  b", "\n c"]
    assert Pairs([{"prompt": "a", "chosen": "b", "rejected": "c"}]).source([])["pairs"] == 0
