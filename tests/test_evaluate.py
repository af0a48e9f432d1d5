"""`evaluate` and `compare` over registered runs.

What they write beside the runs, and what they refuse.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ROOT, papermill
from nbformat.v4 import new_code_cell, new_notebook

from finetune_kit.chat import encode_rows
from finetune_kit.data import prepare_dataset
from finetune_kit.dials import RunConfig, check_run
from finetune_kit.evaluation import evaluate_model, summarize
from finetune_kit.model import load_model
from finetune_kit.record import start_run
from finetune_kit.registry import list_runs
from finetune_kit.surgery import apply_plan, save_cut

pytestmark = pytest.mark.slow


def make_run(layer, rows):
    "A run as `train` leaves it, without the training: the base without a layer, and its answers."
    cfg = RunConfig(drop_layer=layer, backend="transformers")
    plan = check_run(cfg)
    run = start_run("train", cfg, plan, record=False)
    model, tok = load_model(cfg.model, backend="transformers")
    save_cut(apply_plan(model, plan), tok, run.folder / "model")
    answers = evaluate_model(model, tok, encode_rows(rows, tok), max_new_tokens=8)
    run.log(step=1, loss=2.0)
    run.log(step=2, loss=1.0)
    run.save_items(dict(cut=answers))
    run.finish(dict(cut=summarize(answers)), dict(model="model"))


def make_runs(folder, layers=(7, 10), n=12):
    "The folders of runs that each lack a layer, with answers to the same n rows."
    rows = sorted(prepare_dataset("data/domains")["test"], key=lambda row: row["id"])[:n]
    for layer in layers:
        make_run(layer, rows)
    return sorted(file.parent for file in folder.glob("*/run.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("FINETUNE_KIT_RUNS", str(folder))
        return folder, make_runs(folder)


def read_json(path):
    return json.loads(path.read_text())


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def within(interval):
    return interval["lo"] <= interval["mean"] <= interval["hi"]


def test_evaluate_writes_beside_the_runs(made, warm, tmp_path, monkeypatch):
    folder, two = made
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(folder))
    done = warm(
        tmp_path / "o.ipynb",
        folder,
        "nbs/evaluate.ipynb",
        items=8,
        max_new_tokens=8,
        backend="transformers",
        metrics="exact_match,token_f1,rouge_l",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for run in two:
        metrics = read_json(next(run.glob("evaluation-*.json")))["metrics"]
        base, tuned, gain = metrics["base"], metrics["tuned"], metrics["tuned_minus_base"]
        assert tuned["n_items"] == 8
        assert gain["nll"]["mean"] == pytest.approx(tuned["nll"] - base["nll"])
        assert within(gain["nll"])
        assert {"exact_match", "token_f1", "rouge_l"} <= set(tuned)
    first = read_json(next(two[0].glob("evaluation-*.json")))["metrics"]
    listed = list_runs().set_index("id")
    assert listed.loc[two[0].name, "data/domains: tuned.nll"] == first["tuned"]["nll"]
    page = next(folder.glob("evaluate-*/report.html")).read_text()
    for part in (two[0].name, "Verdict", "tuned − base"):
        assert part in page, part


def write_task(folder):
    "A task of lm-evaluation-harness by the name of `sums`."
    sums = [(a, b) for a in range(4) for b in range(4)]
    rows = [dict(q=f"Question: What is {a} plus {b}? Answer:", right=f" {a + b}") for a, b in sums]
    write_rows(folder / "sums_.jsonl", rows)
    task = dict(
        task="sums",
        dataset_path="json",
        dataset_kwargs=dict(data_files=dict(test=str(folder / "sums_.jsonl"))),
        output_type="generate_until",
        test_split="test",
        doc_to_text="{{q}}",
        doc_to_target="{{right}}",
        generation_kwargs=dict(until=["\n"], max_gen_toks=4),
        metric_list=[dict(metric="exact_match")],
    )
    (folder / "sums.yaml").write_text(json.dumps(task))


def test_public_benchmarks_stand_beside_the_data(made, warm, tmp_path):
    reason = "lm-evaluation-harness (the extra `harness`) is not there"
    pytest.importorskip("lm_eval", reason=reason)
    folder, (run, _) = made
    write_task(tmp_path)
    notebook = "nbs/evaluate.ipynb"
    dials = dict(
        runs=run.name, items=8, max_new_tokens=4, backend="transformers", tasks_folder=str(tmp_path)
    )
    refused = warm(tmp_path / "bad.ipynb", folder, notebook, **dials, tasks="sum")
    assert "sums" in refused.stderr  # what there is
    done = warm(tmp_path / "o.ipynb", folder, notebook, **dials, tasks="sums")
    assert done.returncode == 0, done.stderr[-3000:]
    evaluations = [read_json(file) for file in run.glob("evaluation-*.json")]
    latest = max(evaluations, key=lambda evaluation: evaluation["made"])
    found = latest["tasks"]["sums exact_match"]
    assert set(found) == {"base", "tuned", "tuned_minus_base"}
    gain = found["tuned"]["mean"] - found["base"]["mean"]
    assert found["tuned_minus_base"]["mean"] == pytest.approx(gain)
    page = max(folder.glob("evaluate-*/report.html"), key=os.path.getmtime)
    assert "sums exact_match" in page.read_text()


OWN_METRIC = """
import datasets
import evaluate


