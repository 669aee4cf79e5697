"""Hostile text stays text wherever it stands, and pages lose what they should not tell."""

import ast
import html
import re
import unicodedata

import nbformat
import pytest
from bs4 import BeautifulSoup
from hostile import HOSTILE, SURROGATE, TAGS, UNSEEN
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markupsafe import Markup

from dense_rlhf.fingerprint import PACKAGE
from dense_rlhf.report.notebook_page import mathml, notebook_body, overwritten
from dense_rlhf.report.sanitise import ATTRIBUTES, MATH, MATH_LENGTHS, MATH_WORDS, OURS, TEXT
from dense_rlhf.view import escape
from dense_rlhf.view.escape import esc, scrub, scrubbed, visible
from dense_rlhf.view.html import environment, part

HOME, ROOTS = "/" + "home", "/" + "root"  # in two parts: no file of this project names a machine's path


def test_there_are_enough_of_them():
    assert len(set(HOSTILE)) >= 100


@pytest.mark.parametrize("text", [*HOSTILE, SURROGATE])
def test_escaped_text_is_one_text_in_body_and_attribute(text):
    text = f"({text})"  # for the parser folds what is blank alone
    soup = BeautifulSoup(f"<p title='{esc(text)}'>{esc(text)}</p><p title=\"{esc(text)}\"></p>", "html.parser")
    assert [tag.name for tag in soup.find_all()] == ["p", "p"] and all(set(p.attrs) == {"title"} for p in soup("p"))
    assert soup.p.text == soup.p["title"] == visible(text if len(text) <= 2000 else text[:2000] + "…")
    soup.encode("utf-8")


@given(st.text(max_size=300))
def test_nothing_unseen_is_left(text):
    shown = html.unescape(esc(text))
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and c != "\n" for c in shown)
    assert visible(visible(text)) == visible(text)


def test_unseen_characters_are_shown_as_numbers():
    assert visible("a\u202eb\u200b") == "a⟨202e⟩b⟨200b⟩" and all(c not in visible(UNSEEN) for c in UNSEEN)
    assert visible("é e\u0301 日本 😀\n") == "é e\u0301 日本 😀\n"
    assert "⟨" in visible("h" + "\u0335" * 20) and visible("h" + "\u0335" * 3) == "h" + "\u0335" * 3


@pytest.mark.parametrize("text", [*HOSTILE, SURROGATE])
def test_templates_escape_as_esc_does(text):
    assert part("code", text) == f"<code class='mathjax_ignore'>{esc(text)}</code>"
    assert part("code", part("code", text)).count("<code") == 2  # what a template made is not escaped again
    assert environment().from_string("{{ text | uncut }}").render(text=text) == esc(text, len(text))


def test_a_template_that_lacks_a_name_raises():
    with pytest.raises(UndefinedError):
        environment().from_string("{{ missing }}").render()


def test_templates_alone_make_html():
    """No string of the code holds a tag, and only the environment and what was sanitised are trusted as they are."""
    trusted = set()
    for path in [path for box in ("view", "report") for path in (PACKAGE / box).glob("*.py")]:
        tree = ast.parse(path.read_text())
        strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str]
        tags = [text for text in strings if re.search(r"(?<!P)</?(?:[a-z]+\d?)[ >/]", text)]
        assert [text for text in tags if '"made-from"' not in text] == [], path  # which is a pattern
        trusted |= {path.name for node in ast.walk(tree) if getattr(getattr(node, "func", 0), "id", "") == "Markup"}
    assert trusted == {"html.py", "notebook_page.py"} and isinstance(part("paragraph", "x"), Markup)


