"""The live view: right for where it runs, quiet enough, and never in the way of the training that it watches."""

import base64
import io
import math
import random
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from traitlets.config import Config

from dense_rlhf.runs import workspace
from dense_rlhf.types import InputError
from dense_rlhf.view import live


def row(update, **changes):
    judged = dict(update=update, proxy=0.31, gold=0.12, kl=1.02, kl_coef=0.05)
    critic = dict(value_loss=0.2134, explained_variance=0.41)
    return judged | critic | {"seconds/sample": 0.5, "warnings": ""} | changes


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log(clock):
    """`log(updates)` gives a watcher that writes lines, on a clock that stands still."""

    def make(updates, *views):
        track = live.Track(updates, "shap seed 0", clock)
        return live.Watcher(track, [live.Log(track), *[view(track) for view in views]])

    return make


def lines(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


# ---------------------------------------------------------------------------------------------------- log lines


def test_a_line_has_all_numbers_and_the_time_left(log, clock, capsys):
    with log(40) as watch:
        for update in range(12):
            clock.now += 6
            watch(row(update))
        assert watch.track.line() == (
            "shap seed 0  12/40  proxy +0.31  gold +0.12  KL 1.02  value loss 0.213  EV 0.41  3 min left"
        )


def test_lines_are_few_and_hold_the_first_and_the_last(log, clock, capsys):
    with log(100) as watch:
        for update in range(100):
            clock.now += 1
            watch(row(update))
    counts = [line.split()[3] for line in lines(capsys)]
    assert counts == [f"{n}/100" for n in (1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100)]


def test_the_last_update_does_not_wait_for_the_block_to_end(log, clock, capsys):
    with log(3) as watch:
        for update in range(3):
            watch(row(update))
        assert [line.split()[3] for line in lines(capsys)] == ["1/3", "3/3"]


def test_the_end_says_how_long_it_took(log, clock, capsys):
    with log(2) as watch:
        for update in range(2):
            clock.now += 3000
            watch(row(update))
    assert lines(capsys)[-1].endswith("took 1 h 40 min")


def test_a_training_that_raises_still_leaves_its_last_line(log, clock, capsys):
    with pytest.raises(RuntimeError, match="out of memory"), log(40) as watch:
        for update in range(5):
            clock.now += 1
            watch(row(update))
        raise RuntimeError("out of memory")
    assert [line.split()[3] for line in lines(capsys)] == ["1/40", "5/40"]


def test_a_warning_is_shown_at_once_and_not_at_every_update(log, clock, capsys):
    with log(100) as watch:
        for update in range(8):
            clock.now += 1
            watch(row(update, warnings="KLBlowUp" if update >= 3 else ""))
        seen = [("WARNING KLBlowUp" in line, line.split()[3]) for line in lines(capsys)]
        assert seen == [(False, "1/100"), (True, "4/100")]
        clock.now += 1
        watch(row(8, warnings="KLBlowUp, EntropyCollapse"))
        assert lines(capsys)[0].endswith("WARNING KLBlowUp, EntropyCollapse")


def test_a_flickering_warning_does_not_flood(log, clock, capsys):
    with log(1000) as watch:
        for update in range(100):
            clock.now += 0.1
            watch(row(update, warnings="KLBlowUp" * (update % 2)))
        assert len(lines(capsys)) <= 3


@pytest.mark.parametrize("bad", [math.nan, None, "missing", [1, 2], {}])
def test_what_is_missing_is_a_dash(log, bad, capsys):
    with log(40) as watch:
        watch({"update": 0, "gold": bad, "kl": 2})
    assert lines(capsys)[0].split("  ")[2:7] == ["proxy –", "gold –", "KL 2.00", "value loss –", "EV –"]


def test_next_to_nothing_has_no_sign_of_its_own(log, capsys):
    with log(40) as watch:
        watch(row(0, gold=-0.001, kl=-0.001))
    assert "gold +0.00  KL 0.00" in lines(capsys)[0]


def test_infinity_is_shown(log, capsys):
    with log(40) as watch:
        watch(row(0, kl=math.inf, warnings=math.nan))
    assert "KL inf" in lines(capsys)[0]


@pytest.mark.parametrize("update", [math.nan, None, "x"])
def test_rows_without_a_number_are_counted(log, update, capsys):
    with log(3) as watch:
        for _ in range(2):
            watch(row(update))
        assert watch.track.done == 2


def test_time_left_after_a_checkpoint_counts_only_what_was_seen(log, clock, capsys):
    with log(40) as watch:
        for update in (30, 31):
            clock.now += 60
            watch(row(update))
        assert watch.track.line().endswith("8 min left") and "32/40" in watch.track.line()


def test_the_clock_starts_with_the_block(log, clock, capsys):
    watch = log(2)
    clock.now += 1e6
    with watch:
        clock.now += 30
        watch(row(0))
    assert lines(capsys)[0].endswith("30 s left")


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (5369, "89 min"), (5371, "1 h 30 min"), (7199, "2 h 00 min")],
)
def test_durations(seconds, text):
    assert live.duration(seconds) == text


