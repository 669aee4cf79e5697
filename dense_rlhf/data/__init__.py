"""Datasets: human judgements and prompts, split so that no text serves two purposes.

`load_data` reads one; every loader returns a `Dataset` with a count of the rows that it left out, by reason.
"""

from __future__ import annotations

from collections.abc import Callable

from dense_rlhf.config.params import DataParams
from dense_rlhf.config.parse import named
from dense_rlhf.data.dataset import Dataset
from dense_rlhf.data.pairs import collect_pairs, preference_pair, preferences, prompt_text
from dense_rlhf.data.reviews import (
    REVIEW_SHARES,
    REVIEWS_MEMBER,
    REVIEWS_WHEEL,
    load_reviews,
    review_prompts,
    split_reviews,
)
from dense_rlhf.data.rows import hub_rows, read_rows
from dense_rlhf.types import InputError

__all__ = ["DATASETS", "REVIEWS_MEMBER", "REVIEWS_WHEEL", "REVIEW_SHARES", "Dataset", "collect_pairs", "hub_rows"]
__all__ += ["load_data", "preference_pair", "prompt_text", "read_rows", "review_prompts", "split_reviews"]

DATASETS: dict[str, Callable[[DataParams, int | None], Dataset]] = {
    "reviews": load_reviews,
    "hh_rlhf": preferences("hh_rlhf", "Anthropic/hh-rlhf", "train"),
    "ultrafeedback": preferences("ultrafeedback", "HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
}


def load_data(params: DataParams, rows: int | None = None) -> Dataset:
    """The dataset that `params.name` names; from the hub only its first `rows`, if given.

    Raises `InputError` for one that nothing could be learned from: a split without rows, labels that are all alike.
    """
    load = named(DATASETS, params.name, "data.name")
    try:
        data = load(params, rows)
    except InputError:
        raise
    except Exception as error:  # of a loader of the user's
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"data.name: {params.name} raised {problem}; wanted a function of (params, rows)") from error
    if not isinstance(data, Dataset):
        raise InputError(f"data.name: {params.name} returns {type(data).__name__}, wanted a Dataset")
    data.check(params.path or params.name)
    return data
