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

MESSAGES = [
    dict(role="system", content="Be brief."),
    dict(role="user", content="Who are you?"),
    dict(role="assistant", content="Me, and nobody else."),
    dict(role="user", content="Why?"),
    dict(role="assistant", content="Because: 1 + 2\n\nis 3."),
]

# TRL marks these templates by hand ({% generation %}). Of its others, some score the header's line
# break (qwen2_5), or an empty <think> block that the prompt at inference holds already (qwen3,
# qwen3_5, nemotron, glm4moe).
RIGHT_TEMPLATES = [
    "cohere",
    "cohere2",
    "diffusion_gemma",
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
]

SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|<[a-z]+(?:_[a-z]+)+>|<turn\|>|<\|turn>")


@pytest.fixture(scope="module")
def tok():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data/tiny-base")


@pytest.fixture(scope="module")
def rows():
    from finetune_kit.rows import load_rows

    return load_rows(ROOT / "data/domains", "test")


def trl_template(name):
    [folder] = importlib.util.find_spec("trl").submodule_search_locations
    return (Path(folder) / "chat_templates" / f"{name}_training.jinja").read_text()


def with_special_tokens(tok, template):
    "A tokenizer that has the template's special tokens, as the model's own would."
    tok = copy.deepcopy(tok)
    new_tokens = set(SPECIAL_TOKEN.findall(template)) - set(tok.get_vocab())
    tok.add_special_tokens(dict(additional_special_tokens=sorted(new_tokens)))
    return tok


def without_space_at_the_end(tok, ids, mask):
    """Their mask, less the white space behind an end of turn where nothing scored follows.
    Nobody generates it.
    """
    special_ids = {i for i, token in tok.added_tokens_decoder.items() if token.special}
    expected = []
    for place, (token, is_scored) in enumerate(zip(ids, mask, strict=True)):
        follows_an_end = place > 0 and ids[place - 1] in special_ids
        ends_the_run = place + 1 == len(mask) or not mask[place + 1]
        is_space = tok.decode([token]).isspace()
        expected.append(bool(is_scored) and not (is_space and follows_an_end and ends_the_run))
    return expected


@pytest.mark.parametrize("name", RIGHT_TEMPLATES)
def test_masks_equal_trl(name, tok):
    from finetune_kit.chat import encode

    template = trl_template(name)
    tok = with_special_tokens(tok, template)
    conversations = [MESSAGES[1:], MESSAGES[1:3]]
    if name != "gemma":  # it knows no system turn
        conversations.append(MESSAGES)
    for messages in conversations:
        theirs = tok.apply_chat_template(
            messages,
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            enable_thinking=False,
        )
        ours = encode(dict(messages=messages), tok, template)
        mask = theirs["assistant_masks"]
        expected = without_space_at_the_end(tok, theirs["input_ids"], mask)
        assert ours["input_ids"] == theirs["input_ids"]
        assert [label != -100 for label in ours["labels"]] == expected


@pytest.mark.slow
def test_labels_equal_trl_s_own_preparation(tok, rows, tmp_path):
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
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny-base"),
        args,
        train_dataset=datasets.Dataset.from_list([dict(messages=r["messages"]) for r in rows]),
        processing_class=tok,
    )
    ours = [(row["input_ids"], row["labels"]) for row in encode_rows(rows, tok)]
    assert ours == [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


UNSLOTH = """
import json, sys
import unsloth
from unsloth_zoo.dataset_utils import train_on_responses_only
from transformers import AutoTokenizer
path, ids, user, assistant = json.loads(sys.stdin.read())
tok = AutoTokenizer.from_pretrained(path)
mask = train_on_responses_only(None, user, assistant, tokenizer=tok, return_function=True)
labels = mask(dict(input_ids=ids))["labels"]
print("LABELS", json.dumps([list(map(int, row)) for row in labels]))
"""


@pytest.mark.slow
def test_labels_equal_unsloth_s_train_on_responses_only(tok, rows):
    "In a process of its own, since unsloth patches transformers when it is imported."
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    from finetune_kit.chat import encode_rows

    encoded = encode_rows(rows, tok)
    ids = [row["input_ids"] for row in encoded]
    process = subprocess.run(
        [sys.executable, "-c", UNSLOTH],
        input=json.dumps([str(ROOT / "data/tiny-base"), ids, "<|user|>", "<|assistant|>"]),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("LABELS")]
    assert lines, process.stderr[-2000:]
    assert json.loads(lines[0].split(" ", 1)[1]) == [row["labels"] for row in encoded]


def test_the_gate_looks_up_the_end_tokens_once(tok, rows, monkeypatch):
    "A vocabulary of 150,000 tokens takes long to read; 500 times is too often."
    from finetune_kit.chat import check_masks, encode_rows

    encoded = encode_rows(rows, tok)
    calls = []
    read_vocabulary = tok.get_vocab

    def counting():
        calls.append(1)
        return read_vocabulary()

    monkeypatch.setattr(tok, "get_vocab", counting)
    assert check_masks(encoded, tok)["checked"] == len(encoded)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["alpaca", "chatml", "llama2", "phi"])
def test_a_template_s_prompt_is_a_prefix_of_its_text(name, tok):
    from finetune_kit.rendering import render

    for turn in (2, 4):
        prompt = render(MESSAGES[:turn], tok, name, add_generation_prompt=True)
        assert render(MESSAGES, tok, name).startswith(prompt)
