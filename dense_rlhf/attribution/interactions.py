"""What two players add together beyond what each adds alone: "not" with "good".

    interactions(Game.of(model, tokenizer, "prompt", "response"), players="words")

From the scores that a game has, where they tell, or from coalitions of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from dense_rlhf.attribution import coalitions
from dense_rlhf.attribution.game import Game
from dense_rlhf.types import InputError
from dense_rlhf.view.display import heat, table
from dense_rlhf.view.html import part

if TYPE_CHECKING:
    import pandas as pd

INDICES = ("fsii", "sii", "stii")
MOST = 12  # players of which all coalitions are scored for sii and stii
UNKNOWNS = 4096  # main effects and pairs that are fitted together, in some gigabyte


@dataclass(frozen=True, repr=False)
class Interactions:
    """What players and pairs of players add: `score = baseline + sum of main + sum of pairs i < j + gap`.

    A notebook shows it as a heat-map and a table, a terminal as text.
    """

    parts: tuple[str, ...]  # the text of each of the k players
    main: np.ndarray  # (k,) what each adds apart from its pairs; of `sii` the Shapley values
    pairs: np.ndarray  # (k, k) symmetric, above zero where two add more together than each without the other
    baseline: float
    score: float
    index: str
    evaluations: int
    model: str
    within: int | None = None  # pairs of players further apart were not asked, and are zero

    @property
    def gap(self) -> float:
        """What main effects and pairs leave unexplained of score - baseline; zero for `fsii` and `stii`."""
        return float(self.score - self.baseline - self.main.sum() - np.triu(self.pairs).sum())

    @property
    def shapley(self) -> np.ndarray:
        """(k,) main effects and half of each pair: Shapley values where players act alone and in pairs (`fsii`)."""
        return self.main + self.pairs.sum(1) / 2

    def ranked(self, most: int = 12) -> pd.DataFrame:
        """The `most` pairs asked with the largest interaction either way, and its share of the sum of |interaction|."""
        import pandas as pd

        asked = _pairs(len(self.parts), self.within)
        rows = [(self.parts[i], self.parts[j], self.pairs[i, j]) for i, j in asked]
        frame = pd.DataFrame(rows, columns=["part", "with", "interaction"])
        total = frame["interaction"].abs().sum()
        frame["share"] = frame["interaction"].abs() / total if total else 0.0
        return frame.sort_values("interaction", key=abs, ascending=False, kind="stable").head(most)

    def figure(self, most: int = 16) -> None:
        """Display the heat-map of the pairs of the `most` players in the strongest pairs, with its alt text."""
        import matplotlib.pyplot as plt

        from dense_rlhf.view.figures import listed, show

        own, (i, j) = self._strongest(most), self._largest
        names = [repr(part.strip())[1:-1][:24].replace("$", r"\$") for part in self.parts]
        limit = np.abs(self.pairs).max() or 1.0
        ax = plt.subplots(figsize=(2 + 0.4 * len(own), 1.5 + 0.4 * len(own)), layout="constrained")[1]
        image = ax.imshow(self.pairs[np.ix_(own, own)], cmap="PuOr_r", vmin=-limit, vmax=limit)
        ax.set_xticks(range(len(own)), [names[n] for n in own], rotation=60, ha="right")
        ax.set_yticks(range(len(own)), [names[n] for n in own])
        ax.figure.colorbar(image, label="added by the two together")
        ax.set_title(f"Strongest pair: '{names[i]}' with '{names[j]}', {self.pairs[i, j]:+.2f}")
        strongest = sorted(combinations(own, 2), key=lambda pair: -abs(self.pairs[pair]))[:6]
        rows = {f"{names[a]} with {names[b]}": f"{self.pairs[a, b]:+.2f}" for a, b in strongest}
        show(ax, f"Heat-map of interactions, the strongest: {listed(rows)}")

    @property
    def _largest(self) -> tuple[int, int]:
        i, j = np.unravel_index(np.abs(np.triu(self.pairs, 1)).argmax(), self.pairs.shape)
        return int(i), int(j)

    def _strongest(self, most: int) -> list[int]:
        """The players in the strongest pairs, in reading order."""
        strength = np.abs(self.pairs).max(1)
        return sorted({*self._largest, *np.argsort(-strength, kind="stable")[: max(2, most)].tolist()})

    @property
    def _equation(self) -> str:
        terms = f"main {self.main.sum():.4f} + pairs {np.triu(self.pairs).sum():.4f} + gap {self.gap:.1e}"
        return f"score {self.score:.4f} = baseline {self.baseline:.4f} + {terms}"

    @property
    def _how(self) -> str:
        return f"{self.index} on {self.model}: {self.evaluations} evaluations"

    def __repr__(self) -> str:
        rows = self.ranked().itertuples(index=False)
        lines = [f"  {row.interaction:+9.4f}  {row.part!r} with {row[1]!r}" for row in rows]
        return "\n".join([self._equation, f"({self._how})", *lines])

    def _repr_html_(self) -> str:
        own, limit = self._strongest(16), float(np.abs(self.pairs).max())

        def cell(value: float) -> object:
            return heat([f"{value:+.2f}"], [value], limit)

        rows = [(self.parts[i], *(cell(self.pairs[i, j]) if i != j else "" for j in own)) for i in own]
        grid = part("table", "What two add together", ["", *(self.parts[j] for j in own)], rows, named=True)
        ranked = table(self.ranked(), "The strongest pairs", 4).data
        return str(part("explanation", self._equation, self._how, grid, ranked))


def interactions(
    game: Game,
    players: str | Sequence[tuple[int, int]] = "words",
    index: str = "fsii",
    within: int | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Interactions:
    """Interactions of order two between the k players of a response.

    `fsii` (Faith-Shap; Tsai, Yeh and Ravikumar, JMLR 2023): the main effects and pairs that come closest to the scores
    of all coalitions, by least squares with the weights of KernelSHAP, their total held exactly. They are fitted on
    `samples` coalitions drawn as by `leverage_shap`, by default 4 for each unknown, or on all 2^k if those are fewer.
    With `samples=0` the game's own coalitions are read and the model is not asked; coalitions of each size share the
    weight of that size. `within` fits only pairs of players at most so far apart, which fewer coalitions tell: those of
    `shap` tell neighbours. `sii` (Grabisch and Roubens, 1999) and `stii` (Dhamdhere, Agarwal and Sundararajan, 2020)
    are by definition, from all coalitions of at most 12 players. Raises `InputError` for fewer than two players, more
    than 12 for an index by definition, more than 4096 players and pairs, and coalitions that do not tell them.
    """
    group = game.players(players)
    k = int(group.max()) + 1
    if index not in INDICES:
        raise InputError(f"index is {index!r}, wanted one of {', '.join(INDICES)}")
    if k < 2:
        raise InputError(f"the response is {k} player, and pairs take two; wanted finer players, such as tokens")
    order = _pairs(k, within)
    if index == "fsii":
        masks = game.coalitions(group) if samples == 0 else _drawn(k, len(order), samples, seed)
        main, each = _faithful(game, group, masks, order)
    elif within is not None or samples is not None:
        raise InputError(f"within and samples are options of fsii; {index} reads all coalitions")
    else:
        masks = _all(k, index)
        main, each = _by_definition(game(masks[:, group]), masks, index)
    pairs = np.zeros((k, k))
    for (i, j), value in zip(order, each):
        pairs[i, j] = pairs[j, i] = value
    baseline, score = game.ends()
    spans, response = game.subject.spans, game.subject.response
    ends = [np.flatnonzero(group == player)[[0, -1]] for player in range(k)]
    parts = tuple(response[spans[first][0] : spans[last][1]] for first, last in ends)
    return Interactions(parts, main, pairs, baseline, score, index, len(masks), game.subject.model, within)


def _pairs(k: int, within: int | None) -> list[tuple[int, int]]:
    if within is not None and within < 1:
        raise InputError(f"within is {within}, wanted at least 1, which pairs neighbours")
    order = [(i, j) for i, j in combinations(range(k), 2) if within is None or j - i <= within]
    if k + len(order) > UNKNOWNS:
        advice = "take wider players, or pairs of neighbours only (within=1)"
        raise InputError(f"{k} players have {len(order)} pairs, wanted at most {UNKNOWNS} with the players; {advice}")
    return order


def _drawn(k: int, pairs: int, samples: int | None, seed: int) -> np.ndarray:
    """Coalitions (m, k) as `leverage_shap` draws them; all, where `samples` are enough for that."""
    return coalitions.leverage_shap(k, 4 * (k + pairs) if samples is None else samples, seed).masks.numpy()


def _faithful(game: Game, group: np.ndarray, masks: np.ndarray, order: list[tuple[int, int]]) -> tuple:
    """Main effects (k,) and the interaction of each pair of `order`, fitted on the scores of `masks` (m, k)."""
    k, (i, j) = masks.shape[1], np.array(order).T
    sizes = masks.sum(1)
    inner = (sizes > 0) & (sizes < k)
    masks, sizes = masks[inner], sizes[inner]
    unknowns = np.concatenate([masks, masks[:, i] & masks[:, j]], 1)  # the coefficients that a score is the sum of
    weight = 1 / (sizes * (k - sizes) * np.bincount(sizes)[sizes])
    design = coalitions._least_squares(unknowns, weight)
    seen, operator = design.masks.numpy(), design.operator.numpy()
    lost = ~np.isclose(operator @ seen, np.eye(len(operator)), atol=1e-6).all(1)
    if lost.any():
        lacking = f"{len(seen)} coalitions of {k} players do not tell {lost.sum()} of {len(lost)} effects"
        raise InputError(f"{lacking}; take more (samples), pairs of neighbours only (within=1), or coarser players")
    effects = operator @ game(seen[:, :k][:, group])
    return effects[:k], effects[k:]


def _all(k: int, index: str) -> np.ndarray:
    """All coalitions (2^k, k); bit i of a row's number is player i."""
    if k > MOST:
        raise InputError(
            f"{index} needs all coalitions of {k} players, wanted at most {MOST}; take fsii or coarser players"
        )
    return (np.arange(2**k)[:, None] >> np.arange(k) & 1).astype(bool)


def _by_definition(values: np.ndarray, masks: np.ndarray, index: str) -> tuple:
    """`sii` or `stii` of single players and of pairs, from the values of all coalitions."""
    k, sizes, rows = masks.shape[1], masks.sum(1), np.arange(len(masks))
    binomial = [np.array([comb(n, size) for size in range(k + 1)], float) for n in range(k)]
    main, pairs = np.zeros(k), []
    for i in range(k):
        without = rows[~masks[:, i]]
        added = values[without | 1 << i] - values[without]
        main[i] = added[0] if index == "stii" else (added / binomial[k - 1][sizes[without]]).sum() / k
    for i, j in combinations(range(k), 2):
        without = rows[~masks[:, i] & ~masks[:, j]]
        both, first, second = (values[without | bits] for bits in (1 << i | 1 << j, 1 << i, 1 << j))
        n, scale = (k - 1, 2 / k) if index == "stii" else (k - 2, 1 / (k - 1))
        pairs.append(scale * ((both - first - second + values[without]) / binomial[n][sizes[without]]).sum())
    return main, pairs
