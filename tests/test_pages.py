"""What strangers' data put on a page: text, and nothing else.

Every notebook shows pages, sentences and tables by `html`, `markdown` and `styled` of 020_pages,
which escape. That is seen in the source, and in the DOM of a real browser with hostile text in
every field.
"""

import ast
import http.server
import json
import re
import threading
from types import SimpleNamespace

import pandas as pd
import pytest
from browser import Page
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
TEMPLATES = ROOT / "finetune_kit/templates"

# In the source

# What makes a notebook's output of text as it is
RAW = ("HTML", "Markdown", "Latex", "SVG", "Javascript", "IFrame", "Markup", "publish_display_data")
RAW += tuple(f"display_{form}" for form in ("html", "markdown", "svg", "latex", "javascript"))


def name_of(call):
    "`HTML` of both `HTML(...)` and `IPython.display.HTML(...)`."
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def is_literal(node):
    "Whether a text is written out: no f-string, no sum, no name."
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def literal_names(tree):
    "Names that get written-out text wherever they get a value."
    values = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                values.setdefault(getattr(target, "id", ""), []).append(node.value)
        elif isinstance(node, ast.AugAssign):
            values.setdefault(getattr(node.target, "id", ""), []).append(node.value)
        elif isinstance(node, ast.NamedExpr | ast.For | ast.comprehension | ast.arg):
            name = getattr(node, "target", node)
            values.setdefault(getattr(name, "id", getattr(name, "arg", "")), []).append(None)

    def is_written_out(value):
        if isinstance(value, ast.IfExp):
            return is_literal(value.body) and is_literal(value.orelse)
        return is_literal(value)

    return {name for name, given in values.items() if all(map(is_written_out, given))}


def faults_of(source):
    "What in a cell may put text on a page that nobody has escaped."
    from IPython.core.inputtransformer2 import TransformerManager

    tree = ast.parse(TransformerManager().transform_cell(source))
    written_out = literal_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("IPython"):
            yield from (f"imports {n.name}" for n in node.names if n.name in RAW)
        inner = node.value if isinstance(node, ast.Attribute) else None
        if getattr(inner, "attr", "") == "style" and ast.unparse(inner) != "plt.style":
            yield f"{ast.unparse(node)}: a table is shown by styled(...)"
        if isinstance(node, ast.FunctionDef) and re.fullmatch(r"_repr_(html|markdown)_", node.name):
            yield f"{node.name}: a page is shown by html(...)"
        if not isinstance(node, ast.Call):
            continue
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if name_of(node) in RAW and not all(map(is_literal, arguments)):
            yield f"{ast.unparse(node)}: not written out"
        if name_of(node) == "markdown":
            text = node.args[0]
            if not is_literal(text) and getattr(text, "id", "") not in written_out:
                yield f"{ast.unparse(node)}: its text is not written out"
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if "escape" in keywords and keywords["escape"] is not True:
            yield f"{ast.unparse(node)}: escapes in a way of its own"
        if keywords.get("raw"):
            yield f"{ast.unparse(node)}: raw"


BAD = [
    'Markup(f"<b>{name}</b>")',
    'Markup("<b>" + name)',
    "Markup(page)",
    'IPython.display.HTML(f"<b>{name}</b>")',
    "from IPython.display import HTML",
    "from IPython.display import Markdown as M",
    'markdown(f"the run {name}")',
    'markdown("the run " + name)',
    'told = "a"\nif name:\n    told += f" {name}"\nmarkdown(told)',
    'def say(told):\n    told = told or "a"\n    markdown(told)',
    'df.style.format("{}")',
    "df.to_html(escape=False)",
    'display({"text/html": name}, raw=True)',
    "class A:\n    def _repr_html_(self):\n        return self.name",
]


@pytest.mark.parametrize("source", BAD)
def test_faults_are_found(source):
    assert list(faults_of(source))


GOOD = [
    'Markup("<b>{}</b>").format(name)',
    'markdown("{name} is best", name=name)',
    'told = "{n} run"\nif n > 1:\n    told += "s"\nmarkdown(told, n=n)',
    'told = "{n} runs" if n > 1 else "{n} run"\nmarkdown(told, n=n)',
    'html(fill("a.html", name=name))',
]


