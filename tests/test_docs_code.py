"What the docs tell people to type: every command with its options and dials, every block of code."

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml
from docs import GUIDE, NOTEBOOKS, PROSE, ROOT, blocks, name_of, text_of, without_blocks

from finetune_kit.core import FineTuneError, choices

NOTEBOOK_OF = dict(  # Commands that are an experiment
    train="train.ipynb", study="layer_study.ipynb", evaluate="evaluate.ipynb"
)


def commands(code):
    "Each line of a shell block, as words; without comments and what is set before the command."
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words


# Dials


def dial_fault(notebook, given):
    "What is wrong with the dials that are given to a notebook, or None."
    from finetune_kit.declaration import config_class, declared_parameters
    from finetune_kit.dials import config_from

    path = ROOT / "nbs" / Path(notebook).name
    defaults = declared_parameters(path)
    for name in given:
        if name not in defaults:
            return f"unknown parameter {choices(name, defaults)}"
    try:
        config_from(config_class(path), defaults | given, set(given))
    except FineTuneError as error:
        return str(error)
    return None


@cache
def all_dials():
    "The dials of all experiments."
    from finetune_kit.declaration import declared_parameters

    names = set()
    for path in NOTEBOOKS:
        is_experiment = '"parameters"' in path.read_text()
        if is_experiment:
            names.update(declared_parameters(path))
    return names


# finetune-kit, papermill, make


@cache
def kit():
    import typer

    from finetune_kit import cli

    return typer.main.get_command(cli.app)


def kit_fault(words):
    "What is wrong with a call of finetune-kit, or None. It is parsed, and not run."
    from finetune_kit.terminal import pair_values, parse_dials

    name, *rest = pair_values(words[1:])
    if name not in kit().commands:
        return f"no command {name!r}; there are {', '.join(kit().commands)}"
    try:
        given = kit().commands[name].make_context(name, rest).params
    except Exception as error:
        return f"{type(error).__name__}: {getattr(error, 'message', error)}"
    notebook = str(given["notebook"]) if name == "run" else NOTEBOOK_OF.get(name)
    return notebook and dial_fault(notebook, parse_dials(given["parameter"]))


def papermill_value(text):
    "As papermill reads a value."
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def papermill_fault(words):
    "The same of papermill, whose import takes long; so it is read by hand."
    if len(words) < 3 or len(words) % 3 or set(words[3::3]) - {"-p"}:
        return "it should read: papermill NOTEBOOK OUT [-p NAME VALUE]"
    values = map(papermill_value, words[5::3])
    return dial_fault(words[1], dict(zip(words[4::3], values, strict=True)))


def make_fault(targets):
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    unknown = set(targets) - set(known)
    return f"no target {unknown}" if unknown else None


def missing_file(words):
    "The first path of the project that is not there."
    for word in words:
        is_path = re.match(r"(nbs|data|benchmarks|experiments/(?!runs))/", word)
        if is_path and word != "nbs/my_evaluate.ipynb" and not (ROOT / word).exists():
            return word
    return None


def command_fault(words):
    "What is wrong with a command, where it is one of ours, or None."
    if words[0] == "make":
        return make_fault(words[1:])
    if words[0] not in ("finetune-kit", "papermill"):
        return None
    file = missing_file(words)
    if file:
        return f"no file {file}"
    return kit_fault(words) if words[0] == "finetune-kit" else papermill_fault(words)


def option_names(command):
    names = {"--help"}
    for parameter in command.params:
        names.update(parameter.opts, parameter.secondary_opts)
    return names


def inline_fault(words):
    "The same of a command in running text, which may lack its arguments."
    if words[0] == "-p":
        unknown = set(words[1::3]) - all_dials()
        return f"no dial {unknown}" if unknown else None
    if words[0] != "finetune-kit" or len(words) == 1:
        return command_fault(words)
    name = words[1]
    if name.startswith("-"):
        return None if name in option_names(kit()) else f"no option {name!r} of all commands"
    if name not in kit().commands:
        return f"no command {name!r}"
    known = option_names(kit().commands[name])
    for word in words[2:]:
        if word.startswith("--") and word not in known:
            return f"no option {word}"
    return None


def faults_of(commands_on_pages, fault_of):
    faults = []
    for path, words in commands_on_pages:
        fault = fault_of(words)
        if fault:
            faults.append(f"{name_of(path)}: {shlex.join(words)}: {fault}")
    return "\n".join(faults)


def test_every_command_is_one():
    typed = []
    for path in PROSE:
        for language, code in blocks(text_of(path)):
            if language == "sh":
                typed += [(path, words) for words in commands(code)]
    faults = faults_of(typed, command_fault)
    assert not faults, faults
    assert sum(words[0] == "finetune-kit" for _, words in typed) > 30
    assert sum(words[0] == "papermill" for _, words in typed) > 4


