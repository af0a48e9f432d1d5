"Layer studies across processes: papermill runs, a study killed with SIGKILL, layers read from disk within their memory."
import json, os, signal, subprocess, sys, time

import pandas as pd, pytest
from conftest import ROOT, p, papermill


def one_run(runs):
    [folder] = [f for f in runs.iterdir() if (f/"run.json").exists()]
    return folder, json.loads((folder/"run.json").read_text())


def test_layer_study(tmp_path):
    done = papermill(tmp_path/"out.ipynb", tmp_path/"runs", *p(items=12, greedy_k=2, blocks=False, precisions="4bit"), notebook="nbs/layer_study.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    folder, info = one_run(tmp_path/"runs")
    assert info["status"] == "done" and info["metrics"]["base"]["nll"] > 0
    ones, ends, cheap = (pd.read_csv(folder/f"{name}.csv") for name in ("drop_one", "truncations", "atlas"))
    assert ones.layer.tolist() == list(range(12)) and (ones.lo <= ones.delta).all() and (ones.delta <= ones.hi).all()
    assert abs(ends.delta.iloc[-1]) < 1e-6 and abs(cheap.nll - ends.nll).max() < 1e-5, "the logit lens is the truncation"
    removed = pd.read_csv(folder/"greedy.csv")
    assert removed.layer.iloc[0] == ones.delta.idxmin() and abs(removed.delta.iloc[0] - ones.delta.min()) < 1e-5
    page = (folder/"report.html").read_text()
    assert page.count("data:image/png") >= 5 and "dearest layer" in page and "<progress" not in page


@pytest.mark.parametrize("dial, says", [(dict(itms=3), "did you mean 'items'"), pytest.param(dict(stream=True), "precisions=''", marks=pytest.mark.slow)])
def test_layer_study_refuses(tmp_path, dial, says):
    done = papermill(tmp_path/"out.ipynb", tmp_path/"runs", *p(**dial), notebook="nbs/layer_study.ipynb")
    assert done.returncode != 0 and says in done.stderr and not (tmp_path/"runs").exists()


@pytest.mark.slow
def test_prune_heal(tmp_path):
    asked = p(layers="6-8", max_steps=3, eval_items=8, max_new_tokens=4)
    done = papermill(tmp_path/"out.ipynb", tmp_path/"runs", *asked, notebook="nbs/prune_heal.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    folder, info = one_run(tmp_path/"runs")
    assert info["status"] == "done" and list(info["metrics"]["healed"]) == ["6", "7", "8"]
    cuts = pd.read_csv(folder/"cuts.csv")
    assert cuts.layer.tolist() == [6, 7, 8] and (cuts["from"] <= cuts["healed − control"]).all()
    assert sorted(f.name for f in (folder/"cuts").iterdir()) == ["6.json", "7.json", "8.json", "control.json"]


KILLED = '''
import sys, time
from finetune_kit.chat import batches, encode_rows
from finetune_kit.data import load_rows
from finetune_kit.importance import drop_one, greedy
from finetune_kit.model import load_model
model, tok = load_model("data/tiny-base", backend="transformers")
text = batches(encode_rows(load_rows("data/domains", "validation", max_rows=24), tok), 4)
slow = sys.argv[2] == "slow"
def progress(done, total):
    print(done, total, flush=True)
    if slow: time.sleep(.1)
print("RESULT", drop_one(model, text, resume=sys.argv[1], progress=progress).to_json(double_precision=15), flush=True)
'''


def test_a_killed_study_goes_on(tmp_path):
    def command(folder, speed): return [sys.executable, "-c", KILLED, str(tmp_path/folder), speed]
    process = subprocess.Popen(command("a", "slow"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line.split()[0]) == 30: break
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list((tmp_path/"a").glob("walk-*.json")))
    assert kept == 2, "two batches of six were through their 12 layers"
    again, whole = (subprocess.run(command(folder, "fast"), cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[-1] for folder in ("a", "b"))
    assert again == whole and again.startswith("RESULT {")


STREAMED = '''
import json, resource, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from finetune_kit.importance import drop_one
ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
batch = [dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)]
if sys.argv[2] == "write": AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=8)).save_pretrained(sys.argv[1])
else:
    import finetune_kit.importance, accelerate, safetensors
    drop_one(AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)).eval(), batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = drop_one(sys.argv[1], batch, stream=True)
    print("RESULT", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/2**10, len(table))
'''


@pytest.mark.slow
def test_streamed_layers_leave_memory_again(tmp_path):
    "16 layers of 64 MiB: reading them one at a time takes a few of them at most."
    for what in ("write", "study"): done = subprocess.run([sys.executable, "-c", STREAMED, str(tmp_path), what], cwd=ROOT, capture_output=True, text=True)
    _, mib, layers = done.stdout.split()
    assert int(layers) == 16 and float(mib) < 400, done.stdout
