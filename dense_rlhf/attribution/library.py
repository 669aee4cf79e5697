"""The installed `shap` and `lime` on one response: slow, and the yardstick for our batched numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dense_rlhf.params import AttributionParams
from dense_rlhf.reward_model import RewardModel
from dense_rlhf.types import Reading, Rollout


def plain_scores(reward_model: RewardModel, reading: Reading) -> Callable[[np.ndarray], np.ndarray]:
    """A function from presence bits (m, k) of the response's tokens to scores (m,), each coalition its own text."""
    tokens = np.array(reading.response, dtype=int)

    def scores(bits: np.ndarray) -> np.ndarray:
        rows = [[*reading.prompt, *tokens[keep].tolist()] for keep in np.asarray(bits) > 0.5]
        return reward_model.calibrate(reward_model.outputs(rows)).double().cpu().numpy()

    return scores


def _scorer(reward_model: RewardModel, rollout: Rollout, row: int):
    reading = reward_model.readings(rollout)[row]
    return plain_scores(reward_model, reading), len(reading.response)


def _padded(values: np.ndarray, rollout: Rollout) -> Tensor:
    credit = torch.zeros(rollout.mask.shape[1])
    credit[: len(values)] = torch.from_numpy(np.asarray(values, np.float32))
    return credit


def library_shap(reward_model: RewardModel, rollout: Rollout, row: int, params: AttributionParams) -> Tensor:
    """`shap.PermutationExplainer` with every token absent as background, (T,). Restores numpy's global state."""
    import shap

    scores, k = _scorer(reward_model, rollout, row)
    state = np.random.get_state()  # the explainer seeds the global generator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masker = shap.maskers.Independent(np.zeros((1, k)))
        explainer = shap.PermutationExplainer(scores, masker, seed=params.seed)
        found = explainer(np.ones((1, k)), max_evals=params.permutations * (2 * k + 1), silent=True)
    np.random.set_state(state)
    return _padded(found.values[0], rollout)


def library_lime(reward_model: RewardModel, rollout: Rollout, row: int, params: AttributionParams) -> Tensor:
    """`lime`'s text explainer with one feature a token, no feature selection, (T,)."""
    from lime.lime_text import LimeTextExplainer

    scores, k = _scorer(reward_model, rollout, row)
    words = [f"w{t}" for t in range(k)]  # one word stands for each token

    def predict(texts: list[str]) -> np.ndarray:
        present = [set(text.split()) for text in texts]
        return scores(np.array([[word in kept for word in words] for kept in present]))[:, None]

    explainer = LimeTextExplainer(feature_selection="none", random_state=params.seed, split_expression=r"\s+")
    found = explainer.explain_instance(" ".join(words), predict, (0,), num_features=k, num_samples=params.lime_samples)
    order = [int(name[1:]) for name in explainer_words(found)]
    values = np.zeros(k)
    for feature, weight in found.local_exp[0]:
        values[order[feature]] = weight
    return _padded(values, rollout)


def explainer_words(explanation) -> list[str]:
    """lime's features in its own order."""
    return list(explanation.domain_mapper.indexed_string.inverse_vocab)
