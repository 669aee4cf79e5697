"""A record holds what its study's pages need, and nothing that must not be published."""

import hashlib
import io
import json
import lzma
import shutil
import tarfile
from pathlib import Path

import pandas as pd
import pytest
import recorded

from dense_rlhf.files import read_json, write_json
from dense_rlhf.report.record import read_record, write_record
from dense_rlhf.runs import RunFolder, artefacts
from dense_rlhf.types import InputError


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A study and its record, to be copied."""
    root = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        outline, runs = recorded.study(root)
        write_record(outline, runs, root / "results")
    return outline, root


@pytest.fixture
def made(once, tmp_path, monkeypatch):
    outline, root = once
    shutil.copytree(root, tmp_path, dirs_exist_ok=True, ignore=lambda folder, names: {"results"} & {*names})
    monkeypatch.chdir(tmp_path)
    return outline, [RunFolder(path.parent) for path in sorted(tmp_path.glob("runs/made/*/run.json"))]


@pytest.fixture
def folder(once, tmp_path):
    """A record of its own."""
    return Path(shutil.copytree(once[1] / "results" / "made", tmp_path / "results" / "made"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def job(outline, runs, name):
    return next(run for run in runs if run.path.name == name)


def test_a_record_is_small_whole_and_the_same_twice(made, tmp_path):
    outline, runs = made
    folder = write_record(outline, runs, tmp_path / "results")
    first = contents(folder)
    assert contents(write_record(outline, runs, tmp_path / "results")) == first
    assert contents(write_record(outline, runs, tmp_path / "elsewhere")) == first
    record = read_record(folder)
    assert list(record.runs) == [run.path.name for run in runs] and record.outline == outline
    for run in runs:
        files = record.runs[run.path.name]
        assert set(files) == {path.name for path in run.path.iterdir()} - {"log.txt"}
        assert all(files[name] == run.file(name).read_bytes() for name in files if name.endswith((".csv", ".yaml")))
    laid = record.write_runs(tmp_path / "laid")
    assert all(artefacts(laid / run.path.name) for run in runs)
    whole = sum(path.stat().st_size for run in runs for path in run.path.iterdir())
    assert sum(map(len, first.values())) < whole / 3


def test_new_seeds_join_and_nothing_is_lost(made, tmp_path):
    outline, runs = made
    old = [run for run in runs if not run.path.name.endswith("seed1")]
    new = [run for run in runs if run.path.name.endswith("seed1")]
    folder = write_record(outline, old, tmp_path / "results")
    before = contents(folder)
    write_record(outline, new, tmp_path / "results")
    after = contents(folder)
    assert {name for name in before if name not in after} == set()
    assert [name for name in after if name not in before] == [n for n in after if n.startswith("seed1-")]
    assert sorted(read_record(folder).runs) == sorted(run.path.name for run in runs)
    more = tmp_path / "other"
    more.mkdir()
    wider, later = recorded.study(more, seeds=(2,))
    write_record(wider, later, tmp_path / "results")
    assert read_record(folder).outline.seeds == (0, 1, 2)


def test_a_run_that_was_repeated_takes_its_place(made, tmp_path):
    outline, runs = made
    folder = write_record(outline, runs, tmp_path / "results")
    again = job(outline, runs, "ppo")
    write_json(again.file("metrics.json"), {"gain": 2})
    write_json(again.file("run.json"), again.load_json("run.json") | {"artefacts": artefacts(again.path)})
    write_record(outline, [again], tmp_path / "results")
    record = read_record(folder)
    assert json.loads(record.runs["ppo"]["metrics.json"]) == {"gain": 2} and len(record.runs) == len(runs)
    assert len(list(folder.glob("study-*"))) == 1


def test_a_parameter_that_was_added_since_is_no_other_one(made, tmp_path):
    """It had its default before it had a name."""
    outline, runs = made
    write_record(outline, runs, tmp_path / "results")
    again = job(outline, runs, "ppo")
    again.file("params.yaml").write_text(again.file("params.yaml").read_text() + "evaluation_texts: 1000\n")
    write_json(again.file("run.json"), again.load_json("run.json") | {"artefacts": artefacts(again.path)})
    write_record(outline, [again], tmp_path / "results")


def test_other_parameters_are_refused_by_name(made, tmp_path):
    outline, runs = made
    folder = write_record(outline, runs, tmp_path / "results")
    before, again = contents(folder), job(outline, runs, "ppo")
    again.file("params.yaml").write_text(again.file("params.yaml").read_text() + "ppo_lr: 2.0\n")
    write_json(again.file("run.json"), again.load_json("run.json") | {"artefacts": artefacts(again.path)})
    with pytest.raises(InputError, match="ppo with other parameters .ppo_lr"):
        write_record(outline, [again], tmp_path / "results")
    assert contents(folder) == before


@pytest.mark.parametrize("commit", [f"{recorded.COMMIT}+changes", "unknown", ""])
def test_code_that_was_not_committed_is_refused_by_name(commit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outline, runs = recorded.study(tmp_path, seeds=(0,), commit=commit)
    with pytest.raises(InputError, match="3 runs come from code that was not committed: ppo, reviews-04_ppo"):
        write_record(outline, runs, tmp_path / "results")
    assert not (tmp_path / "results" / "made").exists()
    folder = write_record(outline, runs, tmp_path / "results", anyway=True)
    assert read_record(folder).manifest["not_committed"] == [run.path.name for run in runs]


def test_a_file_that_was_altered_is_refused(made, tmp_path):
    outline, runs = made
    runs[1].file("history.csv").write_text("update\n1\n")
    with pytest.raises(InputError, match="history.csv is missing or altered"):
        write_record(outline, runs, tmp_path / "results")


# ---------------------------------------------------------------------------------------------------- what is private


def test_a_record_tells_no_secret_and_no_place(tmp_path, monkeypatch):
    monkeypatch.setenv("DB_PASS", "hunter2-and-more")
    monkeypatch.chdir(tmp_path)
    secrets = ("hunter2-and-more", f"{tmp_path}/x.csv", "see /" + "home/ada/x", "hf_" + "aB3" * 12)
    outline, runs = recorded.study(tmp_path, seeds=(0,), texts=secrets)
    record = read_record(write_record(outline, runs, tmp_path / "results"))
    whole = str(record.manifest) + "".join(c.decode() for files in record.runs.values() for c in files.values())
    assert "⟨secret⟩" in whole
    assert not [word for word in ("hunter2", str(tmp_path), "home/ada", "aB3aB3") if word in whole]


def test_texts_of_an_unclear_licence_are_left_out(tmp_path, monkeypatch):
    """Films' reviews stay; of another dataset prompts are hashes, and what a notebook shows of texts is a note."""
    monkeypatch.chdir(tmp_path)
    text = "somebody asked me how to mend an old bicycle"
    outline, runs = recorded.study(tmp_path, seeds=(0,), texts=(text,))
    assert text in whole_text(read_record(write_record(outline, runs, tmp_path / "results")))
    for run in runs:
        run.file("params.yaml").write_text(
            run.file("params.yaml").read_text().replace("name: reviews", "name: hh_rlhf")
        )
        for name in ("test", "evaluation"):
            if run.file(f"{name}.csv").exists():
                pd.read_csv(run.file(f"{name}.csv")).assign(response="fine").to_csv(
                    run.file(f"{name}.csv"), index=False
                )
        write_json(run.file("run.json"), run.load_json("run.json") | {"artefacts": artefacts(run.path)})
    record = read_record(write_record(outline, runs, tmp_path / "unclear"))
    notebooks = [json.loads(files["notebook.ipynb"]) for files in record.runs.values()]
    for notebook in notebooks:
        shown = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
        tables = "".join(output.get("data", {}).get("text/html", "") for output in shown)
        cells = tables.split("<td>")[1:]
        assert cells and not any(text in cell.partition("</td>")[0] for cell in cells)
        assert not any(text in str(output.get("text", "")) for output in shown)
    table = pd.read_csv(io.BytesIO(record.runs["reviews-04_ppo-shap-seed0"]["test.csv"]))
    assert (table["response"] == "fine").all() and table["prompt"].map(len).eq(16).all()


