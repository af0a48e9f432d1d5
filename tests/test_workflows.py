"What GitHub runs: it parses, calls make targets that exist, and takes actions at pinned versions."

import re
from configparser import ConfigParser

import pytest
import yaml
from conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PINNED = r"[\w-]+/[\w-]+(/[\w-]+)?@(v\d+\.\d+\.\d+|[0-9a-f]{40})"
TRIGGERS = {"push", "pull_request", "workflow_dispatch"}


def read(file):
    return yaml.safe_load(file.read_text())


def steps_of(flow):
    return [step for job in flow["jobs"].values() for step in job["steps"]]


@pytest.fixture
def ini():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_steps(file):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for step in steps_of(read(file)):
        assert ("uses" in step) != ("run" in step)
        for target in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
            assert target in targets, target
        if "uses" in step:
            assert re.fullmatch(PINNED, step["uses"]), f"{step['uses']}: name a whole version"


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_rights_and_machines(file):
    flow = read(file)
    assert set(flow[True]) <= TRIGGERS  # YAML reads `on` as true
    assert flow["permissions"] == {"contents": "read"}
    for job in flow["jobs"].values():
        assert set(job.get("needs", "").split()) <= set(flow["jobs"])
        assert not job["runs-on"].endswith("latest")


def test_what_they_run(ini):
    flows = {file.stem: read(file) for file in WORKFLOWS}
    commands = {name: [step.get("run") for step in steps_of(flow)] for name, flow in flows.items()}
    assert {"make lint", "make typecheck", "make test"} <= set(commands["test"])
    assert {"push", "pull_request"} <= set(flows["test"][True])
    assert "make docs" in commands["docs"]
    for step in steps_of(flows["docs"]):
        if "upload-pages-artifact" in step.get("uses", ""):
            assert step["with"]["path"] == ini["doc_path"]
    for flow in flows.values():
        for step in steps_of(flow):
            if "setup-python" in step.get("uses", ""):
                assert step["with"]["python-version"] == ini["min_python"]


@pytest.mark.parametrize("file", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")))
def test_issue_templates(file):
    template = read(file)
    assert template["name"]
    assert template["description"]
    for field in template["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "markdown")


def test_pre_commit_runs_what_make_lint_runs():
    hooks = read(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    entries = [hook["entry"] for hook in hooks]
    assert ".venv/bin/ruff format" in entries
    assert any("ruff check" in entry for entry in entries)
