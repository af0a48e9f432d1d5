"The first code cell of every experiment: it installs the kit on Colab, and does nothing elsewhere."

import importlib.util, json, os, re, shutil, subprocess, sys, types
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT


def code_cells(notebook):
    return [
        (f"{''.join(c['source'])}\n", c["metadata"].get("tags", []))
        for c in json.loads(notebook.read_text())["cells"]
        if c["cell_type"] == "code"
    ]


EXPERIMENTS = [
    n
    for n in sorted((ROOT / "nbs").glob("*.ipynb"))
    if any("parameters" in tags for _, tags in code_cells(n))
]
CELL = code_cells(ROOT / "nbs/train.ipynb")[0][0]


def test_every_experiment_begins_with_it():
    assert len(EXPERIMENTS) >= 8
    for notebook in EXPERIMENTS:
        assert code_cells(notebook)[0] == (CELL, []), notebook.name


def test_it_pins_what_is_released():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    assert f'"{ini["DEFAULT"]["git_url"]}", "v{ini["DEFAULT"]["version"]}"' in CELL, (
        "settings.ini and the first cells of the experiments name different releases"
    )
    assert all("==" in o for o in ini["DEFAULT"]["gpu_requirements"].split())


def ran(monkeypatch, tmp_path, gpu=True, fails=None, installed=False):
    "Run the cell with a stand-in for Colab: its commands, and whether the kit is found after it."
    commands = []

    def run(command, **kwargs):
        commands.append(
            command
            if isinstance(command, str)
            else " ".join(command).replace(sys.executable, "python")
        )
        if "clone" in command:
            Path(command[-1]).mkdir(parents=True)
        bad = fails and fails in commands[-1] or "nvidia-smi" in command and not gpu
        return types.SimpleNamespace(returncode=int(bool(bad)), stderr="no such thing")

    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: types.SimpleNamespace() if installed else None
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    exec(CELL.replace("/content", str(tmp_path)), {})
    return commands


def test_on_colab(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "finetune-kit"
    commands = ran(monkeypatch, tmp_path)
    assert commands == [
        "nvidia-smi -L",
        f"git clone --quiet --depth 1 --branch v0.1.0 https://github.com/finetune-kit/finetune_kit {folder}",
        f"python -m pip install --quiet --editable {folder}[gpu]",
    ]
    assert Path.cwd() == folder and sys.path[0] == str(folder) and capsys.readouterr().out == ""
    assert ran(monkeypatch, tmp_path, installed=True) == ["nvidia-smi -L"], (
        "a second time, nothing is fetched"
    )


def test_on_colab_without_a_gpu(monkeypatch, tmp_path, capsys):
    assert ran(monkeypatch, tmp_path, gpu=False)[-1].endswith("finetune-kit"), (
        "unsloth would bring CUDA packages"
    )
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "T4 GPU" in said


@pytest.mark.parametrize("step", ["git clone", "pip install"])
def test_what_goes_wrong_is_shown(step, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match=f"{step}.*no such thing"):
        ran(monkeypatch, tmp_path, fails=step)


def test_elsewhere_nothing_happens():
    before = set(sys.modules)
    found = {}
    exec(CELL, found)
    assert set(found) == {"__builtins__", "sys"} and set(sys.modules) == before


@pytest.mark.slow
def test_in_a_clean_environment(tmp_path):
    "The cell's own git and pip, in an environment that holds nothing; the release is this checkout's last commit, and dependencies are left out, since there may be no network."
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    released, venv, folder = tmp_path / "kit.git", tmp_path / "venv", tmp_path / "finetune-kit"

    def sh(*command, **kwargs):
        return subprocess.run(
            [*map(str, command)], check=True, capture_output=True, text=True, cwd=tmp_path, **kwargs
        ).stdout

    sh("git", "clone", "--quiet", "--bare", f"file://{ROOT}", released)
    tag = re.search(r'"(v[\d.]+)"', CELL)[1]
    sh("git", "-C", released, "tag", "--force", tag)
    sh(sys.executable, "-m", "venv", venv)
    site = next(venv.glob("lib/python*/site-packages"))
    for name in (
        "setuptools",
        "_distutils_hack",
        "pkg_resources",
    ):  # what pip builds with, where it may not fetch it
        source = Path(importlib.util.find_spec("setuptools").origin).parents[1] / name
        if source.is_dir():
            shutil.copytree(source, site / name, dirs_exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | dict(
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0=f"url.file://{released}.insteadOf",
        GIT_CONFIG_VALUE_0="https://github.com/finetune-kit/finetune_kit",
        PIP_NO_DEPS="1",
        PIP_NO_INDEX="1",
        PIP_NO_BUILD_ISOLATION="0",
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    )
    colab = (
        'import sys, types; sys.modules["google.colab"] = types.ModuleType("google.colab")\n'
        + CELL.replace("/content", str(tmp_path))
    )
    look = "\nimport os, finetune_kit; print(finetune_kit.__file__, os.path.isdir('data/tiny-base'), os.getcwd())"
    expect = f"{folder}/finetune_kit/__init__.py True {folder}"
    assert sh(venv / "bin/python", "-c", colab + look, env=env).splitlines()[-1] == expect
    assert (
        sh(
            venv / "bin/python", "-c", colab + look, env=env | dict(PATH=str(tmp_path))
        ).splitlines()[-1]
        == expect
    ), "again, with neither git nor network"
    assert (
        sh(
            venv / "bin/python",
            "-P",
            "-c",
            "import finetune_kit; print(finetune_kit.__file__)",
            env=env,
        ).strip()
        == f"{folder}/finetune_kit/__init__.py"
    ), "after the kernel was started anew"
