"""What people's files, trees and tables hold: each kind is read, or refused by name."""

import datetime
import decimal
import gzip
import json
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from finetune_kit.chat import encode_rows
from finetune_kit.core import DatasetError
from finetune_kit.data import data_notes, prepare_dataset
from finetune_kit.rows import load_rows
from finetune_kit.trees import score_once


def contents(rows):
    return [[message["content"] for message in row["messages"]] for row in rows]


def outcome(source, **options):
    "What is said in each row, and each reason; of an error its message as the only reason."
    try:
        rows = load_rows(source, **options)
    except DatasetError as error:
        return [], [str(error)]
    return contents(rows), [reject["reason"] for reject in rows.rejects]


# Trees

Q, A, F, G = (
    dict(id=1, parent_id=None, role="user", text="Q"),
    dict(id=2, parent_id=1, role="assistant", text="A"),
    dict(id=3, parent_id=2, role="user", text="F"),
    dict(id=4, parent_id=3, role="assistant", text="G"),
)
WAY = [["Q", "A", "F", "G"]]
SHORT = [["Q", "A"]]


def last(**changes):
    return [Q, A, F, G | changes]


def in_two(**scopes):
    "Two conversations whose ids both begin at 1."
    return [
        m | {name: str(i) for name in scopes} | dict(text=m["text"] + str(i))
        for i in (1, 2)
        for m in (Q, A)
    ]


def nested(*replies, **beside):
    return [dict(prompt=dict(role="prompter", text="Q", replies=list(replies)), **beside)]


REPLY = dict(role="assistant", text="A")
TREES = {  # Kind → rows, what is said, and a piece of a reason ("" for none)
    "ids begin anew": (in_two(conversation_id=1), [["Q1", "A1"], ["Q2", "A2"]], ""),
    "ids begin anew, thread": (in_two(thread=1), [["Q1", "A1"], ["Q2", "A2"]], ""),
    "ids begin anew, unsaid": (in_two(), [], "conversation_id would tell them apart"),
    "a line twice": ([Q, A, A], SHORT, "duplicate of the message at 2"),
    "pictures": (last(images=["x"]), [], "'images'"),
    "not to be learned": (last(train=False), WAY, ""),
    "different splits": ([Q | dict(split="train"), A | dict(split="test")], [], "different split"),
    "deleted as text": (last(deleted="False"), WAY, ""),
    "deleted": ([Q, A, A | dict(id=3, text="B", deleted="True")], SHORT, "marked as deleted"),
    "behind a deleted one": (
        [Q, A | dict(deleted=1), F, G, A | dict(id=5, text="B")],
        [["Q", "B"]],
        "a message before it is left out: '2'",
    ),
    "a list as id": (last(id=[4]), SHORT, "no id"),
    "NaN as parent": ([Q | dict(parent_id=float("nan")), A | dict(parent_id=1.0)], SHORT, ""),
    "an empty parent": ([Q | dict(parent_id=""), A | dict(id="2", parent_id="1.0")], SHORT, ""),
    "roles in capitals": ([Q | dict(role="User"), A | dict(role="Assistant")], SHORT, ""),
    "another word for roles": ([Q, A | dict(role="model")], SHORT, ""),
    "speakers": ([{**m, "from": m["role"], "role": None} for m in (Q, A)], SHORT, ""),
    "a reply that is none": (nested("x", REPLY), SHORT, "a reply is str"),
    "replies that are none": (nested(None, 3), [], "no message"),
    "a mark beside": (nested(REPLY, label=False), [], "marked undesirable"),
    "an unknown split beside": (nested(REPLY, split="challenge"), [], "'challenge' is none of"),
}


@pytest.mark.parametrize("kind", TREES)
def test_a_tree_is_read_or_refused(kind):
    rows, said, reason = TREES[kind]
    found, reasons = outcome(rows)
    assert found == said
    assert any(reason in given for given in reasons) or not reason, reasons


