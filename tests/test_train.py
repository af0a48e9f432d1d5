"`papermill nbs/train.ipynb`: the run, its report, its repetition, and what it refuses."

import json
import math
import re

import nbformat
import pandas as pd
import pytest
from conftest import ROOT, papermill

from finetune_kit.declaration import parse_parameters
from finetune_kit.dials import RunConfig
from finetune_kit.infer import generate
from finetune_kit.surgery import load_for_inference

QUICK = dict(max_steps=30, eval_every=15, eval_items=40)
STATES = ("base", "cut", "healed", "control")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Where the executed notebook is, and the folder of its run."
    top = tmp_path_factory.mktemp("run")
    done = papermill(top / "out.ipynb", top / "runs", drop_layer=7, **QUICK)
    assert done.returncode == 0, done.stderr[-3000:]
    return top, next((top / "runs").glob("train-drop7-*"))


def info(folder):
    return json.loads((folder / "run.json").read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_cells(path):
    return nbformat.read(path, 4).cells


def outputs_of(path):
    return [out for cell in read_cells(path) if cell.cell_type == "code" for out in cell.outputs]


def test_run_json_says_everything(run):
    _, folder = run
    record = info(folder)
    assert record["status"] == "done"
    assert record["id"] == folder.name
    assert record["error"] is None
    assert record["dropped"] == [7]
    for state in STATES:
        metrics = record["metrics"][state]
        assert metrics["n_tokens"] > 100
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]), rel=1e-6)
        assert 0 <= metrics["exact_match"] <= 1
        lo, hi = metrics["intervals"]["nll"]
        assert lo <= metrics["nll"] <= hi
    assert set(record["hashes"]) == {"config", "code", "data", "model", "template", "machine"}
    assert record["versions"]["torch"]
    assert record["versions"]["unsloth"]
    assert record["config"]["drop_layer"] == 7
    assert record["config"]["max_steps"] == 30
    for name in ("model", "report", "items", "log", "rejects"):
        assert (folder / record["artifacts"][name]).exists(), name


def test_healing_is_measured_against_the_control(run):
    metrics = info(run[1])["metrics"]
    nll = {state: metrics[state]["nll"] for state in STATES}
    # Better than the cut model by more than the interval
    assert metrics["healed_minus_cut"]["nll"]["hi"] < 0
    left = metrics["healed_minus_control"]["nll"]
    assert left["lo"] <= left["mean"] <= left["hi"]
    assert left["mean"] == pytest.approx(nll["healed"] - nll["control"], abs=1e-9)
    share = metrics["recovered"]["nll"]
    assert share["lo"] <= share["mean"] <= share["hi"]
    gained, lost = nll["cut"] - nll["healed"], nll["cut"] - nll["control"]
    assert share["mean"] == pytest.approx(gained / lost, rel=1e-6)


def test_the_verdict_stands_on_top_with_the_figure(run):
    top, folder = run
    for notebook in (top / "out.ipynb", folder / "report.ipynb"):
        cells = read_cells(notebook)
        [first] = [cell for cell in cells if "start_run(" in cell.source]
        shown = [out.data for out in first.outputs if out.output_type == "display_data"]
        texts = [data.get("text/html", "") for data in shown]
        assert any('class="verdict"' in text for text in texts), notebook.name
        assert not any("No verdict yet" in text for text in texts)
        assert any("image/png" in data for data in shown), "the four states, drawn"
        below = [cell for cell in cells if cell.cell_type == "code" and cell is not first]
        assert not [cell for cell in below if 'class="verdict' in str(cell.outputs)]
    page = (folder / "report.html").read_text()
    assert page.index('class="verdict"') < page.index("Ten answers")


def test_the_record_has_the_verdict_and_both_yardsticks(run):
    metrics = info(run[1])["metrics"]
    nll = {state: metrics[state]["nll"] for state in STATES}
    for a, b in (("cut", "base"), ("healed", "base"), ("control", "base")):
        difference = metrics[f"{a}_minus_{b}"]["nll"]["mean"]
        assert difference == pytest.approx(nll[a] - nll[b], abs=1e-9)
    assert metrics["verdict"] == "healed"
    for yardstick in ("recovered", "recovered_of_cost"):
        share = metrics[yardstick]["nll"]
        assert 0 < share["lo"] < share["mean"] < share["hi"]