def outputs(text):
    v4 = nbformat.v4
    return [
        v4.new_output("display_data", {kind: text, "text/plain": text})
        for kind in (
            "text/html",
            "text/markdown",
            "text/latex",
            "application/javascript",
            "text/vnd.mermaid",
            "image/svg+xml",
        )
    ] + [
        v4.new_output("stream", name="stdout", text=text),
        v4.new_output("stream", name="stderr", text=text),
        v4.new_output("error", ename=text, evalue=text, traceback=[text]),
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_notebook_that_shows_it_becomes_a_page_that_only_shows_it(text, tmp_path):
    """Even where a cell hands it to the browser as HTML."""
    cells = [nbformat.v4.new_markdown_cell(f"# T\n\n{text}"), nbformat.v4.new_code_cell(text, outputs=outputs(text))]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    body, _ = notebook_body(tmp_path / "n.ipynb")
    for tag in BeautifulSoup(body, "html.parser").find_all():
        assert tag.name in TEXT | MATH, tag
        known = ATTRIBUTES | MATH_WORDS | MATH_LENGTHS | {"class", "style", "src", "href", "id", "tabindex"}
        assert set(tag.attrs) <= known and not re.search("url|expression|position", tag.get("style", "")), tag
        assert tag.get("href", "#").startswith("#") and tag.get("src", "data:image/").startswith("data:image/"), tag
    assert not any(c in body for c in UNSEEN)


def test_tags_that_are_harmless_stay(tmp_path):
    kept = (
        "<table><caption>c</caption><tr><th scope='row'>a</th><td style='color:red;background:rgba(1,2,3,.5)'>b"
        "</td></tr></table><details><summary>more</summary>x</details>"
        "<img src='data:image/png;base64,AAAA' alt='y'>"
    )
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("display_data", {"text/html": kept})])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    soup = BeautifulSoup(notebook_body(tmp_path / "n.ipynb")[0], "html.parser")
    assert soup.td["style"] == "color:red;background:rgba(1,2,3,.5)" and soup.img["alt"] == "y"
    assert soup.caption.text == "c" and soup.th["scope"] == "row" and soup.find("summary", string="more")


def displayed(html, folder):
    """The body of a page whose only output is this HTML."""
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("display_data", {"text/html": html})])
    text = nbformat.v4.new_markdown_cell(f"# T\n\n{html}")
    nbformat.write(nbformat.v4.new_notebook(cells=[text, cell]), folder / "n.ipynb")
    return BeautifulSoup(notebook_body(folder / "n.ipynb")[0], "html.parser")


@pytest.mark.parametrize(
    "style",
    """position:fixed;inset:0|margin:-800px|margin:0 0 -9em|margin-top:-9em|padding:500px|padding:99em|padding:0 0 50em|
    z-index:9|top:0|float:left|transform:scale(9)|opacity:0|opacity:.1|opacity:0.01|font-size:900px|font-size:99em|
    background:url(x)|background:white url(x)|background-image:linear-gradient(red,red)|background:image-set('x' 1x)|
    background:-webkit-image-set(x)|border:800px solid white|border-radius:5000px|width:9999px|width:calc(100% + 9em)|
    max-width:200vw|width:300%|gap:900px|display:none|display:contents|display:grid|line-height:99|content:'x'|
    box-shadow:0 0 0 99em white|outline:99em solid|pos\\69tion:fixed|margin:/**/-9em|margin:var(--x)|--ink:white|
    padding:1e9px|margin:-1px!important|color:red!important|text-indent:-99em|letter-spacing:-1em|color:rgb(var(--x))|
    animation:x 1s|cursor:none|pointer-events:none|clip-path:inset(0)|filter:invert(1)|all:unset|direction:rtl""".split(
        "|"
    ),
)
def test_a_style_that_reaches_beyond_its_place_is_left_out(style, tmp_path):
    soup = displayed(f'<div id="x" style="{style.strip()};color:red">covers</div>', tmp_path)
    styles = [tag["style"] for tag in soup.find_all(style=True)]
    assert styles == ["color:red"] * 2 and soup.find_all(string="covers")


