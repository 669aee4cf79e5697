"""Indexes: one for each study, one over all. Both are drawn from what `summary.json` holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dense_rlhf.config.params import ABLATIONS, BENCHMARKS
from dense_rlhf.evaluation.findings import Finding
from dense_rlhf.report.charts import spark
from dense_rlhf.report.comparison import Verdict, verdict, verdict_html
from dense_rlhf.report.page import chip, link, sections, table
from dense_rlhf.runs import GOOD
from dense_rlhf.view.escape import esc
from dense_rlhf.view.live import duration

QUESTION = "Which tokens earned the reward?"


RUN = ("job", "notebook", "dataset", "arm", "seed", "status", "error", "seconds", "page", "files")


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
    decided, base = verdict(finding), finding.arms[finding.baseline]
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
    return {
        "answer": decided.answer,
        "line": decided.line,
        "grounds": decided.grounds,
        "claims": list(decided.claims),
        "baseline": finding.baseline,
        "arms": arms,
        "evidence": evidence,
    }


# ---------------------------------------------------------------------------------------------------- parts


def troubles(study: Mapping, where: str = "") -> str:
    """What failed, with its error; nothing where all is well."""
    items = [
        f"{chip(r['status'])} {_link(r, where)}: {esc(r['error'] or 'no reason was given')}"
        for r in study["runs"]
        if r["status"] not in GOOD
    ]
    items += [f"{chip('not rendered')} {esc(text)}" for text in study["lost"]]
    return "<ul class='failed'>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>" if items else ""


def _link(run: Mapping, where: str = "", text: str = "") -> str:
    label = text or esc(run["job"])
    return link(f"{where}{run['page']}", label) if run["page"] else label


ORDERS: dict[str, tuple[Callable[[Mapping], float | None], bool]] = {  # label: number of an arm, whether high is first
    "gold": (lambda arm: arm["mean"], True),
    "gain at equal KL": (lambda arm: arm["at_kl"], True),
    "time": (lambda arm: arm["seconds"], False),
}


def matrix(columns: Sequence[tuple[str, Mapping, Mapping, str]], notes: Mapping[str, str]) -> str:
    """Arms down, datasets across, in several orders. A column is its heading (HTML), a study's summary, the numbers of
    one of its datasets, and the folder of its pages; `notes` are more HTML for a run."""
    listed = list(dict.fromkeys(arm for _, study, numbers, _ in columns for arm in _arms(study, numbers)))
    orders = {"as listed": listed} | {label: _sorted(listed, columns, *how) for label, how in ORDERS.items()}
    head = ["arm", *(heading for heading, *_ in columns)]
    cells = {arm: [_cell(arm, *column[1:], notes) for column in columns] for arm in listed}
    views = {
        label: table(
            f"Gold score after training, mean and 95 % interval; order: {label}",
            head,
            ([esc(arm), *cells[arm]] for arm in names),
        )
        for label, names in orders.items()
    }
    return choose("Order of the arms", views)


def _arms(study: Mapping, numbers: Mapping) -> list[str]:
    ran = [r["arm"] for r in study["runs"] if r["notebook"] == "04_ppo"]
    return list(dict.fromkeys([*numbers.get("arms", {}), *ran]))


def _sorted(names: Sequence[str], columns: Sequence, number: Callable, high_first: bool) -> list[str]:
    def key(name: str) -> tuple[bool, float]:
        values = [number(arm) for _, _, numbers, _ in columns if (arm := numbers.get("arms", {}).get(name))]
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else 0.0
        return not known, -mean if high_first else mean

    return sorted(names, key=key)


def _cell(arm: str, study: Mapping, numbers: Mapping, where: str, notes: Mapping[str, str]) -> str:
    """Headline, curve and a chip for each seed."""
    known, dataset = numbers.get("arms", {}).get(arm), numbers.get("dataset")
    runs = [r for r in study["runs"] if r["notebook"] == "04_ppo" and (r["dataset"], r["arm"]) == (dataset, arm)]
    if not known and not runs:
        return "–"
    chips = "".join(
        f"<span>{_link(r, where, chip(r['status'], ' · seed ' + str(r['seed'])))}{notes.get(r['job'], '')}</span>"
        for r in runs
    )
    seeds = f"<div class='seeds'>{chips}</div>" if chips else ""
    if not known:
        return seeds
    curve = spark(known["path"], f"gold of {arm} on {dataset} while training")
    return f"<span class='number'>{esc(known['gold'])}</span> {curve}{seeds}"


def choose(label: str, views: Mapping[str, str], group: str = "order") -> str:
    """One of several views at a time, by buttons that need no script; `group` tells two choices of a page apart."""
    buttons = "".join(
        f"<input type='radio' name='{group}' id='{group}-{n}'{' checked' * (n == 0)}>"
        f"<label for='{group}-{n}'>{esc(name)}</label>"
        for n, name in enumerate(views)
    )
    shown = "".join(f"<div class='view'>{html}</div>" for html in views.values())
    return f"<div class='views' role='radiogroup' aria-label='{esc(label)}'>{buttons}{shown}</div>"


def verdicts(study: Mapping, where: str = "", prefix: str = "") -> str:
    """The verdict on each dataset of a study, and a link to its comparison; `prefix` precedes the dataset's name."""
    parts = []
    for dataset, numbers in study["datasets"].items():
        more = link(f"{where}comparison-{dataset}.html", esc(f"All arms on {dataset} compared"))
        decided = Verdict(numbers["answer"], numbers["line"], numbers["grounds"], numbers.get("claims", ()))
        parts.append(f"<h3>{esc(prefix + dataset)}</h3>{verdict_html(decided)}<p>{more}</p>")
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------- a study