# ---------------------------------------------------------------------------------------------------- never in the way


def test_a_view_that_fails_is_dropped_and_reported_once(log, capsys):
    class Broken:
        def __init__(self, track):
            pass

        def show(self):
            raise OSError("no space left")

    with log(40, Broken) as watch:
        for update in range(40):
            watch(row(update))
    printed = lines(capsys)
    assert len(printed) == 3 and "Broken no longer watches, OSError('no space left')" in printed[1]


def test_a_closed_stream_stops_nothing(log, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with log(3) as watch:
        stream.close()
        watch(row(0))


def test_watching_draws_no_random_number_and_changes_no_style(frontend, tmp_path):
    import matplotlib

    torch.manual_seed(0), np.random.seed(0), random.seed(0)

    def state():
        drawn = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
        return *drawn, dict(matplotlib.rcParams)

    before, given = state(), row(0)
    with live.watcher(2, "a", tmp_path) as watch:
        assert watch(given) is None
    assert before == state() and given == row(0)


@pytest.mark.parametrize("view", [live.Log, live.Live])
def test_a_quiet_update_costs_next_to_nothing(view, frontend):
    track = live.Track(10**6, "a")
    with live.Watcher(track, [view(track)]) as watch:
        watch(row(0, warnings="KLBlowUp"))
        start = time.process_time()  # of this process alone: others may share the machine
        for update in range(1, 2000):
            watch(row(update, warnings="KLBlowUp"))
        assert (time.process_time() - start) / 2000 < 1e-3


# ---------------------------------------------------------------------------------------------------- in a notebook


@pytest.fixture
def frontend():
    """An interactive shell whose request came from someone who can be asked, and the messages that it sent."""
    publisher = CapturingDisplayPublisher()
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.display_pub, hook = publisher, sys.excepthook
    request = {"content": {"allow_stdin": True}}
    shell.kernel = SimpleNamespace(get_parent=lambda channel: request if channel == "shell" else {})
    publisher.request = request
    yield publisher
    InteractiveShell.clear_instance()
    sys.excepthook = hook


def test_who_can_be_asked_is_watched_live(frontend):
    assert live.is_live()
    frontend.request["content"]["allow_stdin"] = False
    assert not live.is_live()


@pytest.mark.parametrize("request_", [{}, {"content": {}}, {"content": None}])
def test_a_kernel_without_a_request_gets_lines(frontend, request_):
    frontend.request.clear()
    frontend.request.update(request_)
    assert not live.is_live()


def test_outside_a_notebook_there_are_lines(capsys):
    assert not live.is_live()
    with live.watcher(1, "a") as watch:
        watch(row(0))
    assert len(lines(capsys)) == 1


def watched(frontend, rows, updates=40, label="shap seed 0"):
    """Watch the rows, an hour apart, however slow the drawing; returns the messages."""
    clock = Clock()
    track = live.Track(updates, label, clock)
    with live.Watcher(track, [live.Live(track)]) as watch:
        for each in rows:
            clock.now += 3600
            watch(each)
    return frontend.outputs


def test_one_output_is_updated_in_place_and_ends_as_a_figure(frontend, capsys):
    sent = watched(frontend, [row(update) for update in range(2)])
    assert len({message["transient"]["display_id"] for message in sent}) == 1
    assert [message.get("update", False) for message in sent] == [False] + [True] * 3
    assert all(set(message["data"]) == {"text/html", "text/plain"} for message in sent[:-1])
    last = sent[-1]
    assert set(last["data"]) == {"image/png", "text/plain"}
    alt = last["metadata"]["image/png"]["alt"]
    assert alt == last["data"]["text/plain"] and "2 of 40 PPO updates" in alt and "gold from +0.12 to +0.12" in alt
    assert Image.open(io.BytesIO(last["data"]["image/png"])).size == (650, 430)
    assert capsys.readouterr() == ("", "")


def test_the_panel_shows_numbers_bar_and_curve(frontend):
    panel = BeautifulSoup(watched(frontend, [row(0)])[1]["data"]["text/html"], "html.parser")
    assert panel.progress.attrs.items() >= {"max": "40", "value": "1"}.items()
    assert "1/40 updates, 39 h 00 min left" in panel.text
    texts = "proxy (sd)+0.31", "gold (log-odds)+0.12", "KL (nats)1.02", "value loss0.213", "explained variance0.41"
    assert all(text in panel.text for text in texts)
    kind, data = panel.img["src"].split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG") and panel.img["alt"]
    assert not panel.find_all("script") and not panel.find_all(role="status")


def test_a_panel_before_the_first_update(frontend):
    sent = watched(frontend, [])
    assert "waiting for the first update" in sent[0]["data"]["text/html"]
    assert sent[-1]["data"] == {"text/plain": "shap seed 0: no update was made"}


def test_drawing_waits_but_a_new_warning_does_not(frontend):
    clock = Clock()
    track = live.Track(1000, "a", clock)
    with live.Watcher(track, [live.Live(track)]) as watch:
        for update in range(300):
            clock.now += 0.01
            watch(row(update, warnings="KLBlowUp" if update >= 7 else ""))
        assert [re.search(r"(\d+)/1000", m["data"]["text/plain"])[1] for m in frontend.outputs][:3] == ["0", "1", "8"]
        assert len(frontend.outputs) <= 6
    panel = frontend.outputs[2]["data"]["text/html"]
    assert "KLBlowUp since update 7" in BeautifulSoup(panel, "html.parser").find(role="status").text
    assert "KLBlowUp since update 7" in frontend.outputs[-1]["metadata"]["image/png"]["alt"]


def test_drawing_takes_a_small_share_of_the_time(frontend, monkeypatch):
    monkeypatch.setattr(live, "picture", lambda *_: time.sleep(0.2) or b"")
    track = live.Track(10, "a", Clock())
    view = live.Live(track)
    track.add(row(0))
    view.show()
    assert view.pause >= 0.2 / live.DRAW_SHARE


def test_a_training_that_raises_leaves_a_figure(frontend):
    track = live.Track(40, "a")
    with pytest.raises(KeyboardInterrupt), live.Watcher(track, [live.Live(track)]) as watch:
        watch(row(0))
        raise KeyboardInterrupt
    assert "image/png" in frontend.outputs[-1]["data"] and "stopped after 1 of 40" in live.headline(track)


def test_hostile_labels_and_warnings_stay_text(frontend):
    text = "\"><img src=x onerror=alert(1)> </script><script>alert(1)</script> $x_{ '"
    sent = watched(frontend, [row(0, warnings=text)], label=text)
    panel = BeautifulSoup(sent[1]["data"]["text/html"], "html.parser")
    assert len(panel.find_all("img")) == 1 and not panel.find_all("script") and not panel.find_all(onerror=True)
    assert panel.strong.text == text and text in panel.find(role="status").text
    assert "image/png" in sent[-1]["data"]


@pytest.mark.parametrize("values", [[math.nan] * 3, [math.inf, 1.0, -math.inf], [None] * 3, [1e300, -1e300, 0]])
@pytest.mark.filterwarnings("error")
def test_odd_numbers_are_drawn_around(values):
    track = live.Track(3, "a")
    for update, value in enumerate(values):
        track.add(row(update, proxy=value, gold=value, kl=value))
    assert "<progress" in live.panel(track) and live.picture(track, live.headline(track)).startswith(b"\x89PNG")


def test_the_figure_names_its_units_and_fits(monkeypatch):
    from matplotlib.figure import Figure

    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (save(self, *a, **k), kept.append(self)))
    track = live.Track(30, "a label that is as long as the longest arm of a study, seed 1234")
    for update in range(20):
        track.add(row(update, warnings="KLBlowUp" if update == 4 else "EntropyCollapse" if update == 9 else ""))
    live.picture(track, live.headline(track))
    (figure,), (top, bottom) = kept, kept[0].axes
    legend = [text.get_text() for text in top.get_legend().get_texts()]
    assert legend == ["proxy (sd)", "gold (log-odds)", "warning begins"]
    assert "nats" in bottom.get_ylabel() and "PPO update" in bottom.get_xlabel() and top.get_ylabel()
    assert {line.get_xdata()[0] for line in top.lines if line.get_linestyle() == ":"} == {4, 9}
    texts = (figure._suptitle, top.get_legend(), top.yaxis.label, bottom.yaxis.label)
    boxes = [text.get_window_extent() for text in texts]
    assert all(box.x0 >= 0 and box.x1 <= 650 and box.y0 >= 0 and box.y1 <= 430 for box in boxes)
    assert boxes[0].y0 >= boxes[1].y1 and boxes[1].y0 >= top.bbox.y1 - 1
    assert len({line.get_color() for ax in (top, bottom) for line in ax.lines}) == 4


