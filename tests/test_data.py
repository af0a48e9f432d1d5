"Every format, every row shape, every template; and whatever else may stand in a file: each row is read or rejected, none is lost, nothing crashes."

import csv, io, json
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings, strategies as st

from finetune_kit.core import DatasetLoadError, EmptyDatasetError, FineTuneError
from finetune_kit.messages import clean, to_row
from finetune_kit.rows import Rows, drop_near, load_rows, near_pairs, shingles, stream_rows
from finetune_kit.splits import leaks
from finetune_kit.data import prepare_dataset

QA = [dict(role="user", content="Why?"), dict(role="assistant", content="Because.")]
LONG = [
    dict(role="system", content="Be brief."),
    dict(role="user", content="Who?"),
    dict(role="assistant", content="Me."),
    *QA,
]

SHAPES = dict(
    qa=(dict(question="Why?", answer="Because."), QA),
    instruction=(
        dict(instruction="Add.", input="1 2", output="3"),
        [dict(role="user", content="Add.\n1 2"), dict(role="assistant", content="3")],
    ),
    prompt=(dict(prompt="Why?", completion="Because."), QA),
    turns=(dict(user="Why?", assistant="Because."), QA),
    messages=(dict(messages=LONG), LONG),
    sharegpt=(
        dict(
            conversations=[
                {
                    "from": dict(system="system", user="human", assistant="gpt")[m["role"]],
                    "value": m["content"],
                }
                for m in LONG
            ]
        ),
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

# By hand: the whole text, and what of it is scored
TEMPLATES = {
    None: (
        "<s><|user|>Why?<|end|><|assistant|>Because.<|end|>",
        "Because.<|end|>",
        "<s><|system|>Be brief.<|end|><|user|>Who?<|end|><|assistant|>Me.<|end|><|user|>Why?<|end|><|assistant|>Because.<|end|>",
        "Me.<|end|>Because.<|end|>",
    ),
    "alpaca": (
        "<s>### Instruction:\nWhy?\n\n### Response:\nBecause.<|end|>\n\n",
        "Because.<|end|>",
        "<s>Be brief.\n\n### Instruction:\nWho?\n\n### Response:\nMe.<|end|>\n\n### Instruction:\nWhy?\n\n### Response:\nBecause.<|end|>\n\n",
        "Me.<|end|>Because.<|end|>",
    ),
    "chatml": (
        "<s><|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|end|>\n",
        "Because.<|end|>",
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|end|>\n",
        "Me.<|end|>Because.<|end|>",
    ),
    "llama2": (
        "<s>[INST] Why? [/INST] Because.<|end|>",
        " Because.<|end|>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho? [/INST] Me.<|end|><s>[INST] Why? [/INST] Because.<|end|>",
        " Me.<|end|> Because.<|end|>",
    ),
    "phi": (
        "<s>Instruct: Why?\nOutput: Because.<|end|>\n",
        " Because.<|end|>",
        "<s>Be brief.\nInstruct: Who?\nOutput: Me.<|end|>\nInstruct: Why?\nOutput: Because.<|end|>\n",
        " Me.<|end|> Because.<|end|>",
    ),
}


def _table(path, raw, delimiter):
    with open(path, "w", newline="") as f:
        w = csv.DictWriter(f, list(raw), delimiter=delimiter)
        w.writeheader()
        w.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in raw.items()})


def _parquet(path, raw):
    import pyarrow as pa, pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([raw]), path)


def _hub(path, raw):
    (path / "data").mkdir(parents=True)
    _parquet(path / "data" / "train-00000-of-00001.parquet", raw)


FORMATS = dict(
    list=("a.json", lambda p, r: p.write_text(json.dumps([r]))),
    dict=("a.json", lambda p, r: p.write_text(json.dumps(dict(version="1", data=[r])))),
    single=("a.json", lambda p, r: p.write_text(json.dumps(r, indent=1))),
    jsonl=("a.jsonl", lambda p, r: p.write_text(json.dumps(r) + "\n")),
    csv=("a.csv", lambda p, r: _table(p, r, ",")),
    tsv=("a.tsv", lambda p, r: _table(p, r, "\t")),
    parquet=("a.parquet", _parquet),
    hub=("stand-in", _hub),
)


