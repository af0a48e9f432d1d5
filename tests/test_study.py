"""Layer studies across processes: papermill runs and a study killed with SIGKILL.

And layers read from disk within their memory.
"""

import json
import multiprocessing
import signal
import subprocess
import sys
import time
from functools import partial

import pandas as pd
import pytest
import torch
from conftest import ROOT

from finetune_kit.atlas import atlas
from finetune_kit.batches import batches
from finetune_kit.chat import encode_rows
from finetune_kit.cuts import cut_edits, single_cuts
from finetune_kit.importance import drop_one, greedy
from finetune_kit.model import load_model
from finetune_kit.rows import load_rows
from finetune_kit.walk import PORTION_FLOPS, walk_flops


def one_run(runs):
    [folder] = [f for f in runs.iterdir() if (f / "run.json").exists()]
    return folder, json.loads((folder / "run.json").read_text())


def test_layer_study_of_plain_texts(warm, tmp_path):
    """Texts have no sides, so that the two sets are different rows of different lengths."""
    names = "otter", "puffin", "hare"
    texts = [f"The {name} lives here. " * (1 + n) for n in range(4) for name in names]
    data = tmp_path / "texts.json"
    data.write_text(json.dumps(texts))
    dials = dict(data=str(data), items=4, greedy_k=2, blocks=0, parts="", precisions="")
    notebook = "nbs/layer_study.ipynb"
    done = warm(tmp_path / "out.ipynb", tmp_path / "runs", notebook, **dials)
    assert done.returncode == 0, done.stderr[-3000:]
    folder, info = one_run(tmp_path / "runs")
    assert info["status"] == "done"
    chosen_by = pd.read_csv(folder / "chosen_by.csv").set_index("chosen_by")
    removed = pd.read_csv(folder / "greedy.csv")
    assert chosen_by.delta["greedy"] == pytest.approx(removed.delta.iloc[-1], abs=1e-6)
    assert chosen_by.layers["the last layers"] == "10, 11"


def test_layer_study(warm, tmp_path):
    done = warm(
        tmp_path / "out.ipynb",
        tmp_path / "runs",
        "nbs/layer_study.ipynb",
        items=12,
        greedy_k=2,
        blocks=2,
        parts="mlp",
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
    pairs = pd.read_csv(folder / "blocks.csv")
    assert pairs.n.value_counts().to_dict() == {1: 12, 2: 11}
    assert info["chosen"] == dict(items=12, parts="mlp", greedy_k=2, blocks=2, precisions="4bit")
    assert json.loads((folder / "chosen.json").read_text()) == info["chosen"]
    timing = pd.read_csv(folder / "timing.csv").set_index("part")
    assert timing["measured, s"].notna().all()
    assert removed.layer.iloc[0] == ones.delta.idxmin()
    assert abs(removed.delta.iloc[0] - ones.delta.min()) < 1e-5
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") >= 5
    assert "dearest layer" in page
    assert "<progress" not in page


@pytest.mark.parametrize(
    "dial, says",
    [
        (dict(itms=3), "did you mean 'items'"),
        (dict(stream=True, precisions="4bit"), "precisions=''"),
    ],
)
def test_layer_study_refuses(warm, tmp_path, dial, says):
    done = warm(tmp_path / "out.ipynb", tmp_path / "runs", "nbs/layer_study.ipynb", **dial)
    assert done.returncode != 0
    assert says in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_budget_too_small_for_a_row_says_so(warm, tmp_path):
    dials = dict(budget_minutes=0.01, precisions="")
    done = warm(tmp_path / "out.ipynb", tmp_path / "runs", "nbs/layer_study.ipynb", **dials)
    assert done.returncode != 0
    assert "set a larger budget_minutes" in done.stderr
    assert one_run(tmp_path / "runs")[1]["status"] == "failed"


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


def calls_of(model):
    "A list that gets a number for each call of a layer: how many rows go through it."
    calls = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    return calls


def slow_study(study, text, folder, pipe):
    "In a child: tell of every call of a layer, and take a while for it."
    torch.set_num_threads(1)
    model, some = text
    n_calls = 0

    def tell(module, args, output):
        nonlocal n_calls
        n_calls += 1
        pipe.send(n_calls)
        time.sleep(0.002)

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(tell)
    study(model, some, resume=folder)


@pytest.mark.parametrize("study", [drop_one, partial(greedy, k=2, mem_gib=1e-9), atlas])
def test_a_killed_study_goes_on(text, tmp_path, monkeypatch, study):
    """Killed at any time, a study loses no more than a portion.

    Here a portion is a twentieth of the first batch's walk; on a real model it is half a minute.
    """
    model, some = text
    cuts = [(), *(cut_edits(plan, 12) for plan in single_cuts(12))]
    flops = walk_flops(model, some[0], cuts)
    monkeypatch.setitem(PORTION_FLOPS, "cpu", flops / 20)
    whole = study(model, some, resume=tmp_path / "whole")
    calls = calls_of(model)
    study(model, some, resume=tmp_path / "counted")
    in_all = len(calls)
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=slow_study, args=(study, text, tmp_path / "a", there))
    process.start()
    killed_after = in_all * 2 // 3
    while here.recv() < killed_after:
        pass
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    calls.clear()
    again = study(model, some, resume=tmp_path / "a")
    lost = killed_after + len(calls) - in_all
    one_batch = in_all / len(some)
    assert lost <= one_batch / (2 if study is drop_one else 1) + 15, (lost, in_all)
    assert len(calls) < in_all - killed_after + one_batch + 15
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
