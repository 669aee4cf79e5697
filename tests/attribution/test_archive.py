"""Archives: other sources, players and orders from the file alone; identity checked; damage is one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from games import pairwise, table_game
from hypothesis import given
from hypothesis import strategies as st
from test_explain import PROMPT, RESPONSE, build

from dense_rlhf.attribution.archive import load, save
from dense_rlhf.attribution.coarse_to_fine import coarse_to_fine
from dense_rlhf.attribution.game import Game, coarser, explain_game
from dense_rlhf.attribution.interactions import interactions
from dense_rlhf.files import write_json
from dense_rlhf.types import InputError


@pytest.fixture(scope="module")
def llama(tokenizer):
    return build("Llama", tokenizer)


@pytest.fixture(scope="module")
def kept(llama, tokenizer, tmp_path_factory):
    """A game with the scores of `shap`, and the file that they are in."""
    game, path = Game.of(llama, tokenizer, PROMPT, RESPONSE), tmp_path_factory.mktemp("kept") / "scores.json"
    explain_game(game, "shap", permutations=4)
    save(game, path)
    return game, path


def test_a_file_answers_as_the_game_does(kept):
    game, path = kept
    read = load(path)
    assert read.scores == game.scores and read.reward_model is None
    assert replace(read.subject, weights="") == game.subject and len(read.subject.weights) == 64
    for source in ("shap", "shared_lime"):
        ours, theirs = (explain_game(one, source, permutations=4) for one in (read, game))
        assert ours.credit == theirs.credit and ours.score == theirs.score
    np.testing.assert_array_equal(*(interactions(one, "tokens", within=1, samples=0).pairs for one in (read, game)))
    with pytest.raises(InputError, match="lacks"):
        explain_game(read, "kernel")


def test_players_coarser_than_those_scored(kept):
    tokens = explain_game(load(kept[1]), "shap", permutations=4)
    words = coarser(tokens, "words")
    np.testing.assert_allclose(words.player_credit, np.bincount(words.player, tokens.credit), atol=1e-12)
    assert words.gap == pytest.approx(tokens.gap) and len(words.players) < len(tokens.players)
    assert coarser(words, "words") == words and coarser(words, "sentences").players[-1][1] == len(RESPONSE)
    with pytest.raises(InputError, match=r"players split ' good\.', which is one; wanted wider ones"):
        coarser(words, "tokens")


def test_a_file_with_all_coalitions_has_every_cut(tmp_path):
    values, main, pairs = pairwise(10, np.random.default_rng(0))
    save(table_game(values), tmp_path / "a")
    read = load(tmp_path / "a")
    tokens, sentences = (explain_game(read, "shap", players, permutations=1) for players in ("tokens", "sentences"))
    np.testing.assert_allclose(sentences.credit, coarser(tokens, "sentences").credit, atol=1e-9)
    assert coarse_to_fine(read, 10).evaluations == 10


def test_a_loaded_game_is_saved_and_goes_on_with_its_model(kept, llama, tokenizer, tmp_path):
    save(load(kept[1]), tmp_path / "again")
    assert load(tmp_path / "again").subject.weights == load(kept[1]).subject.weights
    game = load(tmp_path / "again", Game.of(llama, tokenizer, PROMPT, RESPONSE))
    asked = len(game.scores)
    assert explain_game(game, "shap", permutations=4).credit == explain_game(kept[0], "shap", permutations=4).credit
    assert len(game.scores) == asked
    explain_game(game, "kernel")
    assert len(game.scores) > asked


@pytest.mark.parametrize(
    "other, name",
    [
        (dict(prompt="a film"), "prompt"),
        (dict(response=RESPONSE + "!"), "response"),
        (dict(end="eos"), "reading"),
        (dict(removal="attention_mask"), "removal"),
    ],
)
def test_another_text_is_refused(kept, llama, tokenizer, other, name):
    prompt, response = other.pop("prompt", PROMPT), other.pop("response", RESPONSE)
    with pytest.raises(InputError, match=f"has scores of another game: its {name} is"):
        load(kept[1], Game.of(llama, tokenizer, prompt, response, **other))


def test_other_weights_are_refused(kept, tokenizer):
    changed = build("Llama", tokenizer)
    with torch.no_grad():
        changed.score.weight[0, 0] += 1e-4
    with pytest.raises(InputError, match="has scores of another game: its weights is"):
        load(kept[1], Game.of(changed, tokenizer, PROMPT, RESPONSE))


def test_a_damaged_file_is_one_line(kept, tmp_path):
    text = kept[1].read_text()
    assert kept[1].stat().st_size < 12_000
    for damaged in (text[:-20], text.replace('"drop"', '"pord"'), "[]", "{", '{"format": 1}', "\x00"):
        (tmp_path / "bad").write_text(damaged)
        with pytest.raises(InputError) as refused:
            load(tmp_path / "bad")
        assert str(tmp_path / "bad") in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(InputError, match="is no file"):
        load(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be written"):
        save(kept[0], tmp_path)


FIELDS = [("subject", name) for name in ("response", "spans", "reading", "removal", "output", "prompt", "text")]


@given(
    place=st.sampled_from([*FIELDS, ("coalitions",), ("scores",), ("format",), ("subject",)]),
    value=st.sampled_from([None, "", "x", 3, -1.5, [], {}, [[0, 1]], ["0"], [[0, 10**9]], "AAAA", True]),
)
def test_a_sealed_file_of_something_else_is_one_line(kept, tmp_path_factory, place, value):
    body = json.loads(kept[1].read_text())
    body.pop("hash")
    inner = body
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    path = tmp_path_factory.mktemp("odd") / "file"
    write_json(path, body, sealed=True)
    try:
        load(path)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert place in [("subject", "prompt"), ("subject", "text"), ("subject", "output")]
