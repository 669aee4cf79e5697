"""Indexes: one for each study, one over all. Both are drawn from what `summary.json` holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from dense_rlhf.config.params import ABLATIONS, BENCHMARKS
from dense_rlhf.evaluation.results import Finding
from dense_rlhf.report.charts import spark
from dense_rlhf.report.comparison import Verdict, verdict, verdict_html
from dense_rlhf.report.page import chip, draw, link, sections, table
from dense_rlhf.runs import GOOD
from dense_rlhf.view.html import part
from dense_rlhf.view.live import duration

if TYPE_CHECKING:
    from markupsafe import Markup

RECORDED = (
    "the key is that of the run in the record, which has the notebooks of all; of trainings that differ in nothing but "
    "the seed the first has a page"
)
QUESTION = "Which tokens earned the reward?"
MAIN = (
    "reviews_full",
    "reviews",
    "smollm2",
    "hh_rlhf",
    "hh_smollm2",
    "ultrafeedback",
    "ultrafeedback_smollm2",
)  # in this order; other studies follow
RUN = ("job", "notebook", "dataset", "arm", "seed", "status", "error", "seconds", "key", "page", "files")
Column = tuple[str, Mapping, Mapping, str]  # heading, a study's summary, numbers of one dataset, folder of its pages


def rank(study: str) -> int:
    """Where a study stands among others."""
    return MAIN.index(study) if study in MAIN else len(MAIN)


def summary(
    study: str, seeds: Sequence[int], records: Sequence[Mapping], findings: Sequence[Finding], lost: Sequence[str]
) -> dict:
    """What an index says of a study: its runs, each with its page and files; its arms with their numbers; and what was
    `lost` in rendering."""
    runs = [{key: r.get(key) for key in RUN} for r in records]
    newest = max(records, key=lambda r: r.get("started") or 0)
    return {
        "study": study,
        "seeds": list(seeds),
        "runs": runs,
        "lost": list(lost),
        "seconds": sum(r.get("seconds") or 0 for r in records),
        "commit": newest.get("commit", "unknown"),
        "started": newest.get("started") or 0,
        "datasets": {f.dataset: _numbers(f) for f in findings},
    }


def _numbers(finding: Finding) -> dict:
    answer, base = verdict(finding), finding.arms[finding.baseline]
    arms = {
        a.name: {
            "kind": a.kind,
            "gold": str(a.gold),
            "mean": a.gold.mean,
            "seeds": len(a.seeds),
            "gain": a.gain.mean if a.gain else None,
            "path": list(a.path),
            "at_kl": a.gain_at_kl.mean if a.gain_at_kl else None,
            "seconds": a.seconds,
            "cost": a.seconds / base.seconds if a.seconds and base.seconds else None,
        }
        for a in finding.arms.values()
    }
    evidence = finding.prompts * sum(len(a.seeds) for a in finding.arms.values())
    about = {"baseline": finding.baseline, "arms": arms, "evidence": evidence}
    return vars(answer) | {"claims": list(answer.claims)} | about


# ---------------------------------------------------------------------------------------------------- parts


def troubles(study: Mapping, where: str = "") -> Markup:
    """What failed, with its error; nothing if all is well."""
    return draw("troubles", [run for run in study["runs"] if run["status"] not in GOOD], study["lost"], where)


ORDERS: dict[str, tuple[Callable[[Mapping], float | None], bool]] = {  # label: number of an arm, whether high is first
    "gold": (lambda arm: arm["mean"], True),
    "gain at equal KL": (lambda arm: arm["at_kl"], True),
    "time": (lambda arm: arm["seconds"], False),
}


def matrix(columns: Sequence[Column], notes: Mapping[str, Markup]) -> Markup | str:
    """Arms down, datasets across, in several orders; `notes` are shown with a run. Nothing without columns."""
    if not columns:
        return ""
    listed = list(dict.fromkeys(arm for _, study, numbers, _ in columns for arm in _arms(study, numbers)))
    orders = {"as listed": listed} | {label: _sorted(listed, columns, *how) for label, how in ORDERS.items()}
    head = ["arm", *(heading for heading, *_ in columns)]
    rows = {arm: [arm, *(_cell(arm, *column[1:], notes) for column in columns)] for arm in listed}
    what = "Gold score after training, mean and 95 % interval; order"
    views = {label: table(f"{what}: {label}", head, [rows[arm] for arm in arms]) for label, arms in orders.items()}
    return draw("choose", "Order of the arms", views)


def _arms(study: Mapping, numbers: Mapping) -> list[str]:
    return list(dict.fromkeys([*numbers.get("arms", {}), *(run["arm"] for run in _policies(study))]))


def _policies(study: Mapping) -> list[Mapping]:
    return [run for run in study["runs"] if run["notebook"] == "04_ppo"]


def _sorted(names: Sequence[str], columns: Sequence[Column], number: Callable, high_first: bool) -> list[str]:
    def key(name: str) -> tuple[bool, float]:
        values = [number(arm) for _, _, numbers, _ in columns if (arm := numbers.get("arms", {}).get(name))]
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else 0.0
        return not known, -mean if high_first else mean

    return sorted(names, key=key)


def _cell(arm: str, study: Mapping, numbers: Mapping, where: str, notes: Mapping[str, Markup]) -> Markup | str:
    """Gold of one arm on one dataset, its curve, and a frame for each seed."""
    known, dataset = numbers.get("arms", {}).get(arm, {}), numbers["dataset"]
    runs = [run for run in _policies(study) if (run["dataset"], run["arm"]) == (dataset, arm)]
    curve = spark(known["path"], f"gold of {arm} on {dataset} while training") if known else ""
    return draw("cell", known.get("gold"), curve, runs, where, notes) if known or runs else "–"


def verdicts(study: Mapping, where: str = "", prefix: str = "", folded: bool = False) -> list[Markup]:
    """The verdict on each dataset of a study, and a link to its comparison; `prefix` precedes the dataset's name. With
    `folded` only its line shows until a reader unfolds it."""
    answers = []
    for dataset, numbers in study["datasets"].items():
        parts = ("" if folded else numbers["line"], numbers["grounds"], numbers.get("claims", ()))
        rest = verdict_html(Verdict(numbers["answer"], *parts))
        line = numbers["line"] if folded else ""
        answers.append(draw("verdict_of", prefix + dataset, numbers["answer"], line, rest, where, dataset))
    return answers


# ---------------------------------------------------------------------------------------------------- a study


def study_index(
    study: Mapping, thumbnails: Mapping[str, Markup], notes: Mapping[str, Markup], side_by_side: Markup
) -> tuple[Markup, Markup]:
    """Body and contents of a study's index; `thumbnails` and `notes` are HTML by run."""
    columns = [
        (link(f"comparison-{name}.html", name) if numbers else name, study, numbers | {"dataset": name}, "")
        for name, numbers in _datasets(study).items()
    ]
    parts = [
        ("failures", "Failures", troubles(study)),
        ("remark", "To be known", draw("remark", study.get("remark", ""))),
        ("verdict", "Did dense rewards help?", draw("joined", verdicts(study))),
        ("across", "Side by side", side_by_side),
        ("arms", "Arms", matrix(columns, notes)),
        ("notebooks", "Notebooks", draw("cards", _run_cards(study, thumbnails))),
        ("runs", "Every run", _run_table(study)),
    ]
    return sections(f"{study['study']}: which tokens earned the reward?", parts, draw("totals", study))


