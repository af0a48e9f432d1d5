"""Every format, every row shape, every template; and whatever else may stand in a file.

Each row is read or rejected, none is lost, nothing crashes.
"""

import csv
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_kit.chat import check_masks, encode, encode_rows
from finetune_kit.core import DatasetLoadError
from finetune_kit.data import prepare_dataset, quick_load
from finetune_kit.duplicates import near_pairs, shingles
from finetune_kit.messages import clean, to_row
from finetune_kit.rendering import answer_spans, render
from finetune_kit.rows import Rows, load_rows, stream_rows
from finetune_kit.splits import leaks


def turn(role, content):
    return dict(role=role, content=content)


QA = [turn("user", "Why?"), turn("assistant", "Because.")]
LONG = [
    turn("system", "Be brief."),
    turn("user", "Who?"),
    turn("assistant", "Me."),
    *QA,
]
SHAREGPT = dict(system="system", user="human", assistant="gpt")
# A row of each shape, and what it says
SHAPES = dict(
    qa=(dict(question="Why?", answer="Because."), QA),
    instruction=(
        dict(instruction="Add.", input="1 2", output="3"),
        [turn("user", "Add.\n1 2"), turn("assistant", "3")],
    ),
    prompt=(dict(prompt="Why?", completion="Because."), QA),
    turns=(dict(user="Why?", assistant="Because."), QA),
    messages=(dict(messages=LONG), LONG),
    sharegpt=(
        dict(conversations=[{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in LONG]),
        LONG,
    ),
    pairs=(
        dict(
            messages=[
                dict(system="Be brief.", user="Who?", assistant="Me."),
                dict(user="Why?", assistant="Because."),
            ]
        ),
        LONG,
    ),
    parts=(
        dict(messages=[m | dict(content=[dict(type="text", text=m["content"])]) for m in LONG]),
        LONG,
    ),
    history=(
        dict(system="Be brief.", history=[["Who?", "Me."]], question="Why?", answer="Because."),
        LONG,
    ),
    conversational=(dict(prompt=LONG[:-1], completion=LONG[-1:]), LONG),
    text=(dict(text="Why? Because."), "Why? Because."),
    unnamed=(dict(ask="Why?", reply="Because."), QA),
)

# By hand, for `QA` and then for `LONG`: the whole text, and what of it is scored
TEMPLATES = {
    None: (
        "<s><|user|>Why?<|end|><|assistant|>Because.<|end|>",
        "Because.<|end|>",
        "<s><|system|>Be brief.<|end|>"
        "<|user|>Who?<|end|><|assistant|>Me.<|end|>"
        "<|user|>Why?<|end|><|assistant|>Because.<|end|>",
        "Me.<|end|>Because.<|end|>",
    ),
    "alpaca": (
        "<s>### Instruction:\nWhy?\n\n### Response:\nBecause.<|end|>\n\n",
        "Because.<|end|>",
        "<s>Be brief.\n\n"
        "### Instruction:\nWho?\n\n### Response:\nMe.<|end|>\n\n"
        "### Instruction:\nWhy?\n\n### Response:\nBecause.<|end|>\n\n",
        "Me.<|end|>Because.<|end|>",
    ),
    "chatml": (
        "<s><|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|end|>\n",
        "Because.<|end|>",
        "<s><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|end|>\n",
        "Me.<|end|>Because.<|end|>",
    ),
    "llama2": (
        "<s>[INST] Why? [/INST] Because.<|end|>",
        " Because.<|end|>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho? [/INST] Me.<|end|>"
        "<s>[INST] Why? [/INST] Because.<|end|>",
        " Me.<|end|> Because.<|end|>",
    ),
    "phi": (
        "<s>Instruct: Why?\nOutput: Because.<|end|>\n",
        " Because.<|end|>",
        "<s>Be brief.\n"
        "Instruct: Who?\nOutput: Me.<|end|>\n"
        "Instruct: Why?\nOutput: Because.<|end|>\n",
        " Me.<|end|> Because.<|end|>",
    ),
}


def scored_text(tok, encoded):
    return tok.decode([label for label in encoded["labels"] if label != -100])


def write_jsonl(path, raws):
    path.write_text("".join(json.dumps(raw) + "\n" for raw in raws))


def _table(path, raw, delimiter):
    cells = {name: json.dumps(v) if isinstance(v, list) else v for name, v in raw.items()}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(raw), delimiter=delimiter)
        writer.writeheader()
        writer.writerow(cells)