@pytest.mark.parametrize(
    "name", sorted(OURS) + "failed chip good bad idle verdict yes warned cards contents skip".split()
)
def test_an_output_cannot_wear_our_classes(name, tmp_path):
    soup = displayed(f"<pre class='{name}'>made up</pre></section></main><p class='x {name}'>and</p>", tmp_path)
    assert len(soup.find_all(string=re.compile("made up|and"))) == 4
    for text in soup.find_all(string=re.compile("made up|and")):
        assert not text.parent.get("class"), text.parent
    (section,) = soup.select("section.cell")
    assert section.find_all(string="and")


@pytest.mark.parametrize("between", ["<x-y></x-y>", "<!-- c -->", "<script>1</script>", "<?p?>"])
def test_marks_are_not_stacked_by_what_is_taken_out(between, tmp_path):
    three = "\u0301" * 3
    html = str(displayed(f"<p>e{between.join([three] * 9)}</p>", tmp_path))
    assert three in html and 2 * three not in html


def test_our_own_classes_stay(tmp_path):
    v4 = nbformat.v4
    outputs = [v4.new_output("stream", name=name, text="x") for name in ("stdout", "stderr")]
    cell = v4.new_code_cell("x", outputs=[*outputs, v4.new_output("error", ename="E", evalue="x", traceback=["x"])])
    nbformat.write(v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    soup = BeautifulSoup(notebook_body(tmp_path / "n.ipynb")[0], "html.parser")
    assert all(soup.select(f".{name}") for name in OURS)


@pytest.mark.parametrize("size", ["-800px", "9999px", "900em", "-1em", "calc(9em)"])
def test_math_cannot_reach_beyond_its_place(size, tmp_path):
    soup = displayed(
        f"<math><mpadded lspace='{size}' width='{size}'><mo minsize='{size}'>x</mo></mpadded></math>", tmp_path
    )
    assert not [tag for tag in soup.find_all(True) if {"lspace", "width", "minsize"} & set(tag.attrs)]
    assert len(soup.find_all("mpadded")) == 2


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 12,
        "sk-" + "aB3" * 12,
        "sk-ant-" + "aB3-" * 10,
        "ghp_" + "aB3" * 12,
        "github_pat_" + "aB3" * 12,
        "AKIA" + "A1B2" * 4,
        "glpat-" + "aB3" * 10,
        "xoxb-123456-abcdef",
        "AIza" + "aB3_-" * 7,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-_DEF",
    ],
)
def test_keys_leave_the_page(secret):
    assert secret not in scrub(f"<p>x {secret} y</p>") and secret not in scrub(f'title="{esc(secret)}"')


@pytest.mark.parametrize(
    "text, gone",
    [
        (HOME + "/someone/x.py", "someone"),
        ("/Users/some.one/x", "some.one"),
        (r"C:\Users\someone\x", "someone"),
        (ROOTS + "/secret-project", ROOTS),
        ("https://user:pass1234@host/x", "pass1234"),
        ("WANDB_API_KEY=0123456789abcdef", "0123456789abcdef"),
        (esc("password: 'correct-horse-42'"), "correct-horse-42"),
        ("DB_PASS=correct-horse-42", "correct-horse-42"),
        ("{'MYSQL_PWD': 'correct-horse-42'}", "correct-horse-42"),
        ("Authorization: Bearer 0123abcd4567", "0123abcd4567"),
        (esc("{'Authorization': 'Basic dXNlcjpwYXNz0'}"), "dXNlcjpwYXNz0"),
        (r"C:\Users\Some Body\x", "Body"),
        (r"C:\Users\Some Body", "Body"),
        (esc(r"open('C:\\Users\\Some Other Body\\x')"), "Other"),
        ("C:/Users/Some Body/x", "Body"),
        ("/Users/some body/x", "body"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE"),
    ],
)
def test_homes_names_and_passwords_leave_the_page(text, gone):
    assert gone not in scrub(f"<pre>{text}</pre>")


@pytest.mark.parametrize(
    "name",
    """DB_PASS MYSQL_PWD AUTH_HEADER WANDB_KEY PGPASSWORD SSHPASS MY_TOKEN_FILE GITHUB_PAT SENTRY_DSN AWS_CREDENTIALS
    APIKEY SESSION_COOKIE REDIS_AUTH KEY GPG_PASSPHRASE wandb_key""".split(),
)
@pytest.mark.parametrize("value", ["hunter2", "plain words of mine", "a'b\"c<d&e\\f", "née en 1900"])
def test_what_the_environment_calls_a_secret_leaves_every_form_of_text(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    for text in (value, html.escape(value), esc(value), repr({"x": value}), esc(repr([value]))):
        assert value not in html.unescape(scrub(f"<p>{text}</p>")) and "⟨secret⟩" in scrub(text)


def test_a_key_within_a_secret_leaves_too(monkeypatch):
    monkeypatch.setenv("AUTH_HEADER", "Bearer abcdefghijkl")
    assert "abcdefghijkl" not in scrub("sent abcdefghijkl")


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "KEYBOARD", "COMPASSES", "AUTHOR", "PATH", "DSNS"])
def test_what_is_no_secret_stays(name, monkeypatch):
    monkeypatch.setenv(name, "plain words of mine")
    assert scrub("plain words of mine") == "plain words of mine"


