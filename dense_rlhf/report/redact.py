"""A run's files as they may be published: small, without secrets and places, if need be without a dataset's texts."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

from dense_rlhf.report.pictures import compact
from dense_rlhf.runs import workspace
from dense_rlhf.view.escape import scrub, scrubbed

WORDS = 5  # of a cell; one of more is a text
OWN = ("response",)  # columns of texts that a policy wrote
WITHHELD = "[texts of the dataset are left out, for their licence is unclear]"


def scrubbed_file(path: Path) -> bytes:
    """A run's file as pages would show it; of a notebook the cells, and figures in few bytes."""
    text, root = path.read_text(encoding="utf-8"), workspace()
    return (_notebook(text, root) if path.suffix == ".ipynb" else scrub(text, root)).encode()


def _notebook(text: str, root: Path) -> str:
    """An executed notebook without the times and places that papermill notes."""
    whole = json.loads(text)
    cells = [{**cell, "metadata": {}} for cell in whole["cells"]]
    for output in _outputs(cells):
        if "image/png" in (data := output.get("data", {})):
            data["image/png"] = compact("".join(data["image/png"]))
    metadata = {name: value for name, value in whole["metadata"].items() if name != "papermill"}
    return _json(scrubbed(whole | {"cells": cells, "metadata": metadata}, root))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _outputs(cells: list[dict]) -> Iterator[dict]:
    return (output for cell in cells for output in cell.get("outputs", ()))


def redacted(name: str, content: bytes) -> bytes:
    """A recorded file without texts of the dataset: in tables their hashes, in notebooks a note.

    Responses stay, which the policy wrote. What a notebook prints, and its heat-maps, are left out whole. Figures stay:
    no cell may put a text of the dataset there.
    """
    if name.endswith(".csv"):
        return _without_texts(content)
    if name.endswith(".ipynb"):
        whole = json.loads(content)
        for output in _outputs(whole["cells"]):
            _withhold(output)
        return _json(whole).encode()
    return content


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value.split()) > WORDS


def _without_texts(table: bytes) -> bytes:
    import pandas as pd

    frame = pd.read_csv(io.BytesIO(table), dtype=str, keep_default_na=False)
    for column in frame:
        if column not in OWN and frame[column].map(_is_text).any():
            frame[column] = frame[column].map(lambda text: hashlib.sha256(text.encode()).hexdigest()[:16])
    return frame.to_csv(index=False).encode()


def _withhold(output: dict) -> None:
    if "text" in output:
        output["text"] = WITHHELD
    for kind, value in (data := output.get("data", {})).items():
        if kind == "text/html":
            data[kind] = _html_without_texts("".join(value))
        elif not kind.startswith(("image/", "text/plain")):
            data[kind] = WITHHELD


def _html_without_texts(html: str) -> str:
    """HTML whose cells of many words are left out; all of it is, where it is a heat-map, which shows token by token."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    if soup.select("span[title]"):
        return WITHHELD
    for cell in soup.select("td, td code"):
        if not cell.decomposed and _is_text(cell.get_text()):
            cell.string = WITHHELD
    return str(soup)
