"""One response as a cooperative game of its tokens: the reward model is asked for each coalition's score once.

    game = Game.of(model, tokenizer, "prompt", "response")
    explain_game(game, "shap")         # as `explain`
    explain_game(game, "shared_lime")  # from the same scores

`archive` keeps a game on disk, `black_box` makes one of any function that scores texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.attribution.coalitions import Estimate
from dense_rlhf.attribution.engine import coalition_scores, is_packed
from dense_rlhf.attribution.explain import Explanation, designed, of_tokens, removal_params
from dense_rlhf.attribution.gaussian import posterior
from dense_rlhf.attribution.reading import players_of, read, text_of, where_read, wrap
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.models.dialogue import messages_of
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.types import InputError, Message, Prompt, Reading


@dataclass(frozen=True)
class Subject:
    """What is explained: a model, a text, and what the one reads of the other."""

    prompt: Prompt
    response: str
    spans: tuple[tuple[int, int], ...]  # characters of the response that each of its n tokens covers
    reading: Reading
    removal: str  # what happens to a token outside of a coalition
    output: int  # which of the model's outputs is the score
    model: str  # where its weights came from, or its class
    engine: str  # packed or plain
    text: str  # all that the model reads, with its special tokens
    read_at: str  # the token at which the score is read
    weights: str = ""  # their hash, where the game was read from an archive


@dataclass(frozen=True, repr=False)
class Game:
    """v(S), the score of the response of which only the tokens S are kept, and every v(S) asked so far."""

    subject: Subject
    reward_model: RewardModel | None = None  # None: only coalitions that were scored before have a value
    scores: dict[bytes, float] = field(default_factory=dict)  # by the packed bits of the n tokens
    progress: Callable = iter
    ask: Callable[[np.ndarray], np.ndarray] | None = None  # in place of the model: scores (m,) of coalitions (m, n)

    @classmethod
    def of(
        cls,
        reward_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | Sequence[Message | Mapping[str, str]],
        response: str,
        **options,
    ) -> Game:
        """The game of `response` to `prompt`; nothing is scored yet.

        `options` are `removal`, `output`, `pair`, `end` and `progress` of `explain`, whose `InputError`s it raises.
        """
        progress, removal = options.pop("progress", iter), options.pop("removal", "drop")
        removal = AttributionParams(removal=removal).removal
        wrapped, reader = wrap(reward_model, tokenizer, **options)
        reading, spans = read(wrapped, reader, prompt, response)
        subject = Subject(
            messages_of(prompt),
            response,
            tuple(spans),
            reading,
            removal,
            wrapped.output,
            wrapped.model.name_or_path or type(wrapped.model).__name__,
            "packed" if is_packed(wrapped, [reading], removal) else "plain",
            text_of(wrapped, reading),
            where_read(wrapped, reading),
        )
        return cls(subject, wrapped, progress=progress)

    def __call__(self, masks: np.ndarray) -> np.ndarray:
        """v (m,) float64 of coalitions (m, n) bool; the model is asked, in one pass, for those not scored before.

        Raises `InputError` where there is no model to ask.
        """
        keys = [bits.tobytes() for bits in np.packbits(masks, axis=1)]
        lacking = {key: mask for key, mask in zip(keys, masks) if key not in self.scores}
        if lacking and self.reward_model is None and self.ask is None:
            held = f"the archive has {len(self.scores)} coalitions, of the {len(set(keys))} needed it lacks"
            raise InputError(f"{held} {len(lacking)}; give it the model to ask")
        if lacking:
            ask = self.ask or self._ask_model
            self.scores.update(zip(lacking, ask(np.stack(list(lacking.values()))).tolist(), strict=True))
        return np.array([self.scores[key] for key in keys])

    def _ask_model(self, masks: np.ndarray) -> np.ndarray:
        reading, removal = self.subject.reading, self.subject.removal
        return coalition_scores(self.reward_model, [reading], [masks], removal, self.progress)[0].double().cpu().numpy()

    def ends(self) -> tuple[float, float]:
        """The scores without any response token, and of the whole."""
        baseline, score = self(np.array([[False], [True]]).repeat(len(self.subject.spans), 1)).tolist()
        return baseline, score

    def coalitions(self, players: np.ndarray) -> np.ndarray:
        """The coalitions of k players, given for each token (n,), scored so far that split none: (m, k) bool."""
        bits = np.frombuffer(b"".join(self.scores), np.uint8).reshape(len(self.scores), -(-len(players) // 8))
        tokens = np.unpackbits(bits, axis=1, count=len(players)).astype(bool)
        masks = tokens[:, np.unique(players, return_index=True)[1]]
        return masks[(masks[:, players] == tokens).all(1)]

    def players(self, players: str | Sequence[tuple[int, int]]) -> np.ndarray:
        """The player of each token (n,): tokens, words, sentences, or spans of characters, as in `explain`."""
        return np.array(players_of(self.subject.response, list(self.subject.spans), players))

    def explanation(self, source: str, complete: bool, given: Estimate, players: np.ndarray, **work) -> Explanation:
        """The explanation by each player's credit, shared evenly by its tokens; `work`: evaluations, seconds."""
        subject, (baseline, score) = self.subject, self.ends()
        return Explanation(
            response=subject.response,
            spans=subject.spans,
            baseline=baseline,
            score=score,
            source=source,
            complete=complete,
            engine=subject.engine,
            model=subject.model,
            text=subject.text,
            read_at=subject.read_at,
            **of_tokens(given, players),
            **work,
        )


