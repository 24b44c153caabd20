"""Every family has a recipe for training, and its options are valid."""

from pathlib import Path

import pytest

from spikeform.cli.recipe import read_config, read_section
from spikeform.conversion.kinds import ATTENTION
from spikeform.errors import ConfigError
from spikeform.training import TrainOptions

RECIPES = Path(__file__).parents[2] / "recipes"


def test_every_family_has_one():
    families = {name.split(".")[2] for name in ATTENTION}  # transformers.models.<family>.…
    assert {path.parent.name for path in RECIPES.glob("*/fas.yaml")} == families


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/fas.yaml")), ids=lambda path: path.parent.name)
def test_recipe(path):
    assert read_config(recipe=path).quant_method == "spikeform_fas"
    assert TrainOptions.from_dict(read_section("train", path)).learning_rate == 9e-5


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/spiking_mamba.yaml")), ids=lambda path: path.parent.name)
def test_distillation(path):
    assert read_config(recipe=path).quant_method == "spikeform_spiking_mamba"
    options = TrainOptions.from_dict(read_section("train", path))
    assert (options.ce, options.distil, options.hidden, options.freeze) == (0, 1, 1, ("*embed*",))


def test_sections(tmp_path):
    recipe = tmp_path / "fas.yaml"
    recipe.write_text("method: fas\ntrain: 3\n")
    assert read_config(recipe=recipe).levels == 8  # sections of other verbs are not the method's options
    assert read_section("calibrate", recipe) == {}
    with pytest.raises(ConfigError, match="train must be a mapping"):
        read_section("train", recipe)
