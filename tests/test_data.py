"""Reading data: every format, every row shape, every template, and whatever else a file may hold.

Each row is read or rejected with a reason; none is lost, and nothing crashes.
"""

import csv
import io
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from finetune_kit.core import DatasetLoadError, MaskError, NoTextColumnsError
from finetune_kit.data import prepare_dataset
from finetune_kit.duplicates import near_pairs, shingles, similarity
from finetune_kit.messages import to_row
from finetune_kit.read import loaders
from finetune_kit.rows import Rows, load_rows, stream_rows
from finetune_kit.sources import resolve_source
from finetune_kit.splits import leaks
from finetune_kit.texts import clean

QA = [dict(role="user", content="Why?"), dict(role="assistant", content="Because.")]
LONG = [
    dict(role="system", content="Be brief."),
    dict(role="user", content="Who?"),
    dict(role="assistant", content="Me."),
    *QA,
]
SHAREGPT_ROLES = dict(system="system", user="human", assistant="gpt")
SHAREGPT = [{"from": SHAREGPT_ROLES[m["role"]], "value": m["content"]} for m in LONG]
TURN_PAIRS = [
    dict(system="Be brief.", user="Who?", assistant="Me."),
    dict(user="Why?", assistant="Because."),
]
TYPED_PARTS = [m | dict(content=[dict(type="text", text=m["content"])]) for m in LONG]
SUM = [dict(role="user", content="Add.\n1 2"), dict(role="assistant", content="3")]

SHAPES = dict(  # Shape → a row of it, and its messages or text
    qa=(dict(question="Why?", answer="Because."), QA),
    instruction=(dict(instruction="Add.", input="1 2", output="3"), SUM),
    prompt=(dict(prompt="Why?", completion="Because."), QA),
    turns=(dict(user="Why?", assistant="Because."), QA),
    messages=(dict(messages=LONG), LONG),
    sharegpt=(dict(conversations=SHAREGPT), LONG),
    pairs=(dict(messages=TURN_PAIRS), LONG),
    parts=(dict(messages=TYPED_PARTS), LONG),
    history=(
        dict(system="Be brief.", history=[["Who?", "Me."]], question="Why?", answer="Because."),
        LONG,
    ),
    conversational=(dict(prompt=LONG[:-1], completion=LONG[-1:]), LONG),
    text=(dict(text="Why? Because."), "Why? Because."),
    unnamed=(dict(ask="Why?", reply="Because."), QA),
)


@dataclass
class Rendered:
    "What a template makes of `QA` and of `LONG`, written by hand: the text, and what is scored."

    short: str
    short_scored: str
    long: str
    long_scored: str


TEMPLATES = {
    None: Rendered(
        "<s><|user|>Why?<|end|><|assistant|>Because.<|end|>",
        "Because.<|end|>",
        "<s><|system|>Be brief.<|end|><|user|>Who?<|end|><|assistant|>Me.<|end|>"
        "<|user|>Why?<|end|><|assistant|>Because.<|end|>",
        "Me.<|end|>Because.<|end|>",
    ),
    "alpaca": Rendered(
        "<s>### Instruction:\nWhy?\n\n### Response:\nBecause.<|end|>\n\n",
        "Because.<|end|>",
        "<s>Be brief.\n\n### Instruction:\nWho?\n\n### Response:\nMe.<|end|>\n\n"
        "### Instruction:\nWhy?\n\n### Response:\nBecause.<|end|>\n\n",
        "Me.<|end|>Because.<|end|>",
    ),
    "chatml": Rendered(
        "<s><|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|end|>\n",
        "Because.<|end|>",
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nMe.<|end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nBecause.<|end|>\n",
        "Me.<|end|>Because.<|end|>",
    ),
    "llama2": Rendered(
        "<s>[INST] Why? [/INST] Because.<|end|>",
        " Because.<|end|>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho? [/INST] Me.<|end|>"
        "<s>[INST] Why? [/INST] Because.<|end|>",
        " Me.<|end|> Because.<|end|>",
    ),
    "phi": Rendered(
        "<s>Instruct: Why?\nOutput: Because.<|end|>\n",
        " Because.<|end|>",
        "<s>Be brief.\nInstruct: Who?\nOutput: Me.<|end|>\n"
        "Instruct: Why?\nOutput: Because.<|end|>\n",
        " Me.<|end|> Because.<|end|>",
    ),
}


