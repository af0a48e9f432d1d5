"Dials that nobody set: one value in the notebook, in a sweep, and when the run is made again."

import json

import pytest
from conftest import ROOT

from finetune_kit.core import IncompatibleConfigError
from finetune_kit.data import prepare_dataset
from finetune_kit.declaration import declared_parameters
from finetune_kit.dials import HealConfig, RunConfig, config_from
from finetune_kit.sweep_plan import plan_sweep
from finetune_kit.sweep_spec import read_spec
from finetune_kit.training import TrainConfig

FEW = dict(max_rows=48, eval_every=0, eval_items=4, backend="transformers", save_every=0)

FLAT = """
model: data/tiny-base
dtype: bfloat16
data: data/domains/math
lora_r: 4
lora_alpha: 32
lora_targets: q_proj,v_proj
lr: 2.0e-4
batch_size: 4
epochs: 0.5
wandb_project: mine
metrics: exact_match,token_f1
"""
IN_SECTIONS = """
model: {name: data/tiny-base, torch_dtype: bfloat16}
data: {path: data/domains/math}
lora: {r: 4, lora_alpha: 32, target_modules: [q_proj, v_proj]}
training: {learning_rate: 2e-4, batch_size: 4, epochs: 0.5}
wandb: {project: mine}
metrics: [exact_match, token_f1]
"""


def test_sections_are_the_flat_file(tmp_path):
    flat, sections = tmp_path / "flat.yaml", tmp_path / "sections.yaml"
    flat.write_text(FLAT)
    sections.write_text(IN_SECTIONS)
    assert RunConfig.from_yaml(sections) == RunConfig.from_yaml(flat)
    dials = declared_parameters(ROOT / "nbs/train.ipynb")
    configs = [config_from(RunConfig, dials | dict(config=str(f))) for f in (flat, sections)]
    assert configs[0] == configs[1] == RunConfig.from_yaml(flat)
    (tmp_path / "more.yaml").write_text("_extends: sections.yaml\nlora: {r: 8}\n")
    more = RunConfig.from_yaml(tmp_path / "more.yaml")
    assert (more.lora_r, more.lora_alpha) == (8, 32)


@pytest.mark.parametrize("epochs, steps", [(1, 12), (0.5, 6), (2, 24), (0.01, 1)])
def test_epochs_become_steps(epochs, steps):
    rows = prepare_dataset("data/domains", max_rows=48)["train"]
    assert len(rows) == 48
    cfg = RunConfig(epochs=epochs, batch_size=2, accumulate=2, max_rows=48).resolved()
    assert (cfg.max_steps, cfg.epochs) == (steps, None)


def test_epochs_and_steps_exclude_each_other(tmp_path):
    with pytest.raises(IncompatibleConfigError, match="epochs=2 with max_steps=5: give one"):
        TrainConfig(epochs=2, max_steps=5)
    (tmp_path / "steps.yaml").write_text("max_steps: 5\n")
    dials = declared_parameters(ROOT / "nbs/train.ipynb") | dict(config=tmp_path / "steps.yaml")
    cfg = config_from(RunConfig, dials | dict(epochs=2))
    assert (cfg.epochs, cfg.max_steps) == (2, None)


def test_the_rules_read_the_data_as_the_run_does():
    whole, few = RunConfig().derived(), RunConfig(max_rows=60).derived()
    assert "288 held-out rows" in whole["eval_items"].reason
    assert few["eval_items"].value == 60
    assert few["max_steps"].value == 12  # three epochs of 60 rows
    assert HealConfig().derived()["max_steps"].value == 60


def test_a_run_has_the_id_that_a_sweep_foresees(warm, tmp_path):
    "And made again from its config.yaml, it is the same run."
    runs = tmp_path / "runs"
    spec = dict(notebook="nbs/train.ipynb", fixed=FEW | dict(epochs=0.5), grid=dict(drop_layer=[7]))
    [planned] = plan_sweep(read_spec(spec))
    done = warm(tmp_path / "a.ipynb", runs, drop_layer=7, epochs=0.5, **FEW)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = runs / planned.id
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "done"
    config = record["config"]
    assert (config["lr"], config["batch_size"], config["max_steps"]) == (2e-3, 16, 2)
    assert (config["epochs"], config["max_new_tokens"]) == (None, 24)
    assert record["metrics"]["training"]["steps"] == 2
    assert record["derived"]["max_steps"] == "0.5 epochs of 48 rows, 16 a step"
    assert "0.5 epochs of 48 rows" in (folder / "report.html").read_text()
    control = runs / record["artifacts"]["control"]
    made = json.loads((control / "run.json").read_text())["finished"]

    again = warm(tmp_path / "b.ipynb", runs, config=folder / "config.yaml")
    assert again.returncode == 0, again.stderr[-3000:]
    assert sorted(run.name for run in runs.glob("train-*")) == [planned.id]
    repeated = json.loads((folder / "run.json").read_text())
    assert repeated["config"] == config
    assert repeated["metrics"]["healed"] == record["metrics"]["healed"]
    assert json.loads((control / "run.json").read_text())["finished"] == made


def test_a_value_set_by_hand_to_what_the_rule_says_is_the_same_run():
    by_rule = RunConfig(drop_layer=7).resolved()
    assert RunConfig(drop_layer=7, lr=2e-3, max_steps=200).resolved() == by_rule
