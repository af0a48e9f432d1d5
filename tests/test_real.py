"Weights and text that nobody here made."

import html, json, re

import pytest


def test_reference_perplexities_of_stories260K(real):
    "Independent figures: fp32, the first 200 stories, each alone with its BOS, cut at 512 ids, mean over 79,210 predicted tokens."
    import torch
    from finetune_kit.chat import encode_rows
    from finetune_kit.batches import batches
    from finetune_kit.rows import load_rows
    from finetune_kit.importance import drop_one
    from finetune_kit.model import load_model

    model, tok = load_model(real / "stories260K", backend="transformers", dtype=torch.float32)
    rows = load_rows(real / "tinystories_clean.json")[:200]
    bs = batches(encode_rows(rows, tok, max_length=512), 8)
    table = drop_one(model, bs)
    assert set(table.n_tokens) == {79210} and table.attrs["baseline"] == pytest.approx(
        1.4766105, abs=2e-6
    )
    assert table.nll.tolist() == pytest.approx(
        [4.6725456, 2.7709516, 2.2642010, 2.3986497, 2.3993564], abs=5e-6
    )


def test_row_counts_match_a_plain_reading(real):
    from finetune_kit.rows import load_rows
    from finetune_kit.data import statistics

    lines = lambda name: sum(1 for o in (real / name).read_text().splitlines() if o.strip())
    items = lambda name: len(json.loads((real / name).read_text()))
    for name, n, duplicates, how in [
        (
            "gsm8k/train.jsonl",
            lines("gsm8k/train.jsonl"),
            0,
            "question ← question, answer ← answer (by name)",
        ),
        (
            "gsm8k/test.jsonl",
            lines("gsm8k/test.jsonl"),
            0,
            "question ← question, answer ← answer (by name)",
        ),
        ("v1_sft_demo.jsonl", lines("v1_sft_demo.jsonl"), 1, "messages ← messages (by name)"),
        (
            "tinystories_clean.json",
            items("tinystories_clean.json"),
            0,
            "text ← the line (by content)",
        ),
        (
            "alpaca_en_demo.json",
            items("alpaca_en_demo.json"),
            14,
            "question ← instruction, input ← input, answer ← output (by name)",
        ),
        (
            "rasbt_instruction_1100.json",
            items("rasbt_instruction_1100.json"),
            0,
            "question ← instruction, input ← input, answer ← output (by name)",
        ),
    ]:
        rows = load_rows(real / name)
        assert (
            len(rows) + len(rows.rejects) == n
            and len(rows.rejects) == duplicates
            and all("duplicate of" in r["reason"] for r in rows.rejects)
        )
        assert rows.detected() == {how: n} and statistics(dict(all=rows)).rows.sum() == len(rows)
        if name.startswith("v1"):
            assert all(
                isinstance(m["content"], str) and m["content"] for r in rows for m in r["messages"]
            )


def test_gsm8k_three_ways(real):
    "The result is what stands after ####, no calculator mark is left, and every row of the official test split is there."
    from finetune_kit.variants import VARIANTS
    from finetune_kit.data import prepare_dataset

    truth = [
        json.loads(o)["answer"].split("#### ")[1].replace(",", "")
        for o in (real / "gsm8k/test.jsonl").read_text().splitlines()
    ]
    for variant in VARIANTS:
        splits = prepare_dataset(real / "gsm8k", variant=variant)
        assert sum(map(len, splits.values())) == 7473 + 1319 and not any(
            r.rejects for r in splits.values()
        )
        answers = [r["messages"][-1]["content"] for r in splits["test"]]
        assert not any("<<" in a for a in answers)
        assert [
            re.search(
                dict(math=r"(.*)", reasoning=r"#### (.*)$", assistant=r"The answer is (.*)\.$")[
                    variant
                ],
                a,
            )[1]
            for a in answers
        ] == truth


@pytest.mark.slow
@pytest.mark.parametrize(
    "data, max_rows", [("tinystories_clean.json", 300), ("gsm8k/train.jsonl", 300)]
)
def test_train_on_real_weights_and_text(real, warm, data, max_rows, tmp_path):
    done = warm(
        tmp_path / "o.ipynb",
        tmp_path / "runs",
        model=real / "stories260K",
        data=real / data,
        drop_layer=2,
        max_steps=25,
        batch_size=4,
        max_rows=max_rows,
        eval_items=16,
        eval_every=0,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = next((tmp_path / "runs").glob("train-drop2-*"))
    m = json.loads((folder / "run.json").read_text())["metrics"]
    assert m["cut"]["nll"] > m["base"]["nll"] and m["healed_minus_cut"]["nll"]["hi"] < 0
    page = (folder / "report.html").read_text()
    if data.startswith("gsm8k"):
        assert m["healed"]["exact_match"] is not None
        assert "### Instruction:" in html.unescape(
            re.sub("<[^>]*>", "", page)
        )  # no template of its own: Alpaca
        left_out = [json.loads(o) for o in (folder / "rejects.jsonl").read_text().splitlines()]
        assert left_out and all("too long" in r["reason"] and r["source"] for r in left_out)
    else:
        assert m["healed"]["exact_match"] is None and "Once upon a time" in page
