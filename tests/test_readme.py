"""The README's own code runs."""

import contextlib
import io
import re
import textwrap

from conftest import ROOT


def blocks() -> list[str]:
    text = (ROOT / "README.md").read_text()
    return [textwrap.dedent(found) for found in re.findall(r"(?:^(?:    .*)?\n)+", text, re.M)]


def test_ppo_with_rewards_of_ones_own_teaches_the_rewarded_word():
    (code,) = (block for block in blocks() if "ppo.update(" in block)
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("updates=8", "updates=3"), names)
    assert printed.getvalue().count("policy_loss") == 3
    assert (names["rollout"].logprobs != names["rollout"].ref_logprobs).any()