@pytest.mark.parametrize("source", GOOD)
def test_no_fault_is_seen_where_none_is(source):
    assert not list(faults_of(source))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_escapes_by_020_pages(path):
    if path.stem == "020_pages":
        pytest.skip("the one place")
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("%%"):
            assert not list(faults_of(source)), cell["id"]


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.html")), ids=lambda path: path.name)
def test_a_template_escapes_all_but_styles(path):
    "Jinja escapes what has no `safe`, in quoted attributes too."
    text = path.read_text()
    marked = re.findall(r"([^\s({,]+|\"[^\"]*\") *\| *safe", text)
    assert set(marked) <= {"style", '"<br>"'}
    assert not re.search(r"=\{[{%]", text), "an attribute without quotes"
    assert "autoescape" not in text


def test_the_report_s_template_escapes():
    "nbconvert's Jinja escapes nothing by itself."
    text = (TEMPLATES / "report.html.j2").read_text()
    shown = [name.strip() for name in re.findall(r"\{\{-?(.*?)-?\}\}", text, re.DOTALL)]
    own = {"resources.policy", "resources.css", "resources.pygments_css", "' open' if given"}
    own |= {"cell.source | highlight_code(metadata=cell.metadata)"}
    for name in shown:
        assert name in own or name.endswith("| e"), name


# In the browser

HOSTILE = {
    "nothing": "plain words",
    "script": "<script>window.ran = 1</script>",
    "image": "<img src=x onerror='window.ran = 1'>",
    "upper case": "<SVG/ONLOAD=window.ran=1>",
    "end of its place": "</title></style></td></table></code></textarea><h1 id=a>b</h1>",
    "end of its attribute": '" onmouseover="window.ran=1" a=\'',
    "link": "[a](javascript:window.ran=1)",
    "link in brackets": "<javascript:window.ran=1> http://127.0.0.1:9/ www.b.de a@b.de",
    "picture": "![a](http://127.0.0.1:9/a.png)",
    "reference": "[a][b] [^c]\n\n[b]: javascript:window.ran=1\n[^c]: d",
    "formula": r"$\href{javascript:window.ran=1}{a}$ \(b\) $$c$$ \begin{align}d\end{align}",
    "template": "{{ 7 * 7 }} {% raw %} {0.__class__} {name} %s",
    "Markdown": "*a* __b__ `c` ~~d~~ | e | \\*f",
    "blocks": "a\n\n# b\n\n- c\n\n    d\n\n> e\n\n---\n\n1. f\n\n```\ng",
    "spaces": "    a",
    "order of letters": "a \u202edlrow\u2066 \u202a",
    "references": "&lt;b&gt; &#60;i&#62; &amp;",
    "comment": "<!-- a --> <![CDATA[b]]> <?php",
    "controls": "\x1b[31ma\x1b[0m \x07 b",
}
TURNING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - {ord(space) for space in "\t\n\r\f"}
WRITTEN_OUT = {code: f"⟨U+{code:04X}⟩" for code in TURNING | CONTROLS}


def plainly(text):
    "As the DOM has it: no line breaks or colours; what is not seen is written out."
    text = re.sub(r"⟨U\+001B⟩\[\d*m", "", text.translate(WRITTEN_OUT))
    return " ".join(text.split())


class Fields:
    "Hostile text for each field of a page, and what was said."

    def __init__(self, text):
        self.text, self.said = text, {}

    def __call__(self, field, place="{field}: {text}"):
        self.said[field] = place.format(field=field, text=self.text)
        return self.said[field]


def run_info(say):
    names = ("commit", "device", "python", "platform", "seed")
    return dict(
        id=say("run"),
        experiment="train",
        hashes={say("hash name"): say("hash")},
        versions={say("package"): say("version")},
        **{name: say(name) for name in names},
    )


def evaluations(say, metric):
    "Four states of 40 items."
    import numpy as np

    rng = np.random.default_rng(0)
    places = range(40)
    common = dict(
        id=[str(place) for place in places],
        n_tokens=4,
        domain=say.text,
        question=[say("question") for _ in places],
        reference=[say("reference") for _ in places],
        answer=[say("answer") for _ in places],
    )
    levels = dict(base=1, cut=9, healed=5, control=2)
    return {
        state: pd.DataFrame(
            common | {"nll": level + rng.random(40), metric: rng.random(40), "exact_match": 1.0}
        )
        for state, level in levels.items()
    }


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data/tiny-base")


