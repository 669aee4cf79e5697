"""Pages that open from disk with no network: one for each notebook run, and an index for the study.

Everything a model or a dataset wrote is escaped where it is displayed (`display.esc`); the page's
Content-Security-Policy, without scripts, is the second wall.
"""

from __future__ import annotations

import re
from pathlib import Path

from dense_rlhf.display import esc, table
from dense_rlhf.judge import arm_table, summarise
from dense_rlhf.params import StudyParams
from dense_rlhf.runs import RunFolder, evaluations, repository_root
from dense_rlhf.store import PACKAGE, write_text
from dense_rlhf.types import InputError

TEMPLATE = PACKAGE / "report_template"
MATH = re.compile(r"(?<!\\)(\$\$?)(?=\S)(.+?)(?<=\S)\1", re.S)


def mathml(markdown: str) -> str:
    """Markdown with `$...$` and `$$...$$` as MathML, which browsers draw without scripts; bad LaTeX stays as code."""
    from latex2mathml.converter import convert

    def one(match: re.Match) -> str:
        try:
            return convert(match[2].strip(), display="block" if match[1] == "$$" else "inline")
        except Exception:  # the converter raises whatever it meets
            return f"<code>{esc(match[2])}</code>"

    return MATH.sub(one, markdown)


def contents(body: str) -> str:
    """A table of contents from the page's headings."""
    heads = re.findall(r'<h2[^>]*id="([^"]+)"[^>]*>(.*?)</h2>', body, re.S)
    tags = re.compile(r"<a class=\"anchor-link\".*?</a>|<[^>]+>", re.S)
    items = "".join(f'<li><a href="#{esc(anchor)}">{tags.sub("", text)}</a></li>' for anchor, text in heads)
    return f"<nav aria-label='Contents'><ul>{items}</ul></nav>" if items else ""


def page(title: str, body: str, footer: str) -> str:
    """A whole HTML page around `body`."""
    from jinja2 import Template

    parts = {"title": title, "body": body, "footer": footer, "style": (TEMPLATE / "style.css").read_text()}
    return Template((TEMPLATE / "page.html.j2").read_text()).render(parts)