def test_what_messages_say_is_used():
    marked = [Q | dict(tools=[dict(name="f")], system="Be brief."), A | dict(thinking="Hm.")]
    call = G | dict(tool_calls=[dict(name="f", arguments={})], weight="0", split="test", lang="en")
    rows = load_rows([*marked, F, call])
    system, _, answer, _, last_answer = rows[0]["messages"]
    assert system["content"] == "Be brief."
    assert answer["reasoning_content"] == "Hm."
    assert last_answer["weight"] == 0
    assert last_answer["tool_calls"][0]["function"]["name"] == "f"
    assert rows[0]["tools"]
    assert rows[0]["split"] == "test"
    assert rows.ignored == {"messages[].lang": 1}


def test_a_mapping_holds_for_a_tree():
    rows = load_rows(
        [m | dict(lang="en", images=["x"]) for m in (Q, A)],
        mapping=dict(domain="lang", ignore=["images"]),
    )
    assert contents(rows) == SHORT
    assert rows[0]["domain"] == "en"


def tree(number, follow_ups=3):
    "A question, a shared answer, and several ways on."
    first = 100 * number
    messages = [
        dict(m, id=m["id"] + first, parent_id=p, text=f"{m['text']}{number}")
        for m, p in ((Q, None), (A, first + 1))
    ]
    for way in range(follow_ups):
        place = first + 10 + 2 * way
        messages.append(F | dict(id=place, parent_id=first + 2, text=f"F{number}{way}"))
        messages.append(G | dict(id=place + 1, parent_id=place, text=f"G{number}{way}"))
    return messages


def test_a_tree_stays_in_one_split_and_an_answer_is_learned_once(tmp_path):
    splits = prepare_dataset([message for number in range(30) for message in tree(number)])
    roots = {
        split: {row["messages"][0]["content"] for row in rows} for split, rows in splits.items()
    }
    assert sum(map(len, roots.values())) == len(set().union(*roots.values())) == 30
    assert all(roots.values())
    for rows in splits.values():
        scored = Counter(
            message["content"]
            for row in score_once(rows)
            for message in row["messages"]
            if message["role"] == "assistant" and message.get("weight") != 0
        )
        assert set(scored.values()) == {1}
        assert {f"A{root[1:]}" for root in (row["messages"][0]["content"] for row in rows)} <= set(
            scored
        )


def test_a_row_that_is_left_out_takes_no_shared_answer_with_it():
    from finetune_kit.model import load_tokenizer

    messages = tree(1, 2)
    messages[2]["text"] = "F " * 600
    rows = load_rows(messages)
    tokenizer = load_tokenizer(ROOT / "data/tiny-base")
    [encoded] = encode_rows(rows, tokenizer)
    assert rows.reasons() == {"too long": 1}
    text = tokenizer.decode([token for token in encoded["labels"] if token != -100])
    assert "A1" in text
    messages[2]["text"] = "<image> F"  # now it is rejected when it is read
    [encoded] = encode_rows(load_rows(messages), tokenizer)
    assert all(message.get("weight") != 0 for message in encoded["row"]["messages"])


# Splits and files

GOOD = "".join(json.dumps(dict(question=f"Q{i}?", answer=f"A{i}")) + "\n" for i in range(20))
HELD = "".join(json.dumps(dict(question=f"H{i}?", answer=f"A{i}")) + "\n" for i in range(5))


