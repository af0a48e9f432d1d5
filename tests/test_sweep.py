"Sweeps over a small notebook: what is refused, skipped, retried, killed and gone on with; and a registry that many write to at once."

import json, multiprocessing, os, random, signal, time

import nbformat, pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

from finetune_kit import record, runs
from finetune_kit.core import FineTuneError, InvalidConfigError

LIGHT = "pandas pydantic yaml filelock nbformat nbconvert IPython ipykernel.ipkernel ipykernel.kernelapp".split()
CELLS = [
    """import os, sys, time, types
torch = types.ModuleType("torch")       # this notebook needs none, and starts in a second without
torch.cuda = torch.backends = types.SimpleNamespace(is_available=lambda: False)
torch.backends.mps, torch.get_num_threads = torch.cuda, lambda: 1
sys.modules["torch"] = torch
from finetune_kit.dials import *
from finetune_kit.record import *
from finetune_kit.surgery import drop"""
    "drop_layer = 7\nseed = 0\nwarmup_steps = 0",
    """cfg = read_dials(globals())
plan = drop(12, cfg.drop_layer)
run = start_run("toy", cfg, plan)""",
    """time.sleep(cfg.warmup_steps/10)
if plan.dropped == [3]: raise ValueError("layer 3 holds it all")
if plan.dropped == [4] and not os.environ.get("SPARE"): os.kill(os.getpid(), 9)
nll = plan.dropped[0] + cfg.seed/10
run.finish(dict(cut=dict(nll=nll, intervals=dict(nll=[nll-.05, nll+.05]))))""",
]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A notebook whose runs take a second, and a registry of its own."
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "runs"))
    for module in (runs, record):
        monkeypatch.setattr(module, "detect_device", lambda: "cpu")
    monkeypatch.setattr(runs, "most_jobs", lambda model=None: (2, "2 cores"))
    cells = [new_code_cell(c) for c in CELLS]
    cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(
        new_notebook(
            cells=cells,
            metadata=dict(
                kernelspec=dict(name="python3", display_name="python3", language="python")
            ),
        ),
        tmp_path / "toy.ipynb",
    )
    return lambda **spec: dict(name="toy", notebook=str(tmp_path / "toy.ipynb")) | spec


def outcome(table):
    return table.drop(columns="error").to_dict("records")


@pytest.mark.slow
def test_a_sweep_skips_what_is_done_and_outlives_what_fails(toy, tmp_path, monkeypatch):
    spec, lines = toy(grid=dict(drop_layer=[1, 3, 4])), []
    dry = runs.sweep(spec, dry_run=True, show=lines.append)
    assert (
        len(lines) == 4
        and "3 to make" in lines[0]
        and set(dry.status) == {"waiting"}
        and not (tmp_path / "runs").exists()
    )
    table = runs.sweep(spec, jobs=2, warm=LIGHT, show=lines.append)
    assert table.status.tolist() == ["done", "failed", "stopped"]
    assert (
        "layer 3 holds it all" in table.error[1]
        and sum("FAILED" in o for o in lines) == 2
        and sum("done in" in o for o in lines) == 1
    )
    page = (tmp_path / "runs/sweep-toy/index.html").read_text()
    for part in (
        f'href="../{table.id[0]}/report.html"',
        "layer 3 holds it all",
        "1.050",
        "data:image/png;base64,",
        "1 done, 1 failed, 1 stopped",
    ):
        assert part in page, part
    assert (
        tmp_path / "runs" / table.id[1] / "report.html"
    ).exists()  # a failed run leaves its report
    before = runs.load_run(table.id[0]).info
    monkeypatch.setenv("SPARE", "1")
    lines.clear()
    again = runs.sweep(
        spec, jobs=2, warm=LIGHT, show=lines.append
    )  # killed ones again, failed ones only if asked to
    assert (
        again.status.tolist() == ["done", "failed", "done"]
        and "1 to make" in lines[0]
        and "by 1 finished run of toy" in lines[0]
    )
    assert runs.load_run(table.id[0]).info == before
    assert [p.id for p in runs.to_do(runs.plan_sweep(runs.read_spec(spec)), retry=True)] == [
        table.id[1]
    ]


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
    with pytest.raises(InvalidConfigError) as e:
        runs.sweep(toy(**changes), show=print)
    assert message in str(e.value) and not (tmp_path / "runs").exists()


