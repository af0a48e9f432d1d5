"""
The way to a GPU: unsloth's CUDA code simulated on a CPU, and, where there is a GPU, on it.

The simulation needs Triton, which `make simulation` puts into `.triton`, away from the others.
"""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from gpu_simulation import CASES

TRITON = ROOT / ".triton"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_simulated(case):
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    if importlib.util.find_spec("triton") is None and not TRITON.is_dir():
        pytest.skip("Triton is not installed; make simulation gets it")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(TRITON)]
    done = subprocess.run(
        [sys.executable, "tests/gpu_simulation.py", case],
        cwd=ROOT,
        env=os.environ
        | dict(PYTHONPATH=os.pathsep.join(filter(None, paths)), CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert f"passed {case}" in done.stdout, done.stderr[-3000:]


QWEN3_06B = dict(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
LLAMA_32_1B = dict(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)


TOO_LARGE = pytest.mark.xfail(strict=True, reason="by the forecast the default batch is too large")


@pytest.mark.parametrize("length", [128, *(pytest.param(n, marks=TOO_LARGE) for n in (512, 1024))])
@pytest.mark.parametrize("kind, shape", [("qwen3", QWEN3_06B), ("llama", LLAMA_32_1B)])
def test_the_defaults_fit_a_t4(tmp_path, kind, shape, length):
    "By the forecast, in 4 bits and fp16: 14 GiB are free on a T4."
    from transformers import AutoConfig

    from finetune_kit.memory import memory_forecast
    from finetune_kit.rules import derive_batch_size

    AutoConfig.for_model(kind, **shape).save_pretrained(tmp_path)
    rows = derive_batch_size([length] * 100, 1).value
    how = dict(method="qlora", quant="4bit", dtype=torch.float16)
    need = memory_forecast(tmp_path, rows, length, **how)
    assert need["total"] < 14, need


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


def rows_of_text(tokenizer):
    "Encoded rows of the embedded data, for training and for validation."
    from finetune_kit.chat import encode_rows
    from finetune_kit.data import prepare_dataset

    splits = prepare_dataset("data/domains", max_rows=60)
    return {name: encode_rows(rows, tokenizer) for name, rows in splits.items()}


def trained(backend, device=None, on_log=None, folder=None, **dials):
    "The result of ten steps without layer 7."
    from finetune_kit.model import load_model
    from finetune_kit.plan import drop
    from finetune_kit.surgery import apply_plan
    from finetune_kit.trainer import TrainConfig, train
    from finetune_kit.training import weights_dtype

    quant = dials.pop("quant", None)
    cfg = TrainConfig(max_steps=10, batch_size=8, eval_every=5, lr=1e-3, **dials)
    dtype = weights_dtype(cfg) if device is None else torch.float32
    model, tokenizer = load_model("data/tiny-base", quant, backend, dtype, device)
    model = apply_plan(model, drop(model, 7))
    return train(model, tokenizer, rows_of_text(tokenizer), cfg, on_log, folder)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["transformers", "unsloth"])
@pytest.mark.parametrize(
    "dials", [{}, dict(method="qlora", quant="4bit"), dict(method="full")], ids=str
)
def test_losses_are_those_of_the_cpu(gpu, backend, dials):
    expected = trained("transformers", "cpu", **dials).log.val_loss.dropna()
    losses = trained(backend, **dials).log.val_loss.dropna()
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=0.03)


@pytest.mark.gpu
def test_fp16_as_on_a_t4(gpu):
    log = trained("transformers", dtype="float16").log
    assert log.loss.map(math.isfinite).all()
    assert log.val_loss.dropna().is_monotonic_decreasing


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_near_the_forecast(gpu, checkpointing):
    from finetune_kit.memory import memory_forecast
    from finetune_kit.speed import most_held

    dials = dict(method="full", dtype="float32", checkpointing=checkpointing)
    held = most_held(lambda: trained("transformers", **dials), "cuda")
    longest = max(len(row["input_ids"]) for row in training_rows())
    need = memory_forecast("data/tiny-base", 8, longest, **dials | dict(dtype=torch.float32))
    assert held.size / 2**30 == pytest.approx(need["total"], rel=0.5)


def training_rows():
    "The training rows, for the longest of them."
    from finetune_kit.model import load_tokenizer

    return rows_of_text(load_tokenizer("data/tiny-base"))["train"]


@pytest.mark.gpu
def test_where_memory_is_short_the_loss_is_the_same(gpu):
    whole = trained("transformers", dtype="float32")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.1 * 2**30 / total)
    try:
        halved = trained("transformers", dtype="float32")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("out of memory" in note for note in halved.notes)
    assert halved.log.loss.tolist() == pytest.approx(whole.log.loss.tolist(), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["transformers", "unsloth"])
def test_an_interrupted_training_goes_on(gpu, backend, tmp_path):
    def stop(line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    whole = trained(backend)
    with pytest.raises(KeyboardInterrupt):
        trained(backend, on_log=stop, folder=tmp_path, save_every=2)
    resumed = trained(backend, folder=tmp_path, save_every=2)
    assert resumed.log.loss.tolist() == pytest.approx(whole.log.loss.tolist(), rel=1e-2)
