"The project itself: imports, notebooks, data, base model, and the report in a real browser."

import ast
import base64
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
LIBRARY = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
HEAVY = {"torch", "transformers", "unsloth", "trl", "datasets"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def code_cells(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield cell, "".join(cell["source"])


# Imports


def modules_after(statement):
    "What Python has imported after a statement."
    code = f"{statement}; import sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["", ".core", ".cli", ".runs"])
def test_import_is_light(module):
    assert not modules_after(f"import finetune_kit{module}") & HEAVY


def imports_of(module):
    "The kit's modules that a module imports, inside functions too, and the names it takes."
    tree = ast.parse((ROOT / "finetune_kit" / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            path = (node.module or "").removeprefix("finetune_kit").lstrip(".")
            is_kit = node.level or (node.module or "").split(".")[0] == "finetune_kit"
            names = [alias.name for alias in node.names]
            if is_kit and path:
                yield path, names
            elif is_kit:  # from finetune_kit import cli_data
                yield from ((name, []) for name in names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("finetune_kit."):
                    yield alias.name.split(".")[1], []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and "finetune_kit" in str(argument.value):
                yield argument.value.split(".")[1], []


def test_modules_import_lower_numbers_only():
    numbers = {}
    for path in LIBRARY:
        number, _, module = path.stem.partition("_")
        numbers[module] = int(number)
    assert len(set(numbers.values())) == len(numbers), "each number once"
    for module, number in numbers.items():
        for other, _ in imports_of(module):
            assert numbers[other] < number, f"{module} imports {other}"


def test_no_private_name_crosses_modules():
    for path in LIBRARY:
        for other, names in imports_of(path.stem.partition("_")[2]):
            private = [name for name in names if name.startswith("_")]
            assert not private, f"{path.stem} imports {private} from {other}"


# Notebooks


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_imports_stand_in_cells_of_their_own(path):
    "nbdev's page builder executes a cell that contains an import alone."
    for cell, source in code_cells(path):
        if source.lstrip().startswith(("#| export", "%", "!")):
            continue
        kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body}
        assert len(kinds) < 2, f"cell {cell['id']} mixes imports with other code"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_is_python(path):
    "Also of experiments that only slow tests run."
    from IPython.core.inputtransformer2 import TransformerManager

    for cell, source in code_cells(path):
        code = TransformerManager().transform_cell(source)
        compile(code, f"{path.name}, {cell['id']}", "exec")


def test_readme_is_the_index():
    command = [
        "nbconvert",
        "--log-level",
        "ERROR",
        "--to",
        "markdown",
        "--stdout",
        "nbs/index.ipynb",
    ]
    result = subprocess.run(
        [sys.executable, "-m", *command], check=True, capture_output=True, text=True, cwd=ROOT
    )
    expected = re.sub(r"\]\((images/|guide/|results\.)", r"](nbs/\1", result.stdout)
    readme = (ROOT / "README.md").read_text()
    assert readme == expected, "make readme writes it"
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / path).exists(), path


# Data and the embedded model


def files_in(folder):
    return {file.relative_to(folder): file.read_text() for file in folder.rglob("*.jsonl")}


def test_embedded_data_is_what_its_notebook_writes(warm, tmp_path):
    folder = tmp_path / "domains"
    run = warm(tmp_path / "o.ipynb", tmp_path, "nbs/tiny_data.ipynb", out=folder)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(files_in(folder)) == 9
    assert files_in(folder) == files_in(ROOT / "data/domains")


def math_item(text):
    is_change = any(verb in text for verb in ("loses", "gives", "keep"))
    is_comparison = "Who has more" in text
    return is_change, is_comparison, tuple(map(int, re.findall(r"\d+", text)))


def item_of(domain, row):
    "What a row asks, whatever its wording: a fact, a sum, the words of a game."
    turns = row.get("messages") or [dict(content=row.get("instruction") or row["question"])]
    [text, *_] = [turn["content"] for turn in turns if turn.get("role", "user") == "user"]
    if domain == "math":
        return math_item(text)
    return text.split(": ")[-1] if domain == "chat" else row["answer"]


@pytest.mark.parametrize("domain", ["environment", "math", "chat"])
def test_no_item_in_two_splits(domain):
    items = {}
    for split in ("train", "validation", "test"):
        lines = (ROOT / "data/domains" / domain / f"{split}.jsonl").read_text().splitlines()
        items[split] = {item_of(domain, json.loads(line)) for line in lines}
    assert not items["train"] & items["test"]
    assert not items["train"] & items["validation"]
    assert not items["validation"] & items["test"]


def test_tiny_base_knows_its_tasks():
    from finetune_kit.infer import generate
    from finetune_kit.model import load_model

    folder = ROOT / "data/tiny-base"
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 8e6
    assert (folder / "README.md").exists()
    model, tokenizer = load_model(folder, backend="transformers")
    expected = {
        "Question: Repeat: moon gate duck Answer:": "moon gate duck",
        "Question: Reverse: wolf rain cup Answer:": "cup rain wolf",
        "Question: Where does the otter live? Answer:": "The otter lives in rivers.",
        "Question: What does the puffin eat? Answer:": "The puffin eats sand eels.",
        "Question: Ben has 30 nuts and Zoe has 4 nuts. Who has more? Answer:": "Ben",
    }
    answers = generate(model, tokenizer, list(expected), 16)
    right = [a == b for a, b in zip(answers, expected.values(), strict=True)]
    assert sum(right) >= 4


# The report in a browser


def screenshot(page, width, height, file):
    "A picture of a page, as an array (height, width, 4) in 0..1."
    import matplotlib.image

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip("no Chromium on this machine")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--hide-scrollbars"
    )
    place = [
        f"--user-data-dir={file.parent / 'profile'}",
        f"--window-size={width},{height}",
        f"--screenshot={file}",
    ]
    command = [browser, *options.split(" "), *place, page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return matplotlib.image.imread(file)


@pytest.fixture
def report(tmp_path):
    "A page with a figure, and with a table that is wider than any screen."
    import matplotlib

    matplotlib.use("agg")
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    from finetune_kit.figures import plot_states
    from finetune_kit.report import report_html

    state = dict(nll=1.0, intervals=dict(nll=[0.8, 1.2]))
    buffer = io.BytesIO()
    plot_states(dict.fromkeys(("base", "cut", "healed", "control"), state)).savefig(buffer)
    png = base64.b64encode(buffer.getvalue()).decode()
    cells = "".join(f"<td>{'wide' * 8}{i}</td>" for i in range(40))
    outputs = {
        "plot()": {"image/png": png},
        "table": {"text/html": f"<table><tr>{cells}</tr></table>"},
    }
    notebook = new_notebook(cells=[new_markdown_cell("# A report")])
    for source, data in outputs.items():
        output = new_output("display_data", data)
        notebook.cells.append(new_code_cell(source, outputs=[output]))
    page = tmp_path / "report.html"
    page.write_text(report_html(notebook, "A report"))
    return page


@pytest.mark.parametrize("width", [1000, 420])
def test_report_in_a_browser(tmp_path, report, width):
    "The figure is there, in colour, and nothing runs out of the page at the side."
    import numpy as np

    picture = screenshot(report, width, 900, tmp_path / f"{width}.png")[..., :3]
    assert picture.shape[1] == width
    orange = np.array([0xD5, 0x5E, 0]) / 255
    assert (abs(picture - orange) < 0.02).all(-1).sum() > 500, "the figure's bars"
    assert (picture[:, -4:] > 0.98).all(), "nothing touches the right edge"
