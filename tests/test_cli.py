"The command line: help, JSON, exit codes, completion, questions; and it starts without delay."

import json
import subprocess
import sys
import types

import pytest
import typer
from conftest import ROOT
from typer.testing import CliRunner

from finetune_kit import cli, cli_runs

HEAVY = {"torch", "transformers", "datasets", "pandas", "numpy", "pydantic", "papermill", "IPython"}
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
    code = (
        "import sys; from finetune_kit.cli import main; sys.argv = ['finetune-kit', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: print(*sys.modules, end.code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    words = result.stdout.split()
    assert not HEAVY & set(words)
    assert words[-1] == "0"
    for name in COMMANDS:
        assert f" {name} " in result.stdout, name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name):
    assert f"`finetune-kit {name}" in COMMANDS[name].help
    for option in COMMANDS[name].params:
        assert option.name == "help" or option.help, f"{name}: {option.name} is not explained"


def test_what_yields_data_yields_json():
    talk = {"chat", "serve", "demo"}
    always_json = {"upload"}
    only_a_path = {"get"}
    without = set()
    for name, command in COMMANDS.items():
        if not any("--json" in option.opts for option in command.params):
            without.add(name)
    assert without == talk | always_json | only_a_path


@pytest.fixture
def registry(tmp_path, monkeypatch):
    "Two runs, of which one was evaluated and timed on other data, by a third."
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path))

    def write(run_id, name="run.json", /, **info):
        (tmp_path / run_id).mkdir(exist_ok=True)
        (tmp_path / run_id / name).write_text(json.dumps(info))

    for run_id in ("train-drop7-aa", "train-drop8-bb"):
        record = dict(id=run_id, status="done", experiment="train", started=1.0)
        write(run_id, **record, metrics=dict(healed=STATE))
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
    listing = called("runs").stdout
    assert "train-drop8-bb" in listing
    on_other_data = listing.split("On other data:")[1].splitlines()
    [row] = [line.split() for line in on_other_data if "train-drop7-aa" in line]
    assert row[:4] == ["train-drop7-aa", "mine", "1.5", "1.0"]
    assert row[-2:] == ["20.0", "40.0"]
    records = json.loads(called("runs", "--json").stdout)
    assert {record["id"]: record["mine: tuned.nll"] for record in records} == {
        "train-drop7-aa": 1.0,
        "train-drop8-bb": None,
        "evaluate-cc": None,
    }


def test_benchmark_sets_base_and_tuned_side_by_side(registry, monkeypatch):
    executions = []

    def execute(*arguments):
        executions.append(arguments)
        return registry / "evaluate-cc" / "report.html"

    monkeypatch.setattr(cli_runs, "execute", execute)
    options = ("--data", "my.jsonl", "--prompts", 4, "-p", "items=8")
    text = called("benchmark", "train-drop7", *options).stdout
    notebook, dials, *_ = executions[0]
    assert notebook == "nbs/evaluate.ipynb"
    assert dials == ["runs=train-drop7", "data=my.jsonl", "speed=4", "items=8"]
    for part in (
        "train-drop7-aa on mine: 8 items, 4 prompts timed, cpu, 1 threads",
        "1.500 (1.400 to 1.600)",
        "-0.500 (-0.600 to -0.400)",
        "× 2.00 (1.90 to 2.10)",
        "first token, ms",
        "memory, MiB",
        "report: ",
    ):
        assert part in text, part
    record = json.loads(called("benchmark", "--json").stdout)
    assert record["runs"]["train-drop7-aa"]["speed"]["tuned"]["tokens_per_s"] == 40.0
    assert record["report"].endswith("report.html")
    assert executions[1][1][:2] == ["runs=all", "data=data/domains"]


def test_a_run_as_json(registry, monkeypatch):
    report = registry / "train-drop7-aa" / "report.html"
    monkeypatch.setattr(cli_runs, "execute", lambda *arguments: report)
    for command in (["run", "nbs/train.ipynb"], ["train", "-p", "seed=1"], ["study"], ["evaluate"]):
        record = json.loads(called(*command, "--json").stdout)
        assert record["id"] == "train-drop7-aa"
        assert record["metrics"]["healed"]["nll"] == 1.5
        assert record["report"] == str(report)
        assert called(*command).stdout == f"report: {report}\n"


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["runs", "--json"], 0, ""),
        (["compare", "train-drop7"], 1, "InvalidConfigError: 1 run: two or more are needed"),
        (["compare", "train-drop7", "nothing"], 1, "0 runs begin with 'nothing'"),
        (["runz"], 2, "No such command 'runz'"),
        (["runs", "--jsn"], 2, "No such option: --jsn"),
        (["--log-level", "loud", "runs"], 1, "choices: DEBUG, INFO"),
    ],
)
def test_exit_codes(words, code, message, registry, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune-kit", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert end.value.code == code
    assert message in " ".join(err.replace("│", "").split())
    assert bool(out) == (code == 0)


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
    result = CliRunner().invoke(cli.app, [], env=env, prog_name="finetune-kit")
    assert result.stdout.split() == offered


def test_train_asks_in_a_terminal(monkeypatch):
    executions = []

    def prompt(question, default):
        return "7,9" if "Layers" in question else default

    monkeypatch.setattr(cli_runs, "execute", lambda *arguments: executions.append(arguments))
    monkeypatch.setattr(typer, "prompt", prompt)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    cli_runs.train()
    assert executions[0][1] == ["model=data/tiny-base", "data=data/domains", "drop_layer=7,9"]
    cli_runs.train(parameter=["seed=1"])
    assert executions[1][1] == ["seed=1"], "it asks only where no dial was given"


def test_logs_go_to_a_file(registry, tmp_path):
    assert called("--log-file", tmp_path / "log.jsonl", "runs").exit_code == 0
    (registry / "train-drop8-bb" / "evaluation-ee.json").write_text("{")
    assert called("--log-file", tmp_path / "log.jsonl", "runs").exit_code == 0
    [line] = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["level"] == "WARNING"
    assert "evaluation-ee.json is damaged" in line["message"]
