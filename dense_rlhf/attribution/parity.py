"""The `shap` and `lime` libraries on one response: slow, the reference for our batched numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dense_rlhf.config.params import AttributionParams
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.types import Reading, Rollout


def plain_scores(reward_model: RewardModel, reading: Reading) -> Callable[[np.ndarray], np.ndarray]:
    """A function from presence bits (m, k) of the response's tokens to scores (m,), each coalition its own text."""
    whole, start = np.array(reward_model.whole(reading), dtype=int), len(reading.prompt)

    def scores(bits: np.ndarray) -> np.ndarray:
        keep = np.ones((len(bits), len(whole)), bool)
        keep[:, start : start + len(reading.response)] = np.asarray(bits) > 0.5
        segments = reading.segments and [np.array(reading.segments)[kept] for kept in keep]
        outputs = reward_model.read_whole([whole[kept] for kept in keep], segments=segments)
        return reward_model.calibrate(outputs).double().cpu().numpy()

    return scores


def shap_values(scores: Callable, k: int, permutations: int, seed: int) -> np.ndarray:
    """`shap.PermutationExplainer` against all tokens absent, (k,). Restores numpy's global random state."""
    import shap

    state = np.random.get_state()  # the explainer seeds the global generator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = shap.PermutationExplainer(scores, shap.maskers.Independent(np.zeros((1, k))), seed=seed)
        explanation = explainer(np.ones((1, k)), max_evals=permutations * (2 * k + 1), silent=True)
    np.random.set_state(state)
    return explanation.values[0]


def lime_values(scores: Callable, k: int, samples: int, seed: int) -> np.ndarray:
    """`lime`'s text explainer with one feature a token, no feature selection, (k,)."""
    from lime.lime_text import LimeTextExplainer

    words = [f"w{t}" for t in range(k)]  # one word stands for each token

    def predict(texts: list[str]) -> np.ndarray:
        present = [set(text.split()) for text in texts]
        return scores(np.array([[word in kept for word in words] for kept in present]))[:, None]

    explainer = LimeTextExplainer(feature_selection="none", random_state=seed, split_expression=r"\s+")
    explanation = explainer.explain_instance(" ".join(words), predict, (0,), num_features=k, num_samples=samples)
    names = explanation.domain_mapper.indexed_string.inverse_vocab  # lime's features in its own order
    values = np.zeros(k)
    for feature, weight in explanation.local_exp[0]:
        values[int(names[feature][1:])] = weight
    return values


def library_shap(reward_model: RewardModel, rollout: Rollout, row: int, params: AttributionParams) -> Tensor:
    """shap's values of one response's tokens, (T,)."""
    return _of_row(shap_values, reward_model, rollout, row, params.permutations, params.seed)


def library_lime(reward_model: RewardModel, rollout: Rollout, row: int, params: AttributionParams) -> Tensor:
    """lime's values of one response's tokens, (T,)."""
    return _of_row(lime_values, reward_model, rollout, row, params.lime_samples, params.seed)


def _of_row(values: Callable, reward_model: RewardModel, rollout: Rollout, row: int, budget: int, seed: int) -> Tensor:
    reading = reward_model.readings(rollout)[row]
    credit = torch.zeros(rollout.mask.shape[1])
    own = values(plain_scores(reward_model, reading), len(reading.response), budget, seed)
    own = torch.from_numpy(np.asarray(own, float))
    own = own if reading.spread is None else own @ reading.spread.to(own)
    credit[: len(own)] = own.float()
    return credit
