"`evaluate` and `compare` over registered runs: what they write beside the runs, and what they refuse."
import json

import nbformat, pytest
from conftest import p, papermill

pytestmark = pytest.mark.slow


def make_runs(folder, layers=(7, 10), n=12):
    "Runs as `train` leaves them, without the training: each the base without a layer, and its answers."
    from finetune_kit.chat import encode_rows
    from finetune_kit.data import prepare_dataset
    from finetune_kit.dials import RunConfig, check_config
    from finetune_kit.metrics import evaluate_model, summarize
    from finetune_kit.model import load_model
    from finetune_kit.record import start_run
    from finetune_kit.surgery import apply_plan, save_cut
    rows = sorted(prepare_dataset("data/domains")["test"], key=lambda r: r["id"])[:n]
    for layer in layers:
        cfg = RunConfig(drop_layer=layer, backend="transformers")
        plan = check_config(cfg)
        run = start_run("train", cfg, plan, record=False)
        model, tok = load_model(cfg.model, backend="transformers")
        save_cut(apply_plan(model, plan), tok, run.folder/"model")
        items = dict(cut=evaluate_model(model, tok, encode_rows(rows, tok), max_new_tokens=8))
        run.log(step=1, loss=2.); run.log(step=2, loss=1.)
        run.save_items(items)
        run.finish({s: summarize(df) for s, df in items.items()}, dict(model="model"))
    return sorted(f.parent for f in folder.glob("*/run.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("FINETUNE_KIT_RUNS", str(folder))
        return folder, make_runs(folder)


def test_evaluate_writes_beside_the_runs(made, tmp_path, monkeypatch):
    folder, two = made
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(folder))
    done = papermill(tmp_path/"o.ipynb", folder, *p(items=8, max_new_tokens=8, backend="transformers", metrics="exact_match,token_f1,rouge_l"), notebook="nbs/evaluate.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    for run in two:
        found = json.loads(next(run.glob("evaluation-*.json")).read_text())
        base, tuned, gain = (found["metrics"][k] for k in ("base", "tuned", "tuned_minus_base"))
        assert tuned["n_items"] == 8 and gain["nll"]["mean"] == pytest.approx(tuned["nll"] - base["nll"]) and gain["nll"]["lo"] <= gain["nll"]["mean"] <= gain["nll"]["hi"]
        assert {"exact_match", "token_f1", "rouge_l"} <= set(found["metrics"]["tuned"])
    from finetune_kit.runs import list_runs
    assert list_runs().set_index("id").loc[two[0].name, "data/domains: tuned.nll"] == json.loads(next(two[0].glob("evaluation-*.json")).read_text())["metrics"]["tuned"]["nll"]
    page = next(folder.glob("evaluate-*/report.html")).read_text()
    assert two[0].name in page and "Verdict" in page and "tuned − base" in page


def test_compare_pairs_the_items(made, tmp_path):
    folder, two = made
    done = papermill(tmp_path/"o.ipynb", folder, *p(runs=",".join(r.name for r in two)), notebook="nbs/compare.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    run = next(folder.glob("compare-*"))
    import pandas as pd
    pairs = pd.read_csv(run/"paired.csv")
    a, b = (json.loads((r/"run.json").read_text())["metrics"]["cut"]["nll"] for r in two)
    assert pairs[pairs.metric == "nll"]["mean"].iloc[0] == pytest.approx(b - a) and pairs.n_items.tolist() == [12, 12]
    page = (run/"report.html").read_text()
    for part in ("drop_layer", "common items", "Wins and losses", "Side by side"): assert part in page, part


@pytest.mark.parametrize("notebook, parameters, message", [
    ("evaluate", dict(metrics="exact_mach"), "did you mean 'exact_match'"), ("evaluate", dict(runs="nothing"), "0 runs begin with 'nothing'"), ("compare", dict(state="headed"), "has no state 'headed'"),
])
def test_refused(notebook, parameters, message, made, tmp_path):
    done = papermill(tmp_path/"o.ipynb", made[0], *p(**parameters), notebook=f"nbs/{notebook}.ipynb")
    assert done.returncode != 0 and message in done.stderr
