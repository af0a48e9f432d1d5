"The first code cell of every experiment: it installs the kit on Colab, and does nothing elsewhere."

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from finetune_kit import colab


def code_cells(notebook):
    "(source, tags) of each code cell."
    cells = json.loads(notebook.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [("".join(cell["source"]) + "\n", cell["metadata"].get("tags", [])) for cell in code]


def is_experiment(notebook):
    return any("parameters" in tags for _, tags in code_cells(notebook))


EXPERIMENTS = [file for file in sorted((ROOT / "nbs").glob("*.ipynb")) if is_experiment(file)]
CELL, _ = code_cells(ROOT / "nbs/train.ipynb")[0]


def test_every_experiment_begins_with_it():
    assert len(EXPERIMENTS) >= 8
    for notebook in EXPERIMENTS:
        assert code_cells(notebook)[0] == (CELL, []), notebook.name


def test_it_pins_what_is_released():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    kit = ini["DEFAULT"]
    strings = re.findall(r'"([^"]*)"', CELL)
    assert strings.count(f"v{kit['version']}") == 1
    assert sum(text.endswith(kit["git_url"]) for text in strings) == 1
    assert all("==" in requirement for requirement in kit["gpu_requirements"].split())


# What the runtime itself is built on: another version would break it, or ask to start anew
RUNTIME = {"torch", "numpy", "pandas", "ipython", "ipykernel", "jupyter-client", "tornado"}
RUNTIME |= {"psutil", "rich", "accelerate"}
# What the kit replaces, since it needs newer ones, and nothing else in the runtime minds
REPLACED = {"transformers", "datasets", "peft"}


def frozen():
    "Name → version in Colab's runtime."
    lines = (ROOT / "tests/colab_freeze.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_requirements_leave_colabs_runtime_as_it_is():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    kit = ini["DEFAULT"]
    assert Version("3.12") >= Version(kit["min_python"])
    asked = (kit["requirements"] + " " + kit["cpu_requirements"]).split()
    runtime = frozen()
    refused = set()
    for requirement in map(Requirement, asked):
        version = runtime.get(canonicalize_name(requirement.name))
        if version and not requirement.specifier.contains(version, prereleases=True):
            refused.add(canonicalize_name(requirement.name))
    assert refused == REPLACED
    assert set(runtime) - REPLACED <= RUNTIME


def test_unsloth_goes_in_without_its_own_torch():
    "As in unsloth's notebooks for Colab."
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    without_dependencies = ini["DEFAULT"]["cpu_nodeps"].split()
    assert ini["DEFAULT"]["gpu_requirements"] in without_dependencies
    names = {Requirement(text).name for text in without_dependencies}
    assert not names & {"torch", "torchvision", "xformers", "triton"}


def stand_in(commands, gpu, fails):
    "For `subprocess.run` and `os.system`: it keeps the commands and carries none out."

    def run(command, **kwargs):
        line = command if isinstance(command, str) else " ".join(command)
        commands.append(line.replace(sys.executable, "python"))
        if "clone" in line:
            folder = Path(line.split()[-1])
            folder.mkdir(parents=True)
            shutil.copy(ROOT / "settings.ini", folder)
        is_bad = (fails and fails in commands[-1]) or ("nvidia-smi" in line and not gpu)
        return types.SimpleNamespace(returncode=int(bool(is_bad)))

    return run


def ran(monkeypatch, tmp_path, gpu=True, fails=None, installed=False):
    "The commands of the cell, run with a stand-in for Colab."
    commands = []

    def version(name):
        if not installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1.0"

    run = stand_in(commands, gpu, fails)
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os, "system", lambda command: run(command).returncode)
    monkeypatch.setattr(colab, "version", version)
    monkeypatch.setattr(colab, "_notebook", lambda: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    exec(CELL.replace("/content", str(tmp_path)), {})
    return commands


def test_on_colab(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "finetune-kit"
    clone, look, unsloth, its_needs, kit = ran(monkeypatch, tmp_path)
    source = "--depth 1 --branch v0.1.0 https://github.com/finetune-kit/finetune_kit"
    assert clone == f"git clone --quiet {source} {folder}"
    assert look == "nvidia-smi -L"
    assert unsloth.startswith("python -m pip install --quiet --no-deps unsloth==")
    assert its_needs.startswith("python -m pip install --quiet tyro")
    assert kit == f"python -m pip install --quiet --editable {folder}"
    assert Path.cwd() == folder
    assert sys.path[0] == str(folder)
    assert capsys.readouterr().out == ""
    again = ran(monkeypatch, tmp_path, installed=True)
    assert again == ["nvidia-smi -L"], "a second time, nothing is fetched"


def test_on_colab_without_a_gpu(monkeypatch, tmp_path, capsys):
    _, _, install = ran(monkeypatch, tmp_path, gpu=False)
    assert install.endswith("finetune-kit"), "there is no use for unsloth"
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "T4 GPU" in said


def test_what_goes_wrong_says_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(AssertionError, match=r"unzip the repository's archive as .*finetune-kit"):
        ran(monkeypatch, tmp_path, fails="git clone")
    shutil.rmtree(tmp_path / "finetune-kit")
    with pytest.raises(RuntimeError, match=r"pip install.*run this cell again"):
        ran(monkeypatch, tmp_path, fails="pip install")


def test_elsewhere_nothing_happens():
    before = set(sys.modules)
    found = {}
    exec(CELL, found)
    assert set(found) == {"__builtins__", "sys"}
    assert set(sys.modules) == before


# What pip builds with, where it may not fetch it
BUILD_PACKAGES = ("setuptools", "_distutils_hack", "pkg_resources")


def sh(*command, cwd, **kwargs):
    "What the command prints."
    strings = [str(part) for part in command]
    done = subprocess.run(strings, check=True, capture_output=True, text=True, cwd=cwd, **kwargs)
    return done.stdout


def release(tmp_path):
    "A bare repository that has this checkout's last commit as the release."
    bare = tmp_path / "kit.git"
    sh("git", "clone", "--quiet", "--bare", f"file://{ROOT}", bare, cwd=tmp_path)
    tag = re.search(r'"(v[\d.]+)"', CELL)[1]
    sh("git", "-C", bare, "tag", "--force", tag, cwd=tmp_path)
    return bare


def clean_environment(tmp_path):
    "Its Python; there is only what pip builds with."
    venv = tmp_path / "venv"
    sh(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    site = next(venv.glob("lib/python*/site-packages"))
    ours = Path(importlib.util.find_spec("setuptools").origin).parents[1]
    for name in BUILD_PACKAGES:
        if (ours / name).is_dir():
            shutil.copytree(ours / name, site / name, dirs_exist_ok=True)
    return venv / "bin/python"


def variables(released):
    "For git to find the release, and for pip to need no network."
    ours = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return ours | dict(
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0=f"url.file://{released}.insteadOf",
        GIT_CONFIG_VALUE_0="https://github.com/finetune-kit/finetune_kit",
        PIP_NO_DEPS="1",
        PIP_NO_INDEX="1",
        PIP_NO_BUILD_ISOLATION="0",
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    )


ON_COLAB = """\
import sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
"""
LOOK = """
import os, finetune_kit
print(finetune_kit.__file__, os.path.isdir('data/tiny-base'), os.getcwd())
"""
WHERE = "import finetune_kit; print(finetune_kit.__file__)"


@pytest.mark.slow
def test_in_a_clean_environment(tmp_path):
    """The cell's own git and pip, in an environment that holds nothing.

    The release is this checkout's last commit, and dependencies are left out, since there may be
    no network.
    """
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    env = variables(release(tmp_path))
    python = clean_environment(tmp_path)
    folder = tmp_path / "finetune-kit"
    script = ON_COLAB + CELL.replace("/content", str(tmp_path)) + LOOK
    package = f"{folder}/finetune_kit/__init__.py"

    def last_line(*options, **changes):
        printed = sh(python, *options, cwd=tmp_path, env=env | changes)
        return printed.splitlines()[-1]

    expected = f"{package} True {folder}"
    assert last_line("-c", script) == expected
    again = last_line("-c", script, PATH=str(tmp_path))
    assert again == expected, "again, with neither git nor network"
    started_anew = last_line("-P", "-c", WHERE)
    assert started_anew == package, "after the kernel was started anew"
