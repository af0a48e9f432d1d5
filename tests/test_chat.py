"The loss mask against those of TRL and unsloth, on templates where theirs are right."

import copy
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SYSTEM = dict(role="system", content="Be brief.")
FIRST_TURN = [
    dict(role="user", content="Who are you?"),
    dict(role="assistant", content="Me, and nobody else."),
]
SECOND_TURN = [
    dict(role="user", content="Why?"),
    dict(role="assistant", content="Because: 1 + 2\n\nis 3."),
]

# TRL marks these templates by hand ({% generation %}). Of its others, some score the header's line
# break (qwen2_5), or an empty <think> block that the prompt at inference has already (qwen3,
# qwen3_5, nemotron, glm4moe).
TRL_TEMPLATES = (
    "cohere",
    "cohere2",
    "gemma",
    "gemma3",
    "lfm2",
    "lfm2_v2",
    "llama3",
    "phi3",
    "phi3_5",
    "qwen2_5_vl",
    "qwen3_instruct_2507",
    "qwen3_vl",
    "diffusion_gemma",
)
WITHOUT_SYSTEM_TURN = ("gemma",)
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|<[a-z]+(?:_[a-z]+)+>|<turn\|>|<\|turn>")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data/tiny-base")


@pytest.fixture(scope="module")
def held_out_rows():
    from finetune_kit.rows import load_rows

    return load_rows(ROOT / "data/domains", "test")


def trl_template(name):
    [package] = importlib.util.find_spec("trl").submodule_search_locations
    return Path(package, "chat_templates", f"{name}_training.jinja").read_text()


def with_special_tokens(tokenizer, template):
    "A tokenizer that has the template's special tokens, as the model's own would."
    tokenizer = copy.deepcopy(tokenizer)
    missing = set(SPECIAL_TOKEN.findall(template)) - set(tokenizer.get_vocab())
    tokenizer.add_special_tokens(dict(additional_special_tokens=sorted(missing)))
    return tokenizer


def without_space_at_the_end(tokenizer, ids, mask):
    """Their mask, less white space after an end of turn where nothing scored follows.
    No model has to generate that."""
    special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    scored = []
    for n, token_id in enumerate(ids):
        is_space = tokenizer.decode([token_id]).isspace()
        is_after_end = n > 0 and ids[n - 1] in special_ids
        is_last_scored = n + 1 == len(mask) or not mask[n + 1]
        scored.append(bool(mask[n]) and not (is_space and is_after_end and is_last_scored))
    return scored


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_masks_equal_trl(name, tokenizer):
    from finetune_kit.chat import encode

    template = trl_template(name)
    tokenizer = with_special_tokens(tokenizer, template)
    conversations = [FIRST_TURN, FIRST_TURN + SECOND_TURN]
    if name not in WITHOUT_SYSTEM_TURN:
        conversations.append([SYSTEM, *FIRST_TURN, *SECOND_TURN])
    for messages in conversations:
        theirs = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            enable_thinking=False,
        )
        ours = encode(dict(messages=messages), tokenizer, template)
        assert ours["input_ids"] == theirs["input_ids"]
        expected = without_space_at_the_end(
            tokenizer, theirs["input_ids"], theirs["assistant_masks"]
        )
        assert [label != -100 for label in ours["labels"]] == expected


@pytest.mark.slow
def test_labels_equal_trl_s_own_preparation(tokenizer, held_out_rows, tmp_path):
    "The trainer's data set, as `SFTTrainer(assistant_only_loss=True)` makes it, label by label."
    import datasets
    import trl
    from transformers import AutoModelForCausalLM

    from finetune_kit.chat import encode_rows

    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        assistant_only_loss=True,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    conversations = [dict(messages=row["messages"]) for row in held_out_rows]
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny-base"),
        args,
        train_dataset=datasets.Dataset.from_list(conversations),
        processing_class=tokenizer,
    )
    ours = encode_rows(held_out_rows, tokenizer)
    theirs = list(trainer.train_dataset)
    for key in ("input_ids", "labels"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]


# In a process of its own, since unsloth patches what it touches
UNSLOTH = """
import json, sys
import unsloth
from unsloth_zoo.dataset_utils import train_on_responses_only
from transformers import AutoTokenizer
given = json.load(sys.stdin)
mask = train_on_responses_only(
    None,
    "<|user|>",
    "<|assistant|>",
    tokenizer=AutoTokenizer.from_pretrained(given["tokenizer"]),
    return_function=True,
)
labels = mask(dict(input_ids=given["input_ids"]))["labels"]
print("LABELS", json.dumps([[int(label) for label in row] for row in labels]))
"""


@pytest.mark.slow
def test_labels_equal_unsloth_s_train_on_responses_only(tokenizer, held_out_rows):
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    from finetune_kit.chat import encode_rows

    encoded = encode_rows(held_out_rows, tokenizer)
    input_ids = [row["input_ids"] for row in encoded]
    result = subprocess.run(
        [sys.executable, "-c", UNSLOTH],
        input=json.dumps(dict(tokenizer=str(ROOT / "data/tiny-base"), input_ids=input_ids)),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("LABELS ")]
    assert lines, result.stderr[-2000:]
    theirs = json.loads(lines[0].removeprefix("LABELS "))
    assert theirs == [row["labels"] for row in encoded]


def test_the_gate_reads_the_vocabulary_once(tokenizer, held_out_rows, monkeypatch):
    "Reading 150,000 tokens takes long; once for each row is too often."
    from finetune_kit.chat import check_masks, encode_rows

    encoded = encode_rows(held_out_rows, tokenizer)
    calls = []
    read_vocabulary = tokenizer.get_vocab

    def counting():
        calls.append(1)
        return read_vocabulary()

    monkeypatch.setattr(tokenizer, "get_vocab", counting)
    assert check_masks(encoded, tokenizer)["checked"] == len(encoded)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["alpaca", "chatml", "llama2", "phi"])
def test_the_prompt_of_a_shipped_template_is_a_prefix_of_its_text(name, tokenizer):
    from finetune_kit.rendering import render

    messages = [SYSTEM, *FIRST_TURN, *SECOND_TURN]
    for place in (2, 4):
        prompt = render(messages[:place], tokenizer, name, add_generation_prompt=True)
        assert render(messages, tokenizer, name).startswith(prompt)
