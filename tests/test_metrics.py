"""Every case of what a metric must say: the project's own, and those given from outside.

A case names a metric, a prediction, a reference, and `want`: a number, or an interval as text.
"""

import json
import math
import re

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


@pytest.mark.parametrize("case", read_cases(OWN_CASES))
def test_own_cases(case):
    check(case)


@pytest.mark.parametrize("case", read_cases(SHARED_CASES))
def test_shared_cases(case):
    check(case)
