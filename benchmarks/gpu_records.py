"""What was measured on cards, one JSON file a configuration, and the table of it in docs/gpu.md.

    python benchmarks/gpu_records.py    writes the table anew, from benchmarks/gpu/*.json

A file has the configuration and its runs, each with a card, versions, the rounds and their figures.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path

FOLDER, PAGE = Path(__file__).parent / "gpu", Path(__file__).parent.parent / "docs" / "gpu.md"
WORSE = 0.05  # a later run on the same card that is slower by this share is marked
START, END = "<!-- table: python benchmarks/gpu_records.py -->\n", "<!-- end of the table -->"
STEPS = "sample", "score", "explain", "log-probabilities", "update"
EMPTY = "not run"


def read(path: Path) -> dict:
    """The record of a configuration; an empty one where there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"configuration": {}, "runs": []}


def write(path: Path, record: dict) -> None:
    """In one move: a reader, or who comes after a kill, sees the whole file before or after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def figures(configuration: dict, rounds: list[dict]) -> dict:
    """Mean and sd of seconds by step and of tokens a second, MFU and the most GiB, of rounds {step: [seconds, GiB]}.

    `configuration` has, where they make sense, `tokens` of a round, `flops` and `peak_flops`. The sd of one round is
    None. `sparse` is the step without the explanation.
    """
    seconds = {step: [one[step][0] for one in rounds] for step in rounds[0]}
    totals = [sum(row) for row in zip(*seconds.values())]
    made = {"seconds": {step: spread(taken) for step, taken in seconds.items()}, "step_seconds": spread(totals)}
    made["peak_gib"] = max(gib for one in rounds for _, gib in one.values())
    if "tokens" in configuration:
        made["tokens_per_second"] = spread([configuration["tokens"] / total for total in totals])
    if "explain" in seconds and len(seconds) > 1:
        made["over_sparse"] = spread([a / (a - b) for a, b in zip(totals, seconds["explain"])])
    if configuration.get("flops") and configuration.get("peak_flops"):
        made["mfu"] = spread([configuration["flops"] / total / configuration["peak_flops"] for total in totals])
    return made


def spread(numbers: list[float]) -> list[float | None]:
    """Mean and sd, four digits."""
    sd = statistics.stdev(numbers) if len(numbers) > 1 else None
    return [float(f"{x:.4g}") if x is not None else None for x in (statistics.fmean(numbers), sd)]


def marked(runs: list[dict]) -> list[tuple[dict, bool]]:
    """Runs that measured something, and whether an earlier one on the same card was faster by more than `WORSE`."""
    best, made = {}, []
    for run in runs:
        if "figures" in run:
            taken = run["figures"]["step_seconds"][0]
            before = best.setdefault(run["card"], taken)
            made.append((run, taken * (1 - WORSE) > before))
            best[run["card"]] = min(before, taken)
    return made


# ---------------------------------------------------------------------------------------------------- table


def table(records: Iterable[dict]) -> str:
    """Markdown: a row for the last run of each configuration on each card; cells that no card has filled say so."""
    head = [
        "configuration",
        "card",
        "tokens/s",
        "MFU",
        *(f"{step} s" for step in STEPS),
        "SHAP / sparse",
        "GiB",
        "note",
    ]
    rows = [head, ["---"] * len(head)]
    for record in records:
        last = {run["card"]: (run, worse) for run, worse in marked(record["runs"])}
        title = record["configuration"]["title"]
        rows += [[title, card, *_cells(run, worse)] for card, (run, worse) in last.items()]
        rows += [] if last else [[title, *[EMPTY] * (len(head) - 2), _error(record)]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(run: dict, worse: bool) -> list[str]:
    made = run["figures"]
    steps = [_pair(made["seconds"].get(step)) for step in STEPS]
    notes = [f"{len(run['rounds'])} round{'s' * (len(run['rounds']) > 1)}"]
    notes += [run["note"]] if "note" in run else []
    notes += ["not finished"] * (not run["complete"])
    notes += [f"**slower by more than {WORSE:.0%} than before**"] * worse
    gib = f"{made['peak_gib']:.3g}" if made["peak_gib"] else "–"
    mfu = _pair(made.get("mfu"), 100, " %")
    return [_pair(made.get("tokens_per_second")), mfu, *steps, _pair(made.get("over_sparse")), gib, "; ".join(notes)]


def _error(record: dict) -> str:
    """The last error of a configuration that measured nothing, in one line."""
    errors = [run["error"] for run in record["runs"] if run.get("error")]
    return errors[-1].splitlines()[-1].replace("|", "\\|") if errors else ""


def _pair(value: list[float | None] | None, scale: float = 1, unit: str = "") -> str:
    """Mean ± sd; a dash where the configuration has none."""
    if value is None:
        return "–"
    mean, sd = (x if x is None else x * scale for x in value)
    write = lambda x: f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"  # noqa: E731
    return write(mean) + (f" ± {write(sd)}" if sd is not None else "") + unit


def main(folder: Path = FOLDER, page: Path = PAGE) -> None:
    """Put the table between its marks on the page."""
    before, rest = page.read_text().split(START)
    records = sorted(map(read, folder.glob("*.json")), key=lambda one: one["configuration"]["order"])
    page.write_text(before + START + "\n" + table(records) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