def notebook_body(path: Path) -> str:
    """An executed notebook as an HTML fragment: code folded, figures embedded with alt text, math as MathML."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = mathml(cell.source)
    exporter = HTMLExporter(extra_template_basedirs=[str(PACKAGE)], template_name="report_template")
    body, _ = exporter.from_notebook_node(notebook)
    return body.replace("</h1>", f"</h1>{contents(body)}", 1)


def footer(record: dict) -> str:
    """Commit, seed, versions, duration and hardware of one run."""
    versions = ", ".join(f"{name} {v}" for name, v in record.get("versions", {}).items())
    return esc(f"{record['job']}: {record['status']} in {record['seconds']:.0f} s, seed {record['seed']}, commit "
               f"{record.get('commit', 'unknown')}, Python {record.get('python')}, {record.get('cores')} "
               f"{record.get('machine')} cores, {versions}")  # fmt: skip


def warned(run: RunFolder, in_full: bool) -> str:
    """The named warnings of a training, each name once: when it was first met, how often, `in_full` what it said."""
    met: dict[str, list[dict]] = {}
    for warning in run.load_json("metrics.json").get("warnings") or ():
        met.setdefault(str(warning.get("name")), []).append(warning)
    items = ""
    for name, times in met.items():
        more = f" and {len(times) - 1} more" if len(times) > 1 else ""
        said = f": {times[0].get('text', '')}" if in_full else ""
        items += f"<li>{esc(name)}, update {esc(times[0].get('update', '–'))}{more}{esc(said)}</li>"
    return f"<ul class='warned' aria-label='warnings'>{items}</ul>" if items else ""


def write_run_page(record: dict, run: RunFolder, target: Path) -> bool:
    """Render one run; False where its notebook never came to be."""
    if not run.file("notebook.ipynb").exists():
        return False
    links = (f'<p><a href="index.html">all runs</a> · '
             f'<a href="../../runs/{esc(run.path.parent.name)}/{esc(run.path.name)}/notebook.ipynb">notebook</a> · '
             f'<a href="../../runs/{esc(run.path.parent.name)}/{esc(run.path.name)}/params.yaml">parameters</a></p>')
    failed = f"<p class='failed'>{esc(record['status'])}: {esc(record['error'])}</p>" if record["error"] else ""
    write_text(target, page(record["job"], links + failed + warned(run, in_full=True)
                            + notebook_body(run.file("notebook.ipynb")), footer(record)))  # fmt: skip
    return True


def _matrix(records: list[dict], pages: set[str], runs_root: Path) -> str:
    """Arms down, seeds across: status, link and warnings of every policy."""
    arms = list(dict.fromkeys((r["dataset"], r["arm"]) for r in records))
    seeds = sorted({r["seed"] for r in records})
    cells = {(r["dataset"], r["arm"], r["seed"]): _link(r, pages)
             + warned(RunFolder(runs_root / r["job"]), in_full=False) for r in records}  # fmt: skip
    head = "".join(f"<th scope='col'>seed {seed}</th>" for seed in seeds)
    rows = "".join(f"<tr><th scope='row'>{esc(arm)} ({esc(data)})</th>"
                   + "".join(f"<td>{cells.get((data, arm, s), '–')}</td>" for s in seeds) + "</tr>"
                   for data, arm in arms)  # fmt: skip
    return f"<table><caption>Policies: arms x seeds</caption><thead><tr><th>arm</th>{head}</tr></thead>{rows}</table>"


def _link(record: dict, pages: set[str]) -> str:
    good = record["status"] in ("ok", "cached")
    label = f"<span class='{'ok' if good else 'failed'}'>{esc(record['status'])}</span>, {record['seconds']:.0f} s"
    return f'<a href="{esc(record["job"])}.html">{label}</a>' if record["job"] in pages else label


def _headline(runs: list[RunFolder]) -> str:
    """The arms with intervals; an explanation where no policy finished."""
    found = {arm: tables for arm, tables in evaluations(runs).items() if tables}
    if len(found) < 2:
        return "<p>No policy has finished.</p>"
    gold = summarise(found, "gold")
    best = max((arm for arm in gold if arm != "reference"), key=lambda arm: gold[arm].mean)
    verdict = "apart from" if gold[best].apart(gold["reference"]) else "overlapping with"
    text = (f"Highest gold score: {best}, {gold[best]}; the untrained reference has {gold['reference']}, intervals "
            f"{verdict} each other. More gold at more KL is not better credit: see the comparison's page.")  # fmt: skip
    caption = "Held-out prompts: mean, 95 % bootstrap interval over seeds and prompts; wins are over the reference"
    return f"<p>{esc(text)}</p>" + table(arm_table(found), caption).data


def write_reports(study: StudyParams, records: list[dict]) -> Path:
    """Write a page a run and the index; returns the index. A page that cannot be rendered is listed as such."""
    folder, pages, lost = repository_root() / "reports" / study.study, set(), []
    runs_root = repository_root() / "runs" / study.study
    for record in records:
        try:
            if write_run_page(record, RunFolder(runs_root / record["job"]), folder / f"{record['job']}.html"):
                pages.add(record["job"])
        except Exception as error:  # one broken notebook must not cost the other pages
            lost.append(f"{record['job']}: {type(error).__name__}: {error}")
    done = [RunFolder(runs_root / r["job"]) for r in records if r["status"] in ("ok", "cached")]
    index = folder / "index.html"
    body = _index_body(study, records, pages, lost, done)
    write_text(index, page(f"{study.study}: reports", body, _index_footer(records)))
    return index


def _index_body(
    study: StudyParams, records: list[dict], pages: set[str], lost: list[str], done: list[RunFolder]
) -> str:
    failed = [r for r in records if r["status"] not in ("ok", "cached")]
    troubles = [f"{r['job']} {r['status']}: {r['error']}" for r in failed] + [f"not rendered: {text}" for text in lost]
    parts = [f"<h1>{esc(study.study)}: which tokens earned the reward?</h1>"]
    if troubles:
        parts.append("<h2>Failures</h2><ul class='failed'>" + "".join(f"<li>{esc(t)}</li>" for t in troubles) + "</ul>")
    by_dataset: dict[str, list[RunFolder]] = {}
    for run in done:
        by_dataset.setdefault(run.load_json("run.json")["dataset"], []).append(run)
    policies = [r for r in records if r["notebook"] == "04_ppo"]
    for dataset, runs in by_dataset.items() if policies else ():
        parts.append(f"<h2>Result on {esc(dataset)}</h2>" + _headline(runs))
    single = [r for r in records if r["notebook"] != "04_ppo"]
    items = "".join(f"<li>{esc(r['job'])}: {_link(r, pages)}</li>" for r in single)
    parts.append(f"<h2>Notebooks</h2><ul>{items}</ul>")
    if policies:
        parts.append(_matrix(policies, pages, repository_root() / "runs" / study.study))
    return "".join(parts)


def _index_footer(records: list[dict]) -> str:
    if not records:
        raise InputError("a study without runs has no report")
    return footer(max(records, key=lambda record: record["started"]))
