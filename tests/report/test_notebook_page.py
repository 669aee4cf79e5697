"""A run's page: what was learned comes first, code that shows nothing does not stand alone, hashes are short."""

import base64
import json

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dense_rlhf.report.notebook_page import notebook_body

WIDGET = "application/vnd.jupyter.widget-view+json"
SHA = "f78a21cfcb46061048410df3c2455d427e43633787e4485147cf8672d7d496d2"


def body(tmp_path, *cells):
    path = tmp_path / "notebook.ipynb"
    nbformat.write(new_notebook(cells=list(cells)), path)
    return str(notebook_body(path)[0])


def shows(source, html):
    return new_code_cell(source, outputs=[new_output("display_data", {"text/html": html})])


def test_what_was_learned_stands_after_the_question(tmp_path):
    cells = (
        new_markdown_cell("# A question"),
        shows("first()", "<p>a table</p>"),
        new_markdown_cell("## A step"),
        shows("second()", "<p>a figure</p>"),
        new_markdown_cell("## What we learned"),
        shows("third()", "<p>the answer</p>"),
    )
    page = body(tmp_path, *cells)
    order = ("A question", "What we learned", "the answer", "The run", "a table", "A step")
    places = [page.index(text) for text in order]
    assert places == sorted(places)


def test_headings_have_no_sign_of_their_anchors(tmp_path):
    path = tmp_path / "notebook.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A ¶ sign\n## Part [link](https://a.org)")]), path)
    html, contents = map(str, notebook_body(path))
    assert html.count("¶") == 1 and "¶" not in contents and "link" in html


def test_code_that_shows_nothing_joins_the_code_after_it(tmp_path):
    silent = new_code_cell("import torch"), new_code_cell("seed = 0")
    page = body(
        tmp_path, new_markdown_cell("# Q"), *silent, shows("draw(seed)", "<p>a figure</p>"), new_code_cell("end()")
    )
    assert page.count("<summary>code</summary>") == 2
    assert "import torch\n\nseed = 0\n\ndraw(seed)" in page and "end()" in page


def test_a_notebook_without_code_or_answer_keeps_its_order(tmp_path):
    assert body(tmp_path, new_markdown_cell("## What we learned"), new_markdown_cell("text")).count("text") == 1
    page = body(tmp_path, new_code_cell("a = 1"), new_markdown_cell("## B"))
    assert page.index("<code>") < page.index("<h2")


def test_hashes_in_tables_are_short(tmp_path):
    page = body(tmp_path, shows("show()", f"<table><tr><td>policy: {SHA}</td></tr></table><p>{SHA}</p>"))
    assert f"policy: {SHA[:12]}…" in page and f"<p>{SHA}</p>" in page


@pytest.mark.parametrize(
    "data, seen",
    [
        ({"text/plain": "words", "text/html": "<p>a table</p>", WIDGET: {"model_id": "x"}}, "a table"),
        ({"text/plain": "words", WIDGET: {"model_id": "x"}}, "words"),
        ({"text/plain": "words", "application/javascript": "run()"}, ""),
        ({"application/json": {"words": 1}}, ""),
    ],
)
def test_an_output_is_shown_once_and_a_widget_by_its_words(data, seen, tmp_path):
    page = BeautifulSoup(body(tmp_path, new_code_cell("x", outputs=[new_output("display_data", data)])), "html.parser")
    page.details.decompose()
    assert page.get_text().strip() == seen


@pytest.mark.parametrize("kind, data", [("image/svg+xml", "<svg>\n</svg>"), ("image/jpeg", "/9j/\n4AAQ")])
def test_a_picture_that_is_no_png_keeps_its_bytes(kind, data, tmp_path):
    output = new_output("display_data", {kind: data}, metadata={kind: {"alt": "a wave"}})
    image = BeautifulSoup(body(tmp_path, new_code_cell("x", outputs=[output])), "html.parser").img
    start, _, shown = image["src"].partition(",")
    whole = data.encode() if kind == "image/svg+xml" else base64.b64decode(data)
    assert (start, base64.b64decode(shown), image["alt"]) == (f"data:{kind};base64", whole, "a wave")


def test_texts_may_be_lists_of_lines(tmp_path):
    output = {"output_type": "display_data", "data": {"text/html": ["<p>a\n", "table</p>"]}}  # without metadata
    printed = {"output_type": "stream", "name": "stdout", "text": ["one\n", "two"]}
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "\n", "question"]},
        {"cell_type": "code", "source": ["a = 1\n", "b = 2"], "outputs": [output, printed]},
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    page = str(notebook_body(tmp_path / "n.ipynb")[0])
    assert all(text in page for text in ("<p>question</p>", "a = 1\nb = 2", "<p>a\ntable</p>", "one\ntwo"))


def test_messages_are_one_fold_at_the_end(tmp_path):
    def noisy(text):
        messages = [new_output("stream", name="stderr", text=f"{text}{i}\n") for i in range(3)]
        return new_code_cell(
            text, outputs=[*messages, new_output("display_data", {"text/html": f"<p>shown {text}</p>"})]
        )

    page = body(tmp_path, noisy("a"), noisy("b"), new_markdown_cell("text after"))
    assert page.count("<summary>messages</summary>") == 1 and "a0\na1\na2\nb0" in page
    assert page.index("<summary>messages") > page.index("shown b")
