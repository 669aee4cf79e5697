"""The model that ships with the package is the one that its recipe describes."""

import json

import pytest

from dense_rlhf.config.params import PolicyParams
from dense_rlhf.data import DataParams, load_data
from dense_rlhf.files import damaged
from dense_rlhf.fingerprint import PACKAGE
from dense_rlhf.models import tiny_recipe as lm
from dense_rlhf.models.language_models import load_policy

FOLDER = PACKAGE / "models" / "tiny_policy"


@pytest.fixture(scope="module")
def recipe():
    recipe = json.loads((FOLDER / "recipe.json").read_text())
    if "held_out_loss" not in recipe:
        pytest.skip("dense_rlhf/tiny_policy is provisional: its recipe.json has no held_out_loss")
    return recipe


def test_it_is_small():
    assert (FOLDER / "model.safetensors").stat().st_size <= 12e6


def test_it_is_as_it_was_written():
    assert damaged(FOLDER) is None


def test_it_has_the_size_of_its_recipe(recipe):
    policy = load_policy(PolicyParams())
    assert sum(p.numel() for p in policy.model.parameters()) == recipe["parameters"]
    assert len(policy.tokenizer) == recipe["params"]["vocabulary"] == policy.model.config.vocab_size
    assert len({policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id}) == 2


def test_its_held_out_loss_is_that_of_its_recipe(recipe):
    data, policy = load_data(DataParams()), load_policy(PolicyParams())
    assert data.revision == recipe["data"]["sha256"]
    params = recipe["params"]
    held_out = lm.token_stream([r.text for r in data.test], policy.tokenizer)[: params["held_out_tokens"]]
    loss = lm.held_out_loss(policy.model, held_out, params["context"])
    assert loss == pytest.approx(recipe["held_out_loss"], abs=0.01)