def test_a_harmful_learning_rate_is_said_first(warm, tmp_path):
    dials = dict(lr=0.05, warmup_steps=0, max_steps=8, eval_every=0, eval_items=24)
    done = warm(tmp_path / "o.ipynb", tmp_path / "runs", max_new_tokens=4, max_length=48, **dials)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = next((tmp_path / "runs").glob("train-drop7-*"))
    assert info(folder)["metrics"]["verdict"] == "harmed"
    page = (folder / "report.html").read_text()
    verdict = page[page.index('class="verdict harmed"') :]
    words = re.sub(r"\s+", " ", re.sub("<[^>]+>", "", verdict))
    assert words.partition(">")[2].startswith("Fine-tuning harmed the whole model")
    assert "lr was 0.05, try 0.005; or fewer steps than 8" in words
    assert "nothing to heal" not in page
    told = r"24 held-out items \((\d+) more are longer than 48 tokens and were left out\)"
    counts = re.findall(told, words)
    assert len(counts) == 2, "in the verdict's conditions, and beside the data"
    assert int(counts[0]) > 0


def test_metrics_jsonl_is_the_training_log(run):
    lines = read_lines(run[1] / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert [line["step"] for line in lines if line.get("val_loss")] == [15, 30]


def test_log_says_when_what_happened(run):
    _, folder = run
    lines = read_lines(folder / "log.jsonl")
    assert f"{folder.name} begins" in lines[0]["message"]
    assert lines[-1]["message"] == f"{folder.name} is done"
    cells = [line for line in lines if line["message"].startswith("cell ")]
    assert len(cells) >= 8
    assert all(line["run"] == folder.name for line in cells)
    seconds = [line["seconds"] for line in cells]
    assert min(seconds) >= 0
    assert max(seconds) > 1
    assert [line["seconds"] for line in lines if line["message"].startswith("the control: ")]
    assert not [line for line in lines if line["level"] == "ERROR"]


PARTS = (
    "Parameters of this run",
    "Verdict",
    "Ten answers",
    'class="mask"',
    'class="verdict',
    "against control",
    "hash of data",
)


def test_report_stands_alone(run):
    page = (run[1] / "report.html").read_text()
    other_files = re.search(r"""(src|href)=["'](?!#|data:)""", page)
    assert not other_files, "the page must need no other file"
    assert "<script" not in page
    assert page.count('src="data:image/png;base64') >= 3
    for part in PARTS:
        assert part in page, part


def test_notebooks_are_clean(run):
    top, folder = run
    for notebook in (top / "out.ipynb", folder / "report.ipynb"):
        text = notebook.read_text()
        assert "<progress" not in text, f"a progress bar is left in {notebook.name}"
        assert not [out for out in outputs_of(notebook) if out.output_type == "error"]
    outputs = outputs_of(top / "out.ipynb")
    warnings = [out.text for out in outputs if out.get("name") == "stderr"]
    assert not warnings, f"no wall of warnings: {warnings}"


def test_report_is_the_executed_notebook(run):
    top, folder = run
    cells = read_cells(top / "out.ipynb")
    ran = [cell.source.strip() for cell in cells if cell.cell_type != "raw"]
    assert [cell.source.strip() for cell in read_cells(folder / "report.ipynb")] == ran


def test_same_run_same_numbers_and_the_control_is_reused(run, warm, tmp_path):
    top, folder = run
    first = info(folder)
    again = warm(tmp_path / "o.ipynb", top / "runs", drop_layer=7, **QUICK)
    assert again.returncode == 0, again.stderr[-3000:]
    second = info(folder)  # the same folder: the same run is found again
    assert second["started"] > first["started"]
    for state in STATES:
        assert second["metrics"][state] == first["metrics"][state]
    [control] = (top / "runs").glob("control-*")
    assert info(control)["started"] < first["finished"]


def test_adapter_loads_onto_the_cut_base(run):
    _, folder = run
    model, tok = load_for_inference(folder)
    as_text = dict(question=str, answer=str)
    items = pd.read_json(folder / "items.jsonl", lines=True, dtype=as_text)
    healed = items[(items.state == "healed") & (items.domain == "environment")].head(8)
    asked = [[dict(role="user", content=question)] for question in healed.question]
    assert generate(model, tok, asked, max_new_tokens=40) == healed.answer.tolist()


@pytest.mark.parametrize(
    "parameters, message",
    [
        (dict(drop_layr=7), "unknown parameter 'drop_layr'"),
        (dict(drop_layer=99), "layer 99 not in 0..11"),
        (dict(data="nothing.jsonl"), "no data at 'nothing.jsonl'"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (dict(drop_layer="abc"), "cannot read 'abc'"),
                (dict(drop_layer=7, prune_after=4), "give one"),
                (dict(model="data/nothing"), "no model at 'data/nothing'"),
                (dict(lr="fast"), "lr='fast': Input should be a valid number"),
                (dict(config="nowhere"), "no config"),
            ]
        ),
    ],
)
def test_refused_before_anything_loads(parameters, message, warm, tmp_path):
    done = warm(tmp_path / "o.ipynb", tmp_path / "runs", **parameters)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list((tmp_path / "runs").glob("*")), "nothing may have begun"