# ---------------------------------------------------------------------------------------------------- real kernels

SCRIPT = """
from dense_rlhf.view import live
with live.watcher(3, "shap seed 0") as watch:
    for update in range(3):
        watch({"update": update, "proxy": 0.1, "gold": 0.2, "kl": 0.3, "value_loss": 0.4, "explained_variance": 0.5})
"""


def test_papermill_gets_lines_and_no_widget(tmp_path):
    import papermill

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SCRIPT)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False, cwd=str(workspace()))
    outputs = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs
    assert {(out.output_type, out.get("name")) for out in outputs} == {("stream", "stderr")}
    text = "".join(out.text for out in outputs)
    assert [line.split("  ")[:2] for line in text.splitlines()] == [["shap seed 0", "1/3"], ["shap seed 0", "3/3"]]
    assert "widget" not in (tmp_path / "out.ipynb").read_text()


def test_a_real_kernel_knows_that_somebody_asks():
    """JupyterLab and VS Code send requests with `allow_stdin`; nbclient, and with it papermill, without."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(workspace()))
    try:
        seen = []
        reply = client.execute_interactive(
            SCRIPT, allow_stdin=True, output_hook=seen.append, timeout=60, stdin_hook=lambda _: None
        )
        assert reply["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    kinds = {message["msg_type"] for message in seen} - {"status", "execute_input"}
    assert kinds == {"display_data", "update_display_data"}


def test_a_script_gets_lines():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=workspace())
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (0, "", 2), done.stderr


# ---------------------------------------------------------------------------------------------------- TensorBoard


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_every_finite_number(tmp_path, capsys):
    folder = tmp_path / "board" / "a"
    with live.watcher(3, "shap seed 0", folder) as watch:
        for update, gold in enumerate((1.0, math.nan, 3.0)):
            watch(row(update, gold=gold, kl=math.inf, note="words", nothing=None))
    read = scalars(folder)
    assert read["gold"] == [(0, 1.0), (2, 3.0)] and read["seconds/sample"] == [(n, 0.5) for n in range(3)]
    assert set(read) == {"proxy", "gold", "value_loss", "explained_variance", "kl_coef", "seconds/sample"}
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"shap seed 0: 7 values that are not finite were not written to {folder}"
    )
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {folder}


def test_tensorboard_hides_what_an_earlier_attempt_wrote(tmp_path):
    for first, gold in ((0, 1.0), (2, 2.0)):
        with live.watcher(4, "a", tmp_path) as watch:
            for update in range(first, 4):
                watch(row(update, gold=gold))
        time.sleep(1.1)  # event files are told apart, and put in order, by the second
    assert scalars(tmp_path)["gold"] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]


def test_tensorboard_is_closed_when_training_raises(tmp_path):
    with pytest.raises(RuntimeError), live.watcher(4, "a", tmp_path) as watch:
        watch(row(0))
        raise RuntimeError
    assert scalars(tmp_path)["gold"] == [(0, 0.12)]


def test_without_the_package_there_is_one_line_of_help(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=r"pip install 'dense-rlhf\[tensorboard\]'") as caught:
        live.watcher(3, "a", tmp_path / "b")
    assert "\n" not in str(caught.value) and not (tmp_path / "b").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="cannot write into"):
        live.watcher(3, "a", tmp_path / "x")