def study_index(study: Mapping, thumbnails: Mapping[str, str], notes: Mapping[str, str], more: str) -> tuple[str, str]:
    """Body and contents of a study's index; `thumbnails` and `notes` are HTML by run, `more` HTML of a study's
    settings or datasets."""
    columns = [
        (link(f"comparison-{name}.html", esc(name)) if numbers else esc(name), study, numbers | {"dataset": name}, "")
        for name, numbers in _datasets(study).items()
    ]
    body, listed = sections(
        [
            ("failures", "Failures", troubles(study)),
            ("verdict", "Did dense rewards help?", verdicts(study)),
            ("across", "Side by side", more),
            ("arms", "Arms", matrix(columns, notes) if columns else ""),
            ("notebooks", "Notebooks", _cards(study, thumbnails)),
            ("runs", "Every run", _run_table(study)),
        ]
    )
    return f"<h1>{esc(study['study'])}: which tokens earned the reward?</h1>{_totals(study)}{body}", listed


def _datasets(study: Mapping) -> dict[str, dict]:
    """Numbers of every dataset that policies were trained on, whether one finished or not."""
    ran = [str(r["dataset"]) for r in study["runs"] if r["notebook"] == "04_ppo"]
    return {name: study["datasets"].get(name, {}) for name in dict.fromkeys([*study["datasets"], *ran])}


def _totals(study: Mapping) -> str:
    statuses = [r["status"] for r in study["runs"]]
    counts = " ".join(f"{chip(status, f' {statuses.count(status)}')}" for status in sorted(set(statuses)))
    return f"<p class='quiet'>{len(statuses)} runs, {duration(study['seconds'])} of work. {counts}</p>"


def _cards(study: Mapping, thumbnails: Mapping[str, str]) -> str:
    single = [r for r in study["runs"] if r["notebook"] != "04_ppo"]
    items = "".join(
        f"<li>{thumbnails.get(r['job'], '')}{_link(r)}<br>{chip(r['status'])} "
        f"<small class='quiet'>{duration(r['seconds'] or 0)}</small>{_comparison(r)}</li>"
        for r in single
    )
    return f"<ul class='cards'>{items}</ul>" if items else ""


def _comparison(run: Mapping) -> str:
    """A link to the page that compares an ablation's results."""
    if run["notebook"] not in ABLATIONS + BENCHMARKS or run["status"] not in GOOD:
        return ""
    return "<br>" + link(f"comparison-{run['job']}.html", "its numbers and tables")


FILES = {"notebook.ipynb": "notebook", "params.yaml": "parameters", "metrics.json": "metrics", "log.txt": "log"}


def files(study: str, job: str, names: Sequence[str]) -> str:
    """Links to the files of a run."""
    return " · ".join(link(f"../../runs/{study}/{job}/{name}", esc(FILES.get(name, name))) for name in names)


def _run_table(study: Mapping) -> str:
    runs = sorted(study["runs"], key=lambda r: r["status"] in GOOD)
    rows = (
        (_link(r), chip(r["status"]), duration(r["seconds"] or 0), files(study["study"], r["job"], r["files"]))
        for r in runs
    )
    return table("Failures first; links lead to the files of each run", ("run", "status", "time", "files"), rows)


# ---------------------------------------------------------------------------------------------------- all studies


def overview(studies: Sequence[Mapping], thumbnails: Mapping[str, str]) -> tuple[str, str]:
    """Body and contents of the index over all studies: failures, then studies by the amount of evidence."""
    studies = sorted(studies, key=lambda s: (-_evidence(s), -s["started"]))
    columns = [
        (
            link(f"{s['study']}/index.html", esc(s["study"])) + f", {esc(name)}",
            s,
            numbers | {"dataset": name},
            f"{s['study']}/",
        )
        for s in studies
        for name, numbers in _datasets(s).items()
    ]
    failed = "".join(
        f"<h3>{esc(s['study'])}</h3>{failed_runs}" for s in studies if (failed_runs := troubles(s, f"{s['study']}/"))
    )
    decided = "".join(verdicts(s, f"{s['study']}/", f"{s['study']}, ") for s in studies)
    body, listed = sections(
        [
            ("failures", "Failures", failed),
            ("verdict", "Did dense rewards help?", decided),
            ("arms", "Arms by study and dataset", matrix(columns, {}) if columns else ""),
            ("studies", "Studies", _study_cards(studies, thumbnails)),
        ]
    )
    lead = (
        "<p class='lead'>RLHF scores a whole response. These studies reward each token for its share of the "
        "score, and ask whether the policy learns faster or better.</p>"
    )
    return f"<h1>{QUESTION}</h1>{lead}{body}", listed


def _evidence(study: Mapping) -> int:
    return max((numbers["evidence"] for numbers in study["datasets"].values()), default=0)


def _study_cards(studies: Sequence[Mapping], thumbnails: Mapping[str, str]) -> str:
    items = "".join(
        f"<li>{thumbnails.get(s['study'], '')}{link(s['study'] + '/index.html', esc(s['study']))}{_totals(s)}</li>"
        for s in studies
    )
    return f"<ul class='cards'>{items}</ul>"