def test_more_jobs_than_fit(toy):
    with pytest.raises(InvalidConfigError, match=r"jobs=3 not in 0\.\.2 \(2 cores\)"):
        runs.sweep(toy(grid=dict(seed=[0, 1])), jobs=3)
    with pytest.raises(InvalidConfigError, match=r"only=2 not in 0\.\.1"):
        runs.sweep(toy(grid=dict(seed=[0, 1])), only=2)


def in_a_process(spec, **how):
    "The sweep in a process group of its own, as a terminal starts it."

    def go():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        runs.sweep(spec, warm=LIGHT, **how)

    process = multiprocessing.get_context("fork").Process(target=go, daemon=True)
    process.start()
    return process


def kernels(folder):
    "Processes that some run under `folder` says it is running in."
    said = [json.loads(f.read_text()) for f in folder.glob("toy-*/run.json")]
    return [
        i["pid"] for i in said if i["status"] == "running" and os.path.exists(f"/proc/{i['pid']}")
    ]


def wait_for(what, seconds=600):
    end = time.time() + seconds
    while not what():
        assert time.time() < end, "it took too long"
        time.sleep(0.05)


def test_all_that_a_training_leaves_has_its_place(tmp_path, monkeypatch):
    "The toy leaves less than train.ipynb: shares, differences with intervals, counts."
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "runs"))
    table = runs.sweep(
        dict(
            name="real",
            fixed=dict(max_steps=2, eval_every=0, eval_items=8),
            grid=dict(drop_layer=[7]),
        ),
        jobs=1,
        warm=True,
    )
    row, m = table.iloc[0], runs.load_run(table.id[0]).info["metrics"]
    assert (
        row.status == "done"
        and row["healed_minus_cut.nll_lo"]
        <= row["healed_minus_cut.nll"]
        == m["healed_minus_cut"]["nll"]["mean"]
        <= row["healed_minus_cut.nll_hi"]
    )
    left, page = (
        row["healed_minus_control.nll"],
        (tmp_path / "runs/sweep-real/index.html").read_text(),
    )
    assert (
        "1 done" in page
        and f"<b>{left:.3f}</b>" in page
        and f"<b>{row['base.nll']:.3f}</b>" in page
        and not set(table.columns) & {"training.nll", "size"}
    )


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_running_and_loses_nothing(toy, tmp_path):
    spec = toy(fixed=dict(warmup_steps=30), grid=dict(seed=[0, 1, 2]))
    process = in_a_process(spec, jobs=2)
    wait_for(lambda: len(kernels(tmp_path / "runs")) == 2)
    pids = kernels(tmp_path / "runs")
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode not in (None, 0) and not [
        p for p in pids if os.path.exists(f"/proc/{p}")
    ]
    assert (tmp_path / "runs/sweep-toy/index.html").exists()
    assert [p.info["status"] for p in runs.to_do(runs.plan_sweep(runs.read_spec(spec)))].count(
        "stopped"
    ) == 2


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_table(toy, tmp_path, monkeypatch):
    spec = toy(fixed=dict(warmup_steps=5), grid=dict(drop_layer=[1, 2, 5, 6], seed=[0, 1]))
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "undisturbed"))
    whole = outcome(runs.sweep(spec, jobs=2, warm=LIGHT))
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "runs"))
    rng = random.Random()
    for _ in range(3):
        done = len(list((tmp_path / "runs").glob("toy-*/run.json")))
        process = in_a_process(spec, jobs=2)
        wait_for(
            lambda: (
                len(list((tmp_path / "runs").glob("toy-*/run.json"))) > done
                or not process.is_alive()
            )
        )
        time.sleep(rng.random() * 1.5)
        process.kill()
        process.join()
        wait_for(lambda: not kernels(tmp_path / "runs"), 60)  # they die with it
    assert outcome(runs.sweep(spec, jobs=2, warm=LIGHT)) == whole and {
        r["status"] for r in whole
    } == {"done"}


