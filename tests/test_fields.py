"""What a column's name and content say: read as what it is, or refused by name; never lost."""

import pytest

from finetune_kit.core import DatasetError
from finetune_kit.rows import load_rows

PASSAGE = "The river Elbe flows north through the old town of Dresden, number "
COLORS = ["red", "green", "blue"]
USER = dict(role="user", content="Why?")
ANSWER = dict(role="assistant", content="Because.")


def rows_of(n=4, **columns):
    "Rows whose columns are functions of their number."
    return [{name: value(i) for name, value in columns.items()} for i in range(n)]


def question(i):
    return f"Where is town {i}?"


def passage(i):
    return PASSAGE + str(i)


def chosen_from(*labels, **columns):
    "Rows with choices, one for each label."
    columns = columns or dict(choices=COLORS)
    return [dict(question=question(i), answer=label, **columns) for i, label in enumerate(labels)]


def numbered(stem, texts=COLORS, first=1):
    return {f"{stem}{i}": text for i, text in enumerate(texts, first)}


def judge(**marks):
    return [dict(question="Why?", answer="Because.", **marks)]


def in_turn(**marks):
    return [dict(messages=[USER, ANSWER | marks])]


CHOICES = {  # Kind → rows, and the first answer; or a piece of the message that refuses them
    "from 0": (chosen_from(0, 2), "red"),
    "from 1": (chosen_from(1, 3), "red"),
    "no row tells": (chosen_from(1, 2), "mapping={'numbers': 'from 1'}"),
    "rows contradict": (chosen_from(0, 3), "fit only one"),
    "numbered columns": (chosen_from("1", "2", **numbered("option")), "red"),
    "columns from 0": (chosen_from("1", "2", **numbered("option", first=0)), "green"),
    "named by column": (chosen_from("option2", **numbered("option")), "green"),
    "numbers are texts": (chosen_from(21, 22, choices=[21, 22, 23]), "21"),
    "words and numbers": (chosen_from("2", "none", choices=["1", "2", "none"]), "2"),
    "letter and number": (chosen_from("B", answer_idx=1, choices=COLORS), "green"),
    "objects": (chosen_from("B", choices=[dict(id="A", text="x"), dict(id="B", text="y")]), "y"),
    "objects, no label": (chosen_from(0, choices=[dict(text="x"), dict(text="y")]), "x"),
    "numbered objects": (
        chosen_from(2, choices=[dict(id=1, text="x"), dict(id=2, text="y")]),
        "y",
    ),
    "marked object": (
        [
            dict(
                question="Q?", choices=[dict(text="x", correct=False), dict(text="y", correct=True)]
            )
        ],
        "y",
    ),
    "unknown object": (
        chosen_from(0, choices=[dict(text="x", votes=1), dict(text="y", votes=2)]),
        "votes",
    ),
    "bars": (chosen_from("B", choices="red|green|blue"), "green"),
    "letters in a text": (chosen_from("B", choices="A) red B) green"), "green"),
    "mathqa": (chosen_from("b", options="a ) 38 , b ) 27.675 , c ) 30"), "27.675"),
    "points": (chosen_from("green", choices="- red\n- green"), "green"),
    "lines": (chosen_from("C", choices="A. red\nB. green\nC. blue"), "blue"),
    "a list as Python writes it": (chosen_from("B", choices="['red', 'green']"), "green"),
    "a list as NumPy writes it": (chosen_from("B", choices="['red' 'green']"), "without commas"),
    "commas": (chosen_from("B", choices="red, green"), "no list of 2 to 10"),
    "empty cells": (chosen_from("B", A="red", B="green", C="", D=None), "green"),
    "an empty one is right": (chosen_from("C", A="red", B="green", C="", D=None), "empty"),
    "two are right": (chosen_from(["A", "B"]), "names none"),
    "copa": (
        [
            dict(premise="It fell.", choice1="A.", choice2="B.", question="cause", label=label)
            for label in (0, 1)
        ],
        "A.",
    ),
    "siqa": (
        [
            dict(context=passage(i), question="Why?", label=i, **numbered("answer", "xyz"))
            for i in ("1", "3")
        ],
        "x",
    ),
    "winogrande": ([dict(sentence="It is _.", option1="x", option2="y", answer="2")], "y"),
    "reclor": ([dict(context="C", question="Q?", answers=["x", "y"], label=0)], "x"),
    "no label": ([dict(question="Q?", choices=COLORS)], "nothing that says which is right"),
}

