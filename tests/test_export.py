"A model taken elsewhere is the same model: whole and cut, the embedded base and real weights; and the way to the Hub, over a network that fails."

import base64, json, os, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import ROOT

SPECS = [None, 1]


def models():
    "Yields what the tests go over: name, folder."
    from conftest import REAL

    yield "tiny-base", ROOT / "data/tiny-base"
    if (REAL / "stories260K").is_dir():
        yield "stories260K", REAL / "stories260K"


def prepared(folder, spec):
    from finetune_kit.model import load_model
    from finetune_kit.plan import drop
    from finetune_kit.surgery import apply_plan

    model, tok = load_model(folder, backend="transformers", device="cpu")
    return apply_plan(model, drop(model, spec)).float(), tok


def prompts(tok):
    from finetune_kit.requests import prompt_ids

    return [prompt_ids(tok, t) for t in ("Once upon a time, there was", "The otter lives in")]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name, folder", list(models()))
def test_every_form_is_the_same_model(tmp_path, name, folder, spec):
    from transformers import AutoModelForCausalLM
    from finetune_kit.chat import end_ids
    from finetune_kit.merged import export_merged
    from finetune_kit.gguf_files import export_gguf, read_back
    from finetune_kit.parity_check import check_parity, parity, torch_logits

    model, tok = prepared(folder, spec)
    export_merged(model, tok, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    gguf = read_back(model, export_gguf(model, tok, tmp_path / "m.gguf"))
    table = check_parity(
        parity(
            dict(model=torch_logits(model), merged=torch_logits(merged), gguf=torch_logits(gguf)),
            prompts(tok),
            10,
            end_ids(tok),
        )
    )
    assert table.difference[1] == 0 and table.tokens[0] > 4


def test_sentencepiece_in_gguf(tmp_path, real):
    "The tokenizer that transformers builds from the file splits text as the original does."
    import gguf
    from transformers import AutoTokenizer
    from finetune_kit.gguf_files import export_gguf

    model, tok = prepared(real / "stories260K", None)
    file = export_gguf(model, tok, tmp_path / "stories.gguf")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    stories = json.loads((real / "tinystories_clean.json").read_text())[:20]
    for s in stories:
        assert (
            again(s, add_special_tokens=False).input_ids
            == tok(s, add_special_tokens=False).input_ids
        )
    fields = {k: f.contents() for k, f in gguf.GGUFReader(file).fields.items()}
    assert (
        fields["tokenizer.ggml.model"] == "llama"
        and fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
        and fields["tokenizer.ggml.add_bos_token"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name, folder", list(models()))
def test_onnx_is_the_same_model(tmp_path, name, folder):
    pytest.importorskip("onnxscript")
    from finetune_kit.chat import end_ids
    from finetune_kit.onnx_files import export_onnx, onnx_logits
    from finetune_kit.parity_check import check_parity, parity, torch_logits

    model, tok = prepared(
        folder, "2-10" if name == "tiny-base" else "2-3"
    )  # few layers: tracing takes its time
    check_parity(
        parity(
            dict(
                model=torch_logits(model), onnx=onnx_logits(export_onnx(model, tmp_path / "m.onnx"))
            ),
            prompts(tok),
            10,
            end_ids(tok),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name, folder", list(models()))
def test_llama_cpp_has_the_last_word(tmp_path, name, folder, spec):
    "It splits text into the same tokens, template's markers included, and answers with the same greedy ones."
    llama_cpp = pytest.importorskip("llama_cpp")
    import torch
    from conftest import REAL
    from finetune_kit.gguf_files import export_gguf, llamacpp_tokens

    model, tok = prepared(folder, spec)
    file = export_gguf(model, tok, tmp_path / "m.gguf")
    vocabulary = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    texts = [
        "Once upon a time, there was",
        "12+7=19, isn't it?  Ja: «grün» 你好 🦦\n\n  two spaces",
    ] + ([*json.loads((REAL / "tinystories_clean.json").read_text())[:20]] if REAL.is_dir() else [])
    for text in texts:
        assert (
            vocabulary.tokenize(text.encode(), add_bos=False, special=True)
            == tok(text, add_special_tokens=False).input_ids
        )
    for ids in prompts(tok):
        expect = model.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=-1
        )[0, len(ids) :].tolist()
        assert llamacpp_tokens(file, ids, 24) == expect


@pytest.mark.slow
def test_llama_cpp_writes_the_same(tmp_path, real):
    "LLAMA_CPP: llama.cpp's folder, whose converter writes a cut of real weights; the file is read back and compared."
    if not (folder := os.environ.get("LLAMA_CPP")):
        pytest.skip("LLAMA_CPP=/path/to/llama.cpp names its folder")
    from finetune_kit.core import ModelError
    from finetune_kit.gguf_files import export_gguf, read_back

    model, tok = prepared(real / "stories260K", 1)
    read_back(model, export_gguf(model, tok, tmp_path / "m.gguf", llama_cpp=folder))
    with pytest.raises(ModelError, match="only by a digest"):
        export_gguf(
            *prepared(ROOT / "data/tiny-base", None), tmp_path / "no.gguf", llama_cpp=folder
        )


class Hub(BaseHTTPRequestHandler):
    "As much of the Hub as one commit needs; the commit itself fails twice."

    failures, files, tokens = 0, {}, set()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while n := int(self.rfile.readline(), 16):
                body += self.rfile.read(n)
                self.rfile.readline()
            self.rfile.readline()
        Hub.tokens.add(self.headers.get("Authorization"))
        url = f"http://127.0.0.1:{self.server.server_address[1]}/me/cut"
        if self.path.startswith("/api/repos/create"):
            return self.answer(200, dict(url=url))
        if "/preupload/" in self.path:
            return self.answer(
                200,
                dict(
                    files=[
                        dict(path=f["path"], uploadMode="regular", shouldIgnore=False)
                        for f in json.loads(body)["files"]
                    ]
                ),
            )
        if "/commit/" not in self.path:
            return self.answer(200, dict(errors=[], warnings=[]))
        if Hub.failures < 2:
            Hub.failures += 1
            return self.answer(503, dict(error="overloaded"))
        Hub.files = {
            o["value"]["path"]: base64.b64decode(o["value"]["content"])
            for o in map(json.loads, body.splitlines())
            if o["key"] == "file"
        }
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

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"a": 1}')
    (tmp_path / "m" / ".env").write_text("HF_TOKEN=leak")
    (tmp_path / "m" / "notes.py").write_text("x")
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    dry = upload(tmp_path / "m", "me/cut", "# card", endpoint=endpoint)
    assert (
        dry["url"] is None
        and set(dry["files"]) == {"config.json", "README.md"}
        and set(dry["left_out"]) == {".env", "notes.py"}
        and not Hub.tokens
    )
    done = upload(tmp_path / "m", "me/cut", "# card", dry_run=False, endpoint=endpoint, wait=0.05)
    assert (
        Hub.failures == 2
        and Hub.files == {"config.json": b'{"a": 1}', "README.md": b"# card"}
        and done["url"].endswith("/commit/1")
    )
    assert Hub.tokens == {"Bearer hf_verysecret"}
    Hub.failures = -99
    with pytest.raises(FineTuneError) as e:
        upload(
            tmp_path / "m", "me/cut", "# card", dry_run=False, endpoint=endpoint, tries=2, wait=0.05
        )
    server.shutdown()
    assert (
        "503" in str(e.value)
        and "verysecret" not in str(e.value) + caplog.text
        and e.value.__suppress_context__
    )


def test_env_file_is_read(tmp_path, monkeypatch):
    from finetune_kit.hub import secret

    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("HF_TOKEN=from_file\n")
    monkeypatch.setenv("HF_TOKEN", "from_environment")
    assert secret("HF_TOKEN") == "from_environment"
    monkeypatch.delenv("HF_TOKEN")
    assert secret("HF_TOKEN") == "from_file" == os.environ["HF_TOKEN"], (
        "so that the libraries below find it too"
    )
    monkeypatch.delenv("HF_TOKEN")


@pytest.mark.slow
def test_a_model_of_the_hub_by_its_name(tmp_path):
    "Without a network, from the hub's own cache."
    import shutil, subprocess, sys

    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "abc"
    shutil.copytree(ROOT / "data/tiny-base", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "from finetune_kit.cli import main; main()",
            "chat",
            "me/tiny",
            "Where does the otter live?",
            "--max-tokens",
            "8",
        ],
        cwd=ROOT,
        env=os.environ | dict(HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0 and len(said.stdout.split()) > 1, said.stderr[-2000:]


@pytest.mark.slow
def test_parity_run(warm, tmp_path):
    import torch
    from finetune_kit.model import add_lora
    from finetune_kit.plan import drop
    from finetune_kit.surgery import save_adapter

    model, tok = prepared(ROOT / "data/tiny-base", 7)
    model = add_lora(model, 8)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.01)  # adapters that do something
    save_adapter(model, tok, tmp_path / "healed", ROOT / "data/tiny-base", drop(12, 7))
    done = warm(
        tmp_path / "o.ipynb",
        tmp_path / "runs",
        "nbs/parity.ipynb",
        model=tmp_path / "healed",
        onnx=False,
        prompts=3,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    r = json.loads(next((tmp_path / "runs").glob("parity-*/run.json")).read_text())
    assert r["status"] == "done" and set(r["metrics"]["parity"]) == {
        "adapter",
        "merged",
        "gguf",
        "served",
    }
    assert all(m["agree"] == m["tokens"] > 5 for m in r["metrics"]["parity"].values())
    bad = warm(
        tmp_path / "o.ipynb",
        tmp_path / "runs",
        "nbs/parity.ipynb",
        model=tmp_path / "healed",
        onnx=False,
        prompts=2,
        tolerance=1e-12,
    )
    assert bad.returncode != 0 and "parted" in bad.stderr
