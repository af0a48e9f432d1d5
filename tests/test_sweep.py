"""Sweeps over a small notebook: what is refused, skipped, retried, killed and gone on with.

And a registry that many processes write to at once.
"""

import json
import multiprocessing
import os
import random
import signal
import time

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

from finetune_kit import identity, record, runs
from finetune_kit.core import FineTuneError, InvalidConfigError
from finetune_kit.sweep_plan import JobLimit, plan_sweep, to_do
from finetune_kit.sweep_spec import read_spec

LIGHT = [
    "pandas",
    "pydantic",
    "yaml",
    "filelock",
    "nbformat",
    "nbconvert",
    "IPython",
    "ipykernel.ipkernel",
    "ipykernel.kernelapp",
]
# The notebook needs no torch: without it, a run starts in a second
IMPORTS = """\
import os, sys, time, types
torch = types.ModuleType("torch")
torch.cuda = torch.backends = types.SimpleNamespace(is_available=lambda: False)
torch.backends.mps, torch.get_num_threads = torch.cuda, lambda: 1
sys.modules["torch"] = torch
from finetune_kit.dials import RunConfig, read_dials
from finetune_kit.record import start_run
from finetune_kit.plan import drop"""
PARAMETERS = """\
drop_layer = 7
seed = 0
warmup_steps = 0"""
START = """\
cfg = read_dials(globals(), RunConfig)
plan = drop(12, cfg.drop_layer)
run = start_run("toy", cfg, plan)"""
# Layer 3 fails, layer 4 is killed, the others are done after warmup_steps/10 seconds
FINISH = """\
time.sleep(cfg.warmup_steps / 10)
if plan.dropped == [3]:
    raise ValueError("layer 3 holds it all")
if plan.dropped == [4] and not os.environ.get("SPARE"):
    os.kill(os.getpid(), 9)
nll = plan.dropped[0] + cfg.seed / 10
run.finish(dict(cut=dict(nll=nll, intervals=dict(nll=[nll - .05, nll + .05]))))"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A notebook whose runs take a second, and a registry of its own."
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "runs"))
    for module in (runs, identity):
        monkeypatch.setattr(module, "detect_device", lambda: "cpu")
    monkeypatch.setattr(runs, "most_jobs", lambda model=None: JobLimit(2, "2 cores"))
    cells = [new_code_cell(source) for source in (IMPORTS, PARAMETERS, START, FINISH)]
    cells[1].metadata["tags"] = ["parameters"]
    kernel = dict(name="python3", display_name="python3", language="python")
    notebook = new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    nbformat.write(notebook, tmp_path / "toy.ipynb")
    return lambda **spec: dict(name="toy", notebook=str(tmp_path / "toy.ipynb")) | spec


def planned_runs(spec):
    return plan_sweep(read_spec(spec))


def remaining_runs(spec, **options):
    return to_do(planned_runs(spec), **options)


def outcome(table):
    return table.drop(columns="error").to_dict("records")


@pytest.mark.slow
def test_a_sweep_skips_what_is_done_and_outlives_what_fails(toy, tmp_path, monkeypatch):
    spec = toy(grid=dict(drop_layer=[1, 3, 4]))
    lines = []
    planned = runs.sweep(spec, dry_run=True, show=lines.append)
    assert len(lines) == 4
    assert "3 to make" in lines[0]
    assert set(planned.status) == {"waiting"}
    assert not (tmp_path / "runs").exists()

    table = runs.sweep(spec, jobs=2, warm=LIGHT, show=lines.append)
    assert table.status.tolist() == ["done", "failed", "stopped"]
    assert "layer 3 holds it all" in table.error[1]
    assert sum("FAILED" in line for line in lines) == 2
    assert sum("done in" in line for line in lines) == 1
    page = (tmp_path / "runs/sweep-toy/index.html").read_text()
    for part in (
        f'href="../{table.id[0]}/report.html"',
        "layer 3 holds it all",
        "1.050",
        "data:image/png;base64,",
        "1 done, 1 failed, 1 stopped",
    ):
        assert part in page, part
    # A failed run leaves its report, too
    assert (tmp_path / "runs" / table.id[1] / "report.html").exists()

    first_record = runs.load_run(table.id[0]).info
    monkeypatch.setenv("SPARE", "1")
    lines.clear()
    again = runs.sweep(spec, jobs=2, warm=LIGHT, show=lines.append)
    # What was killed is made again; what failed, only if it is asked for
    assert again.status.tolist() == ["done", "failed", "done"]
    assert "1 to make" in lines[0]
    assert "by 1 finished run of toy" in lines[0]
    assert runs.load_run(table.id[0]).info == first_record
    assert [run.id for run in remaining_runs(spec, retry=True)] == [table.id[1]]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(grid=dict(drop_layr=[1])), "unknown parameter 'drop_layr'"),
        (dict(gird=dict(seed=[1])), "did you mean 'grid'"),
        (dict(grid={}), "nothing varies"),
        (dict(grid=dict(seed=[])), "grid.seed is empty"),
        (dict(grid=dict(seed=[1]), unless=[dict(seed=1)]), "leave none of 1"),
        (dict(grid=dict(drop_layer=[1, "1"])), "two runs are one"),
        (dict(grid=dict(seed=[0]), notebook="nbs/tran.ipynb"), "no notebook"),
        (dict(grid=dict(drop_layer=[12])), "layer 12 not in 0..11"),
        (dict(grid=dict(seed=["x"])), "seed='x'"),
    ],
)
def test_refused_before_anything_starts(changes, message, toy, tmp_path):
    with pytest.raises(InvalidConfigError) as error:
        runs.sweep(toy(**changes), show=print)
    assert message in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_more_jobs_than_fit(toy):
    with pytest.raises(InvalidConfigError, match=r"jobs=3 not in 0\.\.2 \(2 cores\)"):
        runs.sweep(toy(grid=dict(seed=[0, 1])), jobs=3)
    with pytest.raises(InvalidConfigError, match=r"only=2 not in 0\.\.1"):
        runs.sweep(toy(grid=dict(seed=[0, 1])), only=2)


def in_a_process(spec, **options):
    "The sweep in a process group of its own, as a terminal starts it."

    def start():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        runs.sweep(spec, warm=LIGHT, **options)

    process = multiprocessing.get_context("fork").Process(target=start, daemon=True)
    process.start()
    return process


def exists(pid):
    return os.path.exists(f"/proc/{pid}")


def kernel_pids(folder):
    "Processes that some run under `folder` says it is running in."
    infos = [json.loads(file.read_text()) for file in folder.glob("toy-*/run.json")]
    pids = [info["pid"] for info in infos if info["status"] == "running"]
    return [pid for pid in pids if exists(pid)]


def wait_for(condition, seconds=600):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it took too long"
        time.sleep(0.05)


def test_all_that_a_training_leaves_has_its_place(tmp_path, monkeypatch):
    "The toy leaves less than train.ipynb: shares, differences with intervals, counts."
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "runs"))
    fixed = dict(max_steps=2, eval_every=0, eval_items=8)
    spec = dict(name="real", fixed=fixed, grid=dict(drop_layer=[7]))
    table = runs.sweep(spec, jobs=1, warm=True)
    row = table.iloc[0]
    metrics = runs.load_run(table.id[0]).info["metrics"]
    page = (tmp_path / "runs/sweep-real/index.html").read_text()
    assert row.status == "done"
    assert row["healed_minus_cut.nll"] == metrics["healed_minus_cut"]["nll"]["mean"]
    assert row["healed_minus_cut.nll_lo"] <= row["healed_minus_cut.nll"]
    assert row["healed_minus_cut.nll"] <= row["healed_minus_cut.nll_hi"]
    assert "1 done" in page
    assert f"<b>{row['healed_minus_control.nll']:.3f}</b>" in page
    assert f"<b>{row['base.nll']:.3f}</b>" in page
    assert not set(table.columns) & {"training.nll", "size"}


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_running_and_loses_nothing(toy, tmp_path):
    spec = toy(fixed=dict(warmup_steps=30), grid=dict(seed=[0, 1, 2]))
    folder = tmp_path / "runs"
    process = in_a_process(spec, jobs=2)
    wait_for(lambda: len(kernel_pids(folder)) == 2)
    pids = kernel_pids(folder)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode not in (None, 0)
    assert not [pid for pid in pids if exists(pid)]
    assert (folder / "sweep-toy/index.html").exists()
    statuses = [run.info["status"] for run in remaining_runs(spec)]
    assert statuses.count("stopped") == 2


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_table(toy, tmp_path, monkeypatch):
    spec = toy(fixed=dict(warmup_steps=5), grid=dict(drop_layer=[1, 2, 5, 6], seed=[0, 1]))
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "undisturbed"))
    undisturbed = outcome(runs.sweep(spec, jobs=2, warm=LIGHT))
    folder = tmp_path / "runs"
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(folder))

    def n_started():
        return len(list(folder.glob("toy-*/run.json")))

    for _ in range(3):
        before = n_started()
        process = in_a_process(spec, jobs=2)
        wait_for(lambda: n_started() > before or not process.is_alive())  # noqa: B023 (used at once)
        time.sleep(random.random() * 1.5)
        process.kill()
        process.join()
        wait_for(lambda: not kernel_pids(folder), 60)  # they die with it
    assert outcome(runs.sweep(spec, jobs=2, warm=LIGHT)) == undisturbed
    assert {row["status"] for row in undisturbed} == {"done"}


@pytest.mark.slow
def test_submitit_runs_the_same_sweep(toy):
    "On submitit's local executor; the run's own record says how it went."
    lines = []
    spec = toy(list=[dict(drop_layer=1), dict(drop_layer=3)])
    local = dict(cluster="local", timeout_min=10)
    table = runs.sweep(spec, slurm=local, show=lines.append)
    assert table.status.tolist() == ["done", "failed"]
    assert "layer 3" in table.error[1]
    assert len(lines) == 4
    with pytest.raises(InvalidConfigError, match="slurm"):
        runs.sweep(toy(grid=dict(seed=[5])), slurm=dict(cluster="local", minutes=3))


def test_without_slurm_it_says_so(toy, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FineTuneError, match="no Slurm here"):
        runs.sweep(toy(grid=dict(seed=[0])), slurm=True, show=print)


def write(folder, n):
    "One of many writers: a run, and evaluations of everybody's run."
    info = dict(id=f"toy-{n}", experiment="toy", status="running", pid=os.getpid())
    for step in range(5):
        metrics = dict(healed=dict(nll=float(n), step=step))
        record.Run(folder / f"toy-{n}", info).save(status="done", metrics=metrics, started=n)
    for other in (n, 0):
        run = record.Run(folder / f"toy-{other}")
        run.save_evaluation(f"data{n}", f"{n:04d}", dict(tuned=dict(nll=n / 2)))
    runs.list_runs()


def test_fifty_processes_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write, args=(tmp_path, n)) for n in range(50)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert {process.exitcode for process in processes} == {0}
    table = runs.list_runs().set_index("id")
    assert len(table) == 50
    assert set(table.status) == {"done"}
    assert all(table["healed.step"] == 4)
    for n in range(50):
        column = f"data{n}: tuned.nll"
        assert table.at[f"toy-{n}", column] == n / 2
        assert table.at["toy-0", column] == n / 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_run_is_shown_among_a_thousand(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path))
    metrics = dict(healed=dict(nll=1.0))
    for n in range(1000):
        run = record.Run(tmp_path / f"toy-{n}")
        run.save(id=f"toy-{n}", status="done", started=n, metrics=metrics)
    (tmp_path / "toy-500" / "run.json").write_text('{"status": "do')
    table = runs.list_runs()
    assert len(table) == 1000
    assert table.id[0] == "toy-999"
    assert table.set_index("id").status["toy-500"] == "damaged"
    assert (table.status == "done").sum() == 999


@pytest.mark.parametrize(
    "name, n_runs, n_first",
    [
        ("drop_sweep", 24, 2),
        ("prune_sweep", 12, 2),
        ("calibration_sweep", 3, 3),
        ("methods_sweep", 24, 1),
    ],
)
def test_the_ready_sweeps_are_sound(name, n_runs, n_first):
    planned = planned_runs(ROOT / f"experiments/{name}.yaml")
    assert len(planned) == n_runs
    assert sum(run.first for run in planned) == n_first


@pytest.mark.parametrize(
    "name, config", [("evaluate", "EvaluateConfig"), ("compare", "CompareConfig")]
)
def test_dials_are_the_config(name, config):
    from finetune_kit import registry
    from finetune_kit.declaration import config_class, declared_parameters, experiment_name

    notebook = ROOT / f"nbs/{name}.ipynb"
    values = declared_parameters(notebook)
    cls = config_class(notebook)
    assert values.pop("config") is None
    assert values == cls().model_dump()
    assert cls is getattr(registry, config)
    assert experiment_name(notebook) == name
