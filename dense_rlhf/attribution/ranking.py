"""As many evaluations as it takes to rank the tokens that matter most."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dense_rlhf.attribution.explain import Explanation
from dense_rlhf.attribution.game import Game
from dense_rlhf.attribution.gaussian import posterior
from dense_rlhf.attribution.shells import shells
from dense_rlhf.types import InputError


def explain_until_ranked(
    game: Game, top: int = 3, players: str | Sequence[tuple[int, int]] = "tokens", most: int = 32, seed: int = 0
) -> Explanation:
    """Shapley values from as many coalitions as settle which `top` players have the largest |credit|, and their order.

    Four evaluations a player, then half as many again in each round, until `settled`, at 95 %, is at least `top`, or
    the next round would exceed `most` a player: then `settled` is below `top`. Equal credits are never settled, and
    each round is a new chance to settle wrongly. Raises `InputError` for a `top` or a `most` that cannot be.
    """
    started, group = time.perf_counter(), game.players(players)
    k = int(group.max()) + 1
    if not 1 <= top <= k or most < 4:
        raise InputError(f"top is {top} of {k} players and most {most}, wanted 1 to {k}, and at least 4 a player")
    wanted = 4 * k
    while True:
        masks = shells(k, wanted, seed)
        result = posterior(masks)(game(masks[:, group]))
        wanted += max(wanted // 2, 2 * k)
        if result.settled >= top or wanted > most * k or len(masks) == 2**k:
            break
    work = {"evaluations": len(masks), "seconds": time.perf_counter() - started}
    return game.explanation("gaussian", True, result, group, **work)
