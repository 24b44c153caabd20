"""What the commands show of a streaming model: both accountings, labelled, and the verdict by what runs."""

import pytest

import spikeform


@pytest.fixture(scope="module")
def streaming(tiny_llama, tokenizer, tmp_path_factory):
    """Folder of a tiny streaming model with a record of one stage."""
    folder = tmp_path_factory.mktemp("streaming") / "fas"
    model = spikeform.convert(tiny_llama(context=512), spikeform.FAS(steps=4, threshold=1.0, gated="product"))
    record = {"stage": "train", "steps": 7, "seconds": 1.5, "metrics": {"loss": 2.5}}
    model.spikeform_report.history.append(record)
    spikeform.save(model, folder, tokenizer)
    return folder


def test_energy_shows_both_accountings_and_judges_by_what_runs(run, streaming, dense):
    args = ("energy", streaming, "--reference", dense, "--tokens", "32", "--window", "16")
    document = run(*args, "--json").json
    papers = document["accountings"]["papers' convention"]["estimates"]
    ratios = [estimate["ratio_vs_dense"] for estimate in document["estimates"].values()]
    assert max(part["ratio_vs_dense"] for part in papers.values()) < 1 < min(ratios)
    assert document["streaming"]["steps"] == 4
    assert document["protocol"]["dense_checked"]
    plain = run(*args).out
    assert "papers' convention (not what runs)" in plain
    assert "The spiking network loses to the dense one" in plain
    assert "the one quantised to as many levels as its steps" in plain
    assert "4 steps beside one dense pass" in plain
    assert "bytes of the cache of keys and values" in plain
    assert "of the linear layers' multiplications" in plain
    share = document["streaming"]["operations"]["spiking_share"]
    assert f"{share:.1%}" in plain


def test_inspect_shows_ranges_and_history(run, streaming):
    document = run("inspect", streaming, "--json").json
    assert [row["levels"] for row in document["neurons"]] == [8, 8]
    assert document["neurons"][0]["initial"] == [0.5, 0.5]
    assert document["history"][0]["metrics"] == {"loss": 2.5}
    plain = run("inspect", streaming).out
    assert "2 streaming neuron populations" in plain
    assert "scale" in plain
    assert "loss=2.5" in plain