def _parquet(path, raw):
    pq.write_table(pa.Table.from_pylist([raw]), path)


def _hub(path, raw):
    (path / "data").mkdir(parents=True)
    _parquet(path / "data" / "train-00000-of-00001.parquet", raw)


FORMATS = dict(
    list=("a.json", lambda path, raw: path.write_text(json.dumps([raw]))),
    dict=("a.json", lambda path, raw: path.write_text(json.dumps(dict(version="1", data=[raw])))),
    single=("a.json", lambda path, raw: path.write_text(json.dumps(raw, indent=1))),
    jsonl=("a.jsonl", lambda path, raw: write_jsonl(path, [raw])),
    csv=("a.csv", lambda path, raw: _table(path, raw, ",")),
    tsv=("a.tsv", lambda path, raw: _table(path, raw, "\t")),
    parquet=("a.parquet", _parquet),
    hub=("stand-in", _hub),
)


@pytest.fixture(scope="module")
def tok():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data/tiny-base")


def expected(shape, said, template, tok):
    "The whole text, and what of it is scored."
    if shape == "text":
        text = tok.decode(tok(said).input_ids)
        return text, text
    short, short_scored, long, long_scored = TEMPLATES[template]
    if said == LONG:
        return long, long_scored
    if shape == "instruction":
        text = short.replace("Why?", "Add.\n1 2").replace("Because.", "3")
        return text, short_scored.replace("Because.", "3")
    return short, short_scored


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_shape_and_template(format, shape, tok, tmp_path):
    raw, said = SHAPES[shape]
    name, write = FORMATS[format]
    if format in ("csv", "tsv") and shape == "history":
        pytest.skip("a table's cell holds no list of pairs; messages as JSON do")
    write(tmp_path / name, raw)
    rows = load_rows(f"hub:{tmp_path / name}" if format == "hub" else tmp_path / name)
    assert [row.get("messages", row.get("text")) for row in rows] == [said]
    assert not rows.rejects
    how = "(by content)" if shape == "unnamed" else "(by name)"
    assert next(iter(rows.detected())).endswith(how)
    for template in TEMPLATES:
        text, scored = expected(shape, said, template, tok)
        if shape != "text":
            assert render(said, tok, template) == text
        [encoded] = encode_rows(rows, tok, template)
        assert tok.decode(encoded["input_ids"]) == text
        assert scored_text(tok, encoded) == scored
        check_masks([encoded], tok, template)


def test_text_files_are_texts(tmp_path):
    (tmp_path / "a.txt").write_text("Why?\n\n Because. \r\n")
    rows = load_rows(tmp_path / "a.txt")
    found = [(row["text"], row["source"]) for row in rows]
    assert found == [("Why?", "a.txt:1"), ("Because.", "a.txt:3")]


# Whatever may stand in a file

