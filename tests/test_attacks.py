"""What strangers' files, killed processes and repeated commands must not do."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune_kit import cli
from finetune_kit.catalogue import Catalogue
from finetune_kit.core import FineTuneError, InvalidConfigError, load_config
from finetune_kit.dials import RunConfig
from finetune_kit.record import start_run
from finetune_kit.registry import chosen_runs, list_runs, load_run
from finetune_kit.runs import sweep

ROOT = Path(__file__).parents[1]
CASES = ROOT.parent / "shared/cases/files"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "A folder for runs."
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def finished_run(**dials):
    cfg = RunConfig(**dials).resolved()
    run = start_run("train", cfg, cfg.check(), record=False)
    (run.folder / "items.jsonl").write_text('{"state": "base", "nll": 1.0}\n')
    (run.folder / "report.html").write_text("the report")
    run.finish(dict(base=dict(nll=1.0)))
    return run


# Runs


def test_killed_again_keeps_the_record(runs):
    run = finished_run()
    before = {file.name: file.read_bytes() for file in run.folder.iterdir() if file.is_file()}
    script = (
        "import os, signal\n"
        "from finetune_kit.dials import RunConfig\n"
        "from finetune_kit.record import start_run\n"
        "cfg = RunConfig().resolved()\n"
        "start_run('train', cfg, cfg.check(), record=False)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (runs / f".again-{run.id}").exists()
    after = {file.name: file.read_bytes() for file in run.folder.iterdir() if file.is_file()}
    assert after == before
    assert [found.id for found in chosen_runs("all")] == [run.id]
    cfg = RunConfig().resolved()
    again = start_run("train", cfg, cfg.check(), record=False)
    again.finish(dict(base=dict(nll=2.0)))
    assert load_run(run.id).info["metrics"] == dict(base=dict(nll=2.0))
    assert not (run.folder / "items.jsonl").exists()


def test_repeated_command_makes_nothing(runs, tmp_path):
    run = finished_run(seed=3)
    (run.folder / "report.ipynb").write_text("the notebook")
    command = ["run", "nbs/train.ipynb", "-p", "seed=3", "-o", str(tmp_path / "out.ipynb")]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert f"report: {run.folder / 'report.html'}" in result.stdout
    assert "--again" in result.stderr
    assert (tmp_path / "out.ipynb").read_text() == "the notebook"


ODD = [
    dict(metrics=[1]),
    dict(metrics="good"),
    dict(metrics=dict(base=dict(nll="low"))),
    dict(metrics=dict(base=dict(intervals=[1]))),
    dict(metrics=dict(healed_minus_control=dict(nll=dict(mean="x")))),
    dict(started="yesterday"),
    dict(started=None, finished=None),
    dict(finished=float("nan")),
    dict(config=None),
    dict(config=dict(model=None)),
    dict(config=dict(model=["a"])),
    dict(id="train-drop7-00000000"),
    dict(status=3),
    dict(pid=[1], status="running"),
    dict(hashes=dict(data=3)),
    dict(error=dict(a=1)),
    dict(artifacts=dict(model="../../etc")),
]


def test_one_odd_record_spoils_nothing(runs):
    good = finished_run()
    (good.folder / "model").mkdir()
    for number, odd in enumerate(ODD):
        folder = runs / f"odd-{number}-{number:08x}"
        shutil.copytree(good.folder, folder)
        info = json.loads((folder / "run.json").read_text()) | dict(id=folder.name) | odd
        (folder / "run.json").write_text(json.dumps(info))
    deep = runs / "odd-deep"
    deep.mkdir()
    (deep / "run.json").write_text('{"metrics": ' + "[" * 10_000)
    table = list_runs()
    assert len(table) == len(ODD) + 2
    assert table.set_index("id").status[good.id] == "done"
    assert good.id in Catalogue({}).names()
    assert good.id in [run.id for run in chosen_runs("all")]
    spec = dict(name="one", notebook="nbs/train.ipynb", list=[{}])
    [row] = sweep(spec, dry_run=True, show=lambda line: None).to_dict("records")
    assert row["status"] == "done"
    listed = CliRunner().invoke(cli.app, ["runs"])
    assert listed.exit_code == 0, listed.output
    assert good.id in listed.stdout
    for id in table.id[table.id != good.id]:
        with contextlib.suppress(FineTuneError):  # any other error would be the service's fault
            Catalogue({}).find(id)


def test_two_seeds_of_one_cut(runs, caplog):
    first, second = finished_run(seed=0), finished_run(seed=1)
    failed = start_run("train", RunConfig(seed=2), RunConfig(seed=2).check(), record=False)
    failed.fail(ValueError("no rows"))
    assert load_run("train-drop7").id == second.id
    assert second.id in caplog.text
    assert load_run("train-drop7@seed=0").id == first.id
    with pytest.raises(InvalidConfigError, match=r"seed=0.*seed=1|seed=1.*seed=0"):
        load_run("train")
    with pytest.raises(InvalidConfigError, match="seed=0"):
        load_run("train-drop7@seed=2")


# Files


@pytest.mark.skipif(not CASES.exists(), reason="../shared/cases is not here")
def test_dry_run_executes_nothing(tmp_path, monkeypatch):
    for name in ("evil.ipynb", "evil_sweep.yaml"):
        shutil.copy(CASES / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["sweep", "evil_sweep.yaml", "--dry-run"])
    assert isinstance(result.exception, InvalidConfigError)
    assert "is not of the form name = literal" in str(result.exception)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.skipif(not CASES.exists(), reason="../shared/cases is not here")
@pytest.mark.parametrize("name", ["deep", "dup", "extends_int", "nonstr_key"])
def test_odd_configs(name):
    with pytest.raises(InvalidConfigError, match=rf"{name}\.yaml"):
        load_config(CASES / f"{name}.yaml")
