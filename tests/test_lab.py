"JupyterLab as `make lab` opens it, over its own web interface."

import json, os, secrets, signal, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook, new_output

pytestmark = pytest.mark.slow


@pytest.fixture
def lab(tmp_path):
    "`make lab` in a project that shares this environment; a function that asks it."
    project, settings = tmp_path / "kit", tmp_path / "settings"
    for folder in (project / "nbs", project / ".venv", settings):
        folder.mkdir(parents=True)
    for name in ("Makefile", "settings.ini", "setup.py"):
        (project / name).write_bytes((ROOT / name).read_bytes())
    (project / ".venv/bin").symlink_to(Path(sys.executable).parent)
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    subprocess.run(
        [".venv/bin/nbdev_install_hooks"],
        cwd=project,
        env=os.environ | dict(HOME=str(project / ".venv")),
        check=True,
        capture_output=True,
    )  # as `make setup` does
    (project / ".venv/.ready").touch()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(8)
    (settings / "jupyter_server_config.json").write_text(
        json.dumps(
            dict(
                ServerApp=dict(port=port, port_retries=0, open_browser=False, allow_root=True),
                IdentityProvider=dict(token=token),
            )
        )
    )
    server = subprocess.Popen(
        ["make", "lab"],
        cwd=project,
        env=os.environ | dict(JUPYTER_CONFIG_DIR=str(settings)),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=open(tmp_path / "log", "w"),
    )

    def ask(path, content=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/{path}",
            None if content is None else json.dumps(content).encode(),
            {"Authorization": f"token {token}"},
            method="GET" if content is None else "PUT",
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    try:
        for _ in range(600):
            try:
                ask("status")
                break
            except OSError:
                time.sleep(0.5)
                assert server.poll() is None, (tmp_path / "log").read_text()
        else:
            raise AssertionError((tmp_path / "log").read_text())
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
    notebook = new_notebook(
        cells=[cell],
        metadata=dict(
            kernelspec=dict(name="python3", display_name="python3", language="python"),
            language_info=dict(name="python", version="3.11.0"),
        ),
    )
    ask("contents/a.ipynb", dict(type="notebook", format="json", content=notebook))
    (saved,) = (kept := json.loads((project / "nbs/a.ipynb").read_text()))["cells"]
    assert (
        saved["execution_count"] is None
        and saved["outputs"][0]["execution_count"] is None
        and saved["outputs"][0]["data"] == {"text/plain": ["2"]}
    )
    assert saved["metadata"] == dict(tags=["parameters"]), (
        "papermill's tag stays, what is about the window goes"
    )
    assert list(kept["metadata"]) == ["kernelspec"]


def test_the_notebooks_kernel_is_there(lab):
    kernels = lab[1]("kernelspecs")
    wanted = json.loads((ROOT / "nbs/train.ipynb").read_text())["metadata"]["kernelspec"]["name"]
    assert wanted in kernels["kernelspecs"] and kernels["default"] == wanted