COLUMNS = {
    "xsum": (rows_of(document=passage, summary=lambda i: f"It flows, {i}."), "It flows, 0."),
    "cnn": (rows_of(article=passage, highlights=lambda i: f"Flows {i}", id=str), "Flows 0"),
    "samsum": (rows_of(dialogue=passage, summary=lambda i: f"They meet {i}"), "They meet 0"),
    "billsum": (rows_of(text=passage, summary=lambda i: f"It is {i}", title=str), "It is 0"),
    "spelled otherwise": (rows_of(Text=passage, SUMMARY=lambda i: f"So {i}"), "So 0"),
    "two summaries": (rows_of(text=passage, summary=question, abstract=passage), "choose one"),
    "to be summed up": (
        rows_of(instruction=lambda i: "Sum up.", document=passage, summary=lambda i: f"S {i}"),
        "S 0",
    ),
    "source and target": (rows_of(source=passage, target=lambda i: f"Ziel {i}"), "Ziel 0"),
    "languages": (
        rows_of(en=passage, fi=lambda i: f"kaupunki{i}"),
        "mapping={'question': 'fi', 'answer': 'en'}",
    ),
    "a script without spaces": (rows_of(en=passage, zh=lambda i: f"早上好{i}"), "'zh'"),
    "translation": (
        rows_of(translation=lambda i: dict(en=passage(i), de=f"Der Fluss {i}")),
        "'translation.de'",
    ),
    "extraction": (rows_of(sentence=passage, entities=lambda i: f"Dresden{i}"), "'entities'"),
    "classes": (rows_of(text=passage, label=lambda i: "ab"[i % 2]), "'label'"),
    "numbered classes": (rows_of(text=passage, label=lambda i: i % 2), "'label'"),
    "sentiment": (rows_of(tweet=passage, sentiment=lambda i: i % 2), "'sentiment'"),
    "entailment": (rows_of(premise=passage, hypothesis=passage, label=int), "'hypothesis'"),
    "text and output": (rows_of(text=passage, output=str), "'output'"),
    "questions of a story": (
        rows_of(story=passage, questions=lambda i: [question(i)]),
        "questions",
    ),
    "context, ask, reply": (rows_of(context=passage, ask=question, reply=str), "0"),
    "passage, ask, reply": (rows_of(passage=passage, ask=question, reply=str), "0"),
    "unknown passage": (rows_of(para=passage, ask=question, reply=str), "can be read in 2 ways"),
    "an ask without a mark": (
        rows_of(context=passage, ask=lambda i: f"name town {i}", answer=str),
        "'question': 'ask'",
    ),
    "verdict and note": (
        rows_of(ask=question, verdict=lambda i: "ab"[i % 2], note=passage),
        "a",
    ),
    "note alone": (rows_of(ask=question, note=passage), "no question and answer"),
    "two passages": (
        rows_of(question=question, context=passage, article=str, answer=str),
        "choose",
    ),
    "two thoughts": (rows_of(question=question, thinking=str, cot=passage, answer=str), "choose"),
}

MARKS = {
    **{
        f"{name} {value}": (judge(**{name: value}), "marked undesirable")
        for name, value in [
            *(("good", False), ("accept", False), ("isValid", False), ("is_valid", "no")),
            *(("positive", 0), ("is_chosen", False), ("kto-label", "False"), ("label", "no")),
            *(("preference", "rejected"), ("Status", "Rejected"), ("feedback", "negative")),
            *(("rating", "bad"), ("quality", "poor"), ("flagged", True), ("is spam", "yes")),
            *(("review_status", "REJECTED"), ("annotatorLabel", "bad"), ("badRow", True)),
            *(("is_hallucination", True), ("accepted_answer", False), ("human_verified", "no")),
            *(("deleted", "true"), ("Thumbs Up", False), ("upvoted", 0), ("vote", "👎")),
        ]
    },
    "text": ([dict(text="A bad answer.", label=False)], "marked undesirable"),
    "turn label": (in_turn(label=False), "marked undesirable"),
    "turn rating": (in_turn(Rating="Bad"), "marked undesirable"),
    "turn picture": (in_turn(imageUrl="x.png"), "'imageUrl'"),
    "turn weight": (in_turn(Weight=0), "weight 0"),
    "loss mask": (in_turn(loss_mask=0), "weight 0"),
    "weight as text": (in_turn(weight="0"), "weight 0"),
    "row weight": (judge(Weight="0"), "not to be learned"),
    "no weight": (judge(weight=70.5), "0 (not scored) or 1"),
    "picture": (judge(image_url="http://x/a.png"), "no text"),
    "calls of a row": (judge(tool_calls=[dict(name="f")]), "outside of any turn"),
    "calls of a user": (
        [dict(messages=[USER | dict(tool_calls=[dict(name="f")]), ANSWER])],
        "the assistant's to give",
    ),
    "thoughts": (judge(thinking_trajectories=["Hm."]), "mapping={'reasoning': "),
    "thoughts of a turn": (in_turn(model_reasoning="Hm."), "'model_reasoning'"),
    "a rejected answer": (judge(rejected_answer="No."), "preference"),
    "speaker": (
        [dict(conversation_id=1, speaker=s, text=PASSAGE) for s in ("user", "bot")],
        "a single message",
    ),
    "sender": ([dict(thread_id=1, sender="Ann", text=PASSAGE)], "a single message"),
}


