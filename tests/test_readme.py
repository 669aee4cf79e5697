"""Code in the README and in docs/ runs, and the commands, files and targets that they name exist."""

import contextlib
import io
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT

from dense_rlhf import __main__
from dense_rlhf.config.study import load_study
from dense_rlhf.files import cache_root

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())


def blocks() -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(r"(?:^(?:    .*)?\n)+", TEXT, re.M)]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 12_000


def test_the_readme_says_what_it_takes_and_where_that_is_kept(monkeypatch):
    monkeypatch.delenv("DENSE_RLHF_CACHE", raising=False)
    kept = f"~/{cache_root().relative_to(Path.home())}"
    text = PAGES[ROOT / "README.md"]
    for words in (kept, "DENSE_RLHF_CACHE", "locks/cuda.txt", "locks/README.md", "--allow-root", "macOS and Windows"):
        assert words in text, words
    assert len(re.findall(r"\d GB", text)) >= 2  # of the environment, and of the cache


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
    """Every line of the blocks that calls our command line or make."""
    lines = [line.split("  #")[0].strip() for block in blocks() for line in block.splitlines()]
    return [line for line in lines if re.match(r"(make|python -m dense_rlhf|dense-rlhf|accelerate launch)\b", line)]


@pytest.mark.parametrize("line", [line for line in commands() if not line.startswith("make")])
def test_commands_are_ones_that_we_have(line, monkeypatch):
    """Parsed by the parser itself, with a study that exists and whose parameters are accepted; nothing is run."""
    words = shlex.split(line)
    words = words[next(i for i, word in enumerate(words) if word in ("dense_rlhf", "dense-rlhf")) + 1 :]
    kept = {}
    for command in (*__main__._of_studies(), *__main__._others()):
        monkeypatch.setattr(__main__, command[1].__name__, lambda arguments: kept.update(vars(arguments)) or 0)
    assert __main__.main(words) == 0 and kept
    if kept.get("study") and not any(part in line for part in ("FILE", "FOLDER", "STUDY")):
        load_study(ROOT / kept["study"], kept.get("set") or ())


def test_make_targets_that_they_name_exist():
    named = set(re.findall(r"(?:`|^    )make ([a-z]+)", TEXT + (ROOT / "reports" / "README.md").read_text(), re.M))
    assert named and named <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    named = re.findall(
        r"`((?:params|tests|benchmarks|dense_rlhf|notebooks|locks|docs|examples)/[\w./-]+\.\w+)", PAGES[page]
    )
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if "://" not in target]
    wanted = [*(ROOT / name for name in named), *(page.parent / target for target in links)]
    assert not [path for path in wanted if not path.exists()]


def test_every_notebook_and_study_is_listed():
    listed = re.findall(r"^\| `((?:ablations/)?[\w]+)` \|", PAGES[ROOT / "README.md"], re.M)
    notebooks = (ROOT / "notebooks").rglob("*.ipynb")
    assert sorted(listed) == sorted(
        str(path.relative_to(ROOT / "notebooks").with_suffix(""))
        for path in notebooks
        if "checkpoints" not in str(path)
    )
    studies = re.findall(r"`(params/[\w/]+\.yaml)`", PAGES[ROOT / "docs" / "studies.md"])
    own = {"params/tiny_language_model.yaml"}  # of notebook 00, which is no study
    every = {
        str(path.relative_to(ROOT)) for path in (ROOT / "params").rglob("*.yaml") if path.parent.name != "accelerate"
    }
    assert set(studies) == every - own
