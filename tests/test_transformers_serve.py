"""An exported, cut and healed model behind `transformers serve`, asked by the `openai` client.

Greedy text is the one that the kit's own service gives.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
QUESTIONS = [
    "Where does the otter live?",
    "What does the puffin eat?",
    "Repeat: moon gate duck",
    "Tell me about the lynx.",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "Layer 7 taken out, healed by a few steps, merged, and written for plain transformers."
    from finetune_kit.chat import encode_rows
    from finetune_kit.loop import plain_loop
    from finetune_kit.lora import merge_lora
    from finetune_kit.merged import export_merged
    from finetune_kit.model import load_model
    from finetune_kit.plan import drop
    from finetune_kit.rows import load_rows
    from finetune_kit.surgery import apply_plan
    from finetune_kit.training import TrainConfig

    model, tokenizer = load_model("data/tiny-base", backend="transformers", device="cpu")
    model = apply_plan(model, drop(model, 7))
    rows = encode_rows(load_rows("data/domains", "train", max_rows=64), tokenizer)
    healed = plain_loop(model, tokenizer, rows, TrainConfig(max_steps=6, batch_size=4, lora_r=4))
    folder = tmp_path_factory.mktemp("exported") / "cut-7"
    return export_merged(merge_lora(healed.model).eval(), tokenizer, folder)


@contextlib.contextmanager
def transformers_serve(folder, log):  # yields the URL
    "Plain transformers' own service, without network; skipped where it cannot start."
    pytest.importorskip("fastapi")
    program = Path(sys.executable).with_name("transformers")
    if not program.exists():
        pytest.skip("the command `transformers` is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32"]
    environment = os.environ | dict(HF_HUB_OFFLINE="1")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent
        )
    try:
        wait_until_up(port, process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def wait_until_up(port, process, log):
    deadline = time.time() + 240
    while time.time() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None:
            text = log.read_text()
            if "transformers[serving]" in text:
                pytest.skip("transformers' extra `serving` is not installed")
            raise AssertionError(text[-2000:])
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


def answers_of(url, model):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=240)
    answers = []
    for question in QUESTIONS:
        messages = [dict(role="user", content=question)]
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=24, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        answers.append("".join(pieces).strip())
    return answers


@pytest.mark.slow
def test_it_answers_as_the_kits_own_service(checkpoint, tmp_path):
    from finetune_kit.serve import create_app, serving

    config = json.loads((checkpoint / "config.json").read_text())
    assert config["num_hidden_layers"] == 11
    with serving(create_app({"cut": checkpoint}, runs=False)) as url:
        ours = answers_of(url, "cut")
    with transformers_serve(checkpoint, tmp_path / "serve.log") as url:
        theirs = answers_of(url, str(checkpoint))
    assert all(ours)
    assert len(set(ours)) == len(QUESTIONS)
    assert ours == theirs