@pytest.mark.parametrize("kind", [*CHOICES, *COLUMNS, *MARKS])
def test_a_kind_is_read_or_refused(kind):
    rows, expected = (CHOICES | COLUMNS | MARKS)[kind]
    try:
        loaded = load_rows(rows)
    except DatasetError as error:
        assert expected in str(error)
        assert len(expected) > 3, f"refused, and should be read: {error}"
    else:
        assert loaded[0]["messages"][-1]["content"] == expected


USED = {  # Marks that say nothing against a row
    "true": judge(label=True, is_valid="yes", rejected=False, flagged=0, weight=1),
    "none": judge(label=None, weight=None, images=None, chosen=None, rating=""),
    "nan": judge(label=float("nan"), weight=float("nan"), images=float("nan")),
    "in words": judge(status="Approved", feedback="thumbs_up"),
}


@pytest.mark.parametrize("kind", USED)
def test_a_good_row_stays(kind):
    rows = load_rows(USED[kind])
    assert rows[0]["messages"] == [USER, ANSWER]
    assert not rows.ignored
    assert not rows.notes


def test_what_cannot_be_read_is_told_once():
    rows = load_rows([*judge(rating=3, status="flagged", score=1)])
    [note] = rows.notes
    assert "may mark bad rows: rating, status." in note
    assert rows.ignored == dict(rating=1, status=1, score=1)
    asked = load_rows(judge(rating=3), mapping=dict(ignore=["rating"]))
    assert not asked.notes
    of_turns = load_rows([[USER, ANSWER | dict(rating=3, name="bob")]])
    assert of_turns.ignored == {"turns[].rating": 1, "turns[].name": 1}


def test_what_text_alone_leaves_unsaid():
    "Metadata stops nothing; a mapping by hand decides."
    meta = dict(url="http://x", date="2020-01-01", lang="en", repo_name="a/b", token_count=3)
    assert load_rows(rows_of(text=passage) and [dict(text=passage(0), **meta)])[0]["text"]
    classes = rows_of(text=passage, label=lambda i: i % 2)
    assert load_rows(classes, mapping=dict(text="text"))[0]["text"] == passage(0)
    learned = load_rows(classes, mapping=dict(question="text", answer="label"))
    assert learned[1]["messages"][-1]["content"] == "1"
    pairs = rows_of(translation=lambda i: dict(en=passage(i), de=f"Der Fluss {i}"))
    chosen = dict(question="translation.de", answer="translation.en")
    assert load_rows(pairs, mapping=chosen)[0]["messages"][0]["content"] == "Der Fluss 0"


def test_numbers_by_other_parts_and_by_hand():
    train, test = chosen_from(1, 3), chosen_from(1, 1)
    parts = dict(train=train, test=test)
    assert load_rows(parts, "test")[0]["messages"][-1]["content"] == "red"
    by_hand = load_rows(test, mapping=dict(numbers="from 0"))
    assert by_hand[0]["messages"][-1]["content"] == "green"


def test_classes_are_no_marks():
    rows = [dict(question=question(i), answer="So.", label=i % 3) for i in range(6)]
    assert len(load_rows(rows)) == 6
    assert len(load_rows([row | dict(label=row["label"] % 2) for row in rows])) == 2


def test_tools_of_a_system_turn_and_spelled_keys():
    system = dict(Role="System", Content="Help.", functions=[dict(name="f")])
    call = {"Role": "Assistant", "Content": None, "toolCalls": [dict(name="f", arguments={})]}
    [row] = load_rows([dict(messages=[system, USER, call])])
    assert row["tools"] == [dict(type="function", function=dict(name="f"))]
    assert row["messages"][-1]["tool_calls"][0]["function"]["name"] == "f"
    log = [dict(speaker="user", text="Why?"), dict(speaker="bot", text="Because.")]
    assert load_rows([dict(messages=log)])[0]["messages"] == [USER, ANSWER]