def _datasets(study: Mapping) -> dict[str, dict]:
    """Numbers of every dataset that policies were trained on, whether one finished or not."""
    names = dict.fromkeys([*study["datasets"], *(str(run["dataset"]) for run in _policies(study))])
    return {name: study["datasets"].get(name, {}) for name in names}


def _run_cards(study: Mapping, thumbnails: Mapping[str, Markup]) -> list[tuple[Markup | str, Markup]]:
    """Pictures and words of all runs but policies, with a link to the numbers of an ablation or benchmark."""
    runs = [run for run in study["runs"] if run["notebook"] != "04_ppo"]
    compared = {run["job"] for run in runs if run["notebook"] in ABLATIONS + BENCHMARKS and run["status"] in GOOD}
    return [(thumbnails.get(run["job"], ""), draw("run_card", run, run["job"] in compared)) for run in runs]


def _run_table(study: Mapping) -> Markup:
    """Each run with links to its files, or, on pages that are read without the files, with its key in the record."""
    rows, linked = [], any(run["files"] for run in study["runs"])
    for run in sorted(study["runs"], key=lambda run: run["status"] in GOOD):
        last = draw("files", study["study"], run["job"], run["files"]) if linked else part("code", run.get("key"))
        rows.append((draw("run_link", run), chip(run["status"]), duration(run["seconds"] or 0), last))
    what = "links lead to the files of each run" if linked else RECORDED
    return table(f"Failures first; {what}", ("run", "status", "time", "files" if linked else "key"), rows)


# ---------------------------------------------------------------------------------------------------- all studies


def overview(studies: Iterable[Mapping], thumbnails: Mapping[str, Markup]) -> tuple[Markup, Markup]:
    """Body and contents of the index over all studies: failures, then main studies, then others by their evidence, each
    in one line that unfolds."""
    studies = sorted(studies, key=lambda s: (rank(s["study"]), -_evidence(s), -s["started"]))
    folders = [(s, f"{s['study']}/") for s in studies]
    columns = [
        (draw("column", s["study"], f"{where}index.html", name), s, numbers | {"dataset": name}, where)
        for s, where in folders
        for name, numbers in _datasets(s).items()
    ]
    failures = [draw("heading", s["study"], troubles(s, where)) for s, where in folders]
    main = {s["study"] for s in studies} & {*MAIN} or {s["study"] for s in studies}
    answers = [a for s, where in folders for a in verdicts(s, where, f"{s['study']}, ", s["study"] not in main)]
    cards = [(thumbnails.get(s["study"], ""), draw("study_card", s)) for s in studies]
    parts = [
        ("failures", "Failures", draw("joined", failures)),
        ("verdict", "Did dense rewards help?", draw("joined", answers)),
        ("arms", "Arms by study and dataset", matrix(columns, {})),
        ("studies", "Studies", draw("cards", cards)),
    ]
    return sections(QUESTION, parts, draw("overview_lead"))


def _evidence(study: Mapping) -> int:
    return max((numbers["evidence"] for numbers in study["datasets"].values()), default=0)