FEW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD_WORDS = [
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
FIELDS = [
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
ROLES = ["user", "assistant", "system", "human", "robot"]


def nested(value):
    return st.lists(value, max_size=3) | st.dictionaries(words, value, max_size=3)


words = st.text(max_size=30) | st.sampled_from(ODD_WORDS)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
values = st.recursive(scalars, nested, max_leaves=8)
messages = st.fixed_dictionaries(
    dict(role=st.sampled_from(ROLES) | scalars, content=words | values)
)
turns = st.lists(messages | values, max_size=4)
rows = st.dictionaries(st.sampled_from(FIELDS), words | values | turns, max_size=5) | values
json_lines = rows.map(lambda raw: json.dumps(raw).encode())
byte_lines = st.binary(max_size=40).map(lambda line: line.replace(b"\n", b""))
line_ends = st.sampled_from(["\n", "\r\n"])


def read(path, **kwargs):
    into = Rows()
    return list(stream_rows(path, into=into, **kwargs)), into.rejects


def plain(text):
    return "".join(c for c in text if not 0xD800 <= ord(c) < 0xE000)


@FEW
@given(rows)
def test_a_row_is_used_or_refused_with_a_reason(raw):
    try:
        row = to_row(raw)
    except ValueError as error:
        assert str(error)
        return
    if row.get("text"):
        return
    for message in row["messages"]:
        assert message["role"] in ("system", "user", "assistant")
        assert message["content"] == clean(message["content"]) != ""


@FEW
@given(
    st.lists(rows, max_size=6),
    st.booleans(),
    st.sampled_from(["", "\ufeff"]),
    line_ends,
)
def test_jsonl_of_anything(tmp_path, some, ascii, bom, end):
    path = tmp_path / "a.jsonl"
    lines = "".join(json.dumps(raw, ensure_ascii=ascii) + end for raw in some)
    path.write_bytes((bom + lines).encode("utf-8", "surrogatepass"))
    good, rejects = read(path)
    assert len(good) + len(rejects) == len(some)
    numbers = sorted(int(row["source"].split(":")[1]) for row in [*good, *rejects])
    assert numbers == list(range(1, len(some) + 1))
    assert all(reject["reason"] for reject in rejects)
    json.dumps(rejects).encode()
    if some:
        path = tmp_path / "a.json"
        whole = bom + json.dumps(some, ensure_ascii=ascii)
        path.write_bytes(whole.encode("utf-8", "surrogatepass"))
        good, rejects = read(path)
        assert len(good) + len(rejects) == len(some)


def n_lines(content):
    "Lines that are not blank."
    text = content.decode("utf-8-sig", "surrogateescape")
    return sum(1 for line in text.split("\n") if line.strip())


@FEW
@given(st.lists(byte_lines | json_lines, max_size=6), st.integers(0, 60))
def test_jsonl_of_bytes_and_truncated(tmp_path, lines, cut):
    path, whole = tmp_path / "a.jsonl", b"\n".join(lines)
    for content in (whole, whole[: max(0, len(whole) - cut)]):
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            continue  # UTF-16, by its mark
        for file in (path, path.with_suffix(".txt")):
            file.write_bytes(content)
            good, rejects = read(file)
            assert len(good) + len(rejects) == n_lines(content)


def is_read(question, answer):
    "Whether both are there, with no broken text in them."
    return bool(clean(question) and clean(answer)) and plain(question + answer) == question + answer


@FEW
@given(
    st.lists(st.tuples(words, words, words), max_size=6),
    st.sampled_from([",", ";"]),
    line_ends,
    st.integers(0, 30),
)
def test_csv_with_quotes_and_newlines(tmp_path, records, delimiter, end, cut):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("question", "answer", "note"), *records])
    path, whole = tmp_path / "a.csv", out.getvalue().encode("utf-8", "surrogatepass")
    path.write_bytes(whole)
    good, rejects = read(path)
    assert len(good) + len(rejects) == len(records)
    contents = [[message["content"] for message in row["messages"]] for row in good]
    asked = [(question, answer) for question, answer, _ in records]
    assert contents == [[clean(q), clean(a)] for q, a in asked if is_read(q, a)]
    path.write_bytes(whole[: max(20, len(whole) - cut)])
    again, rejects = read(path)
    before_the_cut = good[: max(0, len(again) - 1)]  # is still read
    assert [row["messages"] for row in again[:-1]] == [row["messages"] for row in before_the_cut]