# One row in a file of each format


def write_table(path, row, delimiter):
    cells = {name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(row), delimiter=delimiter)
        writer.writeheader()
        writer.writerow(cells)


def write_parquet(path, row):
    pq.write_table(pa.Table.from_pylist([row]), path)


def write_hub_folder(path, row):
    "What a hub data set looks like on disk."
    (path / "data").mkdir(parents=True)
    write_parquet(path / "data" / "train-00000-of-00001.parquet", row)


FORMATS = dict(  # Format → the file's name, and what writes a row to it
    list=("a.json", lambda path, row: path.write_text(json.dumps([row]))),
    dict=("a.json", lambda path, row: path.write_text(json.dumps(dict(version="1", data=[row])))),
    single=("a.json", lambda path, row: path.write_text(json.dumps(row, indent=1))),
    jsonl=("a.jsonl", lambda path, row: path.write_text(json.dumps(row) + "\n")),
    csv=("a.csv", lambda path, row: write_table(path, row, ",")),
    tsv=("a.tsv", lambda path, row: write_table(path, row, "\t")),
    parquet=("a.parquet", write_parquet),
    hub=("stand-in", write_hub_folder),
)


@pytest.fixture(scope="module")
def tok():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data/tiny-base")


def scored_text(tok, encoded):
    return tok.decode([label for label in encoded["labels"] if label != -100])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_and_shape(format, shape, tmp_path):
    if format in ("csv", "tsv") and shape == "history":
        pytest.skip("a table's cell holds no list of pairs; messages as JSON do")
    raw, expected = SHAPES[shape]
    name, write = FORMATS[format]
    write(tmp_path / name, raw)
    rows = load_rows(f"hub:{tmp_path / name}" if format == "hub" else tmp_path / name)
    [row] = rows
    assert row.get("messages", row.get("text")) == expected
    assert not rows.rejects
    [detection] = rows.detected()
    assert detection.endswith("(by content)" if shape == "unnamed" else "(by name)")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_template(shape, template, tok, tmp_path):
    from finetune_kit.chat import check_masks, encode_rows, render

    raw, expected = SHAPES[shape]
    rows = load_rows([raw])
    rendered = TEMPLATES[template]
    text = rendered.long if expected == LONG else rendered.short
    scored = rendered.long_scored if expected == LONG else rendered.short_scored
    if shape == "instruction":
        text = text.replace("Why?", "Add.\n1 2").replace("Because.", "3")
        scored = scored.replace("Because.", "3")
    if shape == "text":
        text = scored = tok.decode(tok(expected).input_ids) + tok.eos_token
    else:
        assert render(expected, tok, template) == text
    [encoded] = encode_rows(rows, tok, template)
    assert tok.decode(encoded["input_ids"]) == text
    assert scored_text(tok, encoded) == scored
    check_masks([encoded], tok, template)


def test_text_files_are_texts(tmp_path):
    (tmp_path / "a.txt").write_text("Why?\n\n Because. \r\n")
    rows = load_rows(tmp_path / "a.txt")
    assert [row["text"] for row in rows] == ["Why?", " Because. "]
    assert [row["source"] for row in rows] == ["a.txt:1", "a.txt:3"]


def test_a_source_is_resolved_once(tmp_path):
    (tmp_path / "a.txt").write_text("Why?\n")
    source = resolve_source(tmp_path)
    assert (source.kind, source.files) == ("files", (tmp_path / "a.txt",))
    assert resolve_source(source) is source
    assert load_rows(source) == load_rows(tmp_path)
    hub = resolve_source("openai/gsm8k:main")
    assert (hub.kind, hub.hub_name, hub.hub_config) == ("hub", "openai/gsm8k", "main")
    given_rows = resolve_source([dict(text="Why?")])
    assert (given_rows.kind, given_rows.rows) == ("rows", [dict(text="Why?")])


@pytest.mark.parametrize("source", ["", None, [], dict(text="Why?"), 7])
def test_what_is_no_source(source):
    with pytest.raises(DatasetLoadError, match="no data: the source is"):
        load_rows(source)


