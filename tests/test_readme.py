"""The README's own code runs, and its commands, files and targets are ones that there are."""

import contextlib
import io
import re
import shlex
import textwrap

import pytest
from conftest import ROOT

from dense_rlhf import __main__
from dense_rlhf.config.study import load_study


def blocks() -> list[str]:
    text = (ROOT / "README.md").read_text()
    return [textwrap.dedent(found) for found in re.findall(r"(?:^(?:    .*)?\n)+", text, re.M)]


def said(code: str) -> tuple[str, dict]:
    """What a block prints, and the names it leaves."""
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue(), names


def test_ppo_with_rewards_of_ones_own_teaches_the_rewarded_word():
    (code,) = (block for block in blocks() if "ppo.update(" in block)
    printed, names = said(code.replace("updates=8", "updates=3"))
    assert printed.count("policy_loss") == 3
    assert (names["rollout"].logprobs != names["rollout"].ref_logprobs).any()


def test_a_search_of_ones_own_ends_in_a_verdict_near_the_best():
    (code,) = (block for block in blocks() if "audit.verdict(" in block)
    printed, names = said(code)
    best, _, _ = names["search"].incumbent()
    assert printed.startswith("Converged") and max(abs(w - b) for w, b in zip(best, (0.2, 0.5, 0.3))) < 0.2


def commands():
    """Every line of the README's blocks that calls our command line or make."""
    lines = [line.split("  #")[0].strip() for block in blocks() for line in block.splitlines()]
    return [line for line in lines if re.match(r"(make|python -m dense_rlhf|accelerate launch)\b", line)]


@pytest.mark.parametrize("line", [line for line in commands() if not line.startswith("make")])
def test_commands_are_ones_that_we_have(line, monkeypatch):
    """Parsed by the parser itself, with a study that exists and whose parameters are accepted; nothing is run."""
    words = shlex.split(line)
    words = words[words.index("dense_rlhf") + 1 :]
    kept = {}
    for name in ("_run", "_status", "_check", "_train", "_search", "_report", "_list", "_serve"):
        if hasattr(__main__, name):
            monkeypatch.setattr(__main__, name, lambda arguments: kept.update(vars(arguments)) or 0)
    assert __main__.main(words) == 0 and kept
    if "study" in kept and not any(part in line for part in ("FILE", "FOLDER", "STUDY")):
        load_study(ROOT / kept["study"], kept.get("set") or ())


def test_make_targets_that_it_names_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "reports" / "README.md").read_text()
    named = set(re.findall(r"(?:`|^    )make ([a-z]+)", text, re.M))
    assert named and named <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))


def test_files_that_it_names_exist():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`((?:params|tests|benchmarks|dense_rlhf|notebooks|locks|docs)/[\w./-]+\.\w+)`", text)
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    listed = re.findall(r"^\| `((?:ablations/)?[\w]+)` \|", text.split("**Play.**")[1].split("**Run")[0], re.M)
    wanted = [*named, *links, *(f"notebooks/{name}.ipynb" for name in listed)]
    missing = [name for name in wanted if not (ROOT / name).exists()]
    assert named and listed and not missing
