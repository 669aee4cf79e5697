"""Preference pairs: every layout is read, one prompt is in one split, and one bad row is one counted row."""

import pytest
from conftest import SHARED
from made_rows import CHATS, HH_ROWS, hh_row, left_out, total, turns, write_rows

from dense_rlhf.config.params import DataParams
from dense_rlhf.data import collect_pairs, load_data, preference_pair, prompt_text
from dense_rlhf.data.pairs import as_dialogue, parse_turns
from dense_rlhf.types import InputError, Message, PreferencePair

OTHER = "fields missing or of another type"


def test_a_dialogue_is_its_turns():
    text = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant: He said Human: no.\nAssistant: yes "
    *prompt, reply = parse_turns(text)
    assert prompt == [Message("user", "hi"), Message("assistant", "hello"), Message("user", "why?")]
    assert reply == Message("assistant", "He said Human: no.\nAssistant: yes")
    assert prompt_text(tuple(prompt)) == "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    for same in (text.strip(), "\n" + text, text.replace("\n\n", "\r\n\r\n")):
        assert parse_turns(same) == (*prompt, reply)


@pytest.mark.parametrize("text", ["", "no turns", "\n\nHuman: hi", "\n\nAssistant: a\n\nHuman: b"])
def test_a_dialogue_without_a_last_assistant_turn_is_refused(text):
    with pytest.raises(InputError, match="end with the assistant's"):
        preference_pair({"chosen": text, "rejected": text})


ASKED = (Message("user", "q"),)
LONGER = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"), Message("user", "r"))
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"chosen": "\n\nHuman: q\n\nAssistant: y", "rejected": "\n\nHuman: q\n\nAssistant: n"}, ASKED),
        ({"chosen": "Human: q\n\nAssistant: y", "rejected": "Human: q\n\nAssistant: n"}, ASKED),
        ({"prompt": None, "chosen": "\n\nHuman: q\n\nAssistant: y", "rejected": "\n\nHuman: q\n\nAssistant: n"}, ASKED),
        ({"prompt": "q", "chosen": "\n\nHuman: q\n\nAssistant: y", "rejected": "\n\nHuman: q\n\nAssistant: n"}, ASKED),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " y", "rejected": " n"}, ASKED),
        ({"prompt": "\n\nHuman: q", "chosen": " y", "rejected": " n"}, ASKED),
        ({"prompt": "\n\nHuman: q", "chosen": "\n\nAssistant: y", "rejected": "\n\nAssistant: n"}, ASKED),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": turns("q", "y"), "rejected": turns("q", "n")[1:]}, ASKED),
        ({"prompt": "The sky is", "chosen": " y", "rejected": " n"}, "The sky is"),
        ({"prompt": turns("q"), "chosen": "y", "rejected": "n"}, ASKED),
        ({"prompt": "q", "chosen": turns("q", "y"), "rejected": turns("q", "n")}, ASKED),
        ({"prompt": "", "chosen": turns("q", "y"), "rejected": turns(" q ", "n ")}, ASKED),
        ({"chosen": turns("q", "y"), "rejected": turns("q", "n"), "score_chosen": 8.0}, ASKED),
        ({"prompt": "q", "chosen": turns("q", "y")[1:], "rejected": turns("q", "n")[1:]}, ASKED),
        ({"prompt": turns("q"), "chosen": turns("q", "y")[1:], "rejected": turns("q", "n")[1:]}, ASKED),
        ({"prompt": turns("q"), "chosen": turns("q", "y"), "rejected": turns("q", "n")}, ASKED),
        ({"prompt": [], "chosen": turns("q", "y"), "rejected": turns("q", "n")}, ASKED),
        ({"prompt": [SYSTEM], "chosen": turns("q", "a", "r", "y"), "rejected": turns("q", "a", "r", "n")}, LONGER),
        (
            {
                "prompt": [SYSTEM, *turns("q")],
                "chosen": turns("q", "a", "r", "y")[1:],
                "rejected": turns("q", "a", "r", "n")[1:],
            },
            LONGER,
        ),
    ],
)
def test_every_layout_is_read(row, prompt):
    assert preference_pair(row) == PreferencePair(prompt, "y", "n")
    dataset = collect_pairs([*HH_ROWS, row], preference_pair, 2000, "pairs", "r")
    assert dataset.counts["read"] == total(dataset.counts, "kept: ") == 401


