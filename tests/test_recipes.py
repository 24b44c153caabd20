"""Every family has a recipe, and every recipe is a valid config of its method."""

from pathlib import Path

import pytest

from spikeform.cli.recipe import read_config
from spikeform.conversion.kinds import ATTENTION, MIXERS

RECIPES = Path(__file__).parents[1] / "recipes"


def test_every_family_has_one():
    families = {name.split(".")[2] for name in ATTENTION}  # transformers.models.<family>.…
    assert {path.parent.name for path in RECIPES.glob("*/las.yaml")} == families


def test_spikellm_has_one_for_every_pre_norm_family():
    # BERT's norms stand in the residual stream itself.
    families = {path.parent.name for path in RECIPES.glob("*/las.yaml")} - {"bert"}
    assert {path.parent.name for path in RECIPES.glob("*/spikellm.yaml")} == families


def test_spiking_mamba_has_one_for_every_state_space_family():
    families = {name.split(".")[2] for name in MIXERS}
    assert {path.parent.name for path in RECIPES.glob("*/spiking_mamba.yaml")} == families


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe(path):
    config = read_config(recipe=path)
    assert config.quant_method == f"spikeform_{path.stem}"
    assert path.read_text().splitlines()[1].endswith(f"--config recipes/{path.parent.name}/{path.name}")
