"""The JSON schema that editors check a study's YAML file against."""

import jsonschema
import pytest
import yaml
from test_params import STUDIES

from dense_rlhf.config.params import GROUPS
from dense_rlhf.config.study import schema

VALIDATOR = jsonschema.Draft202012Validator(schema())


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_fit_and_say_their_name(path):
    VALIDATOR.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "wrong",
    [
        "lerning_rate: 0.1",
        "ppo: {lrr: 0.1}",
        "ppo: {lr: 1e-4}",
        "ppo: {lr: -0.1}",
        "ppo: {updates: 2.5}",
        "ppo: {sampler: vllm}",
        "ppo: null",
        "shape: {temperature: 1.0}",
        "arms: {a: {source: [shap]}}",
        "arms: {a: {weights: even}}",
        "settings: {a: {data: {name: reviews}}}",
        "sizes: {smoke: {ppo: {lrr: 0.1}}}",
        "notebooks: [07_downstream]",
        "seeds: [-1]",
    ],
)
def test_what_the_study_would_refuse_is_marked(wrong):
    assert not VALIDATOR.is_valid(yaml.safe_load(wrong))


def test_comments_are_the_descriptions():
    types = schema()["$defs"]
    assert types["PPOParams"]["properties"]["lr"]["description"] == "falls linearly to a tenth"
    described = [one for cls in GROUPS.values() for one in types[cls.__name__]["properties"].values()]
    assert sum("description" in one for one in described) > 0.6 * len(described)
