"The loss mask against those of TRL and unsloth, on templates where theirs are right."

import copy, importlib.util, json, re, subprocess, sys
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

# TRL marks these templates by hand ({% generation %}). Of the others, some score the header's line break (qwen2_5) or an empty <think> block that the prompt at inference holds already (qwen3, qwen3_5, nemotron, glm4moe).
RIGHT = "cohere cohere2 gemma gemma3 lfm2 lfm2_v2 llama3 phi3 phi3_5 qwen2_5_vl qwen3_instruct_2507 qwen3_vl diffusion_gemma".split()


@pytest.fixture(scope="module")
def tok():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data/tiny-base")


def trl_template(name):
    return (
        Path(importlib.util.find_spec("trl").submodule_search_locations[0])
        / "chat_templates"
        / f"{name}_training.jinja"
    ).read_text()


def with_specials(tok, template):
    "A tokenizer that has the template's special tokens, as the model's own would."
    tok = copy.deepcopy(tok)
    tok.add_special_tokens(
        dict(
            additional_special_tokens=sorted(
                set(re.findall(r"<\|\w+\|>|<[a-z]+(?:_[a-z]+)+>|<turn\|>|<\|turn>", template))
                - set(tok.get_vocab())
            )
        )
    )
    return tok


def without_space_at_the_end(tok, ids, mask):
    "Their mask, less the white space that follows an end of turn where nothing scored follows it: nobody generates it."
    special = {i for i, t in tok.added_tokens_decoder.items() if t.special}
    return [
        bool(m and not (tok.decode([i]).isspace() and n and ids[n - 1] in special and not after))
        for n, (i, m, after) in enumerate(zip(ids, mask, [*mask[1:], 0]))
    ]


@pytest.mark.parametrize("name", RIGHT)
def test_masks_equal_trl(name, tok):
    from finetune_kit.chat import encode

    template = trl_template(name)
    tok = with_specials(tok, template)
    for messages in (
        MESSAGES[1:],
        MESSAGES[1:3],
        *([MESSAGES] if name != "gemma" else []),
    ):  # Gemma's knows no system turn
        theirs = tok.apply_chat_template(
            messages,
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            enable_thinking=False,
        )
        ours = encode(dict(messages=messages), tok, template)
        assert ours["input_ids"] == theirs["input_ids"]
        assert [l != -100 for l in ours["labels"]] == without_space_at_the_end(
            tok, theirs["input_ids"], theirs["assistant_masks"]
        )


@pytest.mark.slow
def test_labels_equal_trl_s_own_preparation(tok, tmp_path):
    "The trainer's data set, as `SFTTrainer(assistant_only_loss=True)` makes it, label by label."
    import datasets, trl
    from transformers import AutoModelForCausalLM
    from finetune_kit.chat import encode_rows
    from finetune_kit.rows import load_rows

    rows = load_rows(ROOT / "data/domains", "test")
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
    assert [(e["input_ids"], e["labels"]) for e in encode_rows(rows, tok)] == [
        (r["input_ids"], r["labels"]) for r in trainer.train_dataset
    ]


UNSLOTH = """
import json, sys
import unsloth
from unsloth_zoo.dataset_utils import train_on_responses_only
from transformers import AutoTokenizer
path, ids, template, user, assistant = json.loads(sys.stdin.read())
tok = AutoTokenizer.from_pretrained(path)
f = train_on_responses_only(None, user, assistant, tokenizer=tok, return_function=True)
print("LABELS", json.dumps([list(map(int, l)) for l in f(dict(input_ids=ids))["labels"]]))
"""


@pytest.mark.slow
@pytest.mark.slow
def test_labels_equal_unsloth_s_train_on_responses_only(tok):
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    from finetune_kit.chat import encode_rows
    from finetune_kit.rows import load_rows

    encoded = encode_rows(load_rows(ROOT / "data/domains", "test"), tok)
    done = subprocess.run(
        [sys.executable, "-c", UNSLOTH],
        input=json.dumps(
            [
                str(ROOT / "data/tiny-base"),
                [e["input_ids"] for e in encoded],
                None,
                "<|user|>",
                "<|assistant|>",
            ]
        ),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    labels = [o for o in done.stdout.splitlines() if o.startswith("LABELS")]
    assert labels, done.stderr[-2000:]
    assert json.loads(labels[0].split(" ", 1)[1]) == [e["labels"] for e in encoded]
