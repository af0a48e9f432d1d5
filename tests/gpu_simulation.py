"""
unsloth's CUDA code on CPU tensors, by its own test switch and Triton's interpreter.

`python tests/gpu_simulation.py CASE` runs a case; `tests/test_gpu_path.py` runs them all. What is
real: unsloth's Python, its patched classes, its rules of truncation, its generated trainer. What
is not: CUDA, memory, speed, the rounding of fp16 and bf16, Flash Attention.
"""

import contextlib
import os
import sys
import tempfile
from types import SimpleNamespace

if __name__ == "__main__":  # before torch; not where only `CASES` is read
    os.environ.update(
        UNSLOTH_ALLOW_CPU="1",
        TRITON_INTERPRET="1",
        UNSLOTH_DISABLE_STATISTICS="1",
        HF_HUB_OFFLINE="1",
        UNSLOTH_COMPILE_LOCATION=tempfile.mkdtemp(),
        UNSLOTH_COMPILE_DISABLE="1",
        TORCHDYNAMO_DISABLE="1",
    )
import torch

GIB = 2**30
CARD = SimpleNamespace(
    name="A100",
    total_memory=40 * GIB,
    major=8,
    minor=0,
    multi_processor_count=108,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block_optin=166912,
)


def always(value=None):
    "A function that returns `value`, whatever it is given."
    return lambda *args, **kwargs: value


def simulate_cuda():
    "torch.cuda answers as on an A100."
    torch.cuda.current_stream = always(SimpleNamespace(cuda_stream=0))
    torch.cuda.device = lambda *args, **kwargs: contextlib.nullcontext()
    torch.cuda.mem_get_info = always((14 * GIB, 15 * GIB))
    torch.cuda.current_device = always(0)
    torch.cuda.get_device_properties = always(CARD)
    torch.cuda.get_device_capability = always((CARD.major, CARD.minor))
    for name in ("synchronize", "empty_cache"):
        setattr(torch.cuda, name, always())
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(torch.cuda, name, always(0))
    torch.cuda.max_memory_reserved = always(0)


class OneForEach(dict):
    "unsloth keeps a list with an entry for each GPU; this one has one for all."

    def __init__(self, value):
        super().__init__()
        self.value = value

    def __getitem__(self, key):
        return self.get("any", self.value)

    def __setitem__(self, key, value):
        super().__setitem__("any", value)


class Count(int):
    "A number of GPUs by which such a list is multiplied."

    def __rmul__(self, other):
        return OneForEach(other[0]) if isinstance(other, list) else int(self) * other


def simulate_unsloth():
    "unsloth's modules see one device, the CPU."
    import unsloth  # noqa: F401
    import unsloth_zoo.gradient_checkpointing as checkpointing

    checkpointing.initialize_unsloth_gradient_checkpointing = always()
    instead = dict(
        DEVICE_COUNT=Count(1),
        get_current_device=always(torch.device("cpu")),
        DEVICE_TYPE_TORCH="cpu",
        torch_gpu_device=lambda *args, **kwargs: contextlib.nullcontext(),
        apply_unsloth_gradient_checkpointing=always(False),
    )
    for name, module in list(sys.modules.items()):
        if name.startswith("unsloth") and module is not None:
            for attribute, value in instead.items():
                if hasattr(module, attribute):
                    setattr(module, attribute, value)


def simulate_trainer():
    "TRL's trainer is the one that unsloth generates on a GPU."
    from unsloth.models.rl import patch_trl_rl_trainers

    os.environ["UNSLOTH_ALLOW_CPU"] = "0"
    patch_trl_rl_trainers()
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"


def load(backend="unsloth"):
    from finetune_kit.model import load_model, remembered

    model, tokenizer = load_model(
        "data/tiny-base", backend=backend, device="cpu", dtype=torch.float32
    )
    assert remembered(model).backend == backend
    return model, tokenizer


def inputs():
    "Faults 2 and 3: the whole context is read, as plain transformers reads it; nothing beyond."
    from finetune_kit.core import InvalidConfigError

    plain, _ = load("transformers")
    by_unsloth, _ = load()
    assert type(by_unsloth.model).forward.__module__ == "unsloth.models.llama"
    context = by_unsloth.config.max_position_embeddings
    assert by_unsloth.max_seq_length == context == plain.config.max_position_embeddings
    ids = torch.randint(5, 700, (1, 32))
    with torch.no_grad():
        difference = (plain(ids).logits - by_unsloth(ids).logits).abs().max()
    assert difference < 1e-4, difference
    try:
        by_unsloth(torch.ones(1, context + 1, dtype=torch.long))
    except InvalidConfigError as error:
        assert f"{context + 1} tokens" in str(error)
    else:
        raise AssertionError("a longer input was cut, and nobody was told")


def forecast():
    "Fault 1: a forecast after unsloth has put its classes into transformers."
    from finetune_kit.memory import memory_forecast

    before = memory_forecast("data/tiny-base", 2, 32)
    load()
    assert memory_forecast("data/tiny-base", 2, 32) == before


def checkpointing():
    "Fault 5: with `checkpointing` a layer runs twice a step, and the loss is the same."
    from finetune_kit import lora
    from finetune_kit.examples import ragged_rows
    from finetune_kit.plan import prune_after
    from finetune_kit.surgery import apply_plan
    from finetune_kit.trainer import TrainConfig, train

    def attach(model, options, seed):
        "As on a GPU: unsloth's own adapters."
        get_peft_model = lora.load_unsloth().get_peft_model
        return get_peft_model(model, **options, use_gradient_checkpointing=False, random_state=seed)

    lora._attach = attach
    runs, losses = [], []
    for recompute in (False, True):
        model, tokenizer = load()
        if not runs:
            simulate_trainer()
        model = apply_plan(model, prune_after(model, 1))
        calls = []

        def count(module, args, calls=calls):
            if module.training:
                calls.append(1)

        model.model.layers[0].mlp.register_forward_pre_hook(count)
        cfg = dict(max_steps=1, batch_size=2, lr=1e-3, eval_every=0, lora_r=4)
        rows = ragged_rows(lengths=(9, 5))
        result = train(model, tokenizer, rows, TrainConfig(**cfg, checkpointing=recompute))
        runs.append(len(calls))
        losses.append(result.log.loss.tolist())
    assert runs[1] == 2 * runs[0], runs
    assert losses[0] == losses[1], losses


CASES = dict(inputs=inputs, forecast=forecast, checkpointing=checkpointing)

if __name__ == "__main__":
    simulate_cuda()
    simulate_unsloth()
    CASES[sys.argv[1]]()
    print("passed", sys.argv[1])
