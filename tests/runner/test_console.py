"""What the command line prints of runs."""

import pytest

from dense_rlhf.files import write_json
from dense_rlhf.runner.console import spent


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