def test_every_command_in_running_text_is_one():
    typed = []
    for path in (*PROSE, *NOTEBOOKS):
        text = without_blocks(text_of(path))
        for code in re.findall(r"`((?:finetune-kit|papermill|make|-p) [^`\n]+)`", text):
            if "..." not in code and "…" not in code:
                typed += [(path, words) for words in commands(code)]
    faults = faults_of(typed, inline_fault)
    assert not faults, faults
    assert len(typed) > 20


@pytest.mark.parametrize(
    "line, fault",
    [
        ("finetune-kit studdy", "no command"),
        ("finetune-kit sweep a.yaml --job 2", "--job"),
        ("finetune-kit export run --to", "--to"),
        ("finetune-kit run nbs/train.ipynb -p drop_layr 7", "did you mean 'drop_layer'"),
        ("finetune-kit study -p items many", "items='many'"),
        ("finetune-kit run nbs/tran.ipynb", "no file"),
        ("papermill nbs/train.ipynb out.ipynb -p max_steps 0", "max_steps=0"),
        ("papermill nbs/train.ipynb out.ipynb -p config hubb", "no config"),
        ("papermill nbs/train.ipynb -p seed 1", "should read"),
        ("make tests", "no target"),
    ],
)
def test_a_wrong_command_is_noticed(line, fault):
    [words] = commands(line)
    assert fault in (command_fault(words) or "")


@pytest.mark.parametrize(
    "line",
    [
        "finetune-kit study -p stream true -p precisions \"''\"",
        "FINETUNE_KIT_API_KEY=x finetune-kit serve",
        "finetune-kit run nbs/train.ipynb -p drop_layer=20-24 -o out.ipynb",
    ],
)
def test_a_right_command_passes(line):
    [words] = commands(line)
    assert command_fault(words) is None


# Python and YAML


@cache
def exported(module):
    "What a module of the kit offers: name → its syntax tree, where it defines the name itself."
    names = {}
    for node in ast.parse((ROOT / "finetune_kit" / f"{module}.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: node for alias in node.names}
        elif hasattr(node, "name"):
            names[node.name] = node
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        for target in targets:
            names |= {n.id: node for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def import_faults(tree, imported):
    "Imports from the kit that do not exist; the others are added to `imported`."
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith("finetune_kit."):
            continue
        module = node.module.split(".")[1]
        if not (ROOT / "finetune_kit" / f"{module}.py").exists():
            yield f"no module {node.module}"
            continue
        for alias in node.names:
            if alias.name not in exported(module):
                yield f"{node.module} has no {alias.name}"
            else:
                imported[alias.asname or alias.name] = exported(module)[alias.name]


def call_faults(tree, imported):
    "Keywords that the kit's functions do not take."
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        function = imported.get(node.func.id)
        if not isinstance(function, ast.FunctionDef) or function.args.kwarg:
            continue
        known = {arg.arg for arg in (*function.args.args, *function.args.kwonlyargs)}
        for keyword in node.keywords:
            if keyword.arg and keyword.arg not in known:
                yield f"{function.name} takes no {keyword.arg}"


def python_faults(code, imported):
    "What is wrong with a block. `imported`: name → syntax tree, of the page so far."
    tree = ast.parse(code)
    return [*import_faults(tree, imported), *call_faults(tree, imported)]


def test_every_python_block_is_sound():
    faults = []
    n_blocks = 0
    for path in PROSE:
        imported = {}
        for language, code in blocks(text_of(path)):
            if language != "python":
                continue
            n_blocks += 1
            faults += [f"{name_of(path)}: {fault}" for fault in python_faults(code, imported)]
    assert not faults, "\n".join(faults)
    assert n_blocks > 10


def test_a_wrong_python_block_is_noticed():
    code = "from finetune_kit.rows import load_row, load_rows\nload_rows('a', max_row=3)"
    faults = python_faults(code, {})
    assert faults == ["finetune_kit.rows has no load_row", "load_rows takes no max_row"]


def test_every_sweep_is_sound():
    from finetune_kit.sweep_spec import SweepSpec, combinations

    n_sweeps = 0
    for path in GUIDE:
        for language, code in blocks(text_of(path)):
            if language != "yaml":
                continue
            n_sweeps += 1
            spec = SweepSpec(**(dict(name="sweep") | yaml.safe_load(code)))
            faults = [dial_fault(spec.notebook, dials) for dials in combinations(spec)]
            assert not any(faults), (name_of(path), faults)
            assert re.match(r"# [\w-]+\.yaml\n", code), "its first line names the file"
    assert n_sweeps >= 2
