"""Long responses from coarse to fine: sentences first, then halves of what matters, down to words and tokens.

Players join and leave along random orders, as in `coalitions.permutation_shap`. To split a player is to let its parts
join one after the other in its place: their credits sum to its own, and only the coalitions between them are new.
"""

from __future__ import annotations

import time

import numpy as np

from dense_rlhf.attribution.coalitions import Estimate
from dense_rlhf.attribution.explain import Explanation
from dense_rlhf.attribution.game import Game
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.types import InputError

Span = tuple[int, int]  # tokens [start, stop)


def coarse_to_fine(game: Game, evaluations: int | None = None, permutations: int = 1, seed: int = 0) -> Explanation:
    """Shapley values of players as fine as they matter, from at most `evaluations` coalitions.

    The first players are sentences. Then, round by round, half of the evaluations that are left go to the players of
    largest |credit|, which are halved, between words as far as there are several. By default a fifth of the evaluations
    of `explain`. Complete whatever the budget; exact for the final players where tokens interact in pairs only. What
    has little credit as a whole, because its parts cancel, stays whole. Raises `InputError` for a budget below that of
    the sentences.
    """
    started, rng, n = time.perf_counter(), np.random.default_rng(seed), len(game.subject.spans)
    sentences, words = (_runs(game.players(kind)) for kind in ("sentences", "words"))
    budget = AttributionParams().samples_per_token * n // 5 if evaluations is None else evaluations
    least = _evaluations(len(sentences), permutations)
    if budget < least:
        raise InputError(f"evaluations are {budget}, wanted at least {least}, for {len(sentences)} sentences")
    orders = [_shuffled(sentences, rng) for _ in range(permutations)]
    while True:
        credit = _credit(game, orders)
        room = (budget - _evaluations(len(credit), permutations)) // (2 * permutations)  # splits
        splits = _splits(credit, words, room - room // 2)
        if not splits:
            break
        orders = [[part for span in order for part in _shuffled(splits.get(span, [span]), rng)] for order in orders]
    spans = sorted(credit)
    players = np.repeat(np.arange(len(spans)), [stop - start for start, stop in spans])
    phi, seconds = np.array([credit[span] for span in spans]), time.perf_counter() - started
    work = {"evaluations": _evaluations(len(spans), permutations), "seconds": seconds}
    return game.explanation("coarse_to_fine", True, Estimate(phi), players, **work)


def _evaluations(players: int, permutations: int) -> int:
    """Coalitions of antithetic permutations, no more: two for each player but one, and the ends."""
    return 2 * permutations * (players - 1) + 2


def _runs(players: np.ndarray) -> list[Span]:
    """The stretches of tokens of the same player."""
    edges = [0, *(np.flatnonzero(np.diff(players)) + 1).tolist(), len(players)]
    return list(zip(edges, edges[1:]))


def _shuffled(spans: list[Span], rng: np.random.Generator) -> list[Span]:
    return [spans[i] for i in rng.permutation(len(spans))]


def _credit(game: Game, orders: list[list[Span]]) -> dict[Span, float]:
    """What each player adds, the mean over joining and leaving in each order."""
    k, masks = len(orders[0]), np.zeros((len(orders), 2 * len(orders[0]) + 1, len(game.subject.spans)), bool)
    for order, rows in zip(orders, masks):
        for place, (start, stop) in enumerate(order):
            rows[place + 1 : place + 1 + k, start:stop] = True
    values = game(masks.reshape(-1, masks.shape[-1])).reshape(len(orders), -1)
    added = (np.diff(values[:, : k + 1]) - np.diff(values[:, k:])) / 2
    credit: dict[Span, float] = {}
    for order, row in zip(orders, added):
        for span, value in zip(order, row.tolist()):
            credit[span] = credit.get(span, 0.0) + value / len(orders)
    return credit


def _splits(credit: dict[Span, float], words: list[Span], most: int) -> dict[Span, list[Span]]:
    """The halves of the `most` players with the largest |credit|."""
    wide = sorted((span for span in credit if span[1] - span[0] > 1), key=lambda span: -abs(credit[span]))
    return {span: _halves(span, words) for span in wide[:most]}


def _halves(span: Span, words: list[Span]) -> list[Span]:
    """Two parts of a span, cut between words where it has several, as near to its middle as can be."""
    start, stop = span
    between = [a for a, _ in words if start < a < stop] or range(start + 1, stop)
    middle = min(between, key=lambda place: abs(2 * place - start - stop))
    return [(start, middle), (middle, stop)]
