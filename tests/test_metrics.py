"""Every case of what a metric must say: the project's own, and those given from outside.

A case names a metric, a prediction, a reference, and `want`: a number, or an interval as text.
"""

import json
import math
import re
import time

import pytest
from conftest import ROOT

from finetune_kit.final_numbers import final_number
from finetune_kit.metrics import metrics

OWN_CASES = ROOT / "tests/metric_cases.jsonl"
SHARED_CASES = ROOT.parent / "shared/cases/metrics.jsonl"
BOUNDS = re.compile(r"(?:([\d.]+)<)?x(?:<([\d.]+))?")


def read_cases(path):
    "The cases of a file; one that says why where it is absent."
    if not path.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"{path.name}: no such file"))]
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [pytest.param(case, id=f"{case['metric']}-{n}") for n, case in enumerate(cases)]


def check(case):
    if case["want"] is None:
        assert final_number(case["prediction"]) is None, case
        return
    value = metrics[case["metric"]]([case["prediction"]], [case["reference"]])
    if isinstance(case["want"], str):
        lowest, highest = BOUNDS.fullmatch(case["want"]).groups()
        assert float(lowest or -math.inf) < value < float(highest), case
    else:
        assert value == pytest.approx(case["want"]), case


SLOW = {
    "a power": "999999999999^{999/1000}",
    "powers of powers": "2^" * 10_000,
    "lines": "\n" * 100_000 + "5",
    "lines between": "5" + "\n" * 100_000 + "6",
    "an open bracket": "5 (" + "a" * 50_000,
    "vulgar fractions": "½" * 100_000,
    "repeating decimals": "0.5(" * 25_000,
    "divisions": "1/" * 50_000,
    "overlines": r"0.\overline{" * 10_000,
    "marks": "#### " * 20_000,
    "headings": "#### Step\n" * 10_000 + "5",
    "cues": "answer is " * 10_000 + "5",
    "open boxes": r"\boxed{" * 15_000,
    "fractions in fractions": r"\boxed{" + r"\frac{1}{" * 30 + "2" + "}" * 31,
    "brackets": r"\boxed{" + "(" * 90 + "5" + ")" * 90 + "}",
    "roots": r"\boxed{" + "+".join(rf"\sqrt{{{n}}}" for n in range(2, 14)) + "}",
    "signs": "-" * 100_000 + "5",
    "questions": "\n     Question" * 20_000,
    "digits": "1" * 100_000,
    "words": "The cat has 3 apples and 4 pears. " * 3_000,
}


@pytest.mark.parametrize("kind", SLOW)
def test_no_text_takes_long(kind):
    final_number(r"1/2+\sqrt{2} on 5 May")  # loads what reads
    start = time.process_time()
    final_number(SLOW[kind])
    assert time.process_time() - start < 0.2


def test_long_texts_have_a_rouge():
    start = time.process_time()
    value = metrics["rouge_l"](["a b c d " * 5_000], ["b a d c " * 5_000])
    assert value == pytest.approx(0.5)
    assert time.process_time() - start < 5


def test_many_quotes_take_no_time():
    start = time.process_time()
    assert metrics["exact_match"](["'" * 50_000], ["x"]) == 0
    assert metrics["exact_match"]([". " * 50_000 + "x" + "'." * 20_000], ["x"]) == 0
    assert time.process_time() - start < 2


@pytest.mark.parametrize("part", ["train", "test"])
def test_references_of_gsm8k_are_what_stands_behind_their_mark(part):
    path = ROOT.parent / f"shared/real/gsm8k/{part}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name}: no such file")
    for line in path.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)["answer"]
        written = answer.split("####")[1].strip().replace(",", "")
        assert final_number(answer) == int(written), answer


@pytest.mark.parametrize("case", read_cases(OWN_CASES))
def test_own_cases(case):
    check(case)


@pytest.mark.parametrize("case", read_cases(SHARED_CASES))
def test_shared_cases(case):
    check(case)
