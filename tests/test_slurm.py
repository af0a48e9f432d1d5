"""A sweep through a real Slurm that the tests start here.

A controller, and two nodes with host names, processes and deaths of their own.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from test_sweep import in_a_process, planned_runs, remaining_runs, toy, wait_for  # noqa: F401

from finetune_kit import cli_runs, runs

pytestmark = pytest.mark.slow
# A namespace: nothing that was started in it outlives it
NODE = ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--uts", "sh", "-c"]
# Credentials last 20 seconds, and a job that is requeued waits as long
CONF = """
ClusterName=kit
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={slurmctld}
SlurmUser=root
AuthInfo=socket={folder}/munge,cred_expire=20
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
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


def answer(*command):
    "What a command prints; nothing where it takes too long."
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    return ""


def running_jobs():
    "Job → its node."
    lines = answer("squeue", "--noheader", "--array", "--format=%i %N", "--states=R").splitlines()
    return dict(line.split() for line in lines)


def node_states():
    return answer("sinfo", "--noheader", "--Node", "--format=%N %t").split()


def skip_without_slurm():
    programs = ("munged", "slurmctld", "slurmd", "unshare")
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}; apt-get install slurm-wlm munge")
    if os.geteuid() or subprocess.run([*NODE, "true"], capture_output=True).returncode:
        pytest.skip("it takes root, and namespaces, to start nodes")


def free_ports(n):
    with contextlib.ExitStack() as servers:
        opened = [servers.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [server.getsockname()[1] for server in opened]


def write_configuration(folder):
    ports = dict(zip(("slurmctld", "n1", "n2"), free_ports(3), strict=True))
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, **ports))
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()


@pytest.fixture(scope="module", autouse=True)
def nodes(tmp_path_factory):
    "Node → its process."
    skip_without_slurm()
    folder = tmp_path_factory.mktemp("slurm")
    write_configuration(folder)
    processes = {}

    def start(name, *command):
        with open(folder / f"{name}.log", "w") as log:
            processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                start_new_session=True,
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        key = [f"--key-file={folder}/key", f"--socket={folder}/munge"]
        files = [f"--{kind}-file={folder}/munged.{kind}" for kind in ("pid", "log", "seed")]
        try:
            start("munged", "munged", "--foreground", "--force", *key, *files)
            wait_for(lambda: answer("munge", "--no-input", f"--socket={folder}/munge"), 60)
            start("slurmctld", "slurmctld", "-D", "-c")
            for node in ("n1", "n2"):
                start(node, *NODE, f"hostname {node}; exec slurmd -D -N {node}")
            wait_for(lambda: node_states() == ["n1", "idle", "n2", "idle"], 120)
            yield processes
        finally:
            for process in reversed(processes.values()):
                process.kill()
            for process in processes.values():
                process.wait(30)


def test_what_fails_is_that_runs_only(toy):  # noqa: F811
    lines = []
    spec = toy(list=[dict(drop_layer=1), dict(drop_layer=3, seed=1)])
    table = runs.sweep(spec, slurm=dict(timeout_min=30), show=lines.append)
    assert table.status.tolist() == ["done", "failed"]
    assert "layer 3 holds it all" in table.error[1]
    assert len(lines) == 4
    assert sum("FAILED" in line for line in lines) == 1
    assert {runs.load_run(id).info["host"] for id in table.id} == {"n1", "n2"}


# Tells on which hosts a training has processes
SITECUSTOMIZE = """\
import os, socket
if "LOCAL_RANK" in os.environ:
    with open({file!r}, "a") as f:
        f.write(socket.gethostname() + " " + os.environ["WORLD_SIZE"] + chr(10))
"""
TRAIN = """\
import json, sys
from finetune_kit.chat import encode_rows
from finetune_kit.model import load_model
from finetune_kit.rows import load_rows
from finetune_kit.trainer import train
from finetune_kit.training import TrainConfig
model, tok = load_model("data/tiny-base", backend="transformers")
rows = encode_rows(load_rows("data/domains", "train", max_rows=24), tok)
cfg = TrainConfig(max_steps=3, batch_size=4, warmup_steps=0, lora_r=4, eval_every=0, save_every=0,
                  nproc=int(sys.argv[1]))
print("losses", json.dumps(train(model, tok, rows, cfg, folder=sys.argv[2]).log.loss.tolist()))
"""


def printed_losses(text):
    lines = [line for line in text.splitlines() if line.startswith("losses ")]
    assert lines, text
    return json.loads(lines[0].removeprefix("losses "))