def shown_parts(say, tokenizer):
    "Everything that notebooks show of data, models, configs and errors."
    from markupsafe import Markup

    from finetune_kit.chat import encode
    from finetune_kit.inspect import mask_html
    from finetune_kit.pages import fill, html, markdown, styled
    from finetune_kit.plan import drop
    from finetune_kit.record import Run
    from finetune_kit.report import (
        Progress,
        answers_html,
        conclusion_html,
        settings_html,
        states_html,
    )
    from finetune_kit.verdict import verdict

    dial, metric = say("dial"), say("metric")
    yield html(settings_html({dial: say("value"), "lr": 1}, {dial: say("default")}))
    yield html(settings_html(dict(lr=1), dict(lr=None), dict(lr=say("reason"))))
    levels = {state: dict(nll=1, intervals={}) for state in ("base", "cut", "healed", "control")}
    yield html(states_html(levels, dict(nll=metric)))
    items = evaluations(say, metric)
    yield html(answers_html({say("state"): items["base"], "cut": items["cut"]}))
    told = verdict(drop(12, 7), items, ("nll", metric), say("conditions"))
    yield html(told.html())
    yield styled(told.table(), "t1")
    yield html(Run(ROOT, run_info(say)).rerun_html(control=say("control")))
    yield html(conclusion_html([Markup("<b>{}</b>").format(say("best"))], say("held for")))
    progress = Progress(say("task"), 4)
    progress.start, progress.note, progress.values = 0, say("note"), [1, 2]
    yield html(progress._bar(2))
    yield html(fill("progress_end.html", line=say("line")))
    turns = [dict(role="user", content=say.text), dict(role="assistant", content=say.text)]
    yield html(mask_html([encode(dict(messages=turns), tokenizer, max_length=40)], tokenizer))
    sentences = (
        "{a}, **{b}**, *{c}*, {d:code}\n\n- {e}\n\n## {f}\n\n| {g} |\n|---|\n| {h} |\n\n> {i}"
    )
    yield markdown(sentences, **{letter: say(f"sentence {letter}") for letter in "abcdefghi"})
    yield markdown("{a}\n\n- {a}\n\n## {a}\n\n| {a} |\n|---|\n| {a} |", a=say.text)
    yield markdown("{a}", a=Markup("<b>{}</b>").format(say("bold")))
    cells = [say("cell"), [say.text], None]
    table = pd.DataFrame({say("column"): cells, "c": 0.5}).rename_axis(columns=say.text)
    yield styled(table, "t2", {"c": "{:.0%}"})
    yield styled(pd.DataFrame({(say("level"), say("below")): cells}), "t3", missing=say("missing"))
    index = pd.Index([say("frame row")], name=say("frame index"))
    yield pd.DataFrame({say("frame column"): [say("frame cell")]}, index=index)
    if "\n" in say.text:  # pandas writes \n
        say.said = {field: said for field, said in say.said.items() if "frame" not in field}


def report_page(say, tokenizer):
    from IPython.core.formatters import DisplayFormatter
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    from finetune_kit.report import report_html

    png = "R0lGODlhAQABAAAAACw="  # of one pixel
    notebook = new_notebook(cells=[new_markdown_cell("# A report")])

    def add(kind, source="show()", **values):
        output = new_output(kind, **values)
        notebook.cells.append(new_code_cell(source, outputs=[output]))

    with pd.option_context("display.max_colwidth", None):
        for part in shown_parts(say, tokenizer):
            data, metadata = DisplayFormatter().format(part)
            add("display_data", data=data, metadata=metadata)
    add("display_data", data={"image/png": png}, metadata=dict(alt=say.text))
    add("display_data", data={"text/plain": say("plain")})
    add("display_data", data={"text/latex": say("formula")})
    add("display_data", data={"application/javascript": "window.ran = 1", "text/plain": "a"})
    add("stream", name="stdout", text=say("printed"))
    add("stream", name="stderr", text=say("warned"))
    add(
        "error",
        source=f"# Parameters\ndata = {say.text!r}",
        ename=say("kind"),
        evalue=say("error"),
        traceback=[say("traceback")],
    )
    notebook.cells[-2].metadata.tags = [say.text]
    del say.said["kind"], say.said["error"]  # the traceback holds them
    return report_html(notebook, say.text, say("failure"))


