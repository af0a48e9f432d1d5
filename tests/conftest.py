"Shared by the tests: where things are, and how a notebook is run by papermill's own command line."
import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent/"shared"/"real"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run by make test-all")
    config.addinivalue_line("markers", "gpu: needs a GPU; run by make test-all where there is one")


@pytest.fixture(scope="session")
def real():
    "Weights and data that nobody here made; they stand beside the checkout, where they are at all."
    if not REAL.is_dir(): pytest.skip(f"no real weights and data at {REAL}")
    return REAL


def papermill(out, runs, *parameters, notebook="nbs/train.ipynb"):
    "What a user types; the run's folder goes under `runs`."
    command = [sys.executable, "-m", "papermill", str(ROOT/notebook), str(out), "--no-progress-bar", *map(str, parameters)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | dict(FINETUNE_KIT_RUNS=str(runs)), capture_output=True, text=True, timeout=2400)


def p(**parameters): return [o for k, v in parameters.items() for o in ("-p", k, str(v))]
