"""Long responses from coarse to fine: how well the top tokens are ranked, by evaluations. One JSON object a line.

    python benchmarks/coarse_to_fine.py [--model reviews|smollm2] [--texts 2] [--tokens 512]

Real reviews, cut into a prompt of 6 tokens and a response. The first two texts chose the defaults; judge on others
(`--skip 2`). Measured: Spearman's rank correlation of the reference's 20 largest tokens, for coarse to fine and for
`shap` with every token a player.

The reference samples small coalitions more often than others, as what a token adds is the larger and the noisier the
fewer tokens are there: contexts below 64 tokens by short chains, the others by antithetic permutations.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial

import numpy as np
from attribution import SEED, cut_reviews, proxy, smollm2
from scipy.stats import spearmanr

from dense_rlhf.attribution.coarse_to_fine import coarse_to_fine
from dense_rlhf.attribution.game import Game, Subject, explain_game
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.text_spans import token_spans
from dense_rlhf.runs import provenance
from dense_rlhf.types import Reading

TOP, SHORT = 20, 64


def game_of(reward_model: RewardModel, reading: Reading) -> Game:
    tokenizer, ids = reward_model.tokenizer, list(reading.response)
    about = Subject("", tokenizer.decode(ids), tuple(token_spans(tokenizer, ids)), reading, "drop", 0, "", "", "", "")
    return Game(about, reward_model)


def added(game: Game, order: np.ndarray, leave: bool = False) -> np.ndarray:
    """What each token of `order` adds, joining an empty response one after another, or leaving the whole."""
    masks = np.zeros((len(order) + 1, len(game.subject.spans)), bool)
    for place, token in enumerate(order):
        masks[place + 1 :, token] = True
    values = game(~masks if leave else masks)
    return values[:-1] - values[1:] if leave else np.diff(values)


def reference(game: Game, permutations: int) -> np.ndarray:
    """Shapley values (n,): the mean over context sizes below SHORT, and over those above, each by its own chains."""
    n, rng = len(game.subject.spans), np.random.default_rng(SEED + 1)
    sums, counts = np.zeros((2, n)), np.zeros((2, n))
    for _ in range(permutations):
        for leave in (False, True):
            order = rng.permutation(n)
            sizes = n - 1 - np.arange(n) if leave else np.arange(n)
            np.add.at(sums, ((sizes >= SHORT).astype(int), order), added(game, order, leave))
            np.add.at(counts, ((sizes >= SHORT).astype(int), order), 1)
        for order in np.split(rng.permutation(n), range(SHORT, n, SHORT)):
            sums[0, order] += added(game, order)
            counts[0, order] += 1
    return (sums / counts * [[SHORT / n], [1 - SHORT / n]]).sum(0)


def rank(values: np.ndarray, wanted: np.ndarray) -> float:
    top = np.argsort(-np.abs(wanted))[:TOP]
    return round(float(spearmanr(np.asarray(values)[top], wanted[top]).statistic), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("reviews", "smollm2"), default="reviews")
    for name, value in {"texts": 2, "skip": 0, "tokens": 512, "permutations": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    reward_model = proxy() if given.model == "reviews" else smollm2()
    readings = cut_reviews(6, given.tokens, given.skip + given.texts, reward_model.tokenizer)[given.skip :]
    print(json.dumps({"benchmark": "attribution/run", **provenance()}), flush=True)
    for number, reading in enumerate(readings, given.skip):
        game = game_of(reward_model, reading)
        wanted = reference(game, given.permutations)
        ways = {f"shap, {p} permutations": partial(explain_game, source="shap", permutations=p) for p in (1, 2)}
        ways |= {f"gaussian, {n} a token": partial(explain_game, samples_per_token=n) for n in (2, 4)}
        for budget in (2 * given.tokens // 5, 4 * given.tokens // 5, 8 * given.tokens // 5):
            ways[f"coarse to fine, {budget}"] = partial(coarse_to_fine, evaluations=budget)
        for way, explain in ways.items():
            fresh, started = Game(game.subject, reward_model), time.process_time()
            explained = explain(fresh, seed=SEED)
            numbers = dict(evaluations=len(fresh.scores), players=len(explained.players), gap=explained.gap)
            case = f"{given.model}, {given.tokens} tokens, text {number}"
            line = dict(benchmark="attribution/coarse", case=case, way=way, rho=rank(explained.credit, wanted))
            print(json.dumps(line | numbers | dict(cpu_s=round(time.process_time() - started, 2))), flush=True)


if __name__ == "__main__":
    main()
