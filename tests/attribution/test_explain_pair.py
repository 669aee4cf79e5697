"""Two responses to one prompt, and many responses at once."""

import html
import re

import numpy as np
import pytest
from test_explain import HOSTILE, PROMPT, RESPONSE, bert, bert_tokenizer, llama  # noqa: F401

from dense_rlhf.attribution.explain import explain, explain_many
from dense_rlhf.attribution.pairs import explain_pair
from dense_rlhf.types import InputError

OTHER = " was bad."
MODELS = ["llama", "bert"]


@pytest.fixture(params=MODELS)
def reader(request):
    """A decoder and an encoder, with their tokenizers."""
    tokenizer = {"llama": "tokenizer", "bert": "bert_tokenizer"}[request.param]
    return request.getfixturevalue(request.param), request.getfixturevalue(tokenizer)


@pytest.mark.parametrize("source", ["shap", "lime", "leave_one_out"])
def test_many_are_each_as_alone(reader, source):
    prompts, responses = [PROMPT, PROMPT, "", OTHER], [RESPONSE, OTHER, RESPONSE, OTHER]
    many = explain_many(*reader, prompts, responses, source, end="eos")
    for prompt, response, together in zip(prompts, responses, many, strict=True):
        alone = explain(*reader, prompt, response, source, end="eos")
        assert np.allclose(together.credit, alone.credit, atol=1e-5) and together.response == response
        assert together.score == pytest.approx(alone.score, abs=1e-5)
        assert together.baseline == pytest.approx(alone.baseline, abs=1e-5)
        assert together.evaluations == alone.evaluations and together.spans == alone.spans


def test_nothing_to_explain_is_an_empty_list(reader):
    assert explain_many(*reader, [], []) == []


@pytest.mark.parametrize(
    "prompts, responses, players, error",
    [
        ([PROMPT], [RESPONSE, OTHER], "tokens", "1 prompts and 2 responses, wanted as many"),
        ({PROMPT: 0}, [RESPONSE], "tokens", "dict and list, wanted two lists"),
        (iter([PROMPT]), [RESPONSE], "tokens", "list_iterator and list, wanted two lists"),
        (PROMPT, RESPONSE, "tokens", "str and str, wanted two lists"),
        ([PROMPT, PROMPT], [RESPONSE, ""], "tokens", "row 1: response is '', wanted text"),
        ([PROMPT], [RESPONSE], [(0, 3)], "players are spans"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(prompts, responses, players, error, tokenizer, llama):  # noqa: F811
    with pytest.raises(InputError, match=error):
        explain_many(llama, tokenizer, prompts, responses, players=players)


@pytest.mark.parametrize("source", ["shap", "lime"])
def test_the_margin_is_the_credit_of_both_and_the_gap(reader, source):
    pair = explain_pair(*reader, PROMPT, RESPONSE, OTHER, source=source)
    scores = [explain(*reader, PROMPT, response).score for response in (RESPONSE, OTHER)]
    assert pair.margin == pytest.approx(scores[0] - scores[1], abs=1e-5)
    assert pair.margin == pytest.approx(sum(pair.chosen.credit) - sum(pair.rejected.credit) + pair.gap)
    assert abs(pair.gap) < 1e-5 or source == "lime"


def test_exchanged_responses_give_minus_the_margin_and_its_parts(reader):
    pair = explain_pair(*reader, PROMPT, RESPONSE, OTHER, players="words")
    back = explain_pair(*reader, PROMPT, OTHER, RESPONSE, players="words")
    assert back.margin == pytest.approx(-pair.margin, abs=1e-5)
    there, again = (one.ranked(100).sort_values(["characters", "part"]) for one in (pair, back))
    assert np.allclose(there["to_margin"], -again["to_margin"], atol=1e-5)
    assert there["share"].sum() == pytest.approx(1) and len(there) == len(pair.chosen.players) + len(
        back.chosen.players
    )


def test_a_pair_shows_itself_on_one_scale(tokenizer, llama):  # noqa: F811
    pair = explain_pair(llama, tokenizer, PROMPT, RESPONSE, OTHER)
    page, text = pair._repr_html_(), repr(pair)
    for shown in (f"margin {pair.margin:.4f} = ", "chosen", "rejected", pair.ranked().part.iloc[0].strip()):
        assert shown in html.unescape(page) and shown in text
    depths = [float(depth) for depth in re.findall(r"rgba\([\d,]+,([\d.]+)\)", page)]
    credit = np.abs([*pair.chosen.credit, *pair.rejected.credit])
    assert np.allclose(depths, credit / credit.max() * 0.8, atol=0.006)


def test_hostile_text_is_escaped(tokenizer, llama):  # noqa: F811
    page = explain_pair(llama, tokenizer, PROMPT, HOSTILE, OTHER)._repr_html_()
    assert "<script" not in page and "\u202e" not in page