some_text = st.none() | words.map(plain)
parquet_messages = st.fixed_dictionaries(
    dict(role=st.sampled_from(["user", "assistant", "robot"]), content=some_text)
)
parquet_rows = st.fixed_dictionaries(
    dict(
        question=some_text,
        answer=some_text,
        tags=st.none() | st.lists(some_text, max_size=2),
        nr=st.none() | st.integers(-9, 9),
        raw=st.binary(max_size=3),
        messages=st.none() | st.lists(parquet_messages, max_size=3),
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
@given(st.lists(parquet_rows, min_size=1, max_size=5))
def test_parquet_with_lists(tmp_path, some):
    table = pa.Table.from_pylist(some, PARQUET_SCHEMA)
    pq.write_table(table, tmp_path / "a.parquet")
    good, rejects = read(tmp_path / "a.parquet")
    assert len(good) + len(rejects) == len(some)


def test_parquet_with_broken_text_loses_that_row_only(tmp_path):
    path = tmp_path / "a.parquet"
    offsets = pa.py_buffer(b"\0\0\0\0\4\0\0\0\7\0\0\0\13\0\0\0")
    texts = pa.py_buffer(b"Why?C\xe9?Who?")
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, texts])
    pq.write_table(pa.table(dict(question=broken, answer=["a", "b", "c"])), path)
    good, [reject] = read(path)
    assert [row["messages"][0]["content"] for row in good] == ["Why?", "Who?"]
    assert reject["source"] == "a.parquet:2"
    assert "broken text" in reject["reason"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetLoadError, match="no readable Parquet"):
        load_rows(path)


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
        (
            '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
            "'role' occurs twice",
        ),
        ('["question", "answer"]', "a row is list"),
        ("null", "a row is NoneType"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}, '
            '{"role": "assistant", "content": "b"}]}',
            "no text: 'image_url'",
        ),
    ],
)
def test_what_a_bad_line_is_told(line, reason, tmp_path):
    first = json.dumps(dict(question="Why?", answer="Because."))
    third = json.dumps(dict(question="Who?", answer="Me."))
    (tmp_path / "a.jsonl").write_text(f"{first}\n{line}\n{third}\n")
    rows = load_rows(tmp_path / "a.jsonl")
    [reject] = rows.rejects
    assert [row["source"] for row in rows] == ["a.jsonl:1", "a.jsonl:3"]
    assert reject["source"] == "a.jsonl:2"
    assert reason in reject["reason"]


def test_ten_megabytes_in_a_field(tmp_path):
    big = dict(question="Why?", answer="so " * 3_500_000)
    write_jsonl(tmp_path / "a.jsonl", [big, SHAPES["qa"][0]])
    _table(tmp_path / "b.csv", big, ",")
    _parquet(tmp_path / "c.parquet", big)
    rows = load_rows(tmp_path)
    assert [len(row["messages"][1]["content"]) for row in rows] == [10_499_999, 8]
    assert rows.reasons() == dict(duplicate=2)


@pytest.mark.slow
def test_a_row_of_100_000_tokens_is_left_out_not_cut(tok):
    endless = [QA[0], turn("assistant", "so " * 50_000)]
    rows = Rows(
        [
            dict(messages=endless, id="a", source="a:1"),
            dict(messages=QA, id="b", source="a:2"),
        ]
    )
    assert [encoded["id"] for encoded in encode_rows(rows, tok)] == ["b"]
    assert rows.rejects[0]["source"] == "a:1"
    assert "too long" in rows.rejects[0]["reason"]


def conversation(said, with_system):
    "The texts in turn by the user and the assistant, who has the last word."
    pairs = said[: len(said) // 2 * 2]
    talk = [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(pairs)]
    return [turn("system", "Be brief."), *talk] if with_system else talk


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    said=st.lists(words.map(plain).map(clean).filter(bool), min_size=2, max_size=5),
    system=st.booleans(),
)
def test_masks_of_any_text(tok, said, system):
    "What is scored is what the assistant said, by character and by token, whatever it looks like."
    messages = conversation(said, system)
    answers = [m["content"] + "<|end|>" for m in messages if m["role"] == "assistant"]
    for template in TEMPLATES:
        text, spans = answer_spans(messages, tok, template)
        lead = " " if template in ("llama2", "phi") else ""
        assert [text[a:b] for a, b in spans] == [lead + answer for answer in answers]
        encoded = encode(dict(messages=messages), tok, template)
        for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
            assert label in (-100, token)
        if template is None:
            assert scored_text(tok, encoded) == "".join(answers)


