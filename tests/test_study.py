"Layer studies across processes: papermill runs, a study killed with SIGKILL, layers read from disk within their memory."

import json, multiprocessing, signal, subprocess, sys, time

import pandas as pd, pytest, torch
from conftest import ROOT


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
    assert info["status"] == "done" and info["metrics"]["base"]["nll"] > 0
    ones, ends, cheap = (
        pd.read_csv(folder / f"{name}.csv") for name in ("drop_one", "truncations", "atlas")
    )
    assert (
        ones.layer.tolist() == list(range(12))
        and (ones.lo <= ones.delta).all()
        and (ones.delta <= ones.hi).all()
    )
    assert abs(ends.delta.iloc[-1]) < 1e-6 and abs(cheap.nll - ends.nll).max() < 1e-5, (
        "the logit lens is the truncation"
    )
    removed = pd.read_csv(folder / "greedy.csv")
    assert (
        removed.layer.iloc[0] == ones.delta.idxmin()
        and abs(removed.delta.iloc[0] - ones.delta.min()) < 1e-5
    )
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") >= 5 and "dearest layer" in page and "<progress" not in page


@pytest.mark.parametrize(
    "dial, says", [(dict(itms=3), "did you mean 'items'"), (dict(stream=True), "precisions=''")]
)
def test_layer_study_refuses(warm, tmp_path, dial, says):
    done = warm(tmp_path / "out.ipynb", tmp_path / "runs", "nbs/layer_study.ipynb", **dial)
    assert done.returncode != 0 and says in done.stderr and not (tmp_path / "runs").exists()


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
    assert info["status"] == "done" and list(info["metrics"]["healed"]) == ["6", "7", "8"]
    cuts = pd.read_csv(folder / "cuts.csv")
    assert cuts.layer.tolist() == [6, 7, 8] and (cuts["from"] <= cuts["healed − control"]).all()
    assert sorted(f.parent.name for f in (folder / "cuts").glob("*/items.json")) == [
        "control",
        "without-6",
        "without-7",
        "without-8",
    ] and not list((folder / "cuts").glob("*/checkpoints"))


@pytest.fixture
def text():
    "The embedded base, and six batches."
    from finetune_kit.chat import encode_rows
    from finetune_kit.batches import batches
    from finetune_kit.rows import load_rows
    from finetune_kit.model import load_model

    model, tok = load_model(ROOT / "data/tiny-base", backend="transformers", device="cpu")
    return model, batches(
        encode_rows(load_rows(ROOT / "data/domains", "validation", max_rows=24), tok), 4
    )


def test_a_study_goes_on_for_the_same_weights_only(text, tmp_path):
    from finetune_kit.importance import drop_one

    model, some = text
    before = drop_one(model, some[:2], resume=tmp_path)
    model.model.layers[3].self_attn.o_proj.weight.data[:, 32:64] = 0  # one head
    after = drop_one(model, some[:2], resume=tmp_path)
    assert (
        after.attrs["baseline"] != before.attrs["baseline"]
        and after.delta.tolist() == drop_one(model, some[:2]).delta.tolist()
    )


def test_a_killed_study_goes_on(text, tmp_path):
    from finetune_kit.importance import drop_one

    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()

    def study():
        torch.set_num_threads(1)
        drop_one(
            *text,
            resume=tmp_path / "a",
            progress=lambda done, total: (there.send(done), time.sleep(0.1)),
        )

    process = fork.Process(target=study)
    process.start()
    while here.recv() < 30:
        pass
    process.kill()
    process.join()
    assert (
        process.exitcode == -signal.SIGKILL and len(list((tmp_path / "a").glob("walk-*.json"))) == 2
    ), "two batches of six were through their 12 layers"
    again, whole = drop_one(*text, resume=tmp_path / "a"), drop_one(*text)
    pd.testing.assert_frame_equal(again, whole, check_exact=True)


STREAMED = """
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
"""


@pytest.mark.slow
def test_streamed_layers_leave_memory_again(tmp_path):
    "16 layers of 64 MiB: 1 GiB in all; read one at a time, they never stand in memory together (pages of the files count until the kernel wants them)."
    for what in ("write", "study"):
        done = subprocess.run(
            [sys.executable, "-c", STREAMED, str(tmp_path), what],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    _, mib, layers = done.stdout.split()
    assert int(layers) == 16 and float(mib) < 700, done.stdout
