"Ways to heal: a teacher, the base's own answers, the last layers; and one control for all of them."

import json

import pytest
import torch
from conftest import ROOT
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from finetune_kit.chat import encode_rows
from finetune_kit.comparison import comparison
from finetune_kit.core import IncompatibleConfigError
from finetune_kit.dials import RunConfig
from finetune_kit.loop import count_scored, rows_by_step, validation_loss
from finetune_kit.lora import add_lora
from finetune_kit.model import load_model
from finetune_kit.plan import drop
from finetune_kit.record import open_run
from finetune_kit.rows import load_rows
from finetune_kit.surgery import apply_plan, load_for_inference, save_trained
from finetune_kit.sweep_plan import plan_sweep
from finetune_kit.sweep_spec import SweepSpec
from finetune_kit.targets import own_answers
from finetune_kit.trainer import train
from finetune_kit.training import TrainConfig

BASE = ROOT / "data/tiny-base"
FEW = dict(max_steps=4, batch_size=4, warmup_steps=0, eval_every=0, lr=1e-3, lora_r=4)
WAYS = [
    dict(heal="distill"),
    dict(heal="sft+distill", temperature=2, top_k=32),
    dict(method="last_layers"),
    dict(method="last_layers", last_layers=1, heal="distill"),
    dict(method="full", heal="distill", lr=1e-4),
]


def load(plan=None):
    model, tokenizer = load_model(BASE, backend="transformers", device="cpu")
    return (apply_plan(model, plan) if plan else model), tokenizer


@pytest.fixture(scope="module")
def rows():
    chat = load_rows(ROOT / "data/domains/chat", "train", max_rows=24)
    return encode_rows(chat, load()[1])


def name_of(way):
    return ",".join(map(str, way.values()))


@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_what_was_healed_is_saved_and_says_the_same(way, rows, tmp_path):
    plan = drop(12, "7")
    model, tokenizer = load(plan)
    before = validation_loss(model, rows)
    cfg = TrainConfig(**FEW | way)
    teacher = dict(teacher=load()[0]) if cfg.heal != "sft" else {}
    result = train(model, tokenizer, rows, cfg, **teacher)
    after = validation_loss(result.model, rows)
    assert after < before
    save_trained(result.model, tokenizer, tmp_path / "model", BASE, plan)
    again, _ = load_for_inference(tmp_path / "model", device="cpu", backend="transformers")
    assert validation_loss(again, rows) == pytest.approx(after, abs=1e-5)
    if cfg.method == "last_layers":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert plain.lm_head.weight is not plain.get_input_embeddings().weight
        whole = load()[0].get_input_embeddings().weight
        assert torch.equal(plain.get_input_embeddings().weight, whole)
        assert not torch.equal(plain.lm_head.weight, whole)