# Merging, splitting, near-duplicates


def test_merged_files_of_different_shapes(tmp_path):
    files = [("qa", "jsonl"), ("messages", "list"), ("unnamed", "csv"), ("text", "parquet")]
    for i, (shape, format) in enumerate(files):
        name, write = FORMATS[format]
        write(tmp_path / f"{i}{Path(name).suffix}", SHAPES[shape][0])
    rows = load_rows([tmp_path, tmp_path / "0.jsonl"], dedupe=None)
    assert len(rows) == 5
    assert len(rows.detected()) == 4
    sources = {row["source"] for row in rows}
    assert sources == {"0.jsonl:1", "1.json:1", "2.csv:2", "3.parquet:1"}
    once = load_rows(tmp_path)
    assert len(once) == 3
    assert once.rejects[0]["reason"] == "duplicate of 0.jsonl:1"


def test_a_hub_data_set_keeps_its_splits(tmp_path):
    import datasets

    for split, n_rows in (("train", 40), ("test", 7)):
        rows = [dict(question=f"{split} {i}?", answer=str(i)) for i in range(n_rows)]
        path = f"{tmp_path}/data/{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
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
            shared, either = sets[later] & sets[earlier], sets[later] | sets[earlier]
            similarity = len(shared) / len(either)
            if similarity >= threshold:
                expected.append((later, earlier, similarity))
    assert near_pairs(texts, threshold) == expected


def sum_row(i):
    "A sum, worked out as GSM8K does."
    total = 2 * i + 1
    return dict(
        question=f"What is the sum of {i} and {i + 1} as a plain number?",
        answer=f"{i} + {i + 1} = <<{i}+{i + 1}={total}>>{total}\n#### {total}",
        category="ab"[i % 2],
    )


def test_counts_add_up_through_everything(tmp_path):
    "rows + rejects = rows in the file, whatever is asked for."
    lines = [json.dumps(sum_row(i)) for i in range(200)]
    last = json.dumps(dict(question="Why?", answer="Because.", category="a"))
    lines += [lines[0], "broken", '{"question": "alone"}', last]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for asked in (
        {},
        dict(dedupe="near"),
        dict(variant="math"),
        dict(domain_tags=True, instruction="Be brief."),
        dict(dedupe=None),
    ):
        splits = prepare_dataset(tmp_path / "a.jsonl", **asked)
        assert sum(len(r) + len(r.rejects) for r in splits.values()) == len(lines), asked
    assert leaks(splits, 0.3).similarity.min() >= 0.3


def split_by_id(path):
    return {row["id"]: split for split, rows in prepare_dataset(path).items() for row in rows}


def test_splits_stay_put_in_any_order(tmp_path):
    path = tmp_path / "a.jsonl"
    raws = [dict(question=f"{i}?", answer=str(i)) for i in range(300)]
    write_jsonl(path, raws)
    before = split_by_id(path)
    more = raws + [dict(question=f"new {i}?", answer="x") for i in range(100)]
    random.Random(0).shuffle(more)
    write_jsonl(path, more)
    after = split_by_id(path)
    assert len(after) == 400
    assert all(after[id] == split for id, split in before.items())


def test_quick_load_is_ready_to_train(tok):
    ready = quick_load(ROOT / "data/domains", tok, max_samples=30)
    assert list(ready) == ["train", "validation", "test"]
    assert len(ready["train"]) == 30
    assert set(ready["train"][0]) >= {"input_ids", "labels"}


def test_reading_ahead_does_not_load_torch():
    code = "import finetune_kit.data, sys; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "transformers", "datasets", "pandas"}
