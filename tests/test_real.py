"Weights and text that nobody here made."

import html
import json
import re

import pytest
import torch

from finetune_kit.batches import batches
from finetune_kit.chat import encode_rows
from finetune_kit.data import prepare_dataset, statistics
from finetune_kit.importance import drop_one
from finetune_kit.model import load_model
from finetune_kit.rows import load_rows
from finetune_kit.variants import VARIANTS


def test_reference_perplexities_of_stories260K(real):
    """
    Independent figures, of each layer left out.

    fp32; the first 200 stories, each alone with its BOS, cut at 512 ids; mean over 79,210 tokens.
    """
    model, tokenizer = load_model(real / "stories260K", backend="transformers", dtype=torch.float32)
    rows = [row | dict(open_end=True) for row in load_rows(real / "tinystories_clean.json")[:200]]
    table = drop_one(model, batches(encode_rows(rows, tokenizer, max_length=512), 8))
    assert set(table.n_tokens) == {79210}
    assert table.attrs["baseline"] == pytest.approx(1.4766105, abs=2e-6)
    reference = [4.6725456, 2.7709516, 2.2642010, 2.3986497, 2.3993564]
    assert table.nll.tolist() == pytest.approx(reference, abs=5e-6)


def items_of(file):
    "How many items a file holds, read plainly."
    text = file.read_text()
    if file.suffix == ".json":
        return len(json.loads(text))
    return sum(1 for line in text.splitlines() if line.strip())


GSM8K = "question ← question, answer ← answer (by name)"
ALPACA = "question ← instruction, input ← input, answer ← output (by name)"


@pytest.mark.parametrize(
    "name, duplicates, detected_fields",
    [
        ("gsm8k/train.jsonl", 0, GSM8K),
        ("gsm8k/test.jsonl", 0, GSM8K),
        ("v1_sft_demo.jsonl", 1, "messages ← messages (by name)"),
        ("tinystories_clean.json", 0, "text ← the line (by content)"),
        ("alpaca_en_demo.json", 14, ALPACA),
        ("rasbt_instruction_1100.json", 0, ALPACA),
    ],
)
def test_row_counts_match_a_plain_reading(real, name, duplicates, detected_fields):
    rows = load_rows(real / name)
    total = items_of(real / name)
    assert len(rows) + len(rows.rejects) == total
    assert len(rows.rejects) == duplicates
    assert all("duplicate of" in reject["reason"] for reject in rows.rejects)
    assert rows.detected() == {detected_fields: total}
    assert statistics(dict(all=rows)).rows.sum() == len(rows)


def test_turns_are_texts(real):
    for row in load_rows(real / "v1_sft_demo.jsonl"):
        for message in row["messages"]:
            assert isinstance(message["content"], str)
            assert message["content"]


RESULT_OF = dict(  # variant of GSM8K → where an answer has its result
    math=r"(.*)",
    reasoning=r"#### (.*)$",
    assistant=r"The answer is (.*)\.$",
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gsm8k_three_ways(real, variant):
    "Results stand after ####, no calculator mark is left, every official test row is there."
    lines = (real / "gsm8k/test.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    official_results = [answer.split("#### ")[1].replace(",", "") for answer in answers]

    splits = prepare_dataset(real / "gsm8k", variant=variant)
    assert sum(len(rows) for rows in splits.values()) == 7473 + 1319
    assert not any(rows.rejects for rows in splits.values())
    answers = [row["messages"][-1]["content"] for row in splits["test"]]
    assert not any("<<" in answer for answer in answers)
    results = [re.search(RESULT_OF[variant], answer)[1] for answer in answers]
    assert results == official_results


@pytest.fixture
def trained(real, warm, tmp_path):
    "Runs the train notebook on real weights; gives the run's metrics, report and rejects."

    def run(data):
        result = warm(
            tmp_path / "o.ipynb",
            tmp_path / "runs",
            model=real / "stories260K",
            data=real / data,
            drop_layer=2,
            max_steps=25,
            batch_size=4,
            max_rows=300,
            eval_items=16,
            eval_every=0,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        (folder,) = (tmp_path / "runs").glob("train-drop2-*")
        metrics = json.loads((folder / "run.json").read_text())["metrics"]
        assert metrics["cut"]["nll"] > metrics["base"]["nll"]
        assert metrics["healed_minus_cut"]["nll"]["hi"] < 0
        return folder, metrics

    return run


@pytest.mark.slow
def test_train_on_stories(trained):
    folder, metrics = trained("tinystories_clean.json")
    assert metrics["healed"]["exact_match"] is None
    assert "Once upon a time" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_train_on_questions(trained):
    folder, metrics = trained("gsm8k/train.jsonl")
    assert metrics["healed"]["exact_match"] is not None
    page = (folder / "report.html").read_text()
    text = html.unescape(re.sub("<[^>]*>", "", page))
    assert "### Instruction:" in text  # the tokenizer has no template of its own: Alpaca
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert rejects
    assert all("too long" in reject["reason"] for reject in rejects)
    assert all(reject["source"] for reject in rejects)
