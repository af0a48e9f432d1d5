"`evaluate` and `compare` over registered runs: what they write beside the runs, and what they refuse."

import json, os, re, shutil, subprocess, sys
from pathlib import Path

import nbformat, pytest
from conftest import ROOT, papermill

pytestmark = pytest.mark.slow


def make_runs(folder, layers=(7, 10), n=12):
    "Runs as `train` leaves them, without the training: each the base without a layer, and its answers."
    from finetune_kit.chat import encode_rows
    from finetune_kit.data import prepare_dataset
    from finetune_kit.dials import RunConfig, check_config
    from finetune_kit.evaluation import evaluate_model, summarize
    from finetune_kit.model import load_model
    from finetune_kit.record import start_run
    from finetune_kit.surgery import save_cut
    from finetune_kit.surgery import apply_plan

    rows = sorted(prepare_dataset("data/domains")["test"], key=lambda r: r["id"])[:n]
    for layer in layers:
        cfg = RunConfig(drop_layer=layer, backend="transformers")
        plan = check_config(cfg)
        run = start_run("train", cfg, plan, record=False)
        model, tok = load_model(cfg.model, backend="transformers")
        save_cut(apply_plan(model, plan), tok, run.folder / "model")
        items = dict(cut=evaluate_model(model, tok, encode_rows(rows, tok), max_new_tokens=8))
        run.log(step=1, loss=2.0)
        run.log(step=2, loss=1.0)
        run.save_items(items)
        run.finish({s: summarize(df) for s, df in items.items()}, dict(model="model"))
    return sorted(f.parent for f in folder.glob("*/run.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("FINETUNE_KIT_RUNS", str(folder))
        return folder, make_runs(folder)


def test_evaluate_writes_beside_the_runs(made, warm, tmp_path, monkeypatch):
    folder, two = made
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(folder))
    done = warm(
        tmp_path / "o.ipynb",
        folder,
        "nbs/evaluate.ipynb",
        items=8,
        max_new_tokens=8,
        backend="transformers",
        metrics="exact_match,token_f1,rouge_l",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for run in two:
        found = json.loads(next(run.glob("evaluation-*.json")).read_text())
        base, tuned, gain = (found["metrics"][k] for k in ("base", "tuned", "tuned_minus_base"))
        assert (
            tuned["n_items"] == 8
            and gain["nll"]["mean"] == pytest.approx(tuned["nll"] - base["nll"])
            and gain["nll"]["lo"] <= gain["nll"]["mean"] <= gain["nll"]["hi"]
        )
        assert {"exact_match", "token_f1", "rouge_l"} <= set(found["metrics"]["tuned"])
    from finetune_kit.registry import list_runs

    assert (
        list_runs().set_index("id").loc[two[0].name, "data/domains: tuned.nll"]
        == json.loads(next(two[0].glob("evaluation-*.json")).read_text())["metrics"]["tuned"]["nll"]
    )
    page = next(folder.glob("evaluate-*/report.html")).read_text()
    assert two[0].name in page and "Verdict" in page and "tuned − base" in page


def test_public_benchmarks_stand_beside_the_data(made, warm, tmp_path):
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness (the extra `harness`) is not there"
    )
    folder, (run, _) = made
    (tmp_path / "sums_.jsonl").write_text(
        "".join(
            json.dumps(dict(q=f"Question: What is {a} plus {b}? Answer:", right=f" {a + b}")) + "\n"
            for a in range(4)
            for b in range(4)
        )
    )
    (tmp_path / "sums.yaml").write_text(
        json.dumps(
            dict(
                task="sums",
                dataset_path="json",
                dataset_kwargs=dict(data_files=dict(test=str(tmp_path / "sums_.jsonl"))),
                output_type="generate_until",
                test_split="test",
                doc_to_text="{{q}}",
                doc_to_target="{{right}}",
                generation_kwargs=dict(until=["\n"], max_gen_toks=4),
                metric_list=[dict(metric="exact_match")],
            )
        )
    )
    dials = dict(
        runs=run.name, items=8, max_new_tokens=4, backend="transformers", tasks_folder=str(tmp_path)
    )
    assert (
        "sums"
        in warm(tmp_path / "bad.ipynb", folder, "nbs/evaluate.ipynb", **dials, tasks="sum").stderr
    )  # refused with what there is
    done = warm(tmp_path / "o.ipynb", folder, "nbs/evaluate.ipynb", **dials, tasks="sums")
    assert done.returncode == 0, done.stderr[-3000:]
    found = max(
        (json.loads(f.read_text()) for f in run.glob("evaluation-*.json")), key=lambda e: e["made"]
    )["tasks"]["sums exact_match"]
    assert {"base", "tuned", "tuned_minus_base"} == set(found) and found["tuned_minus_base"][
        "mean"
    ] == pytest.approx(found["tuned"]["mean"] - found["base"]["mean"])
    assert (
        "sums exact_match"
        in max(folder.glob("evaluate-*/report.html"), key=os.path.getmtime).read_text()
    )


def test_compare_pairs_the_items(made, warm, tmp_path):
    folder, two = made
    done = warm(
        tmp_path / "o.ipynb", folder, "nbs/compare.ipynb", runs=",".join(r.name for r in two)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = next(folder.glob("compare-*"))
    import pandas as pd

    pairs = pd.read_csv(run / "paired.csv")
    a, b = (json.loads((r / "run.json").read_text())["metrics"]["cut"]["nll"] for r in two)
    assert pairs[pairs.metric == "nll"]["mean"].iloc[0] == pytest.approx(
        b - a
    ) and pairs.n_items.tolist() == [12, 12]
    page = (run / "report.html").read_text()
    for part in ("drop_layer", "common items", "Wins and losses", "Side by side"):
        assert part in page, part


@pytest.mark.parametrize(
    "notebook, parameters, message",
    [
        ("evaluate", dict(metrics="exact_mach"), "did you mean 'exact_match'"),
        ("evaluate", dict(runs="nothing"), "0 runs begin with 'nothing'"),
        ("compare", dict(state="headed"), "has no state 'headed'"),
    ],
)
def test_refused(notebook, parameters, message, made, warm, tmp_path):
    done = warm(tmp_path / "o.ipynb", made[0], f"nbs/{notebook}.ipynb", **parameters)
    assert done.returncode != 0 and message in done.stderr


def test_benchmark_measures_quality_and_speed(made):
    folder, two = made
    command = [
        sys.executable,
        "-c",
        "from finetune_kit.cli import main; main()",
        "benchmark",
        two[0].name,
        "--prompts",
        "3",
        "-p",
        "items",
        "8",
        "-p",
        "max_new_tokens",
        "8",
        "-p",
        "backend",
        "transformers",
        "--json",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | dict(FINETUNE_KIT_RUNS=str(folder)),
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    e = found["runs"][two[0].name]
    base, tuned = e["speed"]["base"], e["speed"]["tuned"]
    assert e["metrics"]["tuned"]["n_items"] == 8 and base["n_timed"] == tuned["n_timed"] == 3
    for s in (base, tuned):
        assert (
            0 < s["first_s"] <= s["answer_s"] <= s["answer_s_p95"]
            and 1 <= s["answer_tokens"] <= 8
            and s["peak_mib"] > 9
        )
    assert (
        e["speedup"]["mean"] == pytest.approx(tuned["tokens_per_s"] / base["tokens_per_s"])
        and e["speedup"]["lo"] <= e["speedup"]["mean"] <= e["speedup"]["hi"]
    )
    assert "tokens a second" in Path(found["report"]).read_text()


def test_lab_and_papermill_give_the_same_report(made, tmp_path):
    "Lab runs the cells in nbs/, the dials set by hand in the parameters cell; papermill runs them where it is called, with a cell of its own."
    from nbclient import NotebookClient

    folder, two = made
    asked = ",".join(r.name for r in two)
    done = papermill(tmp_path / "o.ipynb", folder, "nbs/compare.ipynb", runs=asked, examples=2)
    assert done.returncode == 0, done.stderr[-3000:]

    def outputs():
        (run,) = [
            f
            for f in folder.glob("compare-*")
            if json.loads((f / "run.json").read_text())["config"]["examples"] == 2
        ]
        kept = [
            c
            for c in nbformat.read(run / "report.ipynb", 4).cells
            if c.cell_type == "markdown" or c.outputs
        ]
        return (
            run,
            [c.source for c in kept],
            [
                [o.get("data") or o.get("text") for o in c.outputs]
                for c in kept
                if c.cell_type == "code"
            ],
        )

    run, sources, first = outputs()
    shutil.rmtree(run)
    nb = nbformat.read(ROOT / "nbs/compare.ipynb", 4)
    (cell,) = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    cell.source = cell.source.replace('runs = "all"  ', f'runs = "{asked}"').replace(
        "examples = 5", "examples = 2"
    )
    with pytest.MonkeyPatch.context() as m:
        m.setenv("FINETUNE_KIT_RUNS", str(folder))
        NotebookClient(
            nb,
            timeout=2400,
            kernel_name="python3",
            resources=dict(metadata=dict(path=str(ROOT / "nbs"))),
        ).execute()
    again, same, second = outputs()
    assert (again, same) == (run, sources) and second == first


def test_a_model_is_asked_as_it_was_trained(made, warm, tmp_path, monkeypatch):
    "With its instruction, on all rows of a file that it has not seen."
    folder = tmp_path / "runs"
    shutil.copytree(made[1][0], folder / made[1][0].name)
    (run,) = folder.iterdir()
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(
        json.dumps(info | dict(config=info["config"] | dict(instruction="Be brief: one word. #1")))
    )
    (tmp_path / "mine.jsonl").write_text(
        "".join(
            json.dumps(dict(question=f"What is {n} plus 1?", answer=str(n + 1))) + "\n"
            for n in range(7)
        )
    )
    done = warm(
        tmp_path / "o.ipynb",
        folder,
        "nbs/evaluate.ipynb",
        data=tmp_path / "mine.jsonl",
        max_new_tokens=4,
        backend="transformers",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [
        e["items"]
        for f in run.glob("evaluation-*.json")
        if "mine" in (e := json.loads(f.read_text()))["data"]
    ] == [7]
    assert "Be brief: one word. #1" in re.sub(
        r"<[^>]+>", "", next(folder.glob("evaluate-*/report.html")).read_text()
    ), "as the mask shows it, token by token"


def test_a_second_run_in_the_same_kernel(warm, tmp_path):
    "As in JupyterLab, where a dial is turned and all cells run again; the third run is the second once more."
    from nbformat.v4 import new_code_cell, new_notebook

    cells = [
        "from finetune_kit.dials import EvaluateConfig\nfrom finetune_kit.record import start_run"
    ]
    for n in (5, 6, 6):
        cells += [f"run = start_run('evaluate', EvaluateConfig(items={n}), None)", "run.finish({})"]
    nbformat.write(
        new_notebook(
            cells=[new_code_cell(c) for c in cells],
            metadata=dict(kernelspec=dict(name="python3", display_name="", language="python")),
        ),
        tmp_path / "again.ipynb",
    )
    done = warm(tmp_path / "o.ipynb", tmp_path / "runs", tmp_path / "again.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [
        json.loads(f.read_text())["status"] for f in (tmp_path / "runs").glob("*/run.json")
    ] == ["done"] * 2 and len(list((tmp_path / "runs").glob("*/report.html"))) == 2
