"""Why one response was preferred to another: where the margin of a reward model's two scores comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.attribution.explain import Explanation, explain_many
from dense_rlhf.types import Message
from dense_rlhf.view.display import heat, heat_table, table
from dense_rlhf.view.html import part

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class PairExplanation:
    """What each token of two responses to one prompt adds to the margin between their scores.

    `margin = sum(chosen.credit) - sum(rejected.credit) + gap`: the score of the prompt alone cancels. A notebook shows
    both responses as heat-maps on one scale and a table, a terminal text.
    """

    chosen: Explanation
    rejected: Explanation

    @property
    def margin(self) -> float:
        """Score of the chosen less that of the rejected; below zero where the model prefers the rejected."""
        return self.chosen.score - self.rejected.score

    @property
    def gap(self) -> float:
        """What the credit leaves unexplained of the margin."""
        return self.margin - sum(self.chosen.credit) + sum(self.rejected.credit)

    def ranked(self, most: int = 12) -> pd.DataFrame:
        """The `most` players that move the margin most; `to_margin` is the credit of the chosen's players and minus
        that of the rejected's, half_width half its 95 % interval (nan where that is not known), share is of the sum of
        all |to_margin|."""
        import pandas as pd

        frames = []
        for side, sign, one in (("chosen", 1, self.chosen), ("rejected", -1, self.rejected)):
            frame = one.ranked(len(one.players))
            frames.append(frame.assign(response=side, to_margin=sign * frame["credit"]))
        both = pd.concat(frames)[["response", "part", "characters", "to_margin", "half_width"]]
        total = both["to_margin"].abs().sum()
        both["share"] = both["to_margin"].abs() / total if total else 0.0
        return both.sort_values("to_margin", key=abs, ascending=False, kind="stable").head(most)

    @property
    def _equation(self) -> str:
        terms = f"credit {sum(self.chosen.credit):.4f} - {sum(self.rejected.credit):.4f} + gap {self.gap:.1e}"
        return f"margin {self.margin:.4f} = {self.chosen.score:.4f} - {self.rejected.score:.4f} = {terms}"

    @property
    def _how(self) -> str:
        evaluations = self.chosen.evaluations + self.rejected.evaluations
        return f"{self.chosen.source} on {self.chosen.model}: {evaluations} evaluations"

    def __repr__(self) -> str:
        rows = self.ranked().itertuples(index=False)
        lines = [f"  {row.to_margin:+9.4f}  {row.response:8s}  {row.part!r}" for row in rows]
        return "\n".join([self._equation, f"({self._how})", *lines])

    def _repr_html_(self) -> str:
        limit = max(map(abs, (*self.chosen.credit, *self.rejected.credit)))
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        lines = {name: heat(one.tokens, one.credit, limit, one.half_width) for name, one in sides.items()}
        ranked = table(self.ranked(), "What moves the margin most", 4).data
        return str(part("explanation", self._equation, self._how, heat_table(lines, ""), ranked))


def explain_pair(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message | Mapping[str, str]],
    chosen: str,
    rejected: str,
    **options,
) -> PairExplanation:
    """Which parts of two responses to `prompt` the margin of their scores rests on.

    `options` are those of `explain_many`, `source` and `players` among them; raises its `InputError`s, where row 0 is
    the chosen and row 1 the rejected. Credit is of each response alone: what both say has two credits.
    """
    both = explain_many(reward_model, tokenizer, [prompt, prompt], [chosen, rejected], **options)
    return PairExplanation(*both)