@pytest.mark.parametrize(
    "train, held, split",
    [
        ("train", "tests", "test"),
        ("trainset", "testset", "test"),
        ("TrainSet", "TestSet", "test"),
        ("train", "validate", "validation"),
        ("x_train_v2", "x_val_v2", "validation"),
        ("data.train", "data.test", "test"),
        ("my_train", "my-eval-v2", "test"),
        ("Training Data", "Test Data", "test"),
        ("all", "held-out", "test"),
        ("train/a", "Dev/a", "validation"),
    ],
)
def test_a_file_is_held_out_by_its_name(train, held, split, tmp_path):
    for name, text in ((train, GOOD), (held, HELD)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(text)
    splits = prepare_dataset(tmp_path)
    assert {row["messages"][0]["content"][0] for row in splits[split]} == {"H"}
    assert not any(row["messages"][0]["content"][0] == "H" for row in splits["train"])


def test_a_name_beside_train_is_asked_for(tmp_path):
    for name, text in (("train", GOOD), ("unseen", HELD)):
        (tmp_path / f"{name}.jsonl").write_text(text)
    train, unseen = tmp_path / "train.jsonl", tmp_path / "unseen.jsonl"
    with pytest.raises(DatasetError, match=r"unseen.jsonl is not: trained on, or held out"):
        prepare_dataset(tmp_path)
    assert len(prepare_dataset(dict(train=train, test=unseen))["test"]) == 5
    both = prepare_dataset(dict(train=[train, unseen]))
    assert sum(map(len, both.values())) == 25


@pytest.mark.parametrize(
    "column", ["split", "Split", "SPLIT", "set", "Subset", "partition", "fold"]
)
def test_a_column_of_splits_is_used(column):
    rows = [
        dict(question=f"{i}?", answer="x") | {column: ["train", "test"][i % 2]} for i in range(20)
    ]
    splits = prepare_dataset([*rows, dict(question="Odd?", answer="x") | {column: "challenge"}])
    assert len(splits["test"]) == 10
    assert f"{column} 'challenge' is none of" in splits["train"].rejects[0]["reason"]


def test_a_column_that_names_no_splits_is_none():
    rows = [dict(question=f"{i}?", answer="x", subset=["en", "de"][i % 2]) for i in range(20)]
    assert sum(map(len, prepare_dataset(rows).values())) == 20
    with pytest.raises(DatasetError, match="split 0 is none of"):
        load_rows([dict(question="Why?", answer="x", split=0)])
    ignored = load_rows(
        [dict(question="Why?", answer="x", split=0)], mapping=dict(ignore=["split"])
    )
    assert len(ignored) == 1


ROW, OTHER = dict(question="Q", answer="A"), dict(question="F", answer="G")
SAID = [dict(role="assistant", content="A")]
JSON_FILES = {  # Kind → value, what is said, and a piece of the message that refuses it
    "lists of other names": (dict(easy=[ROW], hard=[OTHER]), [], "'easy', 'hard'"),
    "a list beside train": (dict(train=[ROW], extra=[OTHER]), [], "'train', 'extra'"),
    "facts beside splits": (dict(train=[ROW], test=[OTHER], info={}), [["Q", "A"], ["F", "G"]], ""),
    "objects around splits": (dict(train=dict(data=[ROW]), version=1), SHORT, ""),
    "columns by index": (dict(question={"0": "Q"}, answer={"0": "A"}), SHORT, ""),
    "one preference": (
        dict(prompt=[dict(role="user", content="Q")], chosen=SAID, rejected=SAID),
        [],
        "preference row",
    ),
}


@pytest.mark.parametrize("kind", JSON_FILES)
def test_a_json_file_is_read_or_refused(kind, tmp_path):
    value, said, reason = JSON_FILES[kind]
    (tmp_path / "a.json").write_text(json.dumps(value))
    found, reasons = outcome(tmp_path / "a.json")
    assert found == said
    assert any(reason in given for given in reasons) or not reason, reasons


def test_what_a_folder_holds_is_read_or_named(tmp_path):
    (tmp_path / "a.ndjson").write_text(GOOD)
    (tmp_path / "state.jsonl").write_text(HELD)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(HELD.replace("H", "I").encode()))
    packed = pyarrow.compress(b"question,answer\nQ,A\n", "zstd", asbytes=True)
    (tmp_path / "c.csv.zst").write_bytes(packed)
    for name in ("d.xlsx", "README.md", "LICENSE"):
        (tmp_path / name).write_text("x")
    splits = prepare_dataset(tmp_path)
    assert sum(map(len, splits.values())) == 31
    assert "Not read, as no loader knows them: d.xlsx" in data_notes(splits)


