"""
Rows that a model reads together are what they are alone: packed, padded, or one at a time.
"""

import pytest
import torch
import transformers
from architecture_checks import tiny_tokenizer
from fastcore.test import test_close as check_close
from tiny_types import tiny_of_type

from finetune_kit.batches import batches, packed_batches, packed_distance, padding_leaks, rows_leak
from finetune_kit.examples import ragged_rows
from finetune_kit.infer import complete, prompts_leak
from finetune_kit.loop import plain_loop, validation_loss
from finetune_kit.lora import add_lora
from finetune_kit.requests import Request
from finetune_kit.scores import scores
from finetune_kit.trainer import train
from finetune_kit.training import TrainConfig

ROWS = ragged_rows((9, 5, 12, 7, 3, 4))
APART = ("llama", "qwen3", "gemma3_text", "mixtral", "olmo3", "deepseek_v3", "gpt_neox")
# What lets a row see the one before it
LEAK = dict(
    lfm2="a convolution",
    qwen3_next="a linear attention with a convolution",
    gpt_oss="attention sinks, without packing",
    falcon="attention that is given no positions",
    opt="positions that are counted by the model",
    mamba="no attention",
    falcon_h1="Mamba beside attention, with a small weight",
)


@pytest.fixture(autouse=True)
def no_messages():
    transformers.logging.set_verbosity_error()


def settings(**changes):
    usual = dict(
        max_steps=3,
        batch_size=3,
        accumulate=2,
        warmup_steps=0,
        eval_every=0,
        method="full",
        lr=1e-3,
    )
    return TrainConfig(**(usual | changes))


@pytest.mark.parametrize("model_type", [*APART, *LEAK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_is_seen_in_any_precision(model_type, dtype):
    model = tiny_of_type(model_type).to(dtype)
    assert bool(rows_leak(model)) == (model_type in LEAK), rows_leak(model)
    _, moved = packed_distance(model)
    assert moved > 0.05 if model_type in LEAK else moved == 0
    assert not padding_leaks(model)


@pytest.mark.parametrize("model_type", ["llama", "lfm2", "qwen3_next", "gpt_oss", "opt"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_is_that_of_the_plain_loop(model_type, method):
    cfg = settings(method=method, lora_r=2)
    dataset = dict(train=ROWS, validation=ROWS[:3])
    plain = plain_loop(tiny_of_type(model_type), tiny_tokenizer(), dataset, cfg)
    kit = train(tiny_of_type(model_type), tiny_tokenizer(), dataset, cfg)
    check_close(kit.log.loss.tolist(), plain.log.loss.tolist(), 1e-5)
    check_close(kit.log.val_loss.iloc[-1], plain.log.val_loss.iloc[-1], 1e-5)
    assert len(kit.notes) == (model_type in LEAK)
    assert all(note.startswith(f"{model_type}: rows that are packed") for note in kit.notes)


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_next"])
def test_adapters_do_not_hide_a_leak(model_type):
    model = add_lora(tiny_of_type(model_type), r=2).train()
    assert rows_leak(model)
    assert model.training


@pytest.mark.parametrize("model_type", ["llama", "lfm2", "deepseek_v32"])
def test_scores_are_those_of_rows_alone(model_type):
    model = tiny_of_type(model_type)
    alone = scores(model, batches(ROWS, 1))
    for together in (batches(ROWS, 6), packed_batches(ROWS, 16)):
        check_close(scores(model, together).nll, alone.nll, 1e-4)
    check_close(validation_loss(model, ROWS), alone.nll.sum() / alone.n_tokens.sum(), 1e-5)


def test_rows_that_padding_changes_go_one_at_a_time():
    model_type = "deepseek_v32"  # what its indexer picks depends on the width of the batch
    kit = train(tiny_of_type(model_type), tiny_tokenizer(), ROWS, settings())
    plain = plain_loop(tiny_of_type(model_type), tiny_tokenizer(), ROWS, settings())
    check_close(kit.log.loss.tolist(), plain.log.loss.tolist(), 1e-5)
    [note] = kit.notes
    assert "so rows go one at a time" in note


@pytest.mark.parametrize("model_type", ["llama", "mamba", "rwkv", "recurrent_gemma"])
def test_a_batch_gives_the_answers_of_one_prompt_alone(model_type):
    model = tiny_of_type(model_type)
    assert bool(prompts_leak(model)) == (model_type in ("rwkv", "recurrent_gemma"))
    prompts = [[5, 6, 7, 8, 9, 10], [7, 8]]
    together = complete(model, tiny_tokenizer(), [Request(ids, 6) for ids in prompts])
    for request in together:
        [alone] = complete(model, tiny_tokenizer(), [Request(request.ids, 6)])
        assert request.new_ids == alone.new_ids


@pytest.mark.slow
def test_two_processes_pad_as_one_does():
    cfg = settings(batch_size=2, method="lora", lora_r=2)
    one = train(tiny_of_type("lfm2"), tiny_tokenizer(), ROWS, cfg)
    two = train(tiny_of_type("lfm2"), tiny_tokenizer(), ROWS, cfg.model_copy(update=dict(nproc=2)))
    check_close(two.log.loss.tolist(), one.log.loss.tolist(), 1e-5)
    assert two.notes == one.notes != []