def naive_losses(rows, cfg, teacher):
    "Row by row with PyTorch's own KL over whole rows and a mask; AdamW at a constant rate."
    model = add_lora(load(drop(12, 7))[0], cfg.lora_r, seed=cfg.seed).train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=cfg.lr, weight_decay=0)
    losses = []
    for step_rows in rows_by_step(rows, cfg):
        total = 0.0
        for row in step_rows:
            ids = torch.tensor([row["input_ids"]])
            mask = torch.tensor(row["labels"])[1:] != -100
            with torch.no_grad():
                log_p = (teacher(ids).logits[0, :-1] / cfg.temperature).log_softmax(-1)
            log_q = (model(ids).logits[0, :-1] / cfg.temperature).log_softmax(-1)
            per_token = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            loss = cfg.temperature**2 * per_token[mask].sum() / count_scored(step_rows)
            loss.backward()
            total += loss.item()
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(learning, cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_distillation_is_the_naive_loop(rows):
    "With two batches a step."
    teacher = load()[0]
    changes = dict(heal="distill", temperature=1.5, schedule="constant", accumulate=2)
    cfg = TrainConfig(**FEW | changes)
    by_trl = train(*load(drop(12, 7)), rows, cfg, teacher=teacher)
    assert by_trl.log.loss.tolist() == pytest.approx(naive_losses(rows, cfg, teacher), abs=1e-5)


def test_a_teacher_with_adapters_is_asked_with_them(rows):
    "As a control is."
    control = train(*load(), rows, TrainConfig(**FEW)).model
    cfg = TrainConfig(**FEW | dict(max_steps=1, heal="distill", teacher="control"))
    losses = [
        train(*load(drop(12, 7)), rows, cfg, teacher=teacher).log.loss[0]
        for teacher in (control, load()[0])
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_whoever_takes_nothing_out_is_told(rows):
    cfg = TrainConfig(**FEW | dict(heal="distill"))
    result = train(*load(), rows, cfg, teacher=load()[0])
    assert result.log.loss.iloc[0] < 1e-5, "the teacher is the model itself"
    assert "no layer was taken out" in result.notes[0]


def test_answers_are_made_once_for_a_base(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path))
    model, tokenizer = load()
    chat = load_rows(ROOT / "data/domains/chat", "train", max_rows=8)
    first = own_answers(lambda: model, "base", tokenizer, chat, max_new_tokens=24)

    def never():
        raise AssertionError("generated again")

    again = own_answers(never, "base", tokenizer, chat, max_new_tokens=24)
    assert list(again.rows) == list(first.rows)
    assert len(first.rows) + len(first.rows.rejects) == len(chat)


def test_a_sweep_over_ways_has_one_control():
    grid = dict(heal=["sft", "distill"], targets_from=["data", "base"], max_rows=[60])
    planned = plan_sweep(SweepSpec(notebook="nbs/train.ipynb", grid=grid))
    assert len({run.id for run in planned}) == 4
    assert [run.first for run in planned] == [True, False, False, False]


@pytest.fixture(scope="module")
def healed_runs(warm, tmp_path_factory):
    top = tmp_path_factory.mktemp("healing")
    quick = dict(max_steps=8, eval_every=4, eval_items=12, max_rows=60, backend="transformers")
    ways = [{}, dict(heal="distill", teacher="control", top_k=64), dict(targets_from="base")]
    for n, way in enumerate(ways):
        warm(top / f"{n}.ipynb", top / "runs", **quick, **way)
    return top / "runs"


@pytest.mark.slow
def test_three_ways_against_one_control(healed_runs, monkeypatch):
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(healed_runs))
    assert len([*healed_runs.glob("control-whole-*/run.json")]) == 1
    runs = [open_run(file.parent) for file in sorted(healed_runs.glob("train-drop7-*/run.json"))]
    assert [run.info["status"] for run in runs] == ["done"] * 3
    assert len({run.info["metrics"]["control"]["nll"] for run in runs}) == 1
    assert len({run.info["metrics"]["cut"]["nll"] for run in runs}) == 1
    table = comparison(runs)
    assert set(table.healing) == {
        "SFT, on the data",
        "SFT, on answers of the whole base",
        "forward KL to the control over its 64 likeliest tokens and the rest, on the data",
    }
    for run in runs:
        report = (run.folder / "report.html").read_text()
        assert json.dumps(f"Healed by {table.set_index('id').healing[run.id]}.")[1:-1] in report


def test_plain_texts_have_no_questions(warm, tmp_path):
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps(dict(text=f"Story {n}: once upon a time.")) for n in range(30)]
    file.write_text("\n".join(lines))
    done = warm(tmp_path / "out.ipynb", tmp_path / "runs", data=str(file), targets_from="base")
    assert done.returncode != 0
    assert "a text has no question to answer" in done.stderr
    assert not [*(tmp_path / "runs").glob("control-*")]


def test_no_experiment_without_a_control_has_a_teacher():
    from finetune_kit.dials import HealConfig

    with pytest.raises(ValueError, match="heal"):
        HealConfig(heal="distill", teacher="control")
    with pytest.raises(IncompatibleConfigError, match="without a teacher"):
        train(*load(), [], TrainConfig(heal="distill", teacher="control"))
    assert RunConfig(heal="distill", teacher="control").check().dropped == [7]
