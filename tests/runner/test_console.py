"""What the command line prints of runs."""

import logging
import re

import nbformat
import pytest
from papermill import execute_notebook

from dense_rlhf.files import write_json
from dense_rlhf.runner.console import failures, spent


def test_a_failed_run_is_repeated_by_hand_without_papermills_warnings(tmp_path, caplog):
    """It warns of each parameter that a notebook's cell of parameters does not name, as most of a study's."""
    record = {"status": "failed", "job": "a", "notebook": "04_ppo", "error": "no"}
    (alone,) = [line for line in failures([record], "made", "again") if "alone:" in line]
    cell = nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "a.ipynb")
    execute_notebook(tmp_path / "a.ipynb", tmp_path / "b.ipynb", {"ppo_lr": 1.0}, prepare_only=True)
    (warning,) = [record for record in caplog.records if "unknown parameter: ppo_lr" in record.message]
    assert warning.levelno < getattr(logging, re.search(r"--log-level (\w+)$", alone)[1])


def test_what_runs_took_is_told_from_what_they_left(tmp_path):
    """A training that was only read took nothing; a run that was cached, and a damaged notebook, count as nothing."""
    cells = [{"metadata": {"papermill": {"duration": seconds}}} for seconds in (2.0, 5.0, None)]
    for name, read in (("a", 0), ("b", 3)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "notebook.ipynb", {"cells": cells})
        write_json(tmp_path / name / "trained.json", {"updates": 3, "read": read, "seconds": 4.0})
    (tmp_path / "b" / "notebook.ipynb").write_text("{")
    records = [{"job": name, "status": "ok", "seconds": 10.0} for name in "abc"]
    cached = [{"job": "a", "status": "cached", "seconds": 10.0}]
    (line,) = spent(records + cached, tmp_path, 1.0)
    wanted = "30 s of runs: 7 s in cells, 23 s to start and end them; 4 s trained policies of 04_ppo; pages took 1 s"
    assert line == wanted and spent(cached, tmp_path, 1.0) == []


@pytest.mark.parametrize("text", ["[]", "{}", '{"cells": 3}', '{"cells": [{}]}', '{"cells": [null]}', '{"cells": [3]}'])
def test_any_notebook_can_be_read(text, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notebook.ipynb").write_text(text)
    assert ": 0 s in cells" in spent([{"job": "a", "status": "ok", "seconds": 1.0}], tmp_path, 0.0)[0]
