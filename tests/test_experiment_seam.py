"A new experiment is one notebook: its parameters cell is all that a run, and a sweep, knows of it."

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

IMPORTS = """\
from typing import Literal
from finetune_kit.dials import read_dials
from finetune_kit.record import start_run"""
PARAMETERS = """\
config = None  # a YAML file of this notebook's dials
rows = 4  # how many rows to count
share: float = 1  # of each
kind: Literal["plain", "chat"] = "plain"  # which rows
note = None  # anything"""
RUN = """\
cfg = read_dials(globals())
run = start_run("count_rows", cfg, cfg.check())"""
HEAVY = 'raise SystemError("a model was loaded")'
FINISH = "run.finish(dict(counted=dict(rows=cfg.rows * cfg.share)))"


def experiment(folder, *cells):
    "A notebook of these cells; the second one has the tag."
    nodes = [new_code_cell(source) for source in cells]
    nodes[1].metadata["tags"] = ["parameters"]
    kernel = dict(name="python3", display_name="python3", language="python")
    path = folder / "count_rows.ipynb"
    nbformat.write(new_notebook(cells=nodes, metadata=dict(kernelspec=kernel)), path)
    return path


def records(runs):
    return [json.loads(file.read_text()) for file in sorted(runs.glob("*/run.json"))]


@pytest.fixture
def notebook(tmp_path):
    return experiment(tmp_path, IMPORTS, PARAMETERS, RUN, FINISH)


def test_it_declares_its_dials(notebook):
    from finetune_kit.declaration import config_class, declared_parameters, experiment_name

    assert experiment_name(notebook) == "count_rows"
    assert declared_parameters(notebook)["rows"] == 4
    fields = config_class(notebook).model_fields
    assert list(fields) == ["rows", "share", "kind", "note"]
    assert fields["rows"].description == "how many rows to count"


@pytest.mark.slow
def test_it_runs(notebook, warm, tmp_path):
    runs = tmp_path / "runs"
    result = warm(tmp_path / "o.ipynb", runs, notebook, rows=3, share=0.5, note=True)
    assert result.returncode == 0, result.stderr[-3000:]
    (record,) = records(runs)
    assert record["status"] == "done"
    assert record["id"].startswith("count_rows-")
    assert record["config"] == dict(rows=3, share=0.5, kind="plain", note=True)
    assert record["metrics"] == dict(counted=dict(rows=1.5))
    assert (runs / record["id"] / "report.html").exists()


@pytest.mark.slow
def test_the_same_dials_are_the_same_run(notebook, warm, tmp_path):
    runs = tmp_path / "runs"
    for dials in ({}, dict(rows=4), dict(rows=5)):
        assert warm(tmp_path / "o.ipynb", runs, notebook, **dials).returncode == 0
    assert [record["config"]["rows"] for record in records(runs)].count(4) == 1
    assert len(records(runs)) == 2


@pytest.mark.slow
def test_a_config_file_gives_what_no_dial_sets(notebook, warm, tmp_path):
    (tmp_path / "a.yaml").write_text("rows: 7\nshare: 0.5\n")
    runs = tmp_path / "runs"
    dials = dict(config=str(tmp_path / "a.yaml"), share=1)
    assert warm(tmp_path / "o.ipynb", runs, notebook, **dials).returncode == 0
    (record,) = records(runs)
    assert record["config"] == dict(rows=7, share=1.0, kind="plain", note=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dials, message",
    [
        (dict(row=3), "unknown parameter 'row'"),
        (dict(rows="many"), "rows='many'"),
        (dict(rows=2.5), "rows=2.5"),
        (dict(rows=True), "expected a number, got True"),
        (dict(kind="both"), "should be 'plain' or 'chat'"),
    ],
)
def test_a_bad_dial_is_refused_before_anything_loads(dials, message, warm, tmp_path):
    notebook = experiment(tmp_path, IMPORTS, PARAMETERS, RUN, HEAVY)
    result = warm(tmp_path / "o.ipynb", tmp_path / "runs", notebook, **dials)
    assert message in result.stderr
    assert "a model was loaded" not in result.stderr
    assert not records(tmp_path / "runs")


@pytest.mark.slow
def test_a_copy_of_an_experiment_takes_a_dial_more(warm, tmp_path):
    "The kit's own class, with what the parameters cell has besides."
    imports = IMPORTS.replace("read_dials", "RunConfig, read_dials")
    run = RUN.replace("globals()", "globals(), RunConfig")
    notebook = experiment(tmp_path, imports, "seed = 0\nwarmth = 0.5", run, "run.finish({})")
    runs = tmp_path / "runs"
    result = warm(tmp_path / "o.ipynb", runs, notebook, warmth=2, drop_layer=3)
    assert result.returncode == 0, result.stderr[-3000:]
    (record,) = records(runs)
    assert record["config"]["warmth"] == 2.0
    assert record["dropped"] == [3]


# From here on what a sweep makes of it: finetune_kit.sweep_plan
def test_a_sweep_plans_it(notebook, tmp_path, monkeypatch):
    from finetune_kit.sweep_plan import plan_sweep
    from finetune_kit.sweep_spec import SweepSpec

    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "runs"))
    spec = SweepSpec(notebook=str(notebook), grid=dict(rows=[1, 2], kind=["plain", "chat"]))
    planned = plan_sweep(spec)
    assert [(p.cfg.rows, p.cfg.kind) for p in planned] == [
        (1, "plain"),
        (1, "chat"),
        (2, "plain"),
        (2, "chat"),
    ]
    assert all(p.id.startswith("count_rows-") for p in planned)


@pytest.mark.parametrize(
    "grid, message",
    [
        (dict(row=[1]), "unknown parameter 'row'"),
        (dict(rows=["many"]), "rows='many'"),
        (dict(kind=["both"]), "should be 'plain' or 'chat'"),
    ],
)
def test_a_sweep_refuses_a_bad_dial(grid, message, notebook):
    from finetune_kit.core import InvalidConfigError
    from finetune_kit.sweep_plan import plan_sweep
    from finetune_kit.sweep_spec import SweepSpec

    with pytest.raises(InvalidConfigError, match=message):
        plan_sweep(SweepSpec(notebook=str(notebook), grid=grid))


@pytest.mark.slow
def test_a_run_is_found_under_the_id_that_was_planned(notebook, warm, tmp_path, monkeypatch):
    from finetune_kit.sweep_plan import plan_sweep
    from finetune_kit.sweep_spec import SweepSpec

    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "runs"))
    spec = SweepSpec(notebook=str(notebook), grid=dict(rows=[3]), fixed=dict(note="a"))
    (planned,) = plan_sweep(spec)
    warm(tmp_path / "o.ipynb", tmp_path / "runs", notebook, rows=3, note="a")
    (record,) = records(tmp_path / "runs")
    assert record["id"] == planned.id