def explain_game(
    game: Game, source: str = "gaussian", players: str | Sequence[tuple[int, int]] = "tokens", **options
) -> Explanation:
    """`explain` of a game, which asks the model only for what it has not scored before.

    `evaluations` are the coalitions that the source reads; `options`, the budgets and seed of `AttributionParams`.
    Raises `InputError` as `explain` does, for another removal than the game's, and for coalitions that are lacking in a
    game without a model.
    """
    started, kind = time.perf_counter(), designed(source)
    params, group = removal_params(source, {"removal": game.subject.removal} | options), game.players(players)
    if params.removal != game.subject.removal:
        raise InputError(f"removal is {params.removal!r}, the game's is {game.subject.removal!r}; give it to the game")
    k = int(group.max()) + 1
    values = game(kind.design(k, params).masks.numpy()[:, group])
    given, seconds = kind.estimate(k, params, values), time.perf_counter() - started
    return game.explanation(source, kind.complete, given, group, evaluations=len(values), seconds=seconds)


def explain_scored(game: Game, players: str | Sequence[tuple[int, int]] = "tokens") -> Explanation:
    """Shapley values with their intervals from all coalitions scored so far that split no player.

    Whatever asked for them; they can be of other players' games, as those of `coarse_to_fine` are. At most the two ends
    are asked of the model. Raises `InputError` as `gaussian.posterior` does.
    """
    started, group = time.perf_counter(), game.players(players)
    game.ends()
    masks = game.coalitions(group)
    given, seconds = posterior(masks)(game(masks[:, group])), time.perf_counter() - started
    return game.explanation("gaussian", True, given, group, evaluations=len(masks), seconds=seconds)


def coarser(explanation: Explanation, players: str | Sequence[tuple[int, int]]) -> Explanation:
    """The same credit for wider players, words or sentences say: each has the sum of its parts'.

    That is its Shapley value where those of the parts are and tokens interact in pairs only. Raises `InputError` where
    a player of the explanation would be split.
    """
    group = np.array(players_of(explanation.response, list(explanation.spans), players))
    player, own = np.array(explanation.player), np.array(explanation.credit)
    split = [number for number in range(player.max() + 1) if len(set(group[player == number])) > 1]
    if split:
        start, end = explanation.players[split[0]]
        raise InputError(f"players split {explanation.response[start:end]!r}, which is one; wanted wider ones")
    return replace(explanation, **of_tokens(Estimate(np.bincount(group, own)), group))
