"""Reports in a real browser: they open from disk, ask for nothing, run nothing, and everyone can read them."""

import json
import re
from urllib.parse import unquote, urlparse

import nbformat
import pytest
from bs4 import BeautifulSoup
from chromium import Watched, launched
from hostile import HOSTILE, SURROGATE, TAGS, UNSEEN
from made_study import ARMS, Study, ablation, broken, policies, record, run, whole
from markupsafe import Markup

from dense_rlhf.report import write as report
from dense_rlhf.report.page import LIMIT, page

KINDS = (
    "index.html",
    "made/index.html",
    "made/comparison-reviews.html",
    "made/02_attribution.html",
    "made/reviews-04_ppo-sparse-seed0.html",
    "made/reviews-04_ppo-lime-seed0.html",
    "ablated/index.html",
    "ablated/comparison-ppo.html",
)


@pytest.fixture(scope="module")
def browser():
    with launched() as chromium:
        yield chromium


def written(root, studies):
    """The pages of made-up studies, in a checkout of their own."""
    patch = pytest.MonkeyPatch()
    patch.setattr(report, "workspace", lambda: root)
    for study, records in studies:
        report.write_reports(study, records)
    patch.undo()
    return root / "reports"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Two studies of ordinary words, with failures."""
    root = tmp_path_factory.mktemp("site")
    return written(root, whole(root))


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """The same, every text of it hostile; one notebook was truly executed."""
    root, arms = tmp_path_factory.mktemp("attacked"), {name: ARMS[name] for name in ("sparse", "shap-signed")}
    policy = policies(root, "made", seeds=(0,), arms=arms, texts=HOSTILE[::3]) + broken(root, "made", HOSTILE[:5])
    for one, text in zip(policy, (SURROGATE, *HOSTILE)):
        one |= {"error": "\n".join([text, *HOSTILE]), "commit": text, "machine": text, "versions": {text: text}}
    single = [run(root, "made", record("02_attribution", "02_attribution"))]
    nbformat.write(executed(root), root / "runs" / "made" / "02_attribution" / "notebook.ipynb")
    tables = ablation(root, "ablated", HOSTILE)
    return written(root, [(Study("made", arms, (0,)), policy + single), (Study("ablated", {}, (0,)), tables)])


def executed(root):
    """A notebook run by a kernel: its data are hostile, it shows them in every way, and raises each of them."""
    from nbclient import NotebookClient

    (root / "texts.json").write_text(json.dumps(HOSTILE))
    sources = [
        "import json, pandas, sys\nfrom IPython.display import HTML, Latex, Markdown, SVG, display\n"
        f"texts = json.load(open({str(root / 'texts.json')!r}))\nfrom dense_rlhf.view import display as ours",
        "display(ours.heatmaps(texts, {'x': [1.0] * len(texts)}, 'tokens'), pandas.DataFrame({'text': texts}))",
        "pandas.set_option('display.max_colwidth', None)\npandas.DataFrame({t: [t] for t in texts})",
        "[display(kind(text)) for text in texts for kind in (HTML, Markdown, Latex)]",
        "print(*texts); print(*texts, file=sys.stderr); texts",
        "for text in ours.progress(texts, 'bar', 0): pass",
        *(f"raise ValueError(texts[{i}])" for i in range(len(HOSTILE))),
        "raise ExceptionGroup(texts[0], [KeyError(text) for text in texts])",
    ]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    options = {"allow_errors": True, "kernel_name": "python3", "timeout": 120}
    return NotebookClient(nbformat.v4.new_notebook(cells=cells), **options).execute()


def pages(folder):
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.html"))}


@pytest.mark.parametrize("which", ["site", "attacked"])
def test_every_page_opens_from_disk_alone(which, browser, request):
    """No external request, no console error, no payload that ran, nowhere else than where it was opened."""
    watched, paths = Watched(browser), pages(request.getfixturevalue(which))
    assert set(paths) >= set(KINDS if which == "site" else ("index.html", "made/index.html"))
    wrong = {name: problems for name, path in paths.items() if (problems := watched.open(path))}
    assert not wrong


def test_hostile_text_is_on_the_pages_and_only_text(attacked):
    """So that the test above has something to find: the words are there, the markup and what is unseen are not."""
    for name, path in pages(attacked).items():
        text = path.read_text(encoding="utf-8")
        assert not any(c in text for c in UNSEEN), name
        assert not re.search(r"<(?:script|iframe|object|embed|link|base|form|video|audio)\b", text), name
        assert len(text) < LIMIT, name
    shown = BeautifulSoup((attacked / "made" / "02_attribution.html").read_text(), "html.parser").text
    assert shown.count("window.hit=1") > 300 and "ExceptionGroup" in shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", KINDS)
def test_everyone_can_read_it(name, scheme, site, browser):
    """No serious or critical violation that axe knows of."""
    assert not violations(Watched(browser, color_scheme=scheme), site / name)


def test_hostile_pages_can_be_read_too(attacked, browser):
    assert not violations(Watched(browser), attacked / "made" / "index.html")


def violations(watched, path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    assert not watched.open(path)
    results = axe.Axe().run(watched.page).response["violations"]
    return [
        f"{v['id']} ({v['impact']}): {v['nodes'][0]['html'][:200]} {v['nodes'][0].get('failureSummary', '')[:200]}"
        for v in results
        if v["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("which", ["site", "attacked"])
def test_links_resolve(which, request):
    folder, anchors = request.getfixturevalue(which), {}
    for path in pages(folder).values():
        soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        ids = [tag["id"] for tag in soup.find_all(id=True)]
        anchors[path.resolve()] = set(ids), [link["href"] for link in soup("a", href=True)]
        assert len(ids) == len(set(ids)), f"{path}: an id twice"
    broken_links = [
        f"{path.name}: {href}"
        for path, (_, links) in anchors.items()
        for href in links
        if not resolves(path, href, anchors)
    ]
    assert not broken_links


def resolves(path, href, anchors):
    parts = urlparse(href)
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    ids = anchors.get(target, (None,))[0]
    here = target.is_file() and not parts.scheme and not parts.netloc
    return here and (not parts.fragment or ids is not None and unquote(parts.fragment) in ids)


def test_the_policy_of_a_page_holds_alone(browser, tmp_path):
    """Were escaping and sanitising to fail, the Content-Security-Policy would still let nothing run or load."""
    watched, path = Watched(browser), tmp_path / "raw.html"
    for text in TAGS:
        if "http-equiv=refresh" not in text:  # which no policy forbids
            path.write_text(page("t", (Markup(f"<p>{text}</p>"), ""), "f"), encoding="utf-8")
            assert not [one for one in watched.open(path) if "payload ran" in one or "dialog" in one], text


def test_views_change_without_scripts(site, browser):
    """Another order is one click away; one view is shown at a time."""
    watched = Watched(browser)
    watched.open(site / "made" / "index.html")
    shown = watched.page.locator(".view:visible")
    assert shown.count() == 1 and "as listed" in shown.inner_text()
    watched.page.get_by_text("gain at equal KL", exact=True).click()
    assert shown.count() == 1 and "order: gain at equal KL" in shown.inner_text()


def test_the_first_page_answers(site):
    """What was found, at what cost, how sure, what no arm did, then the claims; failures before it."""
    text = BeautifulSoup((site / "index.html").read_text(), "html.parser").main.get_text(" ")
    wanted = (
        "Failures",
        "Did dense rewards help",
        "over sparse after equal updates",
        "Cost",
        "How sure",
        "What no arm",
    )
    places = [text.index(what) for what in wanted]
    assert places == sorted(places)
    assert re.search(r"shap-signed \w+ gold [+-]0\.\d\d \[.* at \d\.\d nats of KL against \d\.\d; at equal KL", text)
    assert "2 seeds, 60 held-out" in text and "(chance 0.8)" in text
    assert text.count("undecided") >= 4 and "1b. Dense rewards speed learning" in text
    assert "a training takes 1.4 times that of sparse" in text and "To end above sparse and every control" in text


@pytest.mark.parametrize("name", ["index.html", "made/index.html", "made/comparison-reviews.html"])
def test_a_phone_shows_the_answer_without_scrolling_sideways(name, site, browser):
    watched = Watched(browser, viewport={"width": 390, "height": 800})
    watched.open(site / name)
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= 390
    table = watched.page.locator(".verdict + .wide").first
    assert table.evaluate("box => box.scrollWidth <= box.clientWidth + 1")


def test_print_shows_the_reasons_and_all_columns(site, browser):
    """What is folded on the screen is on paper, and no table is wider than it."""
    watched = Watched(browser, viewport={"width": 670, "height": 900})
    watched.open(site / "made" / "comparison-reviews.html")
    reasons = watched.page.locator(".reasons").first
    assert not reasons.is_visible()
    watched.page.emulate_media(media="print")
    assert reasons.bounding_box()["height"] > 50
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= 680