class Shorter(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features(predictions=text, references=text)
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        pairs = zip(predictions, references)
        return dict(shorter=sum(len(a) < len(b) for a, b in pairs) / len(predictions))
"""


def test_benchmarks_and_metrics_of_evaluate_inside_a_run(warm, tmp_path):
    "Four states on the same items of a task, and a metric by the path of its script."
    reason = "lm-evaluation-harness (the extra `harness`) is not there"
    pytest.importorskip("lm_eval", reason=reason)
    write_task(tmp_path)
    script = tmp_path / "shorter.py"
    script.write_text(OWN_METRIC)
    folder = tmp_path / "runs"
    sizes = dict(max_steps=2, eval_items=6, eval_every=0, max_new_tokens=4)
    dials = dict(backend="transformers", tasks_folder=str(tmp_path), tasks="sums")
    metrics = f"numeric_match,bleu,{script}"
    done = warm(tmp_path / "o.ipynb", folder, "nbs/train.ipynb", **sizes, **dials, metrics=metrics)
    assert done.returncode == 0, done.stderr[-3000:]
    [run] = folder.glob("train-*")
    measured = read_json(run / "run.json")["metrics"]
    found = measured["tasks"]["sums exact_match"]
    states = ("base", "cut", "healed", "control")
    assert set(found) == {*states, "cut_minus_base", "healed_minus_cut", "healed_minus_control"}
    gain = found["healed"]["mean"] - found["cut"]["mean"]
    assert found["healed_minus_cut"]["mean"] == pytest.approx(gain)
    items = pd.read_json(run / "tasks.jsonl", lines=True)
    assert items.groupby("state").id.count().to_dict() == dict.fromkeys(states, 6)
    for state in states:
        its = measured[state]
        assert 0 <= its["shorter"] <= 1
        assert {"bleu", "corpus_bleu", "numeric_match_unreadable"} <= set(its)
        assert its["numeric_match_scored"] <= its["n_items"] == 6
    page = (run / "report.html").read_text()
    for part in ("sums exact_match", "healed − control", "numeric match: answers not readable"):
        assert part in page, part


def test_compare_pairs_the_items(made, warm, tmp_path):
    folder, two = made
    asked = ",".join(run.name for run in two)
    done = warm(tmp_path / "o.ipynb", folder, "nbs/compare.ipynb", runs=asked)
    assert done.returncode == 0, done.stderr[-3000:]
    run = next(folder.glob("compare-*"))
    pairs = pd.read_csv(run / "paired.csv")
    a, b = (read_json(one / "run.json")["metrics"]["cut"]["nll"] for one in two)
    assert pairs[pairs.metric == "nll"]["mean"].iloc[0] == pytest.approx(b - a)
    assert pairs.n_items.tolist() == [12, 12]
    page = (run / "report.html").read_text()
    for part in ("drop_layer", "common items", "Wins and losses", "Side by side"):
        assert part in page, part


@pytest.mark.parametrize(
    "notebook, parameters, message",
    [
        ("evaluate", dict(metrics="exact_mach"), "did you mean 'exact_match'"),
        ("evaluate", dict(runs="nothing"), "0 runs begin with 'nothing'"),
        ("compare", dict(state="headed"), "has no state 'headed'"),
    ],
)
def test_refused(notebook, parameters, message, made, warm, tmp_path):
    done = warm(tmp_path / "o.ipynb", made[0], f"nbs/{notebook}.ipynb", **parameters)
    assert done.returncode != 0
    assert message in done.stderr


def benchmark(run, folder):
    "What `finetune-kit benchmark --json` prints of a run."
    call = "from finetune_kit.cli import main; main()"
    command = [sys.executable, "-c", call, "benchmark", run, "--prompts", "3", "--json"]
    for name, value in dict(items="8", max_new_tokens="8", backend="transformers").items():
        command += ["-p", name, value]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | dict(FINETUNE_KIT_RUNS=str(folder)),
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_benchmark_measures_quality_and_speed(made):
    folder, two = made
    found = benchmark(two[0].name, folder)
    measured = found["runs"][two[0].name]
    assert measured["metrics"]["tuned"]["n_items"] == 8
    base, tuned = measured["speed"]["base"], measured["speed"]["tuned"]
    for speed in (base, tuned):
        assert speed["n_timed"] == 3
        assert 0 < speed["first_s"] <= speed["answer_s"] <= speed["answer_s_p95"]
        assert 1 <= speed["answer_tokens"] <= 8
        assert speed["peak_mib"] > 9
    factor = tuned["tokens_per_s"] / base["tokens_per_s"]
    assert measured["speedup"]["mean"] == pytest.approx(factor)
    assert within(measured["speedup"])
    assert "tokens a second" in Path(found["report"]).read_text()


def run_with_examples(folder, n):
    "The folder of the comparison that shows n examples."
    files = list(folder.glob("compare-*/run.json"))
    [found] = [f.parent for f in files if read_json(f)["config"]["examples"] == n]
    return found


def shown_cells(run):
    "Sources and outputs of the cells of its report."
    cells = nbformat.read(run / "report.ipynb", 4).cells
    shown = [cell for cell in cells if cell.cell_type == "markdown" or cell.outputs]
    outputs = []
    for cell in shown:
        if cell.cell_type == "code":
            outputs.append([output.get("data") or output.get("text") for output in cell.outputs])
    return [cell.source for cell in shown], outputs


def run_as_lab_does(notebook, folder):
    "All cells in nbs/, in order."
    from nbclient import NotebookClient

    resources = dict(metadata=dict(path=str(ROOT / "nbs")))
    client = NotebookClient(notebook, timeout=2400, kernel_name="python3", resources=resources)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("FINETUNE_KIT_RUNS", str(folder))
        client.execute()


def test_lab_and_papermill_give_the_same_report(made, tmp_path):
    """Lab runs the cells in nbs/, the dials set by hand in the parameters cell.

    papermill runs them where it is called, with a cell of its own.
    """
    folder, two = made
    asked = ",".join(run.name for run in two)
    done = papermill(tmp_path / "o.ipynb", folder, "nbs/compare.ipynb", runs=asked, examples=2)
    assert done.returncode == 0, done.stderr[-3000:]
    run = run_with_examples(folder, 2)
    by_papermill = shown_cells(run)
    shutil.rmtree(run)
    notebook = nbformat.read(ROOT / "nbs/compare.ipynb", 4)
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    by_hand = cell.source.replace('runs = "all"', f'runs = "{asked}"')
    cell.source = by_hand.replace("examples = 5", "examples = 2")
    run_as_lab_does(notebook, folder)
    assert run_with_examples(folder, 2) == run
    assert shown_cells(run) == by_papermill


def test_a_model_is_asked_as_it_was_trained(made, warm, tmp_path):
    "With its instruction, on all rows of a file that it has not seen."
    instruction = "Be brief: one word. #1"
    folder, trained = tmp_path / "runs", made[1][0]
    run = folder / trained.name
    shutil.copytree(trained, run)
    info = read_json(run / "run.json")
    info["config"]["instruction"] = instruction
    (run / "run.json").write_text(json.dumps(info))
    rows = [dict(question=f"What is {n} plus 1?", answer=str(n + 1)) for n in range(7)]
    write_rows(tmp_path / "mine.jsonl", rows)
    done = warm(
        tmp_path / "o.ipynb",
        folder,
        "nbs/evaluate.ipynb",
        data=tmp_path / "mine.jsonl",
        max_new_tokens=4,
        backend="transformers",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    evaluations = [read_json(file) for file in run.glob("evaluation-*.json")]
    assert [e["items"] for e in evaluations if "mine" in e["data"]] == [7]
    page = next(folder.glob("evaluate-*/report.html")).read_text()
    shown = re.sub(r"<[^>]+>", "", page)
    assert instruction in shown, "as the mask shows it, token by token"


def test_a_second_run_in_the_same_kernel(warm, tmp_path):
    """As in JupyterLab, where a dial is turned and all cells run again.

    The third run is the second once more.
    """
    imports = [
        "from finetune_kit.record import start_run",
        "from finetune_kit.registry import EvaluateConfig",
    ]
    cells = ["\n".join(imports)]
    for n in (5, 6, 6):
        cells += [f"run = start_run('evaluate', EvaluateConfig(items={n}), None)", "run.finish({})"]
    kernel = dict(name="python3", display_name="", language="python")
    notebook = new_notebook(
        cells=[new_code_cell(source) for source in cells], metadata=dict(kernelspec=kernel)
    )
    nbformat.write(notebook, tmp_path / "again.ipynb")
    runs = tmp_path / "runs"
    done = warm(tmp_path / "o.ipynb", runs, tmp_path / "again.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [read_json(file)["status"] for file in runs.glob("*/run.json")] == ["done"] * 2
    assert len(list(runs.glob("*/report.html"))) == 2
