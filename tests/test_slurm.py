"A sweep through a real Slurm that the tests start here: a controller, and two nodes with host names, processes and deaths of their own."

import contextlib, json, os, shutil, signal, socket, subprocess, sys

import pytest
from conftest import ROOT
from test_sweep import in_a_process, toy, wait_for

from finetune_kit import cli, runs

pytestmark = pytest.mark.slow
NODE = (
    "unshare --fork --kill-child --pid --mount-proc --uts sh -c".split()
)  # a namespace: nothing in it outlives it
CONF = """
ClusterName=kit
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
AuthInfo=socket={at}/munge,cred_expire=20
StateSaveLocation={at}/state
SlurmctldPidFile={at}/slurmctld.pid
SlurmdSpoolDir={at}/%n
SlurmdPidFile={at}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SlurmdParameters=config_overrides
DefMemPerCPU=100
SlurmdTimeout=10
ReturnToService=2
KillWait=5
MailProg=/bin/true
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1} CPUs=1 RealMemory=8000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""


def ask(*command):
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    return ""


def queue():
    return dict(
        line.split()
        for line in ask(
            "squeue", "--noheader", "--array", "--format=%i %N", "--states=R"
        ).splitlines()
    )


@pytest.fixture(scope="module", autouse=True)
def nodes(tmp_path_factory):
    "Node → its process. What cannot start Slurm skips; with credentials that last 20 s, a requeued job waits as long."
    if missing := [p for p in ("munged", "slurmctld", "slurmd", "unshare") if not shutil.which(p)]:
        pytest.skip(f"no {', '.join(missing)}; apt-get install slurm-wlm munge")
    if os.geteuid() or subprocess.run([*NODE, "true"], capture_output=True).returncode:
        pytest.skip("it takes root, and namespaces, to start nodes")
    at, started = tmp_path_factory.mktemp("slurm"), {}
    with contextlib.ExitStack() as held:
        ports = [
            held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            for _ in range(3)
        ]
    (at / "slurm.conf").write_text(CONF.format(at=at, **dict(zip(("ctld", "n1", "n2"), ports))))
    (at / "key").write_bytes(os.urandom(128))
    (at / "key").chmod(0o400)
    for folder in ("state", "n1", "n2"):
        (at / folder).mkdir()

    def start(name, *command):
        with open(at / f"{name}.log", "w") as log:
            started[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=at,
                start_new_session=True,
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(at / "slurm.conf"))
        try:
            start(
                "munged",
                "munged",
                "--foreground",
                "--force",
                f"--key-file={at}/key",
                f"--socket={at}/munge",
                *(f"--{k}-file={at}/munged.{k}" for k in ("pid", "log", "seed")),
            )
            wait_for(lambda: ask("munge", "--no-input", f"--socket={at}/munge"), 60)
            start("slurmctld", "slurmctld", "-D", "-c")
            for n in ("n1", "n2"):
                start(n, *NODE, f"hostname {n}; exec slurmd -D -N {n}")
            wait_for(
                lambda: (
                    ask("sinfo", "--noheader", "--Node", "--format=%N %t").split()
                    == ["n1", "idle", "n2", "idle"]
                ),
                120,
            )
            yield started
        finally:
            for process in reversed(started.values()):
                process.kill()
            for process in started.values():
                process.wait(30)


def planned(spec):
    return runs.plan_sweep(runs.read_spec(spec))


def test_what_fails_is_that_runs_only(toy):
    lines = []
    table = runs.sweep(
        toy(list=[dict(drop_layer=1), dict(drop_layer=3, seed=1)]),
        slurm=dict(timeout_min=30),
        show=lines.append,
    )
    assert (
        table.status.tolist() == ["done", "failed"]
        and "layer 3 holds it all" in table.error[1]
        and len(lines) == 4
        and sum("FAILED" in o for o in lines) == 1
    )
    assert {runs.load_run(i).info["host"] for i in table.id} == {"n1", "n2"}


def test_one_training_over_two_nodes(tmp_path):
    "The loss of each step is that of one process with the same rows. Before the tests that lose a node."
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, socket\nif 'LOCAL_RANK' in os.environ: open({str(tmp_path / 'hosts')!r}, 'a').write(socket.gethostname() + ' ' + os.environ['WORLD_SIZE'] + chr(10))\n"
    )
    (tmp_path / "train.py").write_text("""
