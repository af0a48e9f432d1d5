"""An exported model is the same model: cut or not, the embedded base and real weights.

And the way to the Hub, over a network that fails.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import REAL, ROOT

SPECS = [None, 1]  # Layers that are taken out
TEXTS = ("Once upon a time, there was", "The otter lives in")


def model_folders():
    "Name and folder of the models that the tests go over."
    folders = [("tiny-base", ROOT / "data/tiny-base")]
    if (REAL / "stories260K").is_dir():
        folders.append(("stories260K", REAL / "stories260K"))
    return folders


def cut_model(folder, spec):
    from finetune_kit.model import load_model
    from finetune_kit.plan import drop
    from finetune_kit.surgery import apply_plan

    model, tokenizer = load_model(folder, backend="transformers", device="cpu")
    return apply_plan(model, drop(model, spec)).float(), tokenizer


def prompts(tokenizer):
    from finetune_kit.requests import prompt_ids

    return [prompt_ids(tokenizer, text) for text in TEXTS]


def parity_of(forms, tokenizer):
    "The table of `parity`, which must show no difference beyond rounding."
    from finetune_kit.chat import end_ids
    from finetune_kit.parity_check import check_parity, parity

    return check_parity(parity(forms, prompts(tokenizer), 10, end_ids(tokenizer)))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name, folder", model_folders())
def test_every_form_is_the_same_model(tmp_path, name, folder, spec):
    from transformers import AutoModelForCausalLM

    from finetune_kit.gguf_files import export_gguf, read_back
    from finetune_kit.merged import export_merged
    from finetune_kit.parity_check import torch_logits

    model, tokenizer = cut_model(folder, spec)
    export_merged(model, tokenizer, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    gguf = read_back(model, export_gguf(model, tokenizer, tmp_path / "m.gguf"))
    models = dict(model=model, merged=merged, gguf=gguf)
    table = parity_of({name: torch_logits(each) for name, each in models.items()}, tokenizer)
    assert table.difference[1] == 0
    assert table.tokens[0] > 4


def test_sentencepiece_in_gguf(tmp_path, real):
    "The tokenizer that transformers builds from the file splits text as the original does."
    import gguf
    from transformers import AutoTokenizer

    from finetune_kit.gguf_files import export_gguf

    model, tokenizer = cut_model(real / "stories260K", None)
    file = export_gguf(model, tokenizer, tmp_path / "stories.gguf")
    from_file = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for story in json.loads((real / "tinystories_clean.json").read_text())[:20]:
        expected = tokenizer(story, add_special_tokens=False).input_ids
        assert from_file(story, add_special_tokens=False).input_ids == expected
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert fields["tokenizer.ggml.add_bos_token"]


@pytest.mark.slow
@pytest.mark.parametrize("name, folder", model_folders())
def test_onnx_is_the_same_model(tmp_path, name, folder):
    pytest.importorskip("onnxscript")
    from finetune_kit.onnx_files import export_onnx, onnx_logits
    from finetune_kit.parity_check import torch_logits

    few_layers = "2-10" if name == "tiny-base" else "2-3"  # tracing takes its time
    model, tokenizer = cut_model(folder, few_layers)
    from_file = onnx_logits(export_onnx(model, tmp_path / "m.onnx"))
    parity_of(dict(model=torch_logits(model), onnx=from_file), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name, folder", model_folders())
def test_llama_cpp_gives_the_same(tmp_path, name, folder, spec):
    "It splits text into the same tokens, template's markers included, and chooses the same ones."
    llama_cpp = pytest.importorskip("llama_cpp")
    import torch

    from finetune_kit.gguf_files import export_gguf, llamacpp_tokens

    model, tokenizer = cut_model(folder, spec)
    file = export_gguf(model, tokenizer, tmp_path / "m.gguf")
    vocabulary = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    texts = [TEXTS[0], "12+7=19, isn't it?  Ja: «grün» 你好 🦦\n\n  two spaces"]
    if REAL.is_dir():
        texts += json.loads((REAL / "tinystories_clean.json").read_text())[:20]
    for text in texts:
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert vocabulary.tokenize(text.encode(), add_bos=False, special=True) == expected
    for ids in prompts(tokenizer):
        generated = model.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=-1
        )
        assert llamacpp_tokens(file, ids, 24) == generated[0, len(ids) :].tolist()


@pytest.mark.slow
def test_llama_cpp_writes_the_same(tmp_path, real):
    "LLAMA_CPP: llama.cpp's folder. Its converter writes a cut of real weights; it is read back."
    llama_cpp = os.environ.get("LLAMA_CPP")
    if not llama_cpp:
        pytest.skip("LLAMA_CPP=/path/to/llama.cpp names its folder")
    from finetune_kit.core import ModelError
    from finetune_kit.gguf_files import export_gguf, read_back

    model, tokenizer = cut_model(real / "stories260K", 1)
    file = export_gguf(model, tokenizer, tmp_path / "m.gguf", llama_cpp=llama_cpp)
    read_back(model, file)
    model, tokenizer = cut_model(ROOT / "data/tiny-base", None)
    with pytest.raises(ModelError, match="only by a digest"):
        export_gguf(model, tokenizer, tmp_path / "no.gguf", llama_cpp=llama_cpp)


class Hub(BaseHTTPRequestHandler):
    "As much of the Hub as one commit needs; the commit itself fails twice."

    failures = 0
    files: dict = {}  # noqa: RUF012 - the server's state, shared on purpose
    tokens: set = set()  # noqa: RUF012

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        size = int(self.rfile.readline(), 16)
        while size:
            body += self.rfile.read(size)
            self.rfile.readline()
            size = int(self.rfile.readline(), 16)
        self.rfile.readline()
        return body

    def do_POST(self):
        body = self.body()
        Hub.tokens.add(self.headers.get("Authorization"))
        url = f"http://127.0.0.1:{self.server.server_address[1]}/me/cut"
        if self.path.startswith("/api/repos/create"):
            self.answer(200, dict(url=url))
        elif "/preupload/" in self.path:
            files = []
            for file in json.loads(body)["files"]:
                files.append(dict(path=file["path"], uploadMode="regular", shouldIgnore=False))
            self.answer(200, dict(files=files))
        elif "/commit/" not in self.path:
            self.answer(200, dict(errors=[], warnings=[]))
        elif Hub.failures < 2:
            Hub.failures += 1
            self.answer(503, dict(error="overloaded"))
        else:
            Hub.files = {}
            for operation in map(json.loads, body.splitlines()):
                if operation["key"] == "file":
                    value = operation["value"]
                    Hub.files[value["path"]] = base64.b64decode(value["content"])
            self.answer(200, dict(commitUrl=f"{url}/commit/1", commitOid="1", success=True))

    def answer(self, status, value):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        "Quiet."


def test_upload_over_a_network_that_fails(tmp_path, monkeypatch, caplog):
    from finetune_kit.core import FineTuneError
    from finetune_kit.hub import upload

    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / ".env").write_text("HF_TOKEN=leak")
    (folder / "notes.py").write_text("x")
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")

    dry = upload(folder, "me/cut", "# card", endpoint=endpoint)
    assert dry["url"] is None
    assert set(dry["files"]) == {"config.json", "README.md"}
    assert set(dry["left_out"]) == {".env", "notes.py"}
    assert not Hub.tokens

    sent = upload(folder, "me/cut", "# card", dry_run=False, endpoint=endpoint, wait=0.05)
    assert Hub.failures == 2
    assert Hub.files == {"config.json": b'{"a": 1}', "README.md": b"# card"}
    assert sent["url"].endswith("/commit/1")
    assert Hub.tokens == {"Bearer hf_verysecret"}

    Hub.failures = -99
    with pytest.raises(FineTuneError) as raised:
        upload(folder, "me/cut", "# card", dry_run=False, endpoint=endpoint, tries=2, wait=0.05)
    server.shutdown()
    assert "503" in str(raised.value)
    assert "verysecret" not in str(raised.value) + caplog.text
    assert raised.value.__suppress_context__


def test_env_file_is_read(tmp_path, monkeypatch):
    from finetune_kit.hub import secret

    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("HF_TOKEN=from_file\n")
    monkeypatch.setenv("HF_TOKEN", "from_environment")
    assert secret("HF_TOKEN") == "from_environment"
    monkeypatch.delenv("HF_TOKEN")
    assert secret("HF_TOKEN") == "from_file"
    assert os.environ["HF_TOKEN"] == "from_file", "so that the libraries below find it too"
    monkeypatch.delenv("HF_TOKEN")


@pytest.mark.slow
def test_a_model_of_the_hub_by_its_name(tmp_path):
    "Without a network, from the hub's own cache."
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "abc"
    shutil.copytree(ROOT / "data/tiny-base", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    question = ["chat", "me/tiny", "Where does the otter live?", "--max-tokens", "8"]
    answer = subprocess.run(
        [sys.executable, "-c", "from finetune_kit.cli import main; main()", *question],
        cwd=ROOT,
        env=os.environ | dict(HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert len(answer.stdout.split()) > 1


@pytest.fixture
def adapter(tmp_path):
    "A cut with adapters that change something."
    import torch

    from finetune_kit.lora import add_lora
    from finetune_kit.plan import drop
    from finetune_kit.surgery import save_adapter

    model, tokenizer = cut_model(ROOT / "data/tiny-base", 7)
    model = add_lora(model, 8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    base = ROOT / "data/tiny-base"
    return save_adapter(model, tokenizer, tmp_path / "healed", base, drop(12, 7))


@pytest.mark.slow
def test_parity_run(warm, tmp_path, adapter):
    place = (tmp_path / "o.ipynb", tmp_path / "runs", "nbs/parity.ipynb")
    run = warm(*place, model=adapter, onnx=False, prompts=3)
    assert run.returncode == 0, run.stderr[-3000:]
    record = json.loads(next((tmp_path / "runs").glob("parity-*/run.json")).read_text())
    assert record["status"] == "done"
    forms = record["metrics"]["parity"]
    assert set(forms) == {"adapter", "merged", "gguf", "served"}
    assert all(form["agree"] == form["tokens"] > 5 for form in forms.values())
    run = warm(*place, model=adapter, onnx=False, prompts=2, tolerance=1e-12)
    assert run.returncode != 0
    assert "differs from" in run.stderr