def test_a_failing_run_leaves_a_readable_report(warm, tmp_path):
    # No end of turn: the gate must stop it
    endless = "{% for m in messages %}{{ m.content }}{% endfor %}"
    done = warm(tmp_path / "o.ipynb", tmp_path / "runs", template=endless, **QUICK)
    assert done.returncode != 0
    assert "MaskError" in done.stderr
    folder = next((tmp_path / "runs").glob("train-*"))
    record = info(folder)
    assert record["status"] == "failed"
    assert "MaskError" in record["error"]
    assert record["finished"]
    page = (folder / "report.html").read_text()
    for part in ("This run failed.", "never stop", "Traceback"):
        assert part in page, part


def test_dials_are_the_config():
    "The defaults that the notebook shows are those of `RunConfig`, each with a comment."
    cells = read_cells(ROOT / "nbs" / "train.ipynb")
    [source] = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    dials = {}
    exec(source, {}, dials)
    assert dials.pop("config") is None
    assert dials == RunConfig().model_dump()
    assert all(parameter.description for parameter in parse_parameters(source).values())


def test_config_file_and_dials(warm, tmp_path):
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text(
        "max_steps: 3\nlr: 0.001\neval_items: 4\neval_every: 0\nbackend: transformers\n"
    )
    mine.write_text("_extends: base.yaml\nmax_rows: 40\n")
    runs = tmp_path / "runs"
    done = warm(tmp_path / "o.ipynb", runs, config=mine, prune_after=6, lr=0.0005)
    assert done.returncode == 0, done.stderr[-3000:]
    config = info(next(runs.glob("train-drop6-11-*")))["config"]
    expected = dict(max_steps=3, lr=0.0005, max_rows=40, drop_layer=None)
    assert {name: config[name] for name in expected} == expected
    base.write_text("max_step: 3\n")
    done = warm(tmp_path / "o.ipynb", tmp_path / "runs2", config=mine)
    assert done.returncode != 0
    assert "unknown parameter 'max_step'" in done.stderr
    assert "did you mean 'max_steps'" in done.stderr


def test_two_processes_from_the_notebook(warm, tmp_path):
    done = warm(
        tmp_path / "out.ipynb",
        tmp_path / "runs",
        drop_layer=7,
        nproc=2,
        max_steps=2,
        eval_every=0,
        eval_items=4,
        max_new_tokens=4,
        backend="transformers",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [folder] = (tmp_path / "runs").glob("train-*")
    record = info(folder)
    assert record["status"] == "done"
    assert record["config"]["nproc"] == 2
    assert record["metrics"]["training"]["steps"] == 2