@pytest.mark.parametrize("line", ["data_path: mine.csv", "attribution_rationale_path: words.json"])
def test_a_file_of_the_users_own_has_an_unclear_licence(line, made, tmp_path):
    outline, runs = made
    one = runs[-1]
    one.file("params.yaml").write_text(f"{one.file('params.yaml').read_text()}{line}\n")
    table = pd.read_csv(one.file("test.csv")).assign(prompt="somebody asked me how to mend a bicycle")
    table.to_csv(one.file("test.csv"), index=False)
    write_json(one.file("run.json"), one.load_json("run.json") | {"artefacts": artefacts(one.path)})
    record = read_record(write_record(outline, [one], tmp_path / "own"))
    assert b"bicycle" not in record.runs[one.path.name]["test.csv"]


def whole_text(record):
    return "".join(content.decode() for files in record.runs.values() for content in files.values())


# ---------------------------------------------------------------------------------------------------- damage


def packed(*members):
    """An archive of (name, bytes, kind)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content, kind in members:
            about = tarfile.TarInfo(name)
            about.type, about.size = kind, len(content)
            tar.addfile(about, io.BytesIO(content))
    return lzma.compress(buffer.getvalue())


def damages(folder):
    """Ways to damage a record, each with the file that must be named."""
    archive = next(folder.glob("seed0-*"))
    content, manifest = archive.read_bytes(), folder / "manifest.json"
    yield archive, lambda: archive.write_bytes(content[:-1] + b"x")
    yield archive, archive.unlink
    yield manifest, lambda: manifest.write_text(manifest.read_text().replace('"made"', '"mode"'))
    yield manifest, lambda: manifest.write_text("{}")
    yield manifest, lambda: manifest.write_text("[")
    for part in ({"comparisons": [1]}, {"comparisons": [{"where": 1}]}, {"arms": [1]}, {"seeds": ["a"]}):
        yield manifest, lambda part=part: write_json(manifest, read_json(manifest) | part, sealed=True)


@pytest.mark.parametrize("number", range(9))
def test_a_damaged_file_is_named(number, folder):
    path, damage = list(damages(folder))[number]
    damage()
    with pytest.raises(InputError) as error:
        read_record(folder)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


HOSTILE = [
    ("../run.json", b"{}", tarfile.REGTYPE),
    ("/etc/run.json", b"{}", tarfile.REGTYPE),
    ("made/../../run.json", b"{}", tarfile.REGTYPE),
    ("job/.hidden", b"{}", tarfile.REGTYPE),
    ("job", b"", tarfile.SYMTYPE),
    ("job/a/b", b"{}", tarfile.REGTYPE),
]


@pytest.mark.parametrize("member", HOSTILE, ids=lambda member: member[0])
def test_a_hostile_archive_writes_nothing_elsewhere(member, folder):
    content = packed(member)
    (folder / "seed0-00000000.tar.xz").write_bytes(content)
    manifest = read_record(folder).manifest | {"files": {"seed0-00000000.tar.xz": hashlib.sha256(content).hexdigest()}}
    write_json(folder / "manifest.json", manifest, sealed=True)
    with pytest.raises(InputError, match="is not a file name|which no record has"):
        read_record(folder)


def test_a_huge_archive_is_not_unpacked(folder, monkeypatch):
    monkeypatch.setattr("dense_rlhf.report.record.LARGEST", 1000)
    with pytest.raises(InputError, match="which no record has"):
        read_record(folder)