@pytest.mark.slow
def test_submitit_runs_the_same_sweep(toy):
    "On submitit's local executor; the run's own record says how it went."
    lines = []
    table = runs.sweep(
        toy(list=[dict(drop_layer=1), dict(drop_layer=3)]),
        slurm=dict(cluster="local", timeout_min=10),
        show=lines.append,
    )
    assert (
        table.status.tolist() == ["done", "failed"]
        and "layer 3" in table.error[1]
        and len(lines) == 4
    )
    with pytest.raises(InvalidConfigError, match="slurm"):
        runs.sweep(toy(grid=dict(seed=[5])), slurm=dict(cluster="local", minutes=3))


def test_without_slurm_it_says_so(toy, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FineTuneError, match="no Slurm here"):
        runs.sweep(toy(grid=dict(seed=[0])), slurm=True, show=print)


def write(folder, n):
    "One of many writers: a run, and evaluations of everybody's run."
    for step in range(5):
        record.Run(
            folder / f"toy-{n}",
            dict(id=f"toy-{n}", experiment="toy", status="running", pid=os.getpid()),
        ).save(status="done", metrics=dict(healed=dict(nll=float(n), step=step)), started=n)
    for other in (n, 0):
        record.Run(folder / f"toy-{other}").save_evaluation(
            f"data{n}", f"{n:04d}", dict(tuned=dict(nll=n / 2))
        )
    runs.list_runs()


def test_fifty_processes_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path))
    processes = [
        multiprocessing.get_context("fork").Process(target=write, args=(tmp_path, n))
        for n in range(50)
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert {p.exitcode for p in processes} == {0}
    table = runs.list_runs().set_index("id")
    assert len(table) == 50 and set(table.status) == {"done"} and all(table["healed.step"] == 4)
    assert all(
        table.at[f"toy-{n}", f"data{n}: tuned.nll"]
        == n / 2
        == table.at["toy-0", f"data{n}: tuned.nll"]
        for n in range(50)
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_run_is_shown_among_a_thousand(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path))
    for n in range(1000):
        record.Run(tmp_path / f"toy-{n}").save(
            id=f"toy-{n}", status="done", started=n, metrics=dict(healed=dict(nll=1.0))
        )
    (tmp_path / "toy-500" / "run.json").write_text('{"status": "do')
    table = runs.list_runs()
    assert (
        len(table) == 1000
        and table.id[0] == "toy-999"
        and table.set_index("id").status["toy-500"] == "damaged"
        and (table.status == "done").sum() == 999
    )


@pytest.mark.parametrize(
    "name, n", [("drop_sweep", 24), ("prune_sweep", 12), ("calibration_sweep", 3)]
)
def test_the_ready_sweeps_are_sound(name, n):
    planned = runs.plan_sweep(runs.read_spec(ROOT / f"experiments/{name}.yaml"))
    assert len(planned) == n and sum(p.first for p in planned) == (
        n if name == "calibration_sweep" else 2
    )


@pytest.mark.parametrize(
    "name, config", [("evaluate", "EvaluateConfig"), ("compare", "CompareConfig")]
)
def test_dials_are_the_config(name, config):
    from finetune_kit import dials

    values, experiment, cls = runs._notebook(ROOT / f"nbs/{name}.ipynb")
    assert (
        values.pop("config") is None
        and values == cls().model_dump()
        and cls is getattr(dials, config)
        and experiment == name
    )
