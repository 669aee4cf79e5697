"""The installed `shap` and `lime` on one response: slow, and the yardstick for our batched numbers."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from dense_rlhf.params import AttributionParams
from dense_rlhf.rewards import RewardModel
from dense_rlhf.types import Rollout


def _scorer(reward_model: RewardModel, rollout: Rollout, row: int):
    """A function from presence bits (m, k) of the response tokens to scores (m,), and k."""
    ids = torch.cat([rollout.queries[row], rollout.responses[row]])
    k, P = int(rollout.players[row].sum()), rollout.queries.shape[1]

    def scores(bits: np.ndarray) -> np.ndarray:
        keep = torch.zeros(len(bits), len(ids), dtype=torch.bool)
        keep[:, :P] = rollout.query_mask[row].cpu()
        keep[:, P : P + k] = torch.from_numpy(np.asarray(bits) > 0.5)
        return reward_model.score(ids.expand(len(bits), -1), keep.to(ids.device)).double().cpu().numpy()

    return scores, k


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
