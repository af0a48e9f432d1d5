"`papermill nbs/train.ipynb`: the run, its report, its repetition, and what it refuses."

import json, re
from pathlib import Path

import nbformat, pytest
from conftest import ROOT, papermill

QUICK = dict(max_steps=30, eval_every=15, eval_items=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    d = tmp_path_factory.mktemp("run")
    done = papermill(d / "out.ipynb", d / "runs", drop_layer=7, **QUICK)
    assert done.returncode == 0, done.stderr[-3000:]
    return d, next((d / "runs").glob("train-drop7-*"))


def info(folder):
    return json.loads((folder / "run.json").read_text())


def test_run_json_says_everything(run):
    d, folder = run
    r = info(folder)
    assert (
        r["status"] == "done"
        and r["id"] == folder.name
        and r["error"] is None
        and r["dropped"] == [7]
    )
    for state in ("base", "cut", "healed", "control"):
        m = r["metrics"][state]
        assert m["n_tokens"] > 100 and m["perplexity"] == pytest.approx(
            2.718281828 ** m["nll"], rel=1e-6
        )
        assert (
            0 <= m["exact_match"] <= 1
            and m["intervals"]["nll"][0] <= m["nll"] <= m["intervals"]["nll"][1]
        )
    assert (
        set(r["hashes"]) == {"config", "code", "data", "model", "template", "machine"}
        and r["versions"]["torch"]
        and r["versions"]["unsloth"]
    )
    assert r["config"]["drop_layer"] == 7 and r["config"]["max_steps"] == 30
    for path in ("model", "report", "items", "log", "rejects"):
        assert (folder / r["artifacts"][path]).exists()


def test_healing_is_measured_against_the_control(run):
    m = info(run[1])["metrics"]
    assert (
        m["healed_minus_cut"]["nll"]["hi"] < 0
    )  # better than the cut model by more than the interval
    left = m["healed_minus_control"]["nll"]
    assert left["lo"] <= left["mean"] <= left["hi"] and left["mean"] == pytest.approx(
        m["healed"]["nll"] - m["control"]["nll"], abs=1e-9
    )
    share = m["recovered"]["nll"]
    assert share["lo"] <= share["mean"] <= share["hi"]
    assert share["mean"] == pytest.approx(
        (m["cut"]["nll"] - m["healed"]["nll"]) / (m["cut"]["nll"] - m["control"]["nll"]), rel=1e-6
    )


def test_metrics_jsonl_is_the_training_log(run):
    lines = [json.loads(o) for o in (run[1] / "metrics.jsonl").read_text().splitlines()]
    assert [o["step"] for o in lines] == list(range(1, 31)) and [
        o["step"] for o in lines if o.get("val_loss")
    ] == [15, 30]


def test_log_says_when_what_happened(run):
    lines = [json.loads(o) for o in (run[1] / "log.jsonl").read_text().splitlines()]
    assert (
        f"{run[1].name} begins" in lines[0]["message"]
        and lines[-1]["message"] == f"{run[1].name} is done"
    )
    cells = [o for o in lines if o["message"].startswith("cell ")]
    assert (
        len(cells) >= 8
        and all(o["seconds"] >= 0 and o["run"] == run[1].name for o in cells)
        and max(o["seconds"] for o in cells) > 1
    )
    assert [o["seconds"] for o in lines if o["message"].startswith("the control: ")] and not [
        o for o in lines if o["level"] == "ERROR"
    ]


def test_report_stands_alone_and_is_clean(run):
    d, folder = run
    page = (folder / "report.html").read_text()
    assert "<script" not in page and not re.search(r"""(src|href)=["'](?!#|data:)""", page), (
        "the page must need no other file"
    )
    assert page.count('src="data:image/png;base64') >= 3
    for part in (
        "Parameters of this run",
        "Verdict",
        "Ten answers",
        'class="mask"',
        "of the control",
        "hash of data",
    ):
        assert part in page, part
    for nb in (d / "out.ipynb", folder / "report.ipynb"):
        text = nb.read_text()
        assert "<progress" not in text, f"a progress bar is left in {nb.name}"
        outputs = [
            o for c in nbformat.read(nb, 4).cells if c.cell_type == "code" for o in c.outputs
        ]
        assert not [o for o in outputs if o.output_type == "error"]
    warnings = [
        o.text
        for c in nbformat.read(d / "out.ipynb", 4).cells
        if c.cell_type == "code"
        for o in c.outputs
        if o.get("name") == "stderr"
    ]
    assert not warnings, f"no wall of warnings: {warnings}"


def test_report_is_the_executed_notebook(run):
    d, folder = run
    ran = [
        c.source.strip() for c in nbformat.read(d / "out.ipynb", 4).cells if c.cell_type != "raw"
    ]
    assert [c.source.strip() for c in nbformat.read(folder / "report.ipynb", 4).cells] == ran


def test_same_run_same_numbers_and_the_control_is_reused(run, warm, tmp_path):
    d, folder = run
    first = info(folder)
    again = warm(tmp_path / "o.ipynb", d / "runs", drop_layer=7, **QUICK)
    assert again.returncode == 0, again.stderr[-3000:]
    second = info(folder)  # the same folder: the same run is found again
    assert second["started"] > first["started"]
    for state in ("base", "cut", "healed", "control"):
        assert second["metrics"][state] == first["metrics"][state]
    assert len(list((d / "runs").glob("control-*"))) == 1
    control = next((d / "runs").glob("control-*"))
    assert info(control)["started"] < first["finished"]


def test_adapter_loads_onto_the_cut_base(run):
    from finetune_kit.surgery import load_for_inference
    from finetune_kit.infer import generate
    import pandas as pd

    model, tok = load_for_inference(run[1])
    items = pd.read_json(run[1] / "items.jsonl", lines=True, dtype=dict(question=str, answer=str))
    single = items[(items.state == "healed") & (items.domain == "environment")].head(8)
    assert (
        generate(
            model, tok, [[dict(role="user", content=q)] for q in single.question], max_new_tokens=40
        )
        == single.answer.tolist()
    )


@pytest.mark.parametrize(
    "parameters, message",
    [
        (dict(drop_layr=7), "unknown parameter 'drop_layr'"),
        (dict(drop_layer=99), "layer 99 not in 0..11"),
        (dict(data="nothing.jsonl"), "no data at 'nothing.jsonl'"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (dict(drop_layer="abc"), "cannot read 'abc'"),
                (dict(drop_layer=7, prune_after=4), "give one"),
                (dict(model="data/nothing"), "no model at 'data/nothing'"),
                (dict(lr="fast"), "lr='fast': Input should be a valid number"),
                (dict(config="nowhere"), "no config"),
            ]
        ),
    ],
)
def test_refused_before_anything_loads(parameters, message, warm, tmp_path):
    done = warm(tmp_path / "o.ipynb", tmp_path / "runs", **parameters)
    assert done.returncode != 0 and message in done.stderr
    assert not list((tmp_path / "runs").glob("*")), "nothing may have begun"


