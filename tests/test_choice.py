"Layers chosen by a measure: through a run, a second run that finds the choice, a sweep, a report."

import json

import pandas as pd
import pytest

from finetune_kit.core import FineTuneError
from finetune_kit.data import prepare_dataset
from finetune_kit.dials import RunConfig
from finetune_kit.model_sources import find_model
from finetune_kit.surgery import load_for_inference
from finetune_kit.sweep_plan import plan_sweep
from finetune_kit.sweep_spec import read_spec

QUICK = dict(max_steps=2, eval_every=0, eval_items=8, max_new_tokens=4, save_every=0)
BY_EXACT = dict(drop_by="exact", drop_count=2, choice_items=16, backend="transformers") | QUICK


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def made(warm, tmp_path_factory):
    "Two runs with the same choice and different healing."
    top = tmp_path_factory.mktemp("choice")
    for name, lr in (("one", 1e-3), ("two", 2e-3)):
        done = warm(top / f"{name}.ipynb", top / "runs", lr=lr, **BY_EXACT)
        assert done.returncode == 0, done.stderr[-3000:]
    return top / "runs"


def test_the_choice_is_in_the_runs_folder(made):
    runs = sorted(made.glob("train-exact2-*"))
    assert len(runs) == 2
    for folder in runs:
        record, choice = read_json(folder / "run.json"), read_json(folder / "choice.json")
        table = pd.read_csv(folder / "choice.csv")
        assert record["status"] == "done"
        assert record["dropped"] == choice["dropped"] == table.layer[table.chosen].tolist()
        assert record["plan"].startswith("10 of 12 layers, without")
        assert (table.lo <= table.score).all()
        assert (table.score <= table.hi).all()
        cheapest = table.score.nsmallest(2).index
        assert sorted(table.layer[cheapest]) == record["dropped"]
        page = (folder / "report.html").read_text()
        assert "exact chose" in page
        assert "16 rows of the training split" in page


def test_its_rows_are_training_rows(made):
    splits = prepare_dataset("data/domains")
    ids = set(read_json(next(made.glob("train-exact2-*/choice.json")))["ids"])
    assert len(ids) == 16
    assert ids <= {row["id"] for row in splits["train"]}
    for split in ("validation", "test"):
        assert not ids & {row["id"] for row in splits[split]}


def test_it_is_made_once(made):
    [kept] = made.glob("choices/exact2-*/choice.json")
    tables = [path.read_text() for path in made.glob("train-exact2-*/choice.csv")]
    assert set(tables) == {(kept.parent / "choice.csv").read_text()}
    assert {read_json(path)["notes"]["seconds"] for path in made.glob("train-*/choice.json")} == {
        read_json(kept)["notes"]["seconds"]
    }
    controls = [path for path in made.glob("control-*") if path.is_dir()]
    assert len(controls) == 2  # of two learning rates; the choice makes none of its own


def test_the_model_stands_on_what_was_chosen(made, monkeypatch):
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(made))
    run = next(made.glob("train-exact2-*"))
    dropped = read_json(run / "run.json")["dropped"]
    assert find_model(run.name).plan.dropped == dropped
    model, _ = load_for_inference(run / "model", backend="transformers")
    assert model.config.num_hidden_layers == 10


def test_compare_draws_the_frontier(made, warm, tmp_path):
    runs = ",".join(sorted(path.name for path in made.glob("train-exact2-*")))
    done = warm(tmp_path / "o.ipynb", made, "nbs/compare.ipynb", runs=runs)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (next(made.glob("compare-*")) / "report.html").read_text()
    assert "Methods at equal count" in page
    assert "<p>All layers were taken out by hand" not in page


@pytest.mark.parametrize(
    "dials, message",
    [
        (dict(drop_by="exact", drop_count=2, drop_layer=7), "together with drop_layer=7"),
        (dict(drop_by="exact", drop_count=12), "not in 1..11"),
        (dict(drop_by="depth", drop_count=2, race=True), "nothing to save"),
        (dict(drop_by="exakt", drop_count=2), "did you mean 'exact'"),
    ],
)
def test_refused_before_anything_loads(dials, message, warm, tmp_path):
    done = warm(tmp_path / "o.ipynb", tmp_path / "runs", **dials)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()


def test_calibration_rows_that_are_test_rows(tmp_path, monkeypatch):
    "A file that is train and test at once: the kit's splits leave no training row to choose on."
    from finetune_kit.chosen import choose_for

    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path))
    same = "data/domains/math/test.jsonl"
    data = dict(train=same, validation="data/domains/math/validation.jsonl", test=same)
    with pytest.raises(FineTuneError):
        choose_for(RunConfig(data=data, drop_by="exact", drop_count=2, choice_items=4))


def test_the_methods_sweep_has_one_control(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path))
    planned = plan_sweep(read_spec("experiments/methods_sweep.yaml"))
    assert len(planned) == 24
    assert [run.first for run in planned].count(True) == 1
    assert planned[0].id.startswith("train-exact1-")
