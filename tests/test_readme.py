"""The README's own code runs."""

import contextlib
import io
import re
import textwrap

from conftest import ROOT


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
    printed, names = said(code.replace("range(25)", "range(13)"))
    best, _, _ = names["search"].incumbent()
    assert printed.startswith("Converged") and max(abs(w - b) for w, b in zip(best, (0.2, 0.5, 0.3))) < 0.2