def changed(role="user", content="question 0", **fields):
    """A good chat whose first turn is another."""
    first = {"role": role, "content": content} | fields
    return {side: [first, CHATS[0][side][1]] for side in ("chosen", "rejected")}


TURNS, ROLE, PART = "user and assistant do not take turns", "a role that is not user, assistant or system", "tool"
LAST = "a dialogue must have turns and end with the assistant's"
TWICE = "\n\nHuman: hi\n\nHuman: are you there\n\nAssistant: "
BAD_ROWS = [
    ({**hh_row(0), "rejected": hh_row(1)["rejected"]}, "the prompts of the two sides differ"),
    ({**hh_row(0), "chosen": "\n\nHuman: question 0\n\nAssistant:"}, "empty prompt or reply"),
    ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "empty prompt or reply"),
    ({"chosen": "\n\nHuman:\n\nAssistant: a", "rejected": "\n\nHuman:\n\nAssistant: b"}, "empty prompt or reply"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt or reply"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty prompt or reply"),
    ({**hh_row(0), "rejected": hh_row(0)["chosen"]}, "identical sides"),
    ({"chosen": hh_row(0)["chosen"]}, OTHER),
    ({**hh_row(0), "chosen": 7}, OTHER),
    ({**hh_row(0), "chosen": None}, OTHER),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, OTHER),
    ({"prompt": [3], "chosen": "a", "rejected": "b"}, OTHER),
    ({"prompt": "a", "chosen": float("nan"), "rejected": "b"}, OTHER),
    ({"prompt": "a", "chosen": b"a", "rejected": b"b"}, OTHER),
    ({"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, OTHER),
    (None, OTHER),
    ([1, 2], OTHER),
    ("text", OTHER),
    (InputError("a field is given twice"), "a field is given twice"),
    ({**hh_row(0), "chosen": "\n\nHuman: question 0"}, LAST),
    ({"chosen": "plain", "rejected": "text"}, LAST),
    ({**hh_row(0), "rejected": "text"}, LAST),
    ({"chosen": [], "rejected": []}, LAST),
    ({"chosen": turns("q"), "rejected": turns("q")}, LAST),
    (hh_row("long " * 100), "prompt too long"),
    (HH_ROWS[5], "duplicate"),
    ({side: "Be kind." + text for side, text in hh_row(0).items()}, "text before the first turn"),
    ({"chosen": TWICE + "yes", "rejected": TWICE + "no"}, TURNS),
    ({side: text.replace("\n\nA", "\n\nAssistant: so\n\nA") for side, text in hh_row(0).items()}, TURNS),
    (
        {"chosen": "\n\nAssistant: a" + hh_row(0)["chosen"], "rejected": "\n\nAssistant: a" + hh_row(0)["rejected"]},
        TURNS,
    ),
    ({"prompt": turns("q", "a"), "chosen": turns("q", "b")[1:], "rejected": turns("q", "c")[1:]}, TURNS),
    ({"prompt": "other", **CHATS[0]}, TURNS),
    (changed("system"), TURNS),
    (changed("tool"), ROLE),
    (changed("developer"), ROLE),
    (changed("User"), ROLE),
    (changed(None), ROLE),
    (changed(["user"]), ROLE),
    (changed(content=None), "a turn whose content is no text"),
    (changed(content=7), "a turn whose content is no text"),
    (changed(content=[{"type": "text", "text": "q"}]), "a turn whose content is no text"),
    (changed(content=None, tool_calls=[{"id": "1"}]), "a turn that calls a tool"),
    (changed(tool_calls=[{"id": "1"}]), "a turn that calls a tool"),
    (hh_row("\ud83d 5"), "half a surrogate pair, which is no character"),
    (hh_row(0, chosen="yes \udc00"), "half a surrogate pair, which is no character"),
    ({"prompt": "a", "chosen": "b", "rejected": "\ud83d"}, "half a surrogate pair, which is no character"),
]


@pytest.mark.parametrize("row, reason", BAD_ROWS)
def test_one_bad_row_is_one_counted_row(row, reason):
    dataset = collect_pairs([*HH_ROWS, row], preference_pair, 200, "pairs", "r")
    assert left_out(dataset) == {reason: 1} and dataset.counts["read"] == 401


def test_a_parser_of_the_users_may_raise():
    for error in (KeyError("x"), IndexError(), ValueError("bad"), TypeError()):

        def parse(row, error=error):
            if row is None:
                raise error
            return preference_pair(row)

        assert left_out(collect_pairs([None, *HH_ROWS], parse, 2000, "pairs", "r")) == {OTHER: 1}


def test_empty_tool_calls_are_none():
    """A table has the column in every row where one row has it."""
    assert left_out(collect_pairs([changed(tool_calls=None), *CHATS], preference_pair, 200, "p", "r")) == {
        "duplicate": 1
    }


def test_one_prompt_is_never_in_two_splits():
    rows = HH_ROWS + [hh_row(i, chosen="certainly") for i in range(400)]
    dataset = collect_pairs(rows, preference_pair, 2000, "hh_rlhf", "r")
    prompts = [{p.prompt for p in part} for part in (dataset.reward, dataset.gold, dataset.test)]
    prompts += [set(dataset.train_prompts), set(dataset.validation_prompts)]
    assert len(set().union(*prompts)) == sum(map(len, prompts)) == 400
    assert dataset.is_pairwise and set(dataset.test_prompts) == prompts[2]


def test_a_prompt_of_two_layouts_is_in_one_split_and_its_pair_is_one():
    asked = [f"Is film {i} good?" for i in range(200)]
    texts = [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in asked]
    messages = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in texts]
    other = [row | {"chosen": "well, yes"} for row in messages]
    dataset = collect_pairs([*texts, *messages, *other], preference_pair, 200, "p", "r")
    assert left_out(dataset) == {"duplicate": 200}
    splits = dataset.reward, dataset.gold, dataset.test, dataset.train_prompts, dataset.validation_prompts
    prompts = [{prompt_text(as_dialogue(getattr(one, "prompt", one))) for one in split} for split in splits]
    assert len(set().union(*prompts)) == sum(map(len, prompts)) == 200


