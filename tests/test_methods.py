"A newcomer's training method: registered in his own code, trained, saved and loaded again."

import copy
import importlib
import sys

import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_kit.chat import encode_rows
from finetune_kit.core import IncompatibleConfigError, InvalidConfigError
from finetune_kit.loop import plain_loop
from finetune_kit.lora import find_coverage, merge_lora
from finetune_kit.model import load_model
from finetune_kit.plan import drop
from finetune_kit.probe import logit_distance, probe_logits
from finetune_kit.rows import load_rows
from finetune_kit.surgery import apply_plan, load_for_inference, save_trained
from finetune_kit.trainer import train
from finetune_kit.training import TrainConfig, methods

BASE = ROOT / "data/tiny-base"
FEW_STEPS = dict(max_steps=3, batch_size=4, warmup_steps=0, eval_every=0, lr=1e-2)


def norms(model, cfg):
    "Only the weights of the norms: no adapters."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


def by_plain_loop(model, tokenizer, dataset, cfg, on_log, folder):
    "A trainer of one's own."
    return plain_loop(model, tokenizer, dataset, cfg, on_log)


@pytest.fixture(autouse=True)
def registry():
    "What a test registers is forgotten afterwards."
    before = dict(methods)
    yield methods
    methods.clear()
    methods.update(before)


@pytest.fixture
def cut():
    model, tokenizer = load_model(BASE, backend="transformers", device="cpu")
    plan = drop(model, 7)
    return apply_plan(model, plan), tokenizer, plan


@pytest.fixture
def rows(cut):
    return encode_rows(load_rows(ROOT / "data/domains/chat", "train", max_rows=16), cut[1])


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20, 40)[None]).logits


@pytest.mark.parametrize("trainer", [None, by_plain_loop], ids=["TRL's trainer", "its own"])
def test_a_method_without_adapters_is_trained_saved_and_loaded(trainer, cut, rows, tmp_path):
    model, tokenizer, plan = cut
    methods("norms", train=trainer)(norms)
    head_before = model.lm_head.weight.clone()
    norm_before = model.model.norm.weight.clone()
    before = logits(model)

    result = train(model, tokenizer, rows, TrainConfig(method="norms", **FEW_STEPS))

    assert len(result.log) == 3
    assert 0 < result.parameters["trainable"] < 10_000
    assert torch.equal(result.model.lm_head.weight, head_before)
    assert not torch.equal(result.model.model.norm.weight, norm_before)
    trained = logits(result.model)
    assert not torch.equal(trained, before)

    save_trained(result.model, tokenizer, tmp_path / "model", BASE, plan)
    loaded, _ = load_for_inference(tmp_path / "model", device="cpu")
    torch.testing.assert_close(logits(loaded), trained, rtol=0, atol=0)


def test_it_resumes_as_every_other(cut, rows, tmp_path):
    "Its checkpoints are those of the default trainer."
    methods("norms")(norms)
    cfg = TrainConfig(method="norms", save_every=1, **FEW_STEPS)

    def interrupt(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(*cut[:2], rows, cfg, on_log=interrupt, folder=tmp_path)
    fresh, tokenizer = load_model(BASE, backend="transformers", device="cpu")
    resumed = train(apply_plan(fresh, cut[2]), tokenizer, rows, cfg, folder=tmp_path)
    again, _ = load_model(BASE, backend="transformers", device="cpu")
    uninterrupted = train(apply_plan(again, cut[2]), tokenizer, rows, cfg)
    assert resumed.log.loss.tolist() == uninterrupted.log.loss.tolist()
    assert torch.equal(logits(resumed.model), logits(uninterrupted.model))


@pytest.mark.parametrize(
    "prepare, trainer, message",
    [
        (lambda model: model, None, r"expected a function of \(model, cfg\), got"),
        ("norms", None, "is not a callable object"),
        (
            norms,
            norms,
            r"expected a function of \(model, tokenizer, dataset, cfg, on_log, folder\)",
        ),
    ],
)
def test_what_cannot_be_called_is_refused_at_once(prepare, trainer, message):
    with pytest.raises(InvalidConfigError, match=message):
        methods("wrong", train=trainer)(prepare)
    assert "wrong" not in methods


def test_its_own_trainer_runs_in_one_process(cut, rows):
    methods("norms", train=by_plain_loop)(norms)
    with pytest.raises(IncompatibleConfigError, match="set nproc=1"):
        train(*cut[:2], rows, TrainConfig(method="norms", nproc=2, **FEW_STEPS))


def test_a_method_of_a_module_is_known_to_all_processes(tmp_path, monkeypatch):
    from finetune_kit.loop import Splits
    from finetune_kit.processes import read_job, write_job

    code = "from finetune_kit.training import methods\n\n\n"
    code += '@methods("of_a_module")\ndef of_a_module(model, cfg):\n    return model\n'
    (tmp_path / "my_methods.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_methods")
    cfg = TrainConfig(method="of_a_module")
    model, tokenizer = load_model(BASE, backend="transformers", device="cpu")
    write_job(tmp_path, model, tokenizer, Splits([], []), cfg, None)

    # as in a fresh process
    del methods["of_a_module"]
    monkeypatch.delitem(sys.modules, "my_methods")
    assert read_job(tmp_path).cfg == cfg
    assert "of_a_module" in methods


@pytest.fixture
def experts():
    "A small mixture of experts for the embedded tokenizer, and that tokenizer."
    _, tokenizer = load_model(BASE, backend="transformers", device="cpu")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), tokenizer


def test_experts_learn_and_come_back_from_an_adapter(experts, rows, tmp_path):
    model, tokenizer = experts
    base = copy.deepcopy(model)

    result = train(model, tokenizer, rows, TrainConfig(lora_r=2, **FEW_STEPS))

    assert result.notes == []
    learned = [name for name, weights in result.model.named_parameters() if "experts" in name]
    assert any("lora_B" in name for name in learned)
    result.model.save_pretrained(tmp_path)
    expected = probe_logits(result.model)
    assert logit_distance(probe_logits(base), expected) > 1e-3
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert logit_distance(expected, probe_logits(loaded)) < 1e-4
    assert logit_distance(expected, probe_logits(merge_lora(loaded))) < 1e-4


def test_a_report_tells_of_experts_that_are_left_out(experts, rows):
    model, tokenizer = experts
    line = str(find_coverage(model, dropout=0.1))

    result = train(model, tokenizer, rows, TrainConfig(lora_r=2, lora_dropout=0.1, **FEW_STEPS))

    assert result.notes == [line]
    assert "not experts.gate_up_proj, experts.down_proj" in line


def test_lora_keeps_to_the_targets_and_layers_of_the_cut_model(cut, rows):
    model, tokenizer, _ = cut
    config = TrainConfig(lora_targets="q_proj,v_proj", lora_layers="-1", **FEW_STEPS)

    result = train(model, tokenizer, rows, config)

    trained = [name for name, p in result.model.named_parameters() if p.requires_grad]
    places = {name.partition(".lora_")[0].partition("model.model.")[2] for name in trained}
    assert places == {f"model.layers.10.self_attn.{name}" for name in ("q_proj", "v_proj")}
