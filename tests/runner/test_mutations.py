"""No damaged file of parameters or data starts anything: one line that names the field or the file, exit code 2."""

import pytest
import yaml
from mutations import FORMS, STUDY, data_files, good_rows, marks, structures, values

from dense_rlhf.__main__ import main


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a study and return what is wrong with the answer; nothing is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dense_rlhf.runner.plan._reason", lambda *_: "new")  # no made-up notebook is read
    monkeypatch.setattr("dense_rlhf.runner.grid.run_grid", lambda *_, **__: pytest.fail("started"))

    def run(text: str | bytes, named: str, *settings: str) -> str:
        path = tmp_path / "s.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            code = main(["run", str(path), *settings])
        except (Exception, pytest.fail.Exception) as error:
            return f"{type(error).__name__}: {error}"
        line = capsys.readouterr().err
        good = code == 2 and line.count("\n") == 1 and all(part in line for part in named.split()) and len(line) < 1500
        return "" if good and not (tmp_path / "runs").exists() else f"exit {code}: {line!r}, wanted {named!r}"

    return run


def test_every_wrong_parameter_and_every_broken_file_of_them(refused):
    cases = [*values(), *structures()]
    assert len(cases) > 400 and len({text for _, text, _ in cases}) > 400
    assert {label: wrong for label, text, named in cases if (wrong := refused(text, named))} == {}


def test_every_damaged_file_of_data(refused, tmp_path):
    wrong, count = {}, 0
    for label, name, form, content in data_files():
        path = tmp_path / f"data.{form}"
        path.write_bytes(content)
        count += 1
        if message := refused(yaml.safe_dump(STUDY | {"data": {"name": name, "path": str(path)}}), path.name):
            wrong[label] = message
    assert count > 100 and wrong == {}


def test_every_damaged_file_of_marks(refused, tmp_path):
    path, wrong = tmp_path / "marks.txt", {}
    for label, name, content in marks():
        path.write_bytes(content)
        if message := refused(yaml.safe_dump(STUDY), name, "--set", f"{name}={path}"):
            wrong[label] = message
    assert wrong == {}


def test_the_good_files_are_taken(refused, tmp_path):
    """So that it is the damage that is refused."""
    for name, forms in FORMS.items():
        for form, write in forms.items():
            path = tmp_path / f"data.{form}"
            path.write_bytes(write(good_rows(name)))
            assert refused(yaml.safe_dump(STUDY | {"data": {"name": name, "path": str(path)}}), "") == "Failed: started"
