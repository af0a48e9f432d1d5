"""What training meets: kill -9, a damaged checkpoint, a full disk, a loss that is no number.

Children are forked, so that the libraries are imported once.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import time

import psutil
import pytest
import torch
from conftest import ROOT
from trl import SFTConfig, SFTTrainer

from finetune_kit.chat import encode_rows
from finetune_kit.checkpoints import newest_checkpoint
from finetune_kit.core import CheckpointError, IncompatibleConfigError, NaNLossError, digest
from finetune_kit.data import prepare_dataset
from finetune_kit.model import load_model
from finetune_kit.plan import drop
from finetune_kit.surgery import apply_plan
from finetune_kit.trainer import train
from finetune_kit.training import TrainConfig

BEFORE_FORKING = SFTConfig, SFTTrainer  # imported here, for it takes seconds
CFG = dict(
    max_steps=6,
    batch_size=4,
    warmup_steps=2,
    eval_every=0,
    lora_r=4,
    lora_dropout=0.1,
    save_every=2,
)
fork = multiprocessing.get_context("fork")


def cut():
    model, tokenizer = load_model(ROOT / "data/tiny-base", backend="transformers", device="cpu")
    return apply_plan(model, drop(model, 7)), tokenizer


@pytest.fixture(scope="module")
def rows():
    return encode_rows(prepare_dataset(ROOT / "data/domains", max_rows=24)["train"], cut()[1])


def weights_digest(model):
    weights = {
        name: parameter.detach().numpy().tobytes().hex()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return digest(weights)


def work(rows, folder, pipe, cfg, on_log=None):
    "In a child: send each step, and at the end the digest of the weights or the error."
    torch.set_num_threads(1)

    def tell(line):
        pipe.send(line["step"])
        if on_log:
            on_log(line)

    try:
        result = train(*cut(), rows, TrainConfig(**cfg), tell, folder)
    except CheckpointError as error:
        pipe.send(str(error))
    else:
        pipe.send(weights_digest(result.model))
    os._exit(0)


def child(rows, folder, kill_at=None, on_log=None, **cfg):
    "All that the child sent; it is killed when it has told of step `kill_at`."
    here, there = fork.Pipe()
    process = fork.Process(target=work, args=(rows, folder, there, CFG | cfg, on_log))
    process.start()
    there.close()
    sent = []
    with contextlib.suppress(EOFError):  # the child has ended
        while True:
            sent.append(here.recv())
            if sent[-1] == kill_at:
                os.kill(process.pid, signal.SIGKILL)
    process.join()
    return sent


@pytest.fixture(scope="module")
def uninterrupted(rows, tmp_path_factory):
    return child(rows, tmp_path_factory.mktemp("whole"))[-1]


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_step_it_ends_with_the_same_weights(rows, uninterrupted, times, tmp_path):
    for n, step in enumerate(random.Random(times).choices(range(1, 7), k=times)):
        folder = tmp_path / str(n)
        killed = child(rows, folder, kill_at=step)
        assert step in killed
        assert killed[-1] != uninterrupted
        again = child(rows, folder)
        assert again[-1] == uninterrupted, f"killed at step {step}"
        whole_log = list(range(1, 7))  # the part before the kill included
        assert again[:-1] == whole_log


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(rows, uninterrupted, tmp_path, caplog):
    child(rows, tmp_path, kill_at=6)
    newest = newest_checkpoint(tmp_path)
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(b"\0" + weights.read_bytes()[1:])
    before = newest_checkpoint(tmp_path)
    assert int(before.name.split("-")[1]) < int(newest.name.split("-")[1])
    assert f"{newest.name} is not complete" in caplog.text
    assert child(rows, tmp_path)[-1] == uninterrupted


@pytest.mark.slow
def test_a_full_disk(rows, uninterrupted, tmp_path):
    def fill(line):  # from step 3 on no file may grow beyond 2 kB
        if line["step"] == 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    *steps, error = child(rows, tmp_path, on_log=fill)
    assert steps == [1, 2, 3, 4]
    for part in ("cannot write", "checkpoint-4", "save_every=0"):
        assert part in error
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert newest_checkpoint(tmp_path)
    assert child(rows, tmp_path)[-1] == uninterrupted


def test_the_batch_of_a_nan_is_kept(rows, tmp_path):
    model, tokenizer = cut()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NaNLossError, match=r"nan-step-1\.json"):
        train(model, tokenizer, rows, TrainConfig(**CFG), folder=tmp_path)
    kept = json.loads((tmp_path / "nan-step-1.json").read_text())
    assert len(kept) == 4
    assert {row["id"] for row in kept} <= {row["id"] for row in rows}
    assert all(row["input_ids"] for row in kept)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_another_training_does_not_go_on_from_it(rows, tmp_path):
    few = CFG | dict(max_steps=2, save_every=1)
    train(*cut(), rows, TrainConfig(**few), folder=tmp_path)
    with pytest.raises(IncompatibleConfigError, match="other settings or rows"):
        train(*cut(), rows, TrainConfig(**few | dict(lr=0.05)), folder=tmp_path)
    with pytest.raises(IncompatibleConfigError, match="other settings or rows"):
        train(*cut(), rows[:8], TrainConfig(**few), folder=tmp_path)


def trainer_processes():
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "finetune_kit.trainer" in command and "torch.distributed.run" not in command:
            found.append(process)
    return found


@pytest.mark.slow
def test_two_processes_killed_go_on_and_leave_none_behind(rows, tmp_path):
    whole, killed = tmp_path / "whole" / "checkpoints", tmp_path / "killed" / "checkpoints"
    uninterrupted = child(rows, whole, nproc=2)
    sent = child(rows, killed, kill_at=5, nproc=2)
    assert sent[-1] != uninterrupted[-1]
    assert newest_checkpoint(killed).name == "checkpoint-4"
    deadline = time.time() + 60
    while trainer_processes() and time.time() < deadline:
        time.sleep(0.5)
    assert not trainer_processes()
    assert child(rows, killed, nproc=2) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize(
    "tracker, left",
    [
        ("wandb", "wandb/offline-run-*/*.wandb"),
        ("trackio", "trackio/finetune_kit*.db"),
        ("tensorboard", "tensorboard/events.out.tfevents.*"),
    ],
)
def test_a_tracker_gets_losses_and_leaves_its_files_beside_the_run(
    rows, tmp_path, monkeypatch, tracker, left
):
    """No account and no network: what trackers keep on this machine.

    Two trainings of one process are two runs.
    """
    monkeypatch.setenv("WANDB_MODE", "offline")
    # trackio reads it when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "b" / "trackio"))
    pytest.importorskip(tracker)
    cfg = TrainConfig(**CFG | dict(max_steps=2, save_every=0, report_to=tracker))
    splits = dict(train=rows, validation=rows[:4])
    for name in "ab":
        train(*cut(), splits, cfg, folder=tmp_path / name / "checkpoints")
    [file] = (tmp_path / "b").glob(left)
    assert file.stat().st_size > 200
    logged = file.read_bytes()
    assert b"eval" in logged
    assert b"grad_norm" in logged
