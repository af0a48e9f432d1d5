"""Files as people have them: each kind gives what it should, or is refused by name."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

from finetune_kit.core import DatasetError
from finetune_kit.rows import load_rows

CASES = ROOT.parent / "shared/cases/data"


def last_answers(rows):
    return [row["messages"][-1]["content"] for row in rows]


def read_case(name):
    if not (CASES / name).exists():
        pytest.skip(f"{CASES / name} is not there")
    return load_rows(CASES / name)


USED = {  # File → rows, and the last answer of the first
    "squad40.jsonl": (40, "wood number 3"),
    "code40.jsonl": (40, "    c = a + b + 0\n    return c\n"),
    "toolcall40.jsonl": (40, "Let me look."),
    "reasoning40.jsonl": (40, "2"),
    "think40.jsonl": (40, "<think>\n0 and 2 make 2.\n</think>\n\nIt is 2."),
    "train_flag40.jsonl": (40, "good text 0"),
    "multi40.jsonl": (40, "It is four."),
    "single40.jsonl": (40, "It is 2."),
    "excel_sep.csv": (2, "A, of course"),
    "tabs.csv": (2, "A, sure"),
    "header_commas_semi.csv": (2, "A"),
    "saved_to_disk": (1, None),
    "oasst_flat.jsonl": (1, "In the woods."),
    "array_in.jsonl": (6, "Bird 0 nests in hollow 0."),
    "array_pretty.jsonl": (6, "Bird 0 nests in hollow 0."),
    "rows_are_lists.jsonl": (2, "A."),
    "hf_sequence.parquet": (1, None),
    "dict_of_lists_turns.jsonl": (1, "A."),
    "developer_role.jsonl": (1, "A."),
    "qa.jsonl.gz": (6, None),
    "bom.jsonl": (6, "Bird 0 nests in hollow 0."),
    "utf16.jsonl": (6, "Bird 0 nests in hollow 0."),
    "u2028.jsonl": (1, None),
    "mixed.jsonl": (5, "A"),
    "semi.csv": (2, 'It is "a",\nclearly'),
    "midquote.csv": (2, 'About 6" tall'),
    "pandas_index.csv": (2, "A"),
    "nul.csv": (2, "A"),
    "na.csv": (3, "NA"),
    "leadzero.csv": (2, "00123"),
    "numbers.jsonl": (None, "3"),
    "list_struct.parquet": (None, None),
    "hf_list.parquet": (None, None),
    "moss_hist.jsonl": (1, None),
    "dolly.jsonl": (2, "In the box."),
    "orca.jsonl": (1, "A."),
}


@pytest.mark.parametrize("name", USED)
def test_a_case_is_read(name):
    rows = read_case(name)
    n_rows, answer = USED[name]
    assert n_rows in (None, len(rows)), rows.reasons()
    assert answer in (None, rows[0].get("messages", [{}])[-1].get("content"))


REFUSED = {  # File → rows that stay, and the reason that the others are counted under
    "kto40.jsonl": (20, "marked undesirable"),
    "nan.jsonl": (1, "answer is inf"),
    "dupkeys.jsonl": (1, "the key"),
    "latin1.csv": (1, "broken text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_of_a_case_are_refused_by_name(name):
    rows = read_case(name)
    n_rows, reason = REFUSED[name]
    assert len(rows) == n_rows
    assert any(reason in reject["reason"] for reject in rows.rejects)


def test_a_picture_is_no_text():
    with pytest.raises(DatasetError, match=r"'images', which is no text"):
        read_case("image_tag.jsonl")


def test_calls_thoughts_and_weights_are_kept():
    [call] = read_case("toolcall40.jsonl")[0]["messages"][1]["tool_calls"]
    assert call["function"] == dict(name="weather", arguments=dict(town=0))
    assert read_case("toolcall40.jsonl")[0]["tools"][0]["function"]["name"] == "weather"
    assert read_case("reasoning40.jsonl")[0]["messages"][1]["reasoning_content"]
    assert read_case("train_flag40.jsonl")[0]["messages"][1]["weight"] == 0


# Of the same kinds, written here


KINDS = {  # Kind → rows, and what the first says last; or a piece of the message that refuses them
    "mmlu": ([dict(question="Where?", choices=["here", "there"], answer=0)], "here"),
    "arc": (
        [dict(question="Where?", choices=dict(text=["x", "y"], label=["A", "B"]), answerKey="B")],
        "y",
    ),
    "cmmlu": ([dict(question="Where?", A="x", B="y", answer="B")], "y"),
    "hellaswag": ([dict(ctx="He goes", endings=["home.", "out."], label="0")], "home."),
    "choices, no label": ([dict(question="Where?", choices=["x", "y"])], "which is right"),
    "trivia": ([dict(question="Who?", answer=dict(value="Me", aliases=["I"]))], "Me"),
    "boolq": ([dict(question="is it", passage="It is.", answer=True)], "true"),
    "dpo": ([dict(prompt="Why?", chosen="So.", rejected="No.")], "a preference row"),
    "kto": ([dict(prompt="Why?", completion="No.", label=False)], "marked undesirable"),
    "llava": ([dict(image="a.jpg", conversations=[])], "'image', which is no text"),
    "two answers": ([dict(problem="1+1?", solution="It is 2.", answer="2")], "choose one"),
    "two texts": (
        [dict(a="This is a whole sentence.", b="And so is this one here.")],
        "can be read in 4 ways",
    ),
    "a turn a row": ([dict(role="user", content="Why?")], "a single message"),
    "tree": (
        [
            dict(
                prompt=dict(
                    text="Why?",
                    role="prompter",
                    replies=[dict(text="So.", role="assistant", replies=[])],
                )
            )
        ],
        "So.",
    ),
    "xlam": ([dict(query="Add.", tools='[{"name": "f"}]', answers='[{"name": "f"}]')], ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_read_or_refused(kind):
    rows, expected = KINDS[kind]
    try:
        answer = load_rows(rows)[0]["messages"][-1]["content"]
    except DatasetError as error:
        assert expected in str(error)
    else:
        assert answer == expected


TABLES = {
    "a|b.csv": "question|answer\nWho?|Me, sure\n",
    "tabs.csv": "question\tanswer\nWho?\tMe, sure\n",
    "commas.tsv": 'question,answer\nWho?,"Me, sure"\n',
    "excel.csv": "sep=;\r\nquestion;answer\r\nWho?;Me, sure\r\n",
    "lines.jsonl": '[\n{"question": "Who?",\n"answer": "Me, sure"}\n]\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_by_what_fits(name, tmp_path):
    (tmp_path / name).write_text(TABLES[name])
    assert last_answers(load_rows(tmp_path / name)) == ["Me, sure"]


@pytest.mark.parametrize("text", ["question^answer\nWho?^Me\n", "Who?,Me\nWhy?,So\n"])
def test_a_wrong_delimiter_or_header_is_named(text, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DatasetError, match=r"is that the delimiter|looks like a row"):
        load_rows(tmp_path / "a.csv")


def test_the_answer_chosen_by_hand():
    row = dict(prompt="Why?", chosen="So.", rejected="No.")
    assert last_answers(load_rows([row], mapping=dict(answer="chosen"))) == ["So."]


def test_a_split_that_datasets_saved(tmp_path):
    import datasets

    from finetune_kit.data import prepare_dataset

    parts = {}
    for split, n in (("train", 12), ("test", 3)):
        rows = [dict(question=f"{split} {i}?", answer=str(i)) for i in range(n)]
        parts[split] = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    splits = prepare_dataset(tmp_path / "saved")
    assert len(splits["test"]) == 3
    assert all("train" in row["messages"][0]["content"] for row in splits["train"])


def test_held_out_files_are_not_trained_on(tmp_path):
    from finetune_kit.data import prepare_dataset

    for name, start in (("mine.json", 0), ("held.json", 100)):
        rows = [dict(question=f"{start + i}?", answer="x") for i in range(10)]
        Path(tmp_path / name).write_text(json.dumps(rows))
    mine, held = tmp_path / "mine.json", tmp_path / "held.json"
    for splits in (
        prepare_dataset([mine, held]),
        prepare_dataset(dict(train=mine, test=held)),
        prepare_dataset(mine, test=str(held)),
    ):
        assert len(splits["test"]) == 10
        assert all(row["source"].startswith("held.json") for row in splits["test"])
        assert len(splits["train"]) + len(splits["validation"]) == 10
