"""
Seams: what a newcomer adds from their own notebook, in one place, without touching the package.

Each test registers something, uses it wherever the kit takes it by name, and takes it out again.
"""

import pytest

from finetune_kit.chat import encode_rows
from finetune_kit.core import InvalidConfigError, MetricComputationError
from finetune_kit.evaluation import evaluate_model, summarize
from finetune_kit.metrics import metric, metrics
from finetune_kit.model import load_model
from finetune_kit.rows import load_rows
from finetune_kit.scores import difference


@pytest.fixture
def answer_length():
    "A newcomer's metric, registered for one test."

    @metric("answer_length")
    def answer_length(prediction, reference):
        "Characters of the answer."
        return len(prediction)

    yield answer_length
    del metrics["answer_length"]


@pytest.fixture(scope="module")
def evaluated():
    "Evaluate tiny-base on a few rows by the metrics that are asked for."
    model, tokenizer = load_model("data/tiny-base", backend="transformers")
    encoded = encode_rows(load_rows("data/domains", "test")[::20], tokenizer)

    def evaluate(*names, max_new_tokens=8):
        return evaluate_model(model, tokenizer, encoded, names=names, max_new_tokens=max_new_tokens)

    return evaluate


def test_a_metric_is_measured_on_each_item(answer_length, evaluated):
    items = evaluated("exact_match", "answer_length")
    measured = items.dropna(subset="answer")
    assert len(measured) > 5
    assert measured.answer_length.tolist() == [len(answer) for answer in measured.answer]


def test_a_metric_stands_in_the_summary_with_its_interval(answer_length, evaluated):
    items = evaluated("answer_length")
    summary = summarize(items, ("answer_length",))
    lo, hi = summary["intervals"]["answer_length"]
    assert summary["answer_length"] == pytest.approx(items.answer_length.mean())
    assert lo < summary["answer_length"] < hi


def test_a_metric_is_paired_between_two_evaluations(answer_length, evaluated):
    short = evaluated("answer_length", max_new_tokens=2)
    long = evaluated("answer_length", max_new_tokens=12)
    gain = difference(long, short, "answer_length")
    assert gain["mean"] == pytest.approx((long.answer_length - short.answer_length).mean())
    assert 0 < gain["lo"] <= gain["mean"] <= gain["hi"]


def test_a_metric_that_is_taken_out_is_unknown(evaluated):
    with pytest.raises(InvalidConfigError, match="unknown metric 'answer_length'; choices: "):
        evaluated("answer_length")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_match", "registered already; delete it first to replace it"),
        ("nll", "an evaluation has a column 'nll' already; choose another name"),
        ("bleu,rouge", "a name has letters, digits and _ only"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_at_once(name, message):
    with pytest.raises(InvalidConfigError, match=message):
        metric(name)(lambda prediction, reference: 0.0)


def test_a_function_that_takes_something_else_is_refused_at_once():
    with pytest.raises(InvalidConfigError, match="two arguments, a prediction and a reference"):
        metric("length")(lambda text: len(text))
    assert "length" not in metrics


def test_a_score_that_is_no_number_is_named():
    @metric("forgotten_return")
    def forgotten_return(prediction, reference):
        prediction == reference  # noqa: B015 - the fault that is tested

    try:
        with pytest.raises(
            MetricComputationError, match="expected a number for each pair, got None"
        ):
            forgotten_return(["In rivers."], ["rivers"])
    finally:
        del metrics["forgotten_return"]
