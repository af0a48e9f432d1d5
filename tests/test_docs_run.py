"The pages of the docs, done: every command and block of a page in order, with small dials."

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from docs import PROSE, ROOT, blocks, text_of
from test_docs_code import NOTEBOOK_OF

SKIPPED = [  # What is not run here, and why
    (r"git clone|cd ", "the checkout is here"),
    (r"make ", "sets up an environment, or runs the tests that this is one of"),
    (r"\. \.venv", "the tests have an environment"),
    (r"pip install", "installs packages"),
    (r".*(Qwen/|openai/)", "needs the hub"),
    (r".*/models/", "there is no such folder"),
    (r"finetune-kit get|.* models/smollm2", "a real model; tests/test_gguf.py uses it"),
    (r"sbatch|.* --slurm$", "needs a cluster"),
    (r".* --go$", "sends to the Hub"),
    (r".*0\.0\.0\.0", "listens on every interface"),
    (r"finetune-kit demo", "needs gradio, and does not end"),
    (r".*/drop_sweep.yaml --jobs", "24 runs; the page's own sweep is run"),
    (r"papermill nbs/prune_heal", "12 trainings; tests/test_study.py runs it"),
]
# Dials that are added to what a page says, so that it takes a minute. Nothing else is changed.
SMALL_DIALS = {
    "train.ipynb": "-p max_steps 5 -p eval_every 0 -p eval_items 8 -p max_new_tokens 4 "
    "-p backend transformers",
    "layer_study.ipynb": "-p items 8 -p greedy_k 1 -p blocks 0 -p precisions bfloat16",
    "evaluate.ipynb": "-p items 8 -p max_new_tokens 4 -p backend transformers",
}
SMALL_YAML = [
    ("Qwen/Qwen3-0.6B, config: hub", "data/tiny-base, max_steps: 5"),
    ("[18, 19, 20, 21, 22]", "[5, 7]"),
    ("max_steps: 60, eval_every: 0, eval_items: 60", "max_steps: 5, eval_every: 0, eval_items: 8"),
    ("seed: [0, 1]", "seed: [0]"),
]
# Runs that a page takes for granted: the base without this layer, untrained
NEEDS = {"README.md": (10,), "serving.md": (7,)}


def why_skipped(line):
    for pattern, reason in SKIPPED:
        if re.match(pattern, line):
            return reason
    return None


def notebook_in(words):
    "The experiment that a command runs, or None."
    if words[0] not in ("finetune-kit", "papermill"):
        return None
    if words[0] == "finetune-kit" and words[1] in NOTEBOOK_OF:
        return NOTEBOOK_OF[words[1]]
    names = [Path(word).name for word in words if word.endswith(".ipynb")]
    return names[0] if names else None


def shortened(line):
    "The command with small dials."
    words = shlex.split(line, comments=True)
    dials = SMALL_DIALS.get(notebook_in(words), "")
    return f"{shlex.join(words)} {dials}"


class Reader:
    "Somebody who does what a page says, in a folder of their own."

    def __init__(self, folder, port):
        self.folder = folder
        self.port = port
        self.namespace = {}  # What the page's Python defines
        self.servers = []
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = os.environ | dict(
            FINETUNE_KIT_RUNS=str(folder / "runs"),
            PYTHONPATH=str(ROOT),
            OMP_NUM_THREADS="1",
            PATH=programs,
        )

    def do(self, line):
        reason = why_skipped(line)
        if reason:
            print(f"not run ({reason}): {line}")
        elif line.startswith("finetune-kit serve"):
            self.serve(line)
        else:
            self.run(line)

    def run(self, line):
        result = subprocess.run(
            ["bash", "-c", shortened(line)],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2400,
        )
        assert result.returncode == 0, f"{line}\n{result.stdout[-1500:]}\n{result.stderr[-3000:]}"
        print(f"$ {line}\n{result.stdout[-1500:]}")

    def serve(self, line):
        words = shlex.split(line, comments=True)
        if "--port" not in words:
            words += ["--port", str(self.port)]
        server = subprocess.Popen(
            words,
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.servers.append(server)
        for _ in range(600):
            assert server.poll() is None, f"{line}: it ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"{line}: it never answered")

    def read(self, text):
        for language, code in blocks(text.replace("8000", str(self.port))):
            if language == "sh":
                lines = [re.sub(r"\s+#.*", "", line).strip() for line in code.splitlines()]
                for line in filter(None, lines):
                    self.do(line)
            elif language == "python":
                exec(compile(code, "page", "exec"), self.namespace)
            elif language == "yaml":
                for usual, small in SMALL_YAML:
                    code = code.replace(usual, small)
                (self.folder / re.match(r"# (\S+)", code)[1]).write_text(code)


@pytest.fixture
def registries():
    "What a page registers is forgotten afterwards."
    from finetune_kit.architecture import LAYERS
    from finetune_kit.metrics import metrics
    from finetune_kit.read import loaders
    from finetune_kit.training import methods

    before = [(registry, dict(registry)) for registry in (loaders, metrics, LAYERS, methods)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


@pytest.fixture
def reader(tmp_path, monkeypatch, registries):
    "A folder with the checkout's notebooks, data and sweeps, and a registry of runs of its own."
    for name in ("nbs", "data", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("runs"))
    shutil.copy(ROOT / "data/domains/chat/test.jsonl", tmp_path / "my.jsonl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reader = Reader(tmp_path, port)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_KIT_RUNS", reader.env["FINETUNE_KIT_RUNS"])
    yield reader
    for server in reader.servers:
        server.terminate()
        server.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [path for path in PROSE if path.name != "CONTRIBUTING.md"], ids=lambda path: path.name
)
def test_a_page_does_what_it_says(page, reader):
    from test_evaluate import make_runs

    if page.name in NEEDS:
        make_runs(reader.folder / "runs", NEEDS[page.name])
    reader.read(text_of(page))
