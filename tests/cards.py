"""The numbers in docs/data_card.md and docs/model_card.md, from data, recipe and parameters: nobody types them.

    python tests/cards.py

writes them between the marks `<!-- numbers: NAME -->` and `<!-- end -->`.
"""

import json
import re
from pathlib import Path

from dense_rlhf.config.params import DataParams, RewardParams
from dense_rlhf.data import REVIEW_SHARES, REVIEWS_MEMBER, REVIEWS_WHEEL, load_data
from dense_rlhf.fingerprint import PACKAGE
from dense_rlhf.models.learned_judge import SHAPE

DOCS = Path(__file__).parent.parent / "docs"
CARDS = (DOCS / "data_card.md", DOCS / "model_card.md")
MARK = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end -->)", re.S)


def table(rows: dict[str, object]) -> str:
    shown = {name: f"{value:,}" if isinstance(value, int) else value for name, value in rows.items()}
    return "\n| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in shown.items()) + "\n"


def origin() -> dict[str, object]:
    (name, version), sha256 = REVIEWS_WHEEL[0].split("=="), REVIEWS_WHEEL[1]
    data = load_data(DataParams())
    return {
        "wheel": f"`{name}` {version}, sha256 `{sha256}`",
        "file": f"`{REVIEWS_MEMBER}`, sha256 `{data.revision}`",
        "texts read": data.counts["read"],
    }


def splits() -> dict[str, object]:
    data = load_data(DataParams())
    rows = {f"split `{name}`": data.counts[f"kept: {name}"] for name in REVIEW_SHARES}
    rows |= {name: n for name, n in data.counts.items() if name.startswith(("left out", "prompts left out"))}
    labels = [row.label for part in (data.reward, data.gold, data.test) for row in part]
    words = sorted(len(row.text.split()) for part in (data.reward, data.gold, data.test) for row in part)
    return rows | {
        "prompts to practise on": len(data.train_prompts),
        "prompts to choose by": len(data.validation_prompts),
        "prompts for the last word": len(data.test_prompts),
        "labelled good, of `reward`, `gold` and `test`": f"{sum(labels) / len(labels):.1%}",
        "words of a text: 5 %, median, 95 %": ", ".join(str(words[int(q * len(words))]) for q in (0.05, 0.5, 0.95)),
    }


def policy() -> dict[str, object]:
    recipe = json.loads((PACKAGE / "models" / "tiny_policy" / "recipe.json").read_text())
    params = recipe["params"]
    size = (PACKAGE / "models" / "tiny_policy" / "model.safetensors").stat().st_size
    return {
        "parameters": recipe["parameters"],
        "vocabulary": params["vocabulary"],
        "layers, heads, width": f"{params['layers']}, {params['heads']}, {params['hidden']}",
        "file": f"{size / 1e6:.1f} MB",
        "trained on": f"{recipe['tokens']:,} tokens in {params['steps']:,} steps",
        "took": f"{recipe['seconds'] / 60:.0f} minutes",
        "seed": recipe["seed"],
        "data, sha256": f"`{recipe['data']['sha256']}`",
        "held-out loss": f"{recipe['held_out_loss']:.2f} nats a token, {params['held_out_tokens']:,} tokens of `test`",
    }


def proxy() -> dict[str, object]:
    params = RewardParams()
    return {
        "layers, heads, width": f"{params.layers}, {params.heads}, {params.hidden}",
        "trained on": f"{params.steps} batches of {params.batch} snippets of at most {params.window} tokens",
        "tokens left out of a snippet": f"up to {params.max_drop:.0%}",
    }


def second() -> dict[str, object]:
    shape = ", ".join(str(SHAPE[part]) for part in ("layers", "heads", "hidden"))
    return {"layers, heads, width": shape, "labels": len(load_data(DataParams()).second)}


NUMBERS = {"origin": origin, "splits": splits, "policy": policy, "proxy": proxy, "second": second}


def filled(text: str) -> str:
    """A card with its numbers as they are now."""
    return MARK.sub(lambda found: found[1] + table(NUMBERS[found[2]]()) + found[3], text)


if __name__ == "__main__":
    for card in CARDS:
        card.write_text(filled(card.read_text()))