def test_a_loader_of_a_newcomer(tmp_path):
    "One function in a notebook of their own is enough for files, folders and splits."

    @loaders(".qa")
    def read_qa(path):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            question, bar, answer = line.partition("|")
            yield number, dict(question=question, answer=answer) if bar else ValueError("no bar")

    try:
        (tmp_path / "train.qa").write_text("Why?|Because.\nnothing\n")
        rows = load_rows(tmp_path, "train")
    finally:
        del loaders[".qa"]
    assert [row["messages"] for row in rows] == [QA]
    assert rows.reasons() == {"no bar": 1}


# Whatever may stand in a file

FEW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD_TEXTS = [
    "",
    " ",
    "Why?",
    "\u05dc\u05de\u05d4?",
    "\u0644\u0645\u0627\u0630\u0627",
    "👩‍👩‍👧‍👦",
    "a\0b",
    "\r\n",
    "\ufeffx",
    "\u2028",
    "<|end|>",
    "### Response:\n",
    '"',
    "'",
    ",",
    "\\",
    "{{ x }}",
    "nan",
]
ROLES = ["user", "assistant", "system", "human", "robot"]
FIELD_NAMES = [
    "question",
    "answer",
    "messages",
    "conversations",
    "text",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "domain",
    "prompt",
    "completion",
    "user",
    "assistant",
    "other",
]

words = st.text(max_size=30) | st.sampled_from(ODD_TEXTS)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words


def containers(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)


values = st.recursive(scalars, containers, max_leaves=8)
turn = st.fixed_dictionaries(
    dict(role=st.sampled_from(ROLES) | scalars, content=words | values),
)
turns = st.lists(turn | values, max_size=4)
raw_rows = (
    st.dictionaries(st.sampled_from(FIELD_NAMES), words | values | turns, max_size=5) | values
)


def read(path):
    "The rows and the rejects of a file."
    into = Rows()
    try:
        return list(stream_rows(path, into=into)), into.rejects
    except NoTextColumnsError as error:
        assume("choose one" not in str(error))  # Two readings stop a run, as they should
        raise


def without_surrogates(text):
    return "".join(c for c in text if not 0xD800 <= ord(c) < 0xE000)


def as_bytes(text):
    return text.encode("utf-8", "surrogatepass")


def filled_lines(content):
    "How many lines of a file are not empty."
    lines = content.decode("utf-8-sig", "surrogateescape").split("\n")
    return sum(bool(line.strip()) for line in lines)


@FEW
@given(raw_rows)
def test_a_row_is_used_or_refused_with_a_reason(raw):
    try:
        row = to_row(raw)
    except ValueError as error:
        assert str(error)
        return
    if "text" in row:
        assert row["text"]
        return
    for message in row["messages"]:
        assert message["role"] in ("system", "user", "assistant", "tool")
        assert message["content"] == clean(message["content"]) != ""