TABLES = {  # Kind → file, and what is said
    "one space": (
        'question, answer\nQ,     A\n"F, 1", "G, 1"\n',
        [["Q", "    A"], ["F, 1", "G, 1"]],
    ),
    "lines in quotes": ('question, answer\nQ, "A,\n   b"\n', [["Q", "A,\n   b"]]),
    "no space": ("question,answer\nQ,  A\n", [["Q", "  A"]]),
    "sep as text": ("sep=\\t\nquestion\tanswer\nQ\tA\n", SHORT),
    "sep with its own": ("sep=;;;\nquestion;answer;;\nQ;A;;\n", SHORT),
    "sep and returns": ("SEP=\\t\r\nquestion\tanswer\r\nQ\tA\r\n", SHORT),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_read(kind, tmp_path):
    text, said = TABLES[kind]
    (tmp_path / "a.csv").write_text(text, newline="")
    assert outcome(tmp_path / "a.csv")[0] == said


# Types

ASK = dict(role="user", content="Q")
NAN = float("nan")
TYPES = {  # Kind → rows, and what is said
    "arrays of turns": (
        [dict(messages=np.array([ASK, dict(role="assistant", content="A")]))],
        SHORT,
    ),
    "numbers of NumPy": ([dict(question="Q", answer=np.int64(3))], [["Q", "3"]]),
    "absent": ([dict(question="Q", answer="A", weight=pd.NA, images=NAN, tools=NAN)], SHORT),
    "absent texts": (
        [dict(question="Q", answer="A", system=NAN, input=pd.NaT, history=NAN)],
        SHORT,
    ),
    "absent in a turn": (
        [
            dict(
                messages=[
                    ASK | dict(images=NAN),
                    dict(role="assistant", content="A", weight=NAN, thinking=pd.NA),
                ]
            )
        ],
        SHORT,
    ),
    "no answer": ([dict(question="Q", answer=pd.NA), dict(question="Q", answer="A")], SHORT),
    "dates": (
        [dict(question="Q", answer=pd.Timestamp("2020-01-02 03:04"))],
        [["Q", "2020-01-02T03:04:00"]],
    ),
    "decimals": ([dict(question="Q", answer=decimal.Decimal("1.50"))], [["Q", "1.50"]]),
    "bytes": ([dict(question=b"Q", answer=b"A"), dict(question="F", answer=b"\xff")], SHORT),
    "a data frame": (
        pd.DataFrame(dict(question=["Q", None], answer=["A", "B"], weight=[1, NAN])),
        SHORT,
    ),
    "a data set": (datasets.Dataset.from_list([ROW]), SHORT),
    "data sets": (datasets.DatasetDict(train=datasets.Dataset.from_list([ROW])), SHORT),
}


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_is_read(kind):
    rows, said = TYPES[kind]
    assert outcome(rows)[0] == said


@pytest.mark.parametrize("weight", ["0", "0.0", " 0 ", "false", "False", 0.0, np.bool_(False)])
def test_a_weight_of_any_type(weight):
    turns = [ASK, dict(role="assistant", content="A", weight=weight)]
    again = [ASK | dict(content="F"), dict(role="assistant", content="G", weight="1")]
    messages = load_rows([dict(messages=turns + again)])[0]["messages"]
    assert [message.get("weight") for message in messages] == [None, 0, None, None]


def test_arguments_are_json():
    arguments = dict(day=datetime.date(2020, 1, 2), sizes=np.array([1, 2]), n=np.int64(3))
    call = dict(role="assistant", content="", tool_calls=[dict(name="f", arguments=arguments)])
    [row] = load_rows([dict(messages=[ASK, call])])
    called = row["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert called == dict(day="2020-01-02", sizes=[1, 2], n=3)
    for odd in (b"\xff", float("inf"), 1j):
        call["tool_calls"][0]["arguments"] = dict(odd=odd)
        assert "are no JSON" in outcome([dict(messages=[ASK, call])])[1][0]


def test_a_table_adds_no_arguments(tmp_path):
    def call(**arguments):
        turn = dict(
            role="assistant", content=None, tool_calls=[dict(name="f", arguments=arguments)]
        )
        return dict(messages=[ASK, turn])

    table = pyarrow.Table.from_pylist([call(city="Rome"), call(days=3)])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    called = [row["messages"][1]["tool_calls"][0] for row in load_rows(tmp_path / "a.parquet")]
    assert [c["function"]["arguments"] for c in called] == [dict(city="Rome"), dict(days=3)]