import json, sys
from finetune_kit.chat import encode_rows
from finetune_kit.rows import load_rows
from finetune_kit.model import load_model
from finetune_kit.training import TrainConfig
from finetune_kit.trainer import train
model, tok = load_model("data/tiny-base", backend="transformers")
rows = encode_rows(load_rows("data/domains", "train", max_rows=24), tok)
cfg = TrainConfig(max_steps=3, batch_size=4, warmup_steps=0, lora_r=4, eval_every=0, save_every=0, nproc=int(sys.argv[1]))
print("losses", json.dumps(train(model, tok, rows, cfg, folder=sys.argv[2]).log.loss.tolist()))
""")

    def losses(text):
        return json.loads(
            next(line for line in text.splitlines() if line.startswith("losses ")).removeprefix(
                "losses "
            )
        )

    alone = subprocess.run(
        [sys.executable, tmp_path / "train.py", "1", tmp_path / "alone"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    job = f"#!/bin/sh\ncd {ROOT}\nexport PYTHONPATH={tmp_path}:{ROOT}\nexec {sys.executable} {tmp_path}/train.py 2 {tmp_path}/both\n"
    subprocess.run(
        [
            "sbatch",
            "--wait",
            "--nodes=2",
            "--ntasks-per-node=1",
            "--cpus-per-task=1",
            "--mem-per-cpu=3000",
            f"--output={tmp_path}/log",
        ],
        input=job,
        cwd=tmp_path,
        text=True,
        timeout=1800,
    )
    said = (tmp_path / "log").read_text()
    assert "losses" in said, said
    assert losses(said) == pytest.approx(losses(alone.stdout), rel=1e-5)
    assert {"n1 2", "n2 2"} <= set((tmp_path / "hosts").read_text().splitlines())


def test_lost_requeued_and_preempted_runs_end_as_undisturbed_ones(toy, nodes):
    spec = toy(fixed=dict(warmup_steps=300, drop_layer=1), grid=dict(seed=[0, 1, 2]))
    process, made = in_a_process(spec, slurm=dict(timeout_min=30)), planned(spec)
    wait_for(lambda: len(queue()) == 3)
    on = queue()
    lost, requeued, preempted = sorted(on, key=on.get)
    assert [on[j] for j in (lost, requeued, preempted)] == ["n1", "n2", "n2"]
    for job, disturb in (
        (lost, nodes["n1"].kill),
        (requeued, lambda: ask("scontrol", "requeue", requeued)),
        (preempted, lambda: ask("scancel", "--signal=USR2", preempted)),
    ):  # USR2: as before the time is up
        wait_for(lambda: made[int(job.split("_")[1])].info["status"] == "running")
        disturb()
    process.join(900)
    assert process.exitcode == 0
    table = runs.sweep(spec, show=lambda line: None)
    assert (
        table.status.tolist() == ["done"] * 3
        and table["cut.nll"].tolist() == [1.0, 1.1, 1.2]
        and not any(table.error)
    )
    for job in on:
        assert " Restarts=1 " in ask("scontrol", "show", "job", job), job


def test_cancelled_by_others_and_by_ctrl_c(toy, tmp_path):
    "Without accounting, which would say so."
    spec = toy(fixed=dict(warmup_steps=3000, drop_layer=1), grid=dict(seed=[0, 1]))
    process, made = in_a_process(spec, slurm=dict(timeout_min=30)), planned(spec)
    wait_for(lambda: [p.info["status"] for p in made] == ["running"] * 2)
    ask("scancel", next(j for j in queue() if j.endswith("_1")))
    wait_for((tmp_path / "runs/sweep-toy/index.html").exists, 120)
    assert (
        process.is_alive()
        and [p.info["status"] for p in made] == ["running", "stopped"]
        and "Slurm: cancelled" in made[1].info["error"]
    )
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    wait_for(lambda: not queue(), 60)
    assert process.exitcode not in (None, 0) and len(runs.to_do(planned(spec))) == 2


def test_the_script_makes_the_same_runs(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file, script = tmp_path / "toy.yaml", tmp_path / "toy.sbatch"
    file.write_text(
        json.dumps(
            toy(
                list=[dict(drop_layer=1), dict(drop_layer=3, seed=1)],
                slurm=dict(timeout_min=30, cpus_per_task=1),
            )
        )
    )
    cli.sweep(file, slurm_script=script)
    assert capsys.readouterr().out == f"sbatch {script}\n"
    job = subprocess.run(
        ["sbatch", "--wait", "--parsable", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    ).stdout.strip()
    table, logs = (
        runs.sweep(file, show=lambda line: None),
        [(tmp_path / f"sweep-toy-{job}_{n}.log").read_text() for n in (0, 1)],
    )
    assert (
        table.status.tolist() == ["done", "failed"] and "layer 3 holds it all" in table.error[1]
    ), logs
    assert [
        "JobState=COMPLETED " in ask("scontrol", "show", "job", f"{job}_{n}") for n in (0, 1)
    ] == [True, False], logs