@pytest.fixture(scope="module")
def tok():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data/tiny-base")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_shape_and_template(format, shape, tok, tmp_path):
    from finetune_kit.chat import check_masks, encode_rows, render

    raw, said = SHAPES[shape]
    name, write = FORMATS[format]
    if format in ("csv", "tsv") and shape == "history":
        pytest.skip("a table's cell holds no list of pairs; messages as JSON do")
    write(tmp_path / name, raw)
    rows = load_rows(f"hub:{tmp_path / name}" if format == "hub" else tmp_path / name)
    assert [r.get("messages", r.get("text")) for r in rows] == [said] and not rows.rejects
    assert next(iter(rows.detected())).endswith(
        "(by content)" if shape == "unnamed" else "(by name)"
    )
    for template, (short, short_scored, long, long_scored) in TEMPLATES.items():
        text, scored = (long, long_scored) if said == LONG else (short, short_scored)
        if shape == "instruction":
            text, scored = (
                text.replace("Why?", "Add.\n1 2").replace("Because.", "3"),
                scored.replace("Because.", "3"),
            )
        [e] = encode_rows(rows, tok, template)
        if shape == "text":
            text = scored = tok.decode(tok(said).input_ids)
        else:
            assert render(said, tok, template) == text
        assert (
            tok.decode(e["input_ids"]) == text
            and tok.decode([i for i in e["labels"] if i != -100]) == scored
        )
        check_masks([e], tok, template)


def test_text_files_are_texts(tmp_path):
    (tmp_path / "a.txt").write_text("Why?\n\n Because. \r\n")
    rows = load_rows(tmp_path / "a.txt")
    assert [(r["text"], r["source"]) for r in rows] == [
        ("Why?", "a.txt:1"),
        ("Because.", "a.txt:3"),
    ]


# Whatever may stand in a file

