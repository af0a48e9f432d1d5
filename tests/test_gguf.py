"""A GGUF file is a model: read, de-quantised once, and used wherever a model is named.

The small file is the embedded base, exported; the tests marked `real` are about SmolLM2.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "Write a sentence about a dog.",
    "What is 7 plus 5?",
    "Translate 'good morning' into French.",
    "Who wrote Hamlet?",
    "List two fruits.",
    "What do bees make?",
    "Say hello to my friend Anna.",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "tiny-base as a GGUF file, and the model that it was made from."
    from finetune_kit.gguf_files import export_gguf
    from finetune_kit.model import load_model

    model, tokenizer = load_model(ROOT / "data/tiny-base", backend="transformers", device="cpu")
    file = export_gguf(model, tokenizer, tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    return file, model, tokenizer


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "An empty folder for runs, and so for what is de-quantised."
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def finetune_kit(*words):
    code = "from finetune_kit.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def chat_ids(tokenizer, question):
    from finetune_kit.requests import prompt_ids

    return prompt_ids(tokenizer, [dict(role="user", content=question)])


def greedy(model, ids, n):
    import torch

    options = dict(max_new_tokens=n, do_sample=False)
    with torch.no_grad():
        return model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()


# A small file


def test_a_file_is_the_model_that_it_was_made_from(tiny, runs):
    from finetune_kit.gguf_model import gguf_folder
    from finetune_kit.merged import probe_logits
    from finetune_kit.model import load_model

    file, model, tokenizer = tiny
    loaded, its_tokenizer = load_model(file, backend="transformers", device="cpu")
    assert (probe_logits(loaded) - probe_logits(model)).abs().max() < 1e-4
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert its_tokenizer.eos_token_id == tokenizer.eos_token_id
    ids = chat_ids(tokenizer, "Where does the otter live?")
    assert chat_ids(its_tokenizer, "Where does the otter live?") == ids
    assert greedy(loaded, ids, 12) == greedy(model, ids, 12)
    weights = gguf_folder(file) / "model.safetensors"
    made = weights.stat().st_mtime_ns
    load_model(file, backend="transformers", device="cpu")
    assert weights.stat().st_mtime_ns == made


def test_a_plan_needs_no_weights(tiny, runs):
    result = finetune_kit("plan", tiny[0], "--drop", "7,9")
    assert json.loads(result.stdout)["dropped"] == [7, 9], result.stderr
    assert [path.name for path in runs.glob(".gguf/*/[a-z]*[!k]")] == ["config"]


def test_streamed_layer_by_layer(tiny, runs):
    import torch

    from finetune_kit.merged import probe_logits
    from finetune_kit.stream import stream_model

    streamed = stream_model(tiny[0], dtype=torch.float32, device="cpu")
    assert (probe_logits(streamed) - probe_logits(tiny[1])).abs().max() < 1e-4


def test_its_content_is_its_identity(tiny, runs, tmp_path):
    from finetune_kit.dials import RunConfig
    from finetune_kit.identity import content_hashes

    def hashes(file):
        return content_hashes("train", RunConfig(model=str(file)))

    copy = shutil.copy(tiny[0], tmp_path / "copy.gguf")
    assert hashes(copy)["model"] == hashes(tiny[0])["model"]
    with open(copy, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x01")
    assert hashes(copy)["model"] != hashes(tiny[0])["model"]


LOAD = (
    "import sys; from finetune_kit.gguf_model import gguf_folder; print(gguf_folder(sys.argv[1]))"
)
KILLED = """
import os, sys
import transformers
from finetune_kit.gguf_model import gguf_folder

def die(model, folder):
    (folder / "model.safetensors").write_text("half")
    os.kill(os.getpid(), 9)