def test_too_few_rows_for_the_splits_raise():
    with pytest.raises(InputError, match="3 rows leave nothing for .*; wanted chosen and rejected"):
        collect_pairs(HH_ROWS[:3], preference_pair, 2000, "hh_rlhf", "r")


@pytest.mark.parametrize("name", ["hh_rlhf", "ultrafeedback"])
@pytest.mark.parametrize("rows", [HH_ROWS, CHATS], ids=["texts", "messages"])
@pytest.mark.parametrize("file", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_either_name_reads_every_layout_from_a_file(tmp_path, name, rows, file):
    dataset = load_data(DataParams(name, path=str(write_rows(tmp_path / file, rows))))
    assert left_out(dataset) == {} and dataset.counts["read"] == 400 and dataset.name == name
    assert dataset.reward[0].prompt[0].role == "user" and dataset.reward[0].chosen.startswith("yes")


REAL = {"the prompts of the two sides differ": 9, "identical sides": 2, "empty prompt or reply": 4, TURNS: 6}


@pytest.mark.parametrize(
    "name, file, rows, lost",
    [
        ("hh_rlhf", "hh_rlhf/helpful-base-test.jsonl.gz", 2354, REAL),  # the four are empty rejected replies
        ("ultrafeedback", "ultrafeedback/pairs.jsonl.gz", 1000, {"identical sides": 4, "empty prompt or reply": 2}),
    ],
)
def test_the_real_files(name, file, rows, lost):
    path = SHARED / file
    if not path.exists():
        pytest.skip(f"the real file is not here: {path}")
    dataset = load_data(DataParams(name, path=str(path), max_prompt_chars=10**6))
    assert dataset.counts["read"] == rows and left_out(dataset) == lost
