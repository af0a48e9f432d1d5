"What GitHub runs: it parses, calls make targets that exist, and takes actions at pinned versions."

import re

import pytest, yaml
from conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def steps(flow):
    return [s for job in flow["jobs"].values() for s in job["steps"]]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_workflow(file):
    flow = yaml.safe_load(file.read_text())
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    asked = [t for s in steps(flow) for t in re.findall(r"\bmake ([\w-]+)", s.get("run", ""))]
    for target in asked:
        assert target in targets, target
    for s in steps(flow):
        assert ("uses" in s) != ("run" in s)
        if "uses" in s:
            assert re.fullmatch(
                r"[\w-]+/[\w-]+(/[\w-]+)?@(v\d+\.\d+\.\d+|[0-9a-f]{40})", s["uses"]
            ), f"{s['uses']}: name a whole version"
    assert set(flow[True]) <= {"push", "pull_request", "workflow_dispatch"} and flow[
        "permissions"
    ] == {"contents": "read"}  # YAML reads `on` as true
    for job in flow["jobs"].values():
        assert set(job.get("needs", "").split()) <= set(flow["jobs"]) and not job[
            "runs-on"
        ].endswith("latest")


def test_what_they_run():
    flows = {f.stem: yaml.safe_load(f.read_text()) for f in WORKFLOWS}
    assert "make test" in [s.get("run") for s in steps(flows["test"])] and {
        "push",
        "pull_request",
    } <= set(flows["test"][True])
    published = next(
        s["with"]["path"]
        for s in steps(flows["docs"])
        if "upload-pages-artifact" in s.get("uses", "")
    )
    assert f"doc_path = {published}\n" in (ROOT / "settings.ini").read_text() and "make docs" in [
        s.get("run") for s in steps(flows["docs"])
    ]
    needed = re.search(r"min_python = (\S+)", (ROOT / "settings.ini").read_text())[1]
    assert {
        s["with"]["python-version"]
        for f in flows.values()
        for s in steps(f)
        if "setup-python" in s.get("uses", "")
    } == {needed}