def test_values_of_json_are_scrubbed_and_figures_are_not(monkeypatch):
    monkeypatch.setenv("DB_PASS", "hunter2")
    bundle = {"a": ["hunter2", 1, None, {"hunter2": HOME + "/ada/x"}], "image/png": "hunter2"}
    assert scrubbed(bundle) == {"a": ["⟨secret⟩", 1, None, {"⟨secret⟩": "~/x"}], "image/png": "hunter2"}
    assert scrubbed({"image/png": {"alt": "hunter2"}}) == {"image/png": {"alt": "⟨secret⟩"}}  # of metadata


def test_this_machines_own_secrets_and_paths_leave_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "plain words of mine")
    monkeypatch.setattr(escape, "USER", re.compile(r"(?<=[/\\])ada(?=[/\\])|\bada(?=@)"))
    assert "words of mine" not in scrub("<p>plain words of mine</p>")
    assert scrub(f"{tmp_path}/runs/x", tmp_path) == "runs/x"
    assert scrub("/data/ada/x ada@host, Nabokov's Ada and ada") == "/data/⟨user⟩/x ⟨user⟩@host, Nabokov's Ada and ada"


@pytest.mark.parametrize(
    "text",
    [
        "max_new_tokens: 8",
        "the first token: excellent",
        "ppo_lr=0.0001",
        "data/root/x",
        "reward_token_budget: null",
        "d4acac55fe7f38d09d551abf248647e2",
        "a/b@c",
    ],
)
def test_what_tells_nothing_stays(text):
    assert scrub(text) == text


def test_figures_stay_as_they_are():
    image = f"data:image/png;base64,AKIAABCDEFGHIJKLMNOP{ROOTS}/AAAA"
    assert image in scrub(f"<img src='{image}'>{ROOTS}/x")


def test_progress_bars_end_as_one_line():
    assert overwritten("  0%|   | 0/3\r 50%|#  | 1/3\r100%|###| 3/3\n") == "100%|###| 3/3\n"
    assert overwritten("a\nb\r\nc") == "a\nb\nc"


def test_math_is_not_looked_for_in_code():
    assert mathml("`$x$` costs") == "`$x$` costs" and "<math" in mathml("`a` $x$ `b`")


@pytest.mark.parametrize("text", TAGS[:20])
def test_math_that_is_markup_stays_out(text, tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"${text}$")]), tmp_path / "n.ipynb")
    names = {tag.name for tag in BeautifulSoup(notebook_body(tmp_path / "n.ipynb")[0], "html.parser").find_all()}
    assert names <= TEXT | MATH
