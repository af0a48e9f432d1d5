"JupyterLab as `make lab` opens it, over its own web interface."

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook, new_output

pytestmark = pytest.mark.slow


def make_project(folder):
    "A project that shares this environment, with the hooks that `make setup` installs."
    for name in ("nbs", ".venv"):
        (folder / name).mkdir(parents=True)
    for name in ("Makefile", "settings.ini", "setup.py"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / ".venv/bin").symlink_to(Path(sys.executable).parent)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run(
        [".venv/bin/nbdev_install_hooks"],
        cwd=folder,
        env=os.environ | dict(HOME=str(folder / ".venv")),
        check=True,
        capture_output=True,
    )
    (folder / ".venv/.ready").touch()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_settings(folder, port, token):
    app = dict(port=port, port_retries=0, open_browser=False, allow_root=True)
    settings = dict(ServerApp=app, IdentityProvider=dict(token=token))
    folder.mkdir()
    (folder / "jupyter_server_config.json").write_text(json.dumps(settings))


def asking(port, token):
    "A function that asks the server: it puts `content`, or gets what is there."

    def ask(path, content=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/{path}",
            None if content is None else json.dumps(content).encode(),
            {"Authorization": f"token {token}"},
            method="GET" if content is None else "PUT",
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    return ask


def wait_until_it_answers(ask, server, log):
    for _ in range(600):
        try:
            ask("status")
            return
        except OSError:
            time.sleep(0.5)
            assert server.poll() is None, log.read_text()
    raise AssertionError(log.read_text())


@pytest.fixture
def lab(tmp_path):
    "`make lab` in a project that shares this environment; a function that asks it."
    project, settings, log = tmp_path / "kit", tmp_path / "settings", tmp_path / "log"
    make_project(project)
    port, token = free_port(), secrets.token_hex(8)
    write_settings(settings, port, token)
    with log.open("w") as errors:
        server = subprocess.Popen(
            ["make", "lab"],
            cwd=project,
            env=os.environ | dict(JUPYTER_CONFIG_DIR=str(settings)),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    ask = asking(port, token)
    try:
        wait_until_it_answers(ask, server, log)
        yield project, ask
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def test_saving_cleans_a_notebook(lab):
    project, ask = lab
    cell = new_code_cell(
        "1 + 1",
        execution_count=7,
        metadata=dict(tags=["parameters"], scrolled=True),
        outputs=[new_output("execute_result", {"text/plain": "2"}, execution_count=7)],
    )
    kernel = dict(name="python3", display_name="python3", language="python")
    language = dict(name="python", version="3.11.0")
    metadata = dict(kernelspec=kernel, language_info=language)
    notebook = new_notebook(cells=[cell], metadata=metadata)
    ask("contents/a.ipynb", dict(type="notebook", format="json", content=notebook))
    kept = json.loads((project / "nbs/a.ipynb").read_text())
    [saved] = kept["cells"]
    [output] = saved["outputs"]
    assert saved["execution_count"] is None
    assert output["execution_count"] is None
    assert output["data"] == {"text/plain": ["2"]}
    # papermill's tag stays, what is about the window goes
    assert saved["metadata"] == dict(tags=["parameters"])
    assert list(kept["metadata"]) == ["kernelspec"]


def test_the_notebooks_kernel_is_there(lab):
    _, ask = lab
    kernels = ask("kernelspecs")
    wanted = json.loads((ROOT / "nbs/train.ipynb").read_text())["metadata"]["kernelspec"]["name"]
    assert wanted in kernels["kernelspecs"]
    assert kernels["default"] == wanted