def sweep_page_of(say, runs):
    from finetune_kit.sweep_page import sweep_page

    dial = say.said["dial"] = say("dial").replace(".", "")  # a dot would make it a metric
    spec = SimpleNamespace(  # as `SweepSpec` would be, had it checked nothing
        name=say("sweep"),
        notebook=say("notebook"),
        fixed={say("fixed"): say("fixed value")},
        varied=[dial],
    )
    row = dict(id=say("run"), status=say("status"), error=say("error"), verdict=say("verdict"))
    rows = [
        row | {dial: say("dial value"), "healed.nll": 1.0, "control.nll": 2.0},
        row | {dial: 2, "healed.nll": 1.5, "control.nll": 2.0, "id": "train-1", "error": None},
    ]
    table = pd.DataFrame(rows).assign(**{f"{say.text}.nll": [3.0, 4.0]})
    for row in rows:
        folder = runs / row["id"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.html").touch()
    return sweep_page(spec, table)


def card_page(say):
    "The model card, as Markdown that nbconvert renders."
    from nbconvert.filters import markdown2html

    from finetune_kit.hub import MeasuredState
    from finetune_kit.pages import fill

    names = ("title", "base", "plan", "training", "data", "data_hash", "domains", "dropped")
    fields = {name: say(name) for name in names}
    measured = [say(name) for name in ("state", "nll", "exact_match", "n_items", "n_tokens")]
    card = fill("model_card.md", header="", states=[MeasuredState(*measured)], **fields)
    body = markdown2html(card.split("---\n", 2)[2])
    return f"<!doctype html><html><head><title>a</title></head><body>{body}</body></html>"


def make_page(kind, say, tokenizer, folder):
    if kind == "report":
        return report_page(say, tokenizer)
    return card_page(say) if kind == "card" else sweep_page_of(say, folder / "runs")


SKELETON = """
[...document.querySelectorAll('*')]
  .filter(e => !(e.tagName == 'SPAN' && [...e.attributes].every(a => a.name == 'class')))
  .map(e => e.tagName + ' ' + [...e.attributes].map(a => a.name).sort().join(' '))
"""


def skeleton(page):
    "All elements with the names of their attributes; colours of code and of tokens left out."
    return page.evaluate(SKELETON)


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory):
    "A browser that heeds no page's policy, so that escaping has to do it alone."
    with Page(tmp_path_factory.mktemp("browser") / "profile", with_policy=False) as page:
        yield page


def opened(page, html, folder):
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    page.open(file.as_uri())


@pytest.mark.parametrize("kind", ["report", "sweep", "card"])
def test_hostile_text_stays_text(kind, unguarded, tokenizer, tmp_path, monkeypatch):
    "Whatever a field says, the page has the same elements and attributes, and shows what it says."
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "runs"))
    expected = None
    for name, text in HOSTILE.items():
        say = Fields(text)
        opened(unguarded, make_page(kind, say, tokenizer, tmp_path), tmp_path)
        unguarded.evaluate("document.querySelectorAll('*').forEach(e => e.onmouseover?.())")
        assert unguarded.evaluate("window.ran === undefined"), name
        found = skeleton(unguarded)
        expected = expected or found
        assert found == expected, name
        links = unguarded.evaluate("[...document.links].map(a => a.protocol)")
        assert set(links) <= {"file:"}, name
        seen = plainly(unguarded.evaluate("document.body.textContent"))
        for field, said in say.said.items():
            assert plainly(said) in seen, (name, field)
    assert len(expected) > 20


# Its policy


class Knocks(http.server.BaseHTTPRequestHandler):
    "A server that counts who knocks."

    def do_GET(self):
        self.server.knocks.append(self.path)
        self.send_error(404)

    def log_message(self, *args):
        "Nothing is printed."


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Knocks) as server:
        server.knocks = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


ATTACK = """
<script>window.ran = 1</script>
<script src="{url}/a.js"></script>
<img src="{url}/a.png" onerror="window.ran = 1">
<link rel="stylesheet" href="{url}/a.css">
<style>@import "{url}/b.css"; p {{ background: url({url}/b.png) }}</style><p>a</p>
<iframe src="{url}/a.html"></iframe>
<object data="{url}/b.html"></object>
<form action="{url}/sent"><button id="send">send</button></form>
<a id="link" href="javascript:window.ran = 1">a</a>
"""


