"The command line: help, JSON, exit codes, completion, questions; and that it starts without what is heavy."

import json, subprocess, sys, types

import pytest, typer
from conftest import ROOT
from finetune_kit import cli
from typer.testing import CliRunner

COMMANDS = typer.main.get_command(cli.app).commands
CHANGE = dict(mean=-0.5, lo=-0.6, hi=-0.4)
STATE = dict(
    nll=1.5,
    perplexity=4.5,
    exact_match=0.5,
    n_tokens=30,
    n_items=8,
    intervals=dict(nll=[1.4, 1.6], exact_match=[0.2, 0.8]),
)
QUICK = dict(
    tokens_per_s=20.0,
    first_s=0.01,
    answer_s=0.5,
    answer_s_p95=0.75,
    answer_tokens=10.0,
    peak_mib=50.0,
    n_timed=4,
    intervals=dict(tokens_per_s=[19.0, 21.0]),
)


def test_help_is_light_and_lists_every_command():
    code = "import sys; from finetune_kit.cli import main; sys.argv = ['finetune-kit', '--help']\ntry: main()\nexcept SystemExit as e: print(*sys.modules, e.code)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert (
        not {
            "torch",
            "transformers",
            "datasets",
            "pandas",
            "numpy",
            "pydantic",
            "papermill",
            "IPython",
        }
        & set(out.split())
        and out.split()[-1] == "0"
    )
    for name in COMMANDS:
        assert f" {name} " in out, name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name):
    assert f"`finetune-kit {name}" in COMMANDS[name].help
    for option in COMMANDS[name].params:
        assert option.name == "help" or option.help, f"{name}: {option.name} is not explained"


def test_what_yields_data_yields_json():
    talks, is_json = {"chat", "serve", "demo"}, {"plan", "upload"}
    assert {
        name for name, c in COMMANDS.items() if not any("--json" in o.opts for o in c.params)
    } == talks | is_json


@pytest.fixture
def registry(tmp_path, monkeypatch):
    "Two runs, of which one was evaluated and timed on other data, by a third."
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path))

    def write(id, name="run.json", /, **info):
        (tmp_path / id).mkdir(exist_ok=True)
        (tmp_path / id / name).write_text(json.dumps(info))

    for id in ("train-drop7-aa", "train-drop8-bb"):
        write(id, id=id, status="done", experiment="train", started=1.0, metrics=dict(healed=STATE))
    write(
        "train-drop7-aa",
        "evaluation-ab12.json",
        data="mine",
        items=8,
        device="cpu, 1 threads",
        metrics=dict(base=STATE, tuned=STATE | dict(nll=1.0), tuned_minus_base=dict(nll=CHANGE)),
        speed=dict(base=QUICK, tuned=QUICK | dict(tokens_per_s=40.0)),
        speedup=dict(mean=2.0, lo=1.9, hi=2.1),
    )
    write(
        "evaluate-cc",
        id="evaluate-cc",
        status="done",
        experiment="evaluate",
        started=2.0,
        evaluation="ab12",
        metrics={"train-drop7-aa": dict(nll=1.0)},
    )
    return tmp_path


def called(*args):
    return CliRunner().invoke(cli.app, [*map(str, args)])


def test_runs_show_what_came_of_them_on_other_data(registry):
    shown = called("runs").stdout
    assert "train-drop8-bb" in shown
    row = next(
        line for line in shown.split("On other data:")[1].splitlines() if "train-drop7-aa" in line
    )
    assert row.split()[:4] == ["train-drop7-aa", "mine", "1.5", "1.0"] and row.split()[-2:] == [
        "20.0",
        "40.0",
    ]
    assert {r["id"]: r["mine: tuned.nll"] for r in json.loads(called("runs", "--json").stdout)} == {
        "train-drop7-aa": 1.0,
        "train-drop8-bb": None,
        "evaluate-cc": None,
    }


