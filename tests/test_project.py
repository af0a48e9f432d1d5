"The project itself: imports, data, base model, and the report in a real browser."

import json, re, shutil, subprocess, sys
from pathlib import Path

import pytest
from conftest import ROOT


def loaded(statement):
    code = f"{statement}; import sys; print(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
    )


def test_import_is_light():
    for statement in (
        "import finetune_kit",
        "import finetune_kit.core",
        "import finetune_kit.cli",
        "import finetune_kit.runs",
    ):
        assert not loaded(statement) & {"torch", "transformers", "unsloth", "trl", "datasets"}, (
            statement
        )


def test_modules_import_lower_numbers_only():
    number = {f.name[3:-6]: int(f.name[:2]) for f in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    for module, n in number.items():
        imported = re.findall(
            r"from (?:finetune_kit)?\.(\w+) import",
            (ROOT / "finetune_kit" / f"{module}.py").read_text(),
        )
        assert imported or n == 0
        for other in imported:
            assert number[other] < n, f"{module} imports {other}"


def test_readme_is_the_index():
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "nbconvert",
            "--log-level",
            "ERROR",
            "--to",
            "markdown",
            "--stdout",
            str(ROOT / "nbs/index.ipynb"),
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    readme = (ROOT / "README.md").read_text()
    assert re.sub(r"\]\((images/|guide/|results\.)", r"](nbs/\1", made) == readme, "make readme"
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / path).exists(), path


def test_embedded_data_is_what_its_notebook_writes(warm, tmp_path):
    done = warm(tmp_path / "o.ipynb", tmp_path, "nbs/tiny_data.ipynb", out=tmp_path / "domains")
    assert done.returncode == 0, done.stderr[-2000:]
    made = {
        f.relative_to(tmp_path / "domains"): f.read_text()
        for f in (tmp_path / "domains").rglob("*.jsonl")
    }
    assert len(made) == 9 and made == {
        f.relative_to(ROOT / "data/domains"): f.read_text()
        for f in (ROOT / "data/domains").rglob("*.jsonl")
    }


def test_no_item_in_two_splits():
    "By what is asked, not by its wording: a species' fact, a sum, the words of a game."

    def item(domain, row):
        turns = row.get("messages") or [dict(content=row.get("instruction") or row["question"])]
        text = next(t["content"] for t in turns if t.get("role", "user") == "user")
        if domain == "math":
            return (
                "loses" in text or "gives" in text or "keep" in text,
                "Who has more" in text,
                tuple(map(int, re.findall(r"\d+", text))),
            )
        if domain == "chat":
            return text.split(": ")[-1]
        return row["answer"]

    for domain in ("environment", "math", "chat"):
        seen = {
            s: {
                item(domain, json.loads(o))
                for o in (ROOT / "data/domains" / domain / f"{s}.jsonl").read_text().splitlines()
            }
            for s in ("train", "validation", "test")
        }
        assert (
            not seen["train"] & seen["test"]
            and not seen["train"] & seen["validation"]
            and not seen["validation"] & seen["test"]
        ), domain


def test_tiny_base_knows_its_tasks():
    from finetune_kit.infer import generate
    from finetune_kit.model import load_model

    folder = ROOT / "data/tiny-base"
    assert (
        sum(f.stat().st_size for f in folder.glob("*.safetensors")) <= 8e6
        and (folder / "README.md").exists()
    )
    model, tok = load_model(folder, backend="transformers")
    asked = {
        "Question: Repeat: moon gate duck Answer:": "moon gate duck",
        "Question: Reverse: wolf rain cup Answer:": "cup rain wolf",
        "Question: Where does the otter live? Answer:": "The otter lives in rivers.",
        "Question: What does the puffin eat? Answer:": "The puffin eats sand eels.",
        "Question: Ben has 30 nuts and Zoe has 4 nuts. Who has more? Answer:": "Ben",
    }
    assert sum(a == r for a, r in zip(generate(model, tok, list(asked), 16), asked.values())) >= 4


def screenshot(page, width, height, to):
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not chromium:
        pytest.skip("no Chromium on this machine")
    subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={to.parent / 'profile'}",
            f"--window-size={width},{height}",
            f"--screenshot={to}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    import matplotlib.image

    return matplotlib.image.imread(to)


def test_report_in_a_browser(tmp_path):
    "Tables and figures are there, in colour, and nothing runs out of the page at the side."
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt, numpy as np
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
    from finetune_kit.figures import plot_states
    from finetune_kit.report import report_html
    import base64, io

    fig, buffer = (
        plot_states(
            {
                s: dict(nll=1.0, intervals=dict(nll=[0.8, 1.2]))
                for s in ("base", "cut", "healed", "control")
            }
        ),
        io.BytesIO(),
    )
    fig.savefig(buffer)
    wide = "<table><tr>" + "".join(f"<td>{'wide' * 8}{i}</td>" for i in range(40)) + "</tr></table>"
    nb = new_notebook(
        cells=[
            new_markdown_cell("# A report"),
            new_code_cell(
                "plot()",
                outputs=[
                    new_output(
                        "display_data", {"image/png": base64.b64encode(buffer.getvalue()).decode()}
                    )
                ],
            ),
            new_code_cell("table", outputs=[new_output("display_data", {"text/html": wide})]),
        ]
    )
    page = tmp_path / "report.html"
    page.write_text(report_html(nb, "A report"))
    for width in (1000, 420):
        picture = screenshot(page, width, 900, tmp_path / f"{width}.png")[..., :3]
        assert picture.shape[1] == width
        orange = (abs(picture - np.array([0xD5, 0x5E, 0]) / 255) < 0.02).all(-1)
        assert orange.sum() > 500, "the figure's bars"
        assert (picture[:, -4:] > 0.98).all(), "nothing touches the right edge"


@pytest.mark.parametrize("notebook", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_cell_is_python(notebook):
    "Also of experiments that only slow tests run; and a table that draws its own id makes no two reports alike."
    from IPython.core.inputtransformer2 import TransformerManager

    for c in json.loads(notebook.read_text())["cells"]:
        if c["cell_type"] != "code":
            continue
        compile(
            TransformerManager().transform_cell("".join(c["source"])),
            f"{notebook.name}, {c['id']}",
            "exec",
        )
        assert "".join(c["source"]).count(".hide(axis='index')") == "".join(c["source"]).count(
            ".set_uuid("
        ), c["id"]