@FEW
@given(
    st.lists(raw_rows, max_size=6),
    st.booleans(),
    st.sampled_from(["", "\ufeff"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_json_of_anything(tmp_path, raws, ascii_only, byte_order_mark, line_end):
    lines = [json.dumps(raw, ensure_ascii=ascii_only) + line_end for raw in raws]
    file = tmp_path / "a.jsonl"
    file.write_bytes(as_bytes(byte_order_mark + "".join(lines)))
    rows, rejects = read(file)
    # "a.jsonl:3", or "a.jsonl:1[3]" where the line is a list of rows
    numbers = {int(r["source"].split(":")[1].partition("[")[0]) for r in [*rows, *rejects]}
    assert numbers == set(range(1, len(raws) + 1))
    assert all(reject["reason"] for reject in rejects)
    json.dumps(rejects).encode()
    if raws:
        file = tmp_path / "a.json"
        file.write_bytes(as_bytes(byte_order_mark + json.dumps(raws, ensure_ascii=ascii_only)))
        rows, rejects = read(file)
        assert len(rows) + len(rejects) == len(raws)


def one_line(content):
    return content.replace(b"\n", b"")


@FEW
@given(
    st.lists(
        st.binary(max_size=40).map(one_line) | raw_rows.map(lambda raw: json.dumps(raw).encode()),
        max_size=6,
    ),
    st.integers(0, 60),
)
def test_lines_of_bytes_and_cut_off(tmp_path, lines, n_cut):
    content = b"\n".join(lines)
    for part in (content, content[: max(0, len(content) - n_cut)]):
        if part[:2] in (b"\xff\xfe", b"\xfe\xff"):
            continue  # UTF-16, by its mark
        for name in ("a.jsonl", "a.txt"):
            (tmp_path / name).write_bytes(part)
            rows, rejects = read(tmp_path / name)
            # A line that is a list of rows gives several: "a.jsonl:1[2]"
            told = {r["source"].partition("[")[0] for r in [*rows, *rejects]}
            assert len(told) == filled_lines(part)


def usable_contents(records):
    "What is asked and answered in the records that can be used."
    contents = []
    for question, answer, _ in records:
        is_valid = without_surrogates(question + answer) == question + answer
        if is_valid and clean(question).strip() and clean(answer).strip():
            contents.append([clean(question), clean(answer)])
    return contents


@FEW
@given(
    st.lists(st.tuples(words, words, words), max_size=6),
    st.sampled_from([",", ";"]),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(0, 30),
)
def test_csv_with_quotes_and_newlines(tmp_path, records, delimiter, line_end, n_cut):
    table = io.StringIO()
    writer = csv.writer(table, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([("question", "answer", "note"), *records])
    content = as_bytes(table.getvalue())
    file = tmp_path / "a.csv"
    file.write_bytes(content)
    rows, rejects = read(file)
    assert len(rows) + len(rejects) == len(records)
    contents = [[m["content"] for m in row["messages"]] for row in rows]
    assert contents == usable_contents(records)
    # What stands before a cut is still read
    file.write_bytes(content[: max(20, len(content) - n_cut)])
    rows_before_cut, _ = read(file)
    n_complete = max(0, len(rows_before_cut) - 1)
    messages_before_cut = [row["messages"] for row in rows_before_cut[:n_complete]]
    assert messages_before_cut == [row["messages"] for row in rows[:n_complete]]


plain_words = words.map(without_surrogates)
parquet_message = st.fixed_dictionaries(
    dict(role=st.sampled_from(["user", "assistant", "robot"]), content=st.none() | plain_words)
)
parquet_row = st.fixed_dictionaries(
    dict(
        question=st.none() | plain_words,
        answer=st.none() | plain_words,
        tags=st.none() | st.lists(st.none() | plain_words, max_size=2),
        nr=st.none() | st.integers(-9, 9),
        raw=st.binary(max_size=3),
        messages=st.none() | st.lists(parquet_message, max_size=3),
    )
)
PARQUET_SCHEMA = pa.schema(
    [
        ("question", pa.string()),
        ("answer", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("nr", pa.int64()),
        ("raw", pa.binary()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)


@FEW
@given(st.lists(parquet_row, min_size=1, max_size=5))
def test_parquet_with_lists(tmp_path, records):
    pq.write_table(pa.Table.from_pylist(records, PARQUET_SCHEMA), tmp_path / "a.parquet")
    rows, rejects = read(tmp_path / "a.parquet")
    assert len(rows) + len(rejects) == len(records)


def test_parquet_with_broken_text_loses_that_row_only(tmp_path):
    offsets = pa.py_buffer(b"\0\0\0\0\4\0\0\0\7\0\0\0\13\0\0\0")
    texts = pa.py_buffer(b"Why?C\xe9?Who?")
    questions = pa.Array.from_buffers(pa.string(), 3, [None, offsets, texts])
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(dict(question=questions, answer=["a", "b", "c"])), file)
    rows, rejects = read(file)
    assert [row["messages"][0]["content"] for row in rows] == ["Why?", "Who?"]
    assert [reject["source"] for reject in rejects] == ["a.parquet:2"]
    assert "broken text" in rejects[0]["reason"]

    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DatasetLoadError, match="no readable Parquet"):
        load_rows(file)


REPEATED_ROLE = '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}'
PICTURE = dict(role="user", content=[dict(type="image_url", url="x")])


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"question": "a", "question": "b", "answer": "c"}', "'question' occurs twice"),
        ('{"question": "a", "answer', "no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"question": "a", "answer": ' + "9" * 5000 + "}", "no JSON"),
        ('{"question": "a", "answer": NaN}', "missing"),
        ('{"question": "\\ud800", "answer": "c"}', "broken text"),
        ('{"question": "a", "answer": {"b": null}}', "dict, not text"),
        (REPEATED_ROLE, "'role' occurs twice"),
        ('["question", "answer"]', "a row is list"),
        ("null", "a row is NoneType"),
        (json.dumps(dict(messages=[PICTURE, QA[1]])), "no text: 'image_url'"),
    ],
)
def test_a_bad_line_costs_itself_and_says_why(line, reason, tmp_path):
    first = json.dumps(dict(question="Why?", answer="Because."))
    last = json.dumps(dict(question="Who?", answer="Me."))
    (tmp_path / "a.jsonl").write_text(f"{first}\n{line}\n{last}\n")
    rows = load_rows(tmp_path / "a.jsonl")
    assert [row["source"] for row in rows] == ["a.jsonl:1", "a.jsonl:3"]
    assert [reject["source"] for reject in rows.rejects] == ["a.jsonl:2"]
    assert reason in rows.rejects[0]["reason"]


def test_an_answer_of_two_columns_beside_a_prompt_of_turns():
    row = dict(ask=QA[:1], first="Because.", second="So.")
    mapping = dict(question="ask", answer=["first", "second"])
    assert to_row(row, mapping)["messages"][1]["content"] == "Because.\nSo."


def test_ten_megabytes_in_a_field(tmp_path):
    big = dict(question="Why?", answer="so " * 3_500_000)
    small = dict(question="Why?", answer="Because.")
    (tmp_path / "a.jsonl").write_text(json.dumps(big) + "\n" + json.dumps(small))
    write_table(tmp_path / "b.csv", big, ",")
    write_parquet(tmp_path / "c.parquet", big)
    rows = load_rows(tmp_path)
    assert [len(row["messages"][1]["content"]) for row in rows] == [10_500_000, 8]
    assert rows.reasons() == dict(duplicate=2)


@pytest.mark.slow
def test_a_row_of_100_000_tokens_is_left_out_not_cut(tok):
    from finetune_kit.chat import encode_rows

    long_answer = dict(role="assistant", content="so " * 50_000)
    rows = Rows(
        [
            dict(messages=[QA[0], long_answer], id="a", source="a:1"),
            dict(messages=QA, id="b", source="a:2"),
        ]
    )
    assert [encoded["id"] for encoded in encode_rows(rows, tok)] == ["b"]
    assert rows.rejects[0]["source"] == "a:1"
    assert "too long" in rows.rejects[0]["reason"]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    contents=st.lists(plain_words.map(clean).filter(bool), min_size=2, max_size=5),
    with_system=st.booleans(),
)
def test_masks_of_any_text(tok, contents, with_system):
    "What is scored is what the assistant answered, by character and by token."
    from finetune_kit.chat import encode
    from finetune_kit.rendering import answer_spans, special_pattern, spelled_token

    messages = [dict(role="system", content="Be brief.")] if with_system else []
    n_messages = len(contents) // 2 * 2
    for number, content in enumerate(contents[:n_messages]):
        messages.append(dict(role=("user", "assistant")[number % 2], content=content))
    answers = [m["content"] + "<|end|>" for m in messages if m["role"] == "assistant"]
    if spelled_token(messages, special_pattern(tok)):
        with pytest.raises(MaskError, match="spells the special token"):
            answer_spans(messages, tok)
        return
    for template in TEMPLATES:
        text, spans, *_ = answer_spans(messages, tok, template)
        lead = " " if template in ("llama2", "phi") else ""
        assert [text[start:end] for start, end in spans] == [lead + answer for answer in answers]
        encoded = encode(dict(messages=messages), tok, template)
        pairs = list(zip(encoded["input_ids"], encoded["labels"], strict=True))
        assert all(label in (-100, token) for token, label in pairs)
        if template is None:
            assert scored_text(tok, encoded) == "".join(answers)


# Merging, splitting, near-duplicates


def test_merged_files_of_different_shapes(tmp_path):
    files = [("qa", "jsonl"), ("messages", "list"), ("unnamed", "csv"), ("text", "parquet")]
    for number, (shape, format) in enumerate(files):
        name, write = FORMATS[format]
        write(tmp_path / f"{number}{Path(name).suffix}", SHAPES[shape][0])
    rows = load_rows([tmp_path, tmp_path / "0.jsonl"], dedupe=None)
    assert len(rows) == 5
    assert len(rows.detected()) == 4
    sources = {row["source"] for row in rows}
    assert sources == {"0.jsonl:1", "1.json:1", "2.csv:2", "3.parquet:1"}
    unique = load_rows(tmp_path)
    assert len(unique) == 3
    assert unique.rejects[0]["reason"] == "duplicate of 0.jsonl:1"


def test_a_hub_data_set_keeps_its_splits(tmp_path):
    import datasets

    for split, n_rows in (("train", 40), ("test", 7)):
        records = [dict(question=f"{split} {i}?", answer=str(i)) for i in range(n_rows)]
        file = tmp_path / f"data/{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(records).to_parquet(str(file))
    splits = prepare_dataset(f"hub:{tmp_path}")
    assert len(splits["test"]) == 7
    assert len(splits["train"]) + len(splits["validation"]) == 40
    assert all(row["source"].startswith("hub:") for row in splits["train"])
    with pytest.raises(DatasetLoadError, match="hub data set"):
        prepare_dataset(f"hub:{tmp_path}/nothing")


@FEW
@given(st.lists(st.text("ab c", max_size=30), max_size=12), st.sampled_from([0.2, 0.5, 0.8, 1.0]))
def test_near_pairs_are_all_pairs(texts, threshold):
    sets = [shingles(text) for text in texts]
    expected = []
    for later in range(len(texts)):
        for earlier in range(later):
            value = similarity(sets[later], sets[earlier])
            if value >= threshold:
                expected.append((later, earlier, value))
    assert near_pairs(texts, threshold) == expected


def worked_sum(a):
    "A math problem in GSM8K's notation."
    b, total = a + 1, 2 * a + 1
    return dict(
        question=f"What is the sum of {a} and {b} as a plain number?",
        answer=f"{a} + {b} = <<{a}+{b}={total}>>{total}\n#### {total}",
        category="ab"[a % 2],
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(dedupe="near"),
        dict(variant="math"),
        dict(domain_tags=True, instruction="Be brief."),
        dict(dedupe=None),
    ],
    ids=str,
)
def test_rows_and_rejects_add_up(options, tmp_path):
    "Together they are what stands in the file, whatever is done to the rows."
    lines = [json.dumps(worked_sum(a)) for a in range(200)]
    why = json.dumps(dict(question="Why?", answer="Because.", category="a"))
    lines += [lines[0], "broken", '{"question": "alone"}', why]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    splits = prepare_dataset(tmp_path / "a.jsonl", **options)
    assert sum(len(rows) + len(rows.rejects) for rows in splits.values()) == len(lines)
    assert leaks(splits, 0.3).similarity.min() >= 0.3


def test_splits_stay_put_in_any_order(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps(dict(question=f"{i}?", answer=str(i))) for i in range(300)]

    def split_of_ids():
        splits = prepare_dataset(file)
        return {row["id"]: split for split, rows in splits.items() for row in rows}

    file.write_text("\n".join(lines))
    before = split_of_ids()
    lines += [json.dumps(dict(question=f"new {i}?", answer="x")) for i in range(100)]
    random.Random(0).shuffle(lines)
    file.write_text("\n".join(lines))
    after = split_of_ids()
    assert len(after) == 400
    assert all(after[row_id] == split for row_id, split in before.items())


def test_quick_load_is_ready_to_train(tok):
    from finetune_kit.data import quick_load

    ready = quick_load(ROOT / "data/domains", tok, max_samples=30)
    assert list(ready) == ["train", "validation", "test"]
    assert len(ready["train"]) == 30
    assert set(ready["train"][0]) >= {"input_ids", "labels"}


def test_reading_ahead_does_not_load_torch():
    code = "import finetune_kit.data, sys; print(*sys.modules)"
    python = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(python.stdout.split())
    assert not loaded & {"torch", "transformers", "datasets", "pandas"}