def test_benchmark_sets_base_and_tuned_side_by_side(registry, monkeypatch):
    asked = []
    monkeypatch.setattr(
        cli, "_execute", lambda *a: asked.append(a) or registry / "evaluate-cc" / "report.html"
    )
    shown = called(
        "benchmark", "train-drop7", "--data", "my.jsonl", "--prompts", 4, "-p", "items=8"
    ).stdout
    assert asked[0][:2] == (
        "nbs/evaluate.ipynb",
        ["runs=train-drop7", "data=my.jsonl", "speed=4", "items=8"],
    )
    for part in (
        "train-drop7-aa on mine: 8 items, 4 prompts timed, cpu, 1 threads",
        "1.500 (1.400 to 1.600)",
        "-0.500 (-0.600 to -0.400)",
        "× 2.00 (1.90 to 2.10)",
        "first token, ms",
        "memory, MiB",
        "report: ",
    ):
        assert part in shown, part
    found = json.loads(called("benchmark", "--json").stdout)
    assert (
        found["runs"]["train-drop7-aa"]["speed"]["tuned"]["tokens_per_s"] == 40.0
        and found["report"].endswith("report.html")
        and asked[1][1][:2] == ["runs=all", "data=data/domains"]
    )


def test_a_run_as_json(registry, monkeypatch):
    monkeypatch.setattr(cli, "_execute", lambda *a: registry / "train-drop7-aa" / "report.html")
    for command in (["run", "nbs/train.ipynb"], ["train", "-p", "seed=1"], ["study"], ["evaluate"]):
        found = json.loads(called(*command, "--json").stdout)
        assert (found["id"], found["metrics"]["healed"]["nll"], found["report"]) == (
            "train-drop7-aa",
            1.5,
            str(registry / "train-drop7-aa" / "report.html"),
        )
        assert called(*command).stdout == f"report: {registry / 'train-drop7-aa' / 'report.html'}\n"


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["runs", "--json"], 0, ""),
        (["compare", "train-drop7"], 1, "InvalidConfigError: 1 run: two or more are needed"),
        (["compare", "train-drop7", "nothing"], 1, "0 runs begin with 'nothing'"),
        (["runz"], 2, "No such command 'runz'"),
        (["runs", "--jsn"], 2, "No such option: --jsn"),
        (["--log-level", "loud", "runs"], 1, "choices: DEBUG, INFO"),
    ],
)
def test_exit_codes(words, code, said, registry, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune-kit", *words])
    with pytest.raises(SystemExit) as e:
        cli.main()
    out, err = capsys.readouterr()
    assert (
        e.value.code == code
        and said in " ".join(err.replace("│", "").split())
        and (code == 0) == bool(out)
    )


@pytest.mark.parametrize(
    "typed, offered",
    [
        ("finetune-kit ben", ["benchmark"]),
        ("finetune-kit benchmark --js", ["--json"]),
        ("finetune-kit evaluate train-drop7", ["train-drop7-aa"]),
        ("finetune-kit compare train-drop7-aa train", ["train-drop7-aa", "train-drop8-bb"]),
        ("finetune-kit chat eval", ["evaluate-cc"]),
        ("finetune-kit export x", []),
    ],
)
def test_completion(typed, offered, registry):
    env = dict(
        _FINETUNE_KIT_COMPLETE="complete_bash",
        COMP_WORDS=typed,
        COMP_CWORD=str(len(typed.split()) - 1),
    )
    assert (
        CliRunner().invoke(cli.app, [], env=env, prog_name="finetune-kit").stdout.split() == offered
    )


def test_train_asks_in_a_terminal(monkeypatch):
    ran, answers = [], dict(drop_layer="7,9")
    monkeypatch.setattr(cli, "_execute", lambda *a: ran.append(a))
    monkeypatch.setattr(
        typer,
        "prompt",
        lambda what, default: next((a for name, a in answers.items() if "Layers" in what), default),
    )
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    cli.train()
    assert ran[0][1] == ["model=data/tiny-base", "data=data/domains", "drop_layer=7,9"]
    cli.train(parameter=["seed=1"])
    assert ran[1][1] == ["seed=1"], "it asks only where nothing was said"


def test_logs_go_to_a_file(registry, tmp_path):
    assert called("--log-file", tmp_path / "log.jsonl", "runs").exit_code == 0
    (registry / "train-drop8-bb" / "evaluation-ee.json").write_text("{")
    assert called("--log-file", tmp_path / "log.jsonl", "runs").exit_code == 0
    lines = [json.loads(o) for o in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(o["level"], "evaluation-ee.json is damaged" in o["message"]) for o in lines] == [
        ("WARNING", True)
    ]