def test_one_training_over_two_nodes(tmp_path):
    """The loss of each step is that of one process with the same rows.

    Before the tests that lose a node.
    """
    hosts = tmp_path / "hosts"
    script = tmp_path / "train.py"
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE.format(file=str(hosts)))
    script.write_text(TRAIN)
    alone = subprocess.run(
        [sys.executable, script, "1", tmp_path / "alone"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    job = (
        f"#!/bin/sh\ncd {ROOT}\nexport PYTHONPATH={tmp_path}:{ROOT}\n"
        f"exec {sys.executable} {script} 2 {tmp_path}/both\n"
    )
    options = [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--mem-per-cpu=3000",
        f"--output={tmp_path}/log",
    ]
    subprocess.run(["sbatch", "--wait", *options], input=job, cwd=tmp_path, text=True, timeout=1800)
    both = printed_losses((tmp_path / "log").read_text())
    assert both == pytest.approx(printed_losses(alone.stdout), rel=1e-5)
    assert {"n1 2", "n2 2"} <= set(hosts.read_text().splitlines())


def test_lost_requeued_and_preempted_runs_end_as_undisturbed_ones(toy, nodes):  # noqa: F811
    spec = toy(fixed=dict(warmup_steps=300, drop_layer=1), grid=dict(seed=[0, 1, 2]))
    process = in_a_process(spec, slurm=dict(timeout_min=30))
    planned = planned_runs(spec)
    wait_for(lambda: len(running_jobs()) == 3)
    node_of = running_jobs()
    lost, requeued, preempted = sorted(node_of, key=node_of.get)
    assert [node_of[job] for job in (lost, requeued, preempted)] == ["n1", "n2", "n2"]

    def wait_until_running(job):
        run = planned[int(job.split("_")[1])]
        wait_for(lambda: run.info["status"] == "running")

    wait_until_running(lost)
    nodes["n1"].kill()
    wait_until_running(requeued)
    answer("scontrol", "requeue", requeued)
    wait_until_running(preempted)
    answer("scancel", "--signal=USR2", preempted)  # as before the time is up

    process.join(900)
    assert process.exitcode == 0
    table = runs.sweep(spec, show=lambda line: None)
    assert table.status.tolist() == ["done"] * 3
    assert table["cut.nll"].tolist() == [1.0, 1.1, 1.2]
    assert not any(table.error)
    for job in node_of:
        assert " Restarts=1 " in answer("scontrol", "show", "job", job), job


def test_cancelled_by_others_and_by_ctrl_c(toy, tmp_path):  # noqa: F811
    "Without accounting, which would say so."
    spec = toy(fixed=dict(warmup_steps=3000, drop_layer=1), grid=dict(seed=[0, 1]))
    process = in_a_process(spec, slurm=dict(timeout_min=30))
    planned = planned_runs(spec)
    wait_for(lambda: [run.info["status"] for run in planned] == ["running"] * 2)
    (second_job,) = [job for job in running_jobs() if job.endswith("_1")]
    answer("scancel", second_job)
    wait_for((tmp_path / "runs/sweep-toy/index.html").exists, 120)
    assert process.is_alive()
    assert [run.info["status"] for run in planned] == ["running", "stopped"]
    assert "Slurm: cancelled" in planned[1].info["error"]
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    wait_for(lambda: not running_jobs(), 60)
    assert process.exitcode not in (None, 0)
    assert len(remaining_runs(spec)) == 2


def test_the_script_makes_the_same_runs(toy, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = tmp_path / "toy.yaml"
    script = tmp_path / "toy.sbatch"
    spec = toy(
        list=[dict(drop_layer=1), dict(drop_layer=3, seed=1)],
        slurm=dict(timeout_min=30, cpus_per_task=1),
    )
    file.write_text(json.dumps(spec))
    cli_runs.sweep(file, slurm_script=script)
    assert capsys.readouterr().out == f"sbatch {script}\n"
    submitted = subprocess.run(
        ["sbatch", "--wait", "--parsable", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    job = submitted.stdout.strip()
    table = runs.sweep(file, show=lambda line: None)
    logs = [(tmp_path / f"sweep-toy-{job}_{n}.log").read_text() for n in (0, 1)]
    assert table.status.tolist() == ["done", "failed"], logs
    assert "layer 3 holds it all" in table.error[1], logs
    states = [answer("scontrol", "show", "job", f"{job}_{n}") for n in (0, 1)]
    assert ["JobState=COMPLETED " in state for state in states] == [True, False], logs