def test_a_failing_run_leaves_a_readable_report(warm, tmp_path):
    endless = "{% for m in messages %}{{ m.content }}{% endfor %}"  # no end of turn: the gate must stop it
    done = warm(tmp_path / "o.ipynb", tmp_path / "runs", template=endless, **QUICK)
    assert done.returncode != 0 and "MaskError" in done.stderr
    folder = next((tmp_path / "runs").glob("train-*"))
    r, page = info(folder), (folder / "report.html").read_text()
    assert r["status"] == "failed" and "MaskError" in r["error"] and r["finished"]
    assert "This run failed." in page and "never stop" in page and "Traceback" in page


def test_dials_are_the_config(tmp_path):
    "The defaults that the notebook shows are those of `RunConfig`, each with a comment."
    from finetune_kit.dials import RunConfig

    cells = nbformat.read(ROOT / "nbs" / "train.ipynb", 4).cells
    code = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(code) == 1
    scope = {}
    exec(code[0], scope)
    dials = {k: v for k, v in scope.items() if not k.startswith("__")}
    assert dials.pop("config") is None and dials == RunConfig().model_dump()
    assert all("#" in line for line in code[0].splitlines())


def test_config_file_and_dials(warm, tmp_path):
    (tmp_path / "base.yaml").write_text(
        "max_steps: 3\nlr: 0.001\neval_items: 4\neval_every: 0\nbackend: transformers\n"
    )
    (tmp_path / "mine.yaml").write_text("_extends: base.yaml\nmax_rows: 40\n")
    done = warm(
        tmp_path / "o.ipynb",
        tmp_path / "runs",
        config=tmp_path / "mine.yaml",
        prune_after=6,
        lr=0.0005,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    r = info(next((tmp_path / "runs").glob("train-drop6-11-*")))
    assert {k: r["config"][k] for k in ("max_steps", "lr", "max_rows", "drop_layer")} == dict(
        max_steps=3, lr=0.0005, max_rows=40, drop_layer=None
    )
    (tmp_path / "base.yaml").write_text("max_step: 3\n")
    done = warm(tmp_path / "o.ipynb", tmp_path / "runs2", config=tmp_path / "mine.yaml")
    assert (
        done.returncode != 0
        and "unknown parameter 'max_step'" in done.stderr
        and "did you mean 'max_steps'" in done.stderr
    )


def test_two_processes_from_the_notebook(warm, tmp_path):
    done = warm(
        tmp_path / "out.ipynb",
        tmp_path / "runs",
        drop_layer=7,
        nproc=2,
        max_steps=2,
        eval_every=0,
        eval_items=4,
        max_new_tokens=4,
        backend="transformers",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = [
        i for f in (tmp_path / "runs").glob("train-*/run.json") if (i := json.loads(f.read_text()))
    ]
    assert (
        run["status"] == "done"
        and run["config"]["nproc"] == 2
        and run["metrics"]["training"]["steps"] == 2
    )