FEW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
words = st.text(max_size=30) | st.sampled_from(
    [
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
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(words, v, max_size=3), max_leaves=8
)
turns = st.lists(
    st.fixed_dictionaries(
        dict(
            role=st.sampled_from(["user", "assistant", "system", "human", "robot"]) | scalars,
            content=words | values,
        )
    )
    | values,
    max_size=4,
)
fields = st.sampled_from(
    [
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
)
rows = st.dictionaries(fields, words | values | turns, max_size=5) | values


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
    except ValueError as e:
        assert str(e)
    else:
        assert row.get("text") or all(
            m["role"] in ("system", "user", "assistant")
            and m["content"] == clean(m["content"]) != ""
            for m in row["messages"]
        )


@FEW
@given(
    st.lists(rows, max_size=6),
    st.booleans(),
    st.sampled_from(["", "\ufeff"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_jsonl_of_anything(tmp_path, some, ascii, bom, end):
    f = tmp_path / "a.jsonl"
    f.write_bytes(
        (bom + "".join(json.dumps(r, ensure_ascii=ascii) + end for r in some)).encode(
            "utf-8", "surrogatepass"
        )
    )
    good, rejects = read(f)
    assert len(good) + len(rejects) == len(some)
    assert sorted(int(r["source"].split(":")[1]) for r in [*good, *rejects]) == list(
        range(1, len(some) + 1)
    ) and all(r["reason"] for r in rejects)
    json.dumps(rejects).encode()
    if some:
        f = tmp_path / "a.json"
        f.write_bytes((bom + json.dumps(some, ensure_ascii=ascii)).encode("utf-8", "surrogatepass"))
        good, rejects = read(f)
        assert len(good) + len(rejects) == len(some)


@FEW
@given(
    st.lists(
        st.binary(max_size=40).map(lambda b: b.replace(b"\n", b""))
        | rows.map(lambda r: json.dumps(r).encode()),
        max_size=6,
    ),
    st.integers(0, 60),
)
def test_jsonl_of_bytes_and_truncated(tmp_path, lines, cut):
    f, whole = tmp_path / "a.jsonl", b"\n".join(lines)
    for content in (whole, whole[: max(0, len(whole) - cut)]):
        f.write_bytes(content)
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            continue  # UTF-16, by its mark
        good, rejects = read(f)
        assert len(good) + len(rejects) == sum(
            1 for o in content.decode("utf-8-sig", "surrogateescape").split("\n") if o.strip()
        )
        f.with_suffix(".txt").write_bytes(content)
        good, rejects = read(f.with_suffix(".txt"))
        assert len(good) + len(rejects) == sum(
            1 for o in content.decode("utf-8-sig", "surrogateescape").split("\n") if o.strip()
        )


@FEW
@given(
    st.lists(st.tuples(words, words, words), max_size=6),
    st.sampled_from([",", ";"]),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(0, 30),
)
def test_csv_with_quotes_and_newlines(tmp_path, records, delimiter, end, cut):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(
        [("question", "answer", "note"), *records]
    )
    f, whole = tmp_path / "a.csv", out.getvalue().encode("utf-8", "surrogatepass")
    f.write_bytes(whole)
    good, rejects = read(f)
    assert len(good) + len(rejects) == len(records)
    assert [[m["content"] for m in r["messages"]] for r in good] == [
        [clean(q), clean(a)]
        for q, a, _ in records
        if clean(q) and clean(a) and plain(q + a) == q + a
    ]
    f.write_bytes(whole[: max(20, len(whole) - cut)])
    again, rejects = read(f)
    assert [r["messages"] for r in again[:-1]] == [
        r["messages"] for r in good[: max(0, len(again) - 1)]
    ]  # what stands before the cut is still read


@FEW
@given(
    st.lists(
        st.fixed_dictionaries(
            dict(
                question=st.none() | words,
                answer=st.none() | words,
                tags=st.none() | st.lists(st.none() | words, max_size=2),
                nr=st.none() | st.integers(-9, 9),
                raw=st.binary(max_size=3),
                messages=st.none()
                | st.lists(
                    st.fixed_dictionaries(
                        dict(
                            role=st.sampled_from(["user", "assistant", "robot"]),
                            content=st.none() | words,
                        )
                    ),
                    max_size=3,
                ),
            )
        ),
        min_size=1,
        max_size=5,
    )
)
def test_parquet_with_lists(tmp_path, some):
    import pyarrow as pa, pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("question", pa.string()),
            ("answer", pa.string()),
            ("tags", pa.list_(pa.string())),
            ("nr", pa.int64()),
            ("raw", pa.binary()),
            ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ]
    )
    some = [
        {
            k: plain(v)
            if isinstance(v, str)
            else [
                plain(o) if isinstance(o, str) else o and {n: o[n] and plain(o[n]) for n in o}
                for o in v
            ]
            if isinstance(v, list)
            else v
            for k, v in r.items()
        }
        for r in some
    ]
    pq.write_table(pa.Table.from_pylist(some, schema), tmp_path / "a.parquet")
    good, rejects = read(tmp_path / "a.parquet")
    assert len(good) + len(rejects) == len(some)


def test_parquet_with_broken_text_loses_that_row_only(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq

    broken = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0\7\0\0\0\13\0\0\0"), pa.py_buffer(b"Why?C\xe9?Who?")],
    )
    pq.write_table(pa.table(dict(question=broken, answer=["a", "b", "c"])), tmp_path / "a.parquet")
    good, rejects = read(tmp_path / "a.parquet")
    assert (
        [r["messages"][0]["content"] for r in good] == ["Why?", "Who?"]
        and [r["source"] for r in rejects] == ["a.parquet:2"]
        and "broken text" in rejects[0]["reason"]
    )
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-20])
    with pytest.raises(DatasetLoadError, match="no readable Parquet"):
        load_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"question": "a", "question": "b", "answer": "c"}', "'question' stands twice"),
        ('{"question": "a", "answer', "no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"question": "a", "answer": ' + "9" * 5000 + "}", "no JSON"),
        ('{"question": "a", "answer": NaN}', "missing"),
        ('{"question": "\\ud800", "answer": "c"}', "broken text"),
        ('{"question": "a", "answer": {"b": null}}', "dict, not text"),
        (
            '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
            "'role' stands twice",
        ),
        ('["question", "answer"]', "a row is list"),
        ("null", "a row is NoneType"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}, {"role": "assistant", "content": "b"}]}',
            "no text: 'image_url'",
        ),
    ],
)
def test_what_a_bad_line_is_told(line, reason, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        f"{json.dumps(SHAPES['qa'][0])}\n{line}\n{json.dumps(dict(question='Who?', answer='Me.'))}\n"
    )
    rows = load_rows(tmp_path / "a.jsonl")
    assert (
        [r["source"] for r in rows] == ["a.jsonl:1", "a.jsonl:3"]
        and [r["source"] for r in rows.rejects] == ["a.jsonl:2"]
        and reason in rows.rejects[0]["reason"]
    )