def attacked(page, server, folder):
    "What an unescaped output of a stranger's own notebook does: whether it ran, and its knocks."
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    from finetune_kit.report import report_html

    url = f"http://127.0.0.1:{server.server_port}"
    output = new_output("display_data", {"text/html": ATTACK.format(url=url)})
    notebook = new_notebook(cells=[new_code_cell("show()", outputs=[output])])
    opened(page, report_html(notebook), folder)
    page.evaluate("document.getElementById('link').click()")
    ran = page.evaluate("window.ran === 1")
    page.evaluate("document.getElementById('send').click()")
    page.evaluate("new Promise(done => setTimeout(done, 500))")
    return ran, server.knocks


def test_policy_lets_nothing_run_or_load(tmp_path, server):
    with Page(tmp_path / "profile") as page:
        assert attacked(page, server, tmp_path) == (False, [])


def test_without_policy_it_would(tmp_path, server, unguarded):
    "So that the test above can fail."
    ran, knocks = attacked(unguarded, server, tmp_path)
    assert ran
    assert {path.partition("?")[0] for path in knocks} > {"/a.js", "/a.png", "/a.css"}


def test_every_page_of_its_own_has_the_policy(tokenizer, tmp_path, monkeypatch):
    "In front of all that it governs."
    monkeypatch.setenv("FINETUNE_KIT_RUNS", str(tmp_path / "runs"))
    [policy] = re.findall('content="([^"]*)"', (TEMPLATES / "policy.html").read_text())
    for kind in ("report", "sweep"):
        page = make_page(kind, Fields("a"), tokenizer, tmp_path)
        head = page.partition("<body>")[0]
        assert head.index(policy) < head.index("<title>") < head.index("<style>")
        assert "<script" not in page


# Whole runs


IMAGE = "<img src=x onerror='window.ran = 1'>"  # a file may be called so, too


def strangers_rows():
    for n in range(60):
        yield {
            f"ask {IMAGE}": f"What is {n} plus 1? {HOSTILE['formula'] if n % 3 else IMAGE}",
            f"reply {IMAGE}": f"{n + 1} {IMAGE} [a](javascript:window.ran=1)",
            "domain": f"d{n % 2} *b* {IMAGE}",
            f"other {IMAGE} `c`": HOSTILE["blocks"],
        }


@pytest.mark.slow
def test_runs_on_strangers_data(tmp_path, warm, unguarded):
    "A run, its control, a comparison, and a run that fails: all that is hostile stays text."
    data, model = tmp_path / f"{IMAGE}.jsonl", tmp_path / f"tiny {IMAGE}"
    data.write_text("".join(json.dumps(row) + "\n" for row in strangers_rows()))
    model.symlink_to(ROOT / "data/tiny-base")
    mapping = dict(question=f"ask {IMAGE}", answer=f"reply {IMAGE}", domain="domain")
    dials = dict(model=model, data=data, mapping=mapping, max_steps=2, eval_items=6)
    dials |= dict(max_new_tokens=4, backend="transformers")
    runs = tmp_path / "runs"
    for drop_layer in (3, 7):
        done = warm(tmp_path / "out.ipynb", runs, drop_layer=drop_layer, **dials)
        assert done.returncode == 0, done.stderr
    done = warm(tmp_path / "out.ipynb", runs, "nbs/compare.ipynb")
    assert done.returncode == 0, done.stderr
    no_rows = dials | dict(mapping=dict(question=f"{IMAGE} that is not there", answer="b"))
    assert warm(tmp_path / "out.ipynb", runs, drop_layer=1, **no_rows).returncode == 1
    reports = sorted(runs.glob("*/report.html"))
    assert len(reports) >= 3
    for report in reports:
        unguarded.open(report.as_uri())
        assert unguarded.evaluate("window.ran === undefined"), report
        if report.parent.name.startswith("train"):  # where no item differs, `compare` shows none
            assert "onerror=" in unguarded.text(), report
        elements = {tuple(element.split(" ", 1)) for element in skeleton(unguarded)}
        assert not {tag for tag, _ in elements} & {"SCRIPT", "IFRAME", "OBJECT", "FORM"}
        assert not {names for _, names in elements if re.search(r"\bon", names)}, report
        sources = unguarded.evaluate("[...document.images].map(i => i.src.slice(0, 5))")
        assert set(sources) <= {"data:"}, report
