"""Play with a reward shape: sliders redraw the token heat-map of one response. Where nobody can move a slider, the same
view is shown at a few settings, one below another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from IPython.display import HTML, display

from dense_rlhf.shaping.rewards import shape_rewards, shaped
from dense_rlhf.types import RewardShape
from dense_rlhf.view.display import heat, heat_table, is_live, response_tokens

if TYPE_CHECKING:
    from ipywidgets import VBox
    from markupsafe import Markup
    from transformers import PreTrainedTokenizerBase

    from dense_rlhf.types import Attribution, Rollout

SETTINGS = [("softmax", t, w) for t in (0.03, 0.3, 1.0) for w in (1.0, 0.5)]
SETTINGS += [("signed", 1.0, w) for w in (1.0, 0.5, 0.0)]


@dataclass(frozen=True)
class Explorer:
    """One mixture of two sources over the responses of a rollout, as text in colours."""

    rollout: Rollout
    attributions: Mapping[str, Attribution]
    tokenizer: PreTrainedTokenizerBase
    source: str = "shap"
    other: str = "terminal"

    def tokens(self, row: int) -> list[str]:
        """The text of each token of a response, its end too."""
        return response_tokens(self.rollout, row, self.tokenizer)

    def rewards(self, row: int, shape: RewardShape) -> list[float]:
        """What each token is paid."""
        return shape_rewards(self.rollout, self.attributions, shape)[row][self.rollout.mask[row]].tolist()

    def line(self, row: int, shape: RewardShape, limit: float) -> tuple[str, Markup]:
        """The name of one shape and the heat-map of its rewards, full colour at `limit`."""
        weights = " + ".join(f"{w:.2f} {s}" for s, w in zip(shape.sources, shape.weights) if w)
        how = f", softmax at {shape.temperature:.2g}" if shape.normalise == "softmax" else f", {shape.normalise}"
        return weights + how, heat(self.tokens(row), self.rewards(row, shape), limit)

    def view(self, row: int, source: str, other: str, weight: float, temperature: float, normalise: str) -> str:
        """Credit of both sources and the rewards of their mixture, as HTML."""
        shape = mixture(source, other, weight, temperature, normalise)
        kept, tokens = self.rollout.mask[row], self.tokens(row)
        lines = {f"credit: {s}": heat(tokens, self.attributions[s].credit[row][kept].tolist()) for s in (source, other)}
        facts = shaped(self.rollout, self.attributions, shape).diagnostics
        even = ", ".join(f"{s} {facts[f'ess/{s}']:.2f}" for s in shape.sources)
        caption = (
            f"Response {row}, score {self.rollout.scores[row].item():+.2f}. Over all responses: ESS/T {even}; "
            f"{facts['flipped']:.0%} of tokens paid against their credit"
        )
        limit = max(map(abs, self.rewards(row, shape)), default=0) or 1.0
        return heat_table(lines | dict([self.line(row, shape, limit)]), caption)

    def multiples(self, row: int) -> str:
        """The mixture at several weights, temperatures and normalisations, on one colour scale, as HTML."""
        shapes = list(dict.fromkeys(mixture(self.source, self.other, w, t, n) for n, t, w in SETTINGS))
        most = sorted(max(map(abs, self.rewards(row, shape)), default=0.0) for shape in shapes)
        limit = most[len(most) // 2] or 1.0  # the median: a line that pays a single token would make the others pale
        caption = (
            f"What each token of response {row} gets of its score {self.rollout.scores[row].item():+.2f}; one "
            "scale: orange is paid, blue is fined. In JupyterLab sliders move all of it"
        )
        return heat_table(dict(self.line(row, shape, limit) for shape in shapes), caption)

    def widget(self, row: int) -> VBox:
        """Sliders and menus over `view`. Raises ImportError without ipywidgets."""
        import ipywidgets as w

        names, style = list(self.attributions), {"description_width": "7em"}
        controls = {
            "row": w.IntSlider(row, 0, len(self.rollout.scores) - 1, description="response", style=style),
            "source": w.Dropdown(options=names, value=self.source, description="source", style=style),
            "other": w.Dropdown(options=names, value=self.other, description="other source", style=style),
            "weight": w.FloatSlider(0.5, min=0, max=1, step=0.05, description="weight", style=style),
            "temperature": w.FloatLogSlider(1.0, min=-2, max=1, step=0.1, description="temperature", style=style),
            "normalise": w.ToggleButtons(options=["softmax", "signed"], description="normalise", style=style),
        }
        shown = w.HTML(self.view(row, self.source, self.other, 0.5, 1.0, "softmax"))

        def redraw(_: object) -> None:
            shown.value = self.view(**{name: control.value for name, control in controls.items()})

        for control in controls.values():
            control.observe(redraw, "value")
        return w.VBox([w.HBox(list(controls.values()), layout={"flex_flow": "row wrap"}), shown])


def mixture(source: str, other: str, weight: float, temperature: float, normalise: str) -> RewardShape:
    """The shape of two sources; of a single one if both are the same or one has no weight."""
    pairs = {source: 1.0} if source == other else {source: weight, other: 1 - weight}
    kept = {s: w for s, w in pairs.items() if w > 0}
    return RewardShape(tuple(kept), tuple(kept.values()), normalise, temperature)


def explore(
    rollout: Rollout,
    attributions: Mapping[str, Attribution],
    tokenizer: PreTrainedTokenizerBase,
    source: str = "shap",
    other: str = "terminal",
    row: int | None = None,
) -> None:
    """Display sliders over how two sources mix into rewards, or small multiples where nobody can move them.

    `row` is the response; without one that whose score is furthest from the median.
    """
    if row is None:
        row = int((rollout.scores - rollout.scores.median()).abs().argmax())
    explorer = Explorer(rollout, attributions, tokenizer, source, other)
    if is_live():
        try:
            return display(explorer.widget(row))
        except ImportError:  # ipywidgets is optional
            pass
    display(HTML(explorer.multiples(row)))