def test_ten_megabytes_in_a_field(tmp_path):
    big = dict(question="Why?", answer="so " * 3_500_000)
    (tmp_path / "a.jsonl").write_text(json.dumps(big) + "\n" + json.dumps(SHAPES["qa"][0]))
    _table(tmp_path / "b.csv", big, ",")
    _parquet(tmp_path / "c.parquet", big)
    rows = load_rows(tmp_path)
    assert [len(r["messages"][1]["content"]) for r in rows] == [
        10_499_999,
        8,
    ] and rows.reasons() == dict(duplicate=2)


@pytest.mark.slow
def test_a_row_of_100_000_tokens_is_left_out_not_cut(tok):
    from finetune_kit.chat import encode_rows

    rows = Rows(
        [
            dict(
                messages=[QA[0], dict(role="assistant", content="so " * 50_000)],
                id="a",
                source="a:1",
            ),
            dict(messages=QA, id="b", source="a:2"),
        ]
    )
    assert (
        [e["id"] for e in encode_rows(rows, tok)] == ["b"]
        and rows.rejects[0]["source"] == "a:1"
        and "too long" in rows.rejects[0]["reason"]
    )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    said=st.lists(words.map(plain).map(clean).filter(bool), min_size=2, max_size=5),
    system=st.booleans(),
)
def test_masks_of_any_text(tok, said, system):
    "What is scored is what the assistant said, character by character and token by token, whatever that looks like."
    from finetune_kit.chat import encode
    from finetune_kit.rendering import answer_spans

    messages = [
        dict(role=("user", "assistant")[i % 2], content=t)
        for i, t in enumerate(said[: len(said) // 2 * 2])
    ]
    if system:
        messages = [dict(role="system", content="Be brief."), *messages]
    answers = [m["content"] + "<|end|>" for m in messages if m["role"] == "assistant"]
    for template in TEMPLATES:
        text, spans = answer_spans(messages, tok, template)
        lead = " " if template in ("llama2", "phi") else ""
        assert [text[a:b] for a, b in spans] == [lead + a for a in answers]
        e = encode(dict(messages=messages), tok, template)
        assert len(e["input_ids"]) == len(e["labels"]) and all(
            l in (-100, i) for i, l in zip(e["input_ids"], e["labels"])
        )
        if template is None:
            assert tok.decode([i for i in e["labels"] if i != -100]) == "".join(answers)


# Merging, splitting, near-duplicates


def test_merged_files_of_different_shapes(tmp_path):
    for i, (shape, format) in enumerate(
        [("qa", "jsonl"), ("messages", "list"), ("unnamed", "csv"), ("text", "parquet")]
    ):
        FORMATS[format][1](tmp_path / f"{i}{Path(FORMATS[format][0]).suffix}", SHAPES[shape][0])
    rows = load_rows([tmp_path, tmp_path / "0.jsonl"], dedupe=None)
    assert (
        len(rows) == 5
        and len(rows.detected()) == 4
        and {r["source"] for r in rows} == {"0.jsonl:1", "1.json:1", "2.csv:2", "3.parquet:1"}
    )
    assert (
        len(load_rows(tmp_path)) == 3
        and load_rows(tmp_path).rejects[0]["reason"] == "duplicate of 0.jsonl:1"
    )


def test_a_hub_data_set_keeps_its_splits(tmp_path):
    import datasets

    for s, n in (("train", 40), ("test", 7)):
        datasets.Dataset.from_list(
            [dict(question=f"{s} {i}?", answer=str(i)) for i in range(n)]
        ).to_parquet(f"{tmp_path}/data/{s}-00000-of-00001.parquet")
    splits = prepare_dataset(f"hub:{tmp_path}")
    assert (
        len(splits["test"]) == 7
        and len(splits["train"]) + len(splits["validation"]) == 40
        and all(r["source"].startswith("hub:") for r in splits["train"])
    )
    with pytest.raises(DatasetLoadError, match="hub data set"):
        prepare_dataset(f"hub:{tmp_path}/nothing")


@FEW
@given(st.lists(st.text("ab c", max_size=30), max_size=12), st.sampled_from([0.2, 0.5, 0.8, 1.0]))
def test_near_pairs_are_all_pairs(texts, threshold):
    sets = [shingles(t) for t in texts]
    sim = lambda i, j: len(sets[i] & sets[j]) / len(sets[i] | sets[j])
    assert near_pairs(texts, threshold) == [
        (i, j, sim(i, j)) for i in range(len(texts)) for j in range(i) if sim(i, j) >= threshold
    ]


def test_counts_add_up_through_everything(tmp_path):
    "rows + rejects = rows in the file, whatever is asked for."
    lines = [
        json.dumps(
            dict(
                question=f"What is the sum of {i} and {i + 1} as a plain number?",
                answer=f"{i} + {i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}\n#### {2 * i + 1}",
                category="ab"[i % 2],
            )
        )
        for i in range(200)
    ]
    lines += [
        lines[0],
        "broken",
        '{"question": "alone"}',
        json.dumps(dict(question="Why?", answer="Because.", category="a")),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for asked in (
        dict(),
        dict(dedupe="near"),
        dict(variant="math"),
        dict(domain_tags=True, instruction="Be brief."),
        dict(dedupe=None),
    ):
        splits = prepare_dataset(tmp_path / "a.jsonl", **asked)
        assert sum(len(r) + len(r.rejects) for r in splits.values()) == len(lines), asked
    assert leaks(splits, 0.3).similarity.min() >= 0.3


def test_splits_stay_put_in_any_order(tmp_path):
    import random

    lines = [json.dumps(dict(question=f"{i}?", answer=str(i))) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    before = {r["id"]: s for s, rows in prepare_dataset(tmp_path / "a.jsonl").items() for r in rows}
    more = lines + [json.dumps(dict(question=f"new {i}?", answer="x")) for i in range(100)]
    random.Random(0).shuffle(more)
    (tmp_path / "a.jsonl").write_text("\n".join(more))
    after = {r["id"]: s for s, rows in prepare_dataset(tmp_path / "a.jsonl").items() for r in rows}
    assert len(after) == 400 and all(after[i] == s for i, s in before.items())


def test_quick_load_is_ready_to_train(tok):
    from finetune_kit.data import quick_load

    ready = quick_load(ROOT / "data/domains", tok, max_samples=30)
    assert (
        list(ready) == ["train", "validation", "test"]
        and len(ready["train"]) == 30
        and set(ready["train"][0]) >= {"input_ids", "labels"}
    )


def test_reading_ahead_does_not_load_torch():
    import subprocess, sys

    code = "import finetune_kit.data, sys; print(*sys.modules)"
    assert not set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
    ) & {"torch", "transformers", "datasets", "pandas"}
