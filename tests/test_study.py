"""Layer studies across processes: papermill runs and a study killed with SIGKILL.

And layers read from disk within their memory.
"""

import json
import multiprocessing
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import ROOT

from finetune_kit.batches import batches
from finetune_kit.chat import encode_rows
from finetune_kit.importance import drop_one
from finetune_kit.model import load_model
from finetune_kit.rows import load_rows


def one_run(runs):
    [folder] = [f for f in runs.iterdir() if (f / "run.json").exists()]
    return folder, json.loads((folder / "run.json").read_text())


def test_layer_study(warm, tmp_path):
    done = warm(
        tmp_path / "out.ipynb",
        tmp_path / "runs",
        "nbs/layer_study.ipynb",
        items=12,
        greedy_k=2,
        blocks=False,
        precisions="4bit",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder, info = one_run(tmp_path / "runs")
    assert info["status"] == "done"
    assert info["metrics"]["base"]["nll"] > 0
    ones, ends, cheap, removed = (
        pd.read_csv(folder / f"{name}.csv")
        for name in ("drop_one", "truncations", "atlas", "greedy")
    )
    assert ones.layer.tolist() == list(range(12))
    assert (ones.lo <= ones.delta).all()
    assert (ones.delta <= ones.hi).all()
    assert abs(ends.delta.iloc[-1]) < 1e-6
    assert abs(cheap.nll - ends.nll).max() < 1e-5, "the logit lens is the truncation"
    assert removed.layer.iloc[0] == ones.delta.idxmin()
    assert abs(removed.delta.iloc[0] - ones.delta.min()) < 1e-5
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") >= 5
    assert "dearest layer" in page
    assert "<progress" not in page


@pytest.mark.parametrize(
    "dial, says", [(dict(itms=3), "did you mean 'items'"), (dict(stream=True), "precisions=''")]
)
def test_layer_study_refuses(warm, tmp_path, dial, says):
    done = warm(tmp_path / "out.ipynb", tmp_path / "runs", "nbs/layer_study.ipynb", **dial)
    assert done.returncode != 0
    assert says in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_prune_heal(warm, tmp_path):
    done = warm(
        tmp_path / "out.ipynb",
        tmp_path / "runs",
        "nbs/prune_heal.ipynb",
        layers="6-8",
        max_steps=3,
        eval_items=8,
        max_new_tokens=4,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder, info = one_run(tmp_path / "runs")
    assert info["status"] == "done"
    assert list(info["metrics"]["healed"]) == ["6", "7", "8"]
    cuts = pd.read_csv(folder / "cuts.csv")
    assert cuts.layer.tolist() == [6, 7, 8]
    assert (cuts["from"] <= cuts["healed − control"]).all()
    kept = sorted(file.parent.name for file in (folder / "cuts").glob("*/items.json"))
    assert kept == ["control", "without-6", "without-7", "without-8"]
    assert not list((folder / "cuts").glob("*/checkpoints"))


@pytest.fixture
def text():
    "The embedded base, and six batches."
    model, tok = load_model(ROOT / "data/tiny-base", backend="transformers", device="cpu")
    rows = load_rows(ROOT / "data/domains", "validation", max_rows=24)
    return model, batches(encode_rows(rows, tok), 4)


def test_a_study_goes_on_for_the_same_weights_only(text, tmp_path):
    model, some = text
    before = drop_one(model, some[:2], resume=tmp_path)
    model.model.layers[3].self_attn.o_proj.weight.data[:, 32:64] = 0  # one head
    after = drop_one(model, some[:2], resume=tmp_path)
    assert after.attrs["baseline"] != before.attrs["baseline"]
    assert after.delta.tolist() == drop_one(model, some[:2]).delta.tolist()


def slow_study(text, folder, pipe):
    "In a child: tell of every step, and take a while for it."
    torch.set_num_threads(1)

    def tell(done, total):
        pipe.send(done)
        time.sleep(0.1)

    drop_one(*text, resume=folder, progress=tell)


def test_a_killed_study_goes_on(text, tmp_path):
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=slow_study, args=(text, tmp_path / "a", there))
    process.start()
    while here.recv() < 30:
        pass
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = list((tmp_path / "a").glob("walk-*.json"))
    assert len(kept) == 2, "two batches of six were through their 12 layers"
    again, whole = drop_one(*text, resume=tmp_path / "a"), drop_one(*text)
    pd.testing.assert_frame_equal(again, whole, check_exact=True)


STREAMED = """
import resource
import sys

import accelerate
import safetensors
import torch
from finetune_kit.importance import drop_one
from transformers import AutoModelForCausalLM, LlamaConfig


def llama(**shape):
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **shape))


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


folder, what = sys.argv[1:]
ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
batch = [dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)]
if what == "write":
    large = llama(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    large.save_pretrained(folder)
else:
    small = llama(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    drop_one(small.eval(), batch)  # what is imported on the way does not count
    before = peak_mib()
    table = drop_one(folder, batch, stream=True)
    print("RESULT", peak_mib() - before, len(table))
"""


@pytest.mark.slow
def test_streamed_layers_leave_memory_again(tmp_path):
    """16 layers of 64 MiB: 1 GiB in all; read one at a time, they never stand in memory together.

    Pages of the files count until the kernel wants them.
    """
    for what in ("write", "study"):
        command = [sys.executable, "-c", STREAMED, str(tmp_path), what]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, mib, layers = done.stdout.split()
    assert int(layers) == 16
    assert float(mib) < 700
