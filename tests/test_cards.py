"""The cards say what data, recipe and parameters say."""

import re

import cards
import pytest


@pytest.mark.parametrize("card", cards.CARDS, ids=lambda card: card.stem)
def test_numbers_are_those_of_what_is_shipped(card):
    text = card.read_text()
    assert cards.MARK.search(text) and text == cards.filled(text), "python tests/cards.py writes them anew"


@pytest.mark.parametrize("card", cards.CARDS, ids=lambda card: card.stem)
def test_no_number_is_typed(card):
    prose = re.sub(r"`[^`]*`", "", cards.MARK.sub("", card.read_text()))
    assert not re.findall(r"\d+", prose)


def test_each_mark_has_its_numbers():
    named = [name for card in cards.CARDS for _, name, _ in cards.MARK.findall(card.read_text())]
    assert sorted(named) == sorted(cards.NUMBERS)