transformers.PreTrainedModel.save_pretrained = die
gguf_folder(sys.argv[1])
"""


def python(code, file):
    command = [sys.executable, "-c", code, str(file)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_killed_and_two_at_once(tiny, runs):
    from finetune_kit.model import load_model

    killed = python(KILLED, tiny[0])
    killed.communicate(timeout=300)
    assert killed.returncode == -9
    assert list(runs.glob(".gguf/*/.model.part/model.safetensors"))
    assert not list(runs.glob(".gguf/*/model"))
    both = [python(LOAD, tiny[0]) for _ in range(2)]
    folders = {process.communicate(timeout=300)[0].strip() for process in both}
    assert len(folders) == 1
    assert [process.returncode for process in both] == [0, 0]
    assert not list(runs.glob(".gguf/*/.model.part"))
    load_model(tiny[0], backend="transformers", device="cpu")


def test_a_run_on_it(tiny, runs, warm, tmp_path):
    "The adapter names the file, so that what was de-quantised may be deleted."
    from finetune_kit.export import export
    from finetune_kit.model_sources import find_model
    from finetune_kit.surgery import load_for_inference

    dials = dict(model=tiny[0], drop_layer=7, max_steps=2, eval_items=4, max_new_tokens=8)
    result = warm(tmp_path / "o.ipynb", runs, **dials)
    assert result.returncode == 0, result.stderr[-3000:]
    source = find_model("train-drop7")
    assert source.base == str(tiny[0])
    shutil.rmtree(runs / ".gguf")
    model, _ = load_for_inference(source.path, backend="transformers")
    assert model.config.num_hidden_layers == 11
    assert export("train-drop7", "gguf", tmp_path / "cut.gguf").exists()


REFUSED = {
    "half": ("ModelLoadError", "not downloaded whole"),
    "page": ("ModelLoadError", "no GGUF file"),
    "none": ("ModelNotFoundError", "no file at"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_files_are_one_sentence(tiny, runs, tmp_path, name):
    file = tmp_path / f"{name}.gguf"
    if name == "half":
        file.write_bytes(tiny[0].read_bytes()[:-50000])
    elif name == "page":
        file.write_text("<!doctype html>")
    result = finetune_kit("plan", file)
    error, text = REFUSED[name]
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1
    assert line.startswith(error) and text in line
    assert not list(runs.glob(".gguf/*/model"))


def test_a_layer_that_is_not_there(tiny, runs):
    result = finetune_kit("plan", tiny[0], "--drop", "12")
    assert "layer 12 not in 0..11" in result.stderr
    assert not list(runs.glob(".gguf/*/model"))


# SmolLM2


@pytest.fixture(scope="module")
def loaded(smollm2):
    from finetune_kit.model import load_model

    return load_model(smollm2, backend="transformers", device="cpu")


@pytest.mark.real
def test_logits_are_transformers_own(loaded, smollm2):
    import torch
    from transformers import AutoModelForCausalLM

    from finetune_kit.merged import probe_logits

    expected = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    assert torch.equal(probe_logits(loaded[0]), probe_logits(expected.eval()))


@pytest.mark.real
def test_special_tokens_and_template(loaded):
    model, tokenizer = loaded
    assert [tokenizer.bos_token, tokenizer.eos_token] == ["<|im_start|>", "<|im_end|>"]
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2
    text = tokenizer.decode(chat_ids(tokenizer, "Hi"))
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenizer) == model.config.vocab_size == 49152


@pytest.mark.real
def test_it_answers(loaded):
    model, tokenizer = loaded
    ids = greedy(model, chat_ids(tokenizer, QUESTIONS[0]), 16)
    assert tokenizer.decode(ids) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.real
def test_plan_and_cut(loaded, smollm2):
    from finetune_kit.plan import drop
    from finetune_kit.surgery import skipping

    result = finetune_kit("plan", smollm2, "--drop", "5")
    assert json.loads(result.stdout)["n_layers"] == 30
    model, tokenizer = loaded
    text = "The capital of France is Paris, and the capital of Italy is Rome."
    ids = tokenizer(text, return_tensors="pt").input_ids

    def nll():
        import torch

        with torch.no_grad():
            return model(ids, labels=ids).loss.item()

    whole = nll()
    dropped = {}
    for layer in (0, 5):
        with skipping(model, drop(model, layer)):
            dropped[layer] = nll()
    assert whole < 2.5
    assert abs(dropped[5] - whole) < 0.5 < 4 < dropped[0] - whole


@pytest.mark.real
def test_written_and_read_again(loaded, tmp_path, monkeypatch):
    "A cut of it, so that the file is small. Its tokenizer is byte-level."
    import copy

    import gguf
    import torch

    from finetune_kit.gguf_files import export_gguf
    from finetune_kit.merged import probe_logits
    from finetune_kit.model import load_model
    from finetune_kit.plan import drop
    from finetune_kit.surgery import apply_plan

    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "runs"))
    model, tokenizer = loaded
    cut = apply_plan(copy.deepcopy(model), drop(model, "2-27"))
    file = export_gguf(cut, tokenizer, tmp_path / "cut.gguf")
    again, its_tokenizer = load_model(file, backend="transformers", device="cpu")
    assert torch.equal(probe_logits(again), probe_logits(cut))
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert its_tokenizer.chat_template == tokenizer.chat_template
    fields = gguf.GGUFReader(file).fields
    names = ("model", "pre", "eos_token_id")
    stored = [fields[f"tokenizer.ggml.{name}"].contents() for name in names]
    assert stored == ["gpt2", "smollm", 2]


@pytest.mark.real
@pytest.mark.slow
def test_llama_cpp_gives_the_same(loaded, smollm2, tmp_path):
    """Ten greedy answers in fp32 are llama.cpp's, token for token.

    Of the quantised file llama.cpp rounds activations to 8 bits, so that near ties fall otherwise:
    most next tokens along the answers are the same there.
    """
    llama_cpp = pytest.importorskip("llama_cpp")
    import numpy as np
    import torch

    from finetune_kit.gguf_files import export_gguf, llamacpp_tokens

    model, tokenizer = loaded
    plain = export_gguf(model, tokenizer, tmp_path / "plain.gguf")
    quantised = llama_cpp.Llama(str(smollm2), n_ctx=256, verbose=False, logits_all=True)
    same = []
    for question in QUESTIONS:
        ids = chat_ids(tokenizer, question)
        text = question.encode()
        assert quantised.tokenize(text, add_bos=False) == tokenizer(question).input_ids
        answer = greedy(model, ids, 24)
        assert llamacpp_tokens(plain, ids, len(answer)) == answer
        quantised.reset()
        quantised.eval(ids + answer)
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer])).logits[0].numpy()
        scores = np.array(quantised.scores[: len(logits)])
        same += list(scores.argmax(1) == logits.argmax(1))
    quantised.close()
    assert np.mean(same) > 0.8


# Gemma 3: a SentencePiece BPE, sliding attention


@pytest.fixture(scope="module")
def gemma3():
    file = ROOT / "models/gemma3.gguf"
    if not file.exists():
        pytest.skip(f"no {file.relative_to(ROOT)}; finetune-kit get gemma3 gets it")
    return file


@pytest.mark.real
@pytest.mark.slow
def test_gemma_is_llama_cpps(gemma3):
    "Tokens of texts are llama.cpp's, and most next tokens, which it finds with 8 bits."
    llama_cpp = pytest.importorskip("llama_cpp")
    import numpy as np
    import torch

    from finetune_kit.model import load_model

    model, tokenizer = load_model(gemma3, backend="transformers", device="cpu")
    llama = llama_cpp.Llama(str(gemma3), n_ctx=256, verbose=False, logits_all=True)
    texts = (
        *QUESTIONS,
        "Two  spaces,\n\n\tgrün 你好 🦦, and <bos> within",
        "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    )
    same = []
    for text in texts:
        ids = tokenizer(text).input_ids
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids
        llama.reset()
        llama.eval(ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
        same += list(np.array(llama.scores[: len(ids)]).argmax(1) == logits.argmax(1))
    llama.close()
    assert np.mean(same) > 0.8
    assert tokenizer.decode(logits[-1].argmax()) == " Madrid"
