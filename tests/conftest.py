"Shared by the tests: where things are, and how a notebook is run, cold or on a warm kernel."

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"
# Sums depend on it in their last digits, and warm kernels have one
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run by make test-all")
    config.addinivalue_line("markers", "gpu: needs a GPU; run by make test-all where there is one")
    config.addinivalue_line("markers", "real: needs models/smollm2.gguf, which make real gets")


@pytest.fixture(scope="session")
def real():
    "Weights and data that nobody here made; they stand beside the checkout, where they are at all."
    if not REAL.is_dir():
        pytest.skip(f"no real weights and data at {REAL}")
    return REAL


@pytest.fixture(scope="session")
def smollm2():
    "SmolLM2-135M-Instruct as a GGUF file; for tests marked `real`."
    file = ROOT / "models/smollm2.gguf"
    if not file.exists():
        pytest.skip(f"no {file.relative_to(ROOT)}; make real gets it")
    return file


def papermill(out, runs, notebook="nbs/train.ipynb", /, **parameters):
    "What a user types; the run's folder goes under `runs`."
    command = [sys.executable, "-m", "papermill", str(ROOT / notebook), str(out)]
    command.append("--no-progress-bar")
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | dict(FINETUNE_KIT_RUNS=str(runs)),
        capture_output=True,
        text=True,
        timeout=2400,
    )


def with_plain_paths(parameters):
    "The same, with paths as text."
    plain = {}
    for name, value in parameters.items():
        plain[name] = str(value) if isinstance(value, Path) else value
    return plain


@pytest.fixture(scope="session")
def warm():
    "As `papermill`, on kernels forked from one process that has imported what is heavy."
    import papermill as pm

    from finetune_kit.kernels import Kernels

    with Kernels() as kernels:

        def run(out, runs, notebook="nbs/train.ipynb", /, **parameters):
            manager = kernels.manager(FINETUNE_KIT_RUNS=str(runs))
            try:
                pm.execute_notebook(
                    ROOT / notebook,
                    out,
                    with_plain_paths(parameters),
                    kernel_name="python3",
                    progress_bar=False,
                    start_timeout=600,
                    cwd=ROOT,
                    kernel_manager_class=manager,
                )
            except Exception as error:
                return SimpleNamespace(returncode=1, stderr=str(error))
            return SimpleNamespace(returncode=0, stderr="")

        yield run
