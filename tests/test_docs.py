"""What the docs say: the site's configuration, every link and picture, every command with its options and dials, every block of Python; and, slow, all of them run in order.

`python tests/test_docs.py` writes nbs/llms.txt."""

import ast, json, os, re, shlex, shutil, socket, subprocess, sys, time, urllib.request
from functools import cache
from pathlib import Path

import pytest, yaml
from conftest import ROOT

SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text())
REPO = SITE["website"]["repo-url"]
GUIDE = sorted((ROOT / "nbs/guide").glob("*.md"))
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDE]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@cache
def text_of(path):
    "A page's Markdown; of a notebook, that of its Markdown cells."
    if path.suffix == ".md":
        return path.read_text()
    return "\n\n".join(
        "".join(c["source"])
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "markdown"
    )


def blocks(text):
    "(language, code) of the fenced blocks; one without a language that begins with an import is Python."
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield language or ("python" if re.match(r"(from|import) ", code) else ""), code


def without_code(text):
    return re.sub(r"`[^`\n]+`", "``", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


# The site


def listed(items):
    for i in items:
        if isinstance(i, str):
            yield i
        else:
            yield from listed(i["contents"])


def test_the_sidebar_lists_every_page():
    top, pages = (
        yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text()),
        list(listed(SITE["website"]["sidebar"]["contents"])),
    )
    assert top["metadata-files"] == ["../_quarto.yml"] and top["project"]["type"] == "website"
    assert sorted(pages) == sorted(
        p.relative_to(ROOT / "nbs").as_posix() for p in (*NOTEBOOKS, *GUIDE)
    ), "the sidebar and nbs/ must list the same pages, each once"
    numbered = [p for p in pages if p[:1].isdigit()]
    assert (
        pages[:2] == ["index.ipynb", "guide/tutorial.md"]
        and numbered == sorted(numbered)
        and pages[-len(numbered) :] == numbered
    ), "in reading order"


def test_the_configuration_is_complete():
    from configparser import ConfigParser

    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    ini, site, page = ini["DEFAULT"], SITE["website"], SITE["format"]["html"]
    assert SITE["project"]["output-dir"] == ini["doc_path"], (
        "nbdev_docs moves _proc/<doc_path> to the root"
    )
    assert (site["repo-url"], site["repo-branch"], site["repo-subdir"], site["site-url"]) == (
        ini["git_url"],
        ini["branch"],
        ini["nbs_path"],
        ini["doc_host"] + ini["doc_baseurl"],
    )
    assert (
        site["description"] == ini["description"]
        and set(site["repo-actions"]) == {"edit", "source", "issue"}
        and set(page["theme"]) == {"light", "dark"}
        and site["search"]
        and page["code-tools"]
        and page["toc"]
    )
    assert ini["procs"] == "finetune_kit.report:SitePage", (
        "or the pages lose what stands below their titles, and the links to Colab"
    )
    assert all((ROOT / "nbs" / r).exists() for r in SITE["project"]["resources"])


def title_of(page):
    "Title and description, as nbdev and Quarto read them."
    text = text_of(ROOT / "nbs" / page)
    if page.endswith(".md"):
        return (head := yaml.safe_load(text.split("---")[1]))["title"], head["description"]
    return re.search(r"^# (.*)", text)[1], re.search(r"^> (.*)", text, re.M)[1]


def url_of(page):
    return f"{SITE['website']['site-url']}/{re.sub(r'(?:^|(?<=/))[0-9]+_', '', page).rsplit('.', 1)[0]}.html"


def llms_txt():
    "An index for language models (llmstxt.org), out of the sidebar."
    lines = [
        f"# {SITE['website']['title']}",
        "",
        f"> {SITE['website']['description']}",
        "",
        "A research kit of notebooks, with a package and a command line made from them. A layer plan takes layers out of a model, a study measures what each is worth, a run fine-tunes what is left beside a control.",
    ]
    for item in SITE["website"]["sidebar"]["contents"]:
        section, pages = (
            (item["section"], item["contents"]) if isinstance(item, dict) else ("Overview", [item])
        )
        lines += [
            "",
            f"## {section}",
            "",
            *(f"- [{title_of(p)[0]}]({url_of(p)}): {title_of(p)[1]}" for p in pages),
        ]
    return "\n".join(lines) + "\n"


def test_llms_txt_is_the_sidebar():
    assert (ROOT / "nbs/llms.txt").read_text() == llms_txt(), "python tests/test_docs.py writes it"
    assert url_of("00_core.ipynb").endswith("/core.html") and url_of("guide/sweep.md").endswith(
        "/guide/sweep.html"
    )


# Links


def anchors(text):
    "Each heading's anchor, as GitHub makes it, where Quarto makes the same."
    found = set()
    for heading in re.findall(
        r"^#+ +(.*?) *$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M
    ):
        github = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        quarto = re.sub(
            r"^[^a-z]+", "", "-".join(re.sub(r"[^\w\-. ]", "", heading.lower()).split())
        )
        if github == quarto:
            found.add(github)
    return found


def link_fault(path, target):
    "What is wrong with a link on a page, or None. Other people's addresses are not looked up."
    local = re.sub(rf"^{re.escape(REPO)}/(?:blob|tree)/main/", "", target)
    if local == target and re.match(r"https?:|mailto:", target):
        return None
    file, _, anchor = local.partition("#")
    to = (path if not file else (ROOT if local != target else path.parent) / file).resolve()
    if not to.exists():
        return "no such file"
    if (
        local == target
        and path.is_relative_to(ROOT / "nbs")
        and not to.is_relative_to(ROOT / "nbs")
    ):
        return "not on the site, where only nbs/ is; link to the repository"
    if anchor and anchor not in anchors(text_of(to)):
        return f"no such heading; there are {', '.join(sorted(anchors(text_of(to))))}"


def test_every_link_leads_somewhere():
    links = [
        (p, target)
        for p in (*PROSE, *NOTEBOOKS)
        for target in re.findall(r"\]\(<?([^)\s>]+)", without_code(text_of(p)))
        + re.findall(r'(?:src|href)="([^"]+)"', without_code(text_of(p)))
    ]
    assert not (
        faults := [
            f"{name_of(p)}: {target}: {why}"
            for p, target in links
            if (why := link_fault(p, target))
        ]
    ), "\n".join(faults)
    assert len(links) > 25 and {p for p, _ in links} >= set(GUIDE)
    page = ROOT / "nbs/guide/tutorial.md"
    for bad, why in (
        ("sweeep.md", "no such file"),
        ("sweep.md#nowhere", "no such heading"),
        ("../../README.md", "not on the site"),
        (f"{REPO}/blob/main/data/tiny-bass", "no such file"),
    ):
        assert why in link_fault(page, bad)


def test_every_picture_says_what_it_shows():
    pictures = [
        (p, alt, target)
        for p in (*PROSE, *NOTEBOOKS)
        for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)", without_code(text_of(p)))
    ]
    assert len(pictures) >= 3 and all(len(alt) > 30 for _, alt, _ in pictures), pictures


# Commands


def commands(code):
    "Each line of a shell block, as words; without comments and what is set before the command."
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words


@cache
def parameters(notebook):
    "The values in a notebook's parameters cell, and the class that checks them."
    from finetune_kit import dials

    cells = [
        ("".join(c["source"]), c["metadata"].get("tags", []))
        for c in json.loads((ROOT / "nbs" / notebook).read_text())["cells"]
        if c["cell_type"] == "code"
    ]
    values = {}
    for source, tags in cells:
        if "parameters" in tags:
            exec(source, {}, values)
    read = re.search(
        r"read_dials\(globals\(\)(?:, *(\w+))?\)", "\n".join(source for source, _ in cells)
    )
    return values, getattr(dials, read[1] or "RunConfig", None) if read else None


def dial_fault(notebook, given):
    "What is wrong with the dials that are given to a notebook."
    from finetune_kit.core import FineTuneError, choices
    from finetune_kit.dials import read_dials

    values, cls = parameters(Path(notebook).name)
    if unknown := [k for k in given if k not in values]:
        return f"unknown parameter {choices(unknown[0], values)}"
    try:
        cls and read_dials(
            values | given | dict(In=["# Parameters\n" + "".join(f"{k} = 0\n" for k in given)]), cls
        )
    except FineTuneError as e:
        return str(e)


@cache
def kit():
    import typer
    from finetune_kit.terminal import app

    return typer.main.get_command(app)


def kit_fault(words):
    "What is wrong with a call of finetune-kit. It is parsed, and not run."
    from finetune_kit.terminal import _parameters, pair_values

    name, *rest = pair_values(words[1:])
    if name not in kit().commands:
        return f"no command {name!r}; there are {', '.join(kit().commands)}"
    try:
        given = kit().commands[name].make_context(name, rest).params
    except Exception as e:
        return f"{type(e).__name__}: {getattr(e, 'message', e)}"
    notebook = (
        str(given["notebook"])
        if name == "run"
        else dict(train="train.ipynb", study="layer_study.ipynb", evaluate="evaluate.ipynb").get(
            name
        )
    )
    return notebook and dial_fault(
        notebook, _parameters([p.partition("=")[::2] for p in given["parameter"] or []])
    )


def papermill_fault(words):
    "The same of papermill, whose import takes long; so it is read by hand."

    def typed(text):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    if len(words) < 3 or len(words) % 3 or set(words[3::3]) - {"-p"}:
        return "it should read: papermill NOTEBOOK OUT [-p NAME VALUE]"
    return dial_fault(words[1], {k: typed(v) for k, v in zip(words[4::3], words[5::3])})


def command_fault(words):
    "What is wrong with a command, where it is one of ours, or None."
    if words[0] == "make":
        return (
            None
            if (
                unknown := set(words[1:])
                - set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
            )
            == set()
            else f"no target {unknown}"
        )
    if words[0] not in ("finetune-kit", "papermill"):
        return None
    if missing := [
        w
        for w in words
        if re.match(r"(nbs|data|benchmarks|experiments/(?!runs))/", w)
        and w != "nbs/my_evaluate.ipynb"
        and not (ROOT / w).exists()
    ]:
        return f"no file {missing[0]}"
    return kit_fault(words) if words[0] == "finetune-kit" else papermill_fault(words)


def inline_fault(words):
    "The same of a command in running text, which may lack its arguments."
    if words[0] == "-p":
        return (
            None
            if (unknown := set(words[1::3]) - {k for n in NOTEBOOKS for k in parameters(n.name)[0]})
            == set()
            else f"no dial {unknown}"
        )
    if words[0] != "finetune-kit" or len(words) == 1:
        return command_fault(words)
    of_all = {o for p in kit().params for o in p.opts} | {"--help"}
    if words[1].startswith("-"):
        return None if words[1] in of_all else f"no option {words[1]!r} of all commands"
    known = (
        {o for p in kit().commands[words[1]].params for o in p.opts} | {"--help"}
        if words[1] in kit().commands
        else {"--help"}
    )
    if words[1] not in (*kit().commands, "--help"):
        return f"no command {words[1]!r}"
    return next(
        (f"no option {w}" for w in words[1:] if w.startswith("--") and w not in known), None
    )


def test_every_command_is_one():
    said = [
        (p, words)
        for p in PROSE
        for language, code in blocks(text_of(p))
        if language == "sh"
        for words in commands(code)
    ]
    faults = [
        f"{name_of(p)}: {shlex.join(words)}: {why}"
        for p, words in said
        if (why := command_fault(words))
    ]
    short = [
        (p, code)
        for p in (*PROSE, *NOTEBOOKS)
        for code in re.findall(
            r"`((?:finetune-kit|papermill|make|-p) [^`\n]+)`",
            re.sub(r"^```.*?^```$", "", text_of(p), flags=re.M | re.S),
        )
        if "..." not in code and "…" not in code
    ]
    faults += [
        f"{name_of(p)}: `{code}`: {why}"
        for p, code in short
        for words in commands(code)
        if (why := inline_fault(words))
    ]
    assert not faults, "\n".join(faults)
    assert (
        sum(w[0] == "finetune-kit" for _, w in said) > 30
        and sum(w[0] == "papermill" for _, w in said) > 4
        and len(short) > 20
    )


@pytest.mark.parametrize(
    "line, why",
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
        ("finetune-kit study -p stream true -p precisions \"''\"", None),
        ("FINETUNE_KIT_API_KEY=x finetune-kit serve", None),
        ("finetune-kit run nbs/train.ipynb -p drop_layer=20-24 -o out.ipynb", None),
    ],
)
def test_a_wrong_command_is_found(line, why):
    [words] = commands(line)
    found = command_fault(words)
    assert why in (found or "") if why else found is None, found


# Python and YAML


@cache
def defined(module):
    "What a module of the kit defines: name → its node."
    found = {}
    for node in ast.parse((ROOT / "finetune_kit" / f"{module}.py").read_text()).body:
        if hasattr(node, "name"):
            found[node.name] = node
        for t in getattr(node, "targets", []):
            found |= {n.id: node for n in ast.walk(t) if isinstance(n, ast.Name)}
    return found


def python_faults(code, imported):
    "Imports from the kit that do not exist, and keywords that its functions do not take. `imported`: name → module, of the page so far."
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finetune_kit."):
            module = node.module.split(".")[1]
            if not (ROOT / "finetune_kit" / f"{module}.py").exists():
                yield f"no module {node.module}"
                continue
            for a in node.names:
                if a.name not in defined(module):
                    yield f"{node.module} has no {a.name}"
                else:
                    imported[a.asname or a.name] = defined(module)[a.name]
    for node in ast.walk(tree):
        made = (
            imported.get(node.func.id)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            else None
        )
        if isinstance(made, ast.FunctionDef):
            yield from (
                f"{made.name} takes no {k.arg}"
                for k in node.keywords
                if k.arg and k.arg not in {a.arg for a in (*made.args.args, *made.args.kwonlyargs)}
            )


def test_every_python_block_is_sound():
    faults, n = [], 0
    for p in PROSE:
        imported = {}
        for language, code in blocks(text_of(p)):
            if language != "python":
                continue
            n += 1
            try:
                faults += [f"{name_of(p)}: {why}" for why in python_faults(code, imported)]
            except SyntaxError as e:
                faults.append(f"{name_of(p)}: {e}")
    assert not faults and n > 10, "\n".join(faults)
    assert [
        *python_faults(
            "from finetune_kit.data import load_row, load_rows\nload_rows('a', max_row=3)", {}
        )
    ] == ["finetune_kit.data has no load_row", "load_rows takes no max_row"]


def test_every_sweep_is_sound():
    from finetune_kit.sweep_spec import SweepSpec

    found = 0
    for p in GUIDE:
        for language, code in blocks(text_of(p)):
            if language != "yaml":
                continue
            spec, found = SweepSpec(**(dict(name="sweep") | yaml.safe_load(code))), found + 1
            faults = [why for one in spec.combinations() if (why := dial_fault(spec.notebook, one))]
            assert not faults and re.match(r"# [\w-]+\.yaml\n", code), (name_of(p), faults)
    assert found >= 2


# Run

SKIPPED = [  # What is not run here, and why
    (r"git clone|cd ", "the checkout is here"),
    (r"make ", "sets up an environment, or runs the tests that this is one of"),
    (r"\. \.venv", "the tests have an environment"),
    (r"pip install", "installs packages"),
    (r".*(Qwen/|openai/)", "needs the hub"),
    (r".*/models/", "there is no such folder"),
    (r"sbatch|.* --slurm$", "needs a cluster"),
    (r".* --go$", "sends to the Hub"),
    (r".*0\.0\.0\.0", "listens on every interface"),
    (r"finetune-kit demo", "needs gradio, and does not end"),
    (r".*/drop_sweep.yaml --jobs", "24 runs; the page's own sweep is run"),
    (r"papermill nbs/prune_heal", "12 trainings; tests/test_study.py runs it"),
]
SMALL = {  # Dials that are added to what a page says, so that it takes a minute; nothing else is changed in a command
    "train.ipynb": "-p max_steps 5 -p eval_every 0 -p eval_items 8 -p max_new_tokens 4 -p backend transformers",
    "layer_study.ipynb": "-p items 8 -p greedy_k 1 -p blocks false -p precisions bfloat16",
    "evaluate.ipynb": "-p items 8 -p max_new_tokens 4 -p backend transformers",
}
SUBSTITUTED = [
    ("Qwen/Qwen3-0.6B, config: hub", "data/tiny-base, max_steps: 5"),
    ("[18, 19, 20, 21, 22]", "[5, 7]"),
    ("max_steps: 60, eval_every: 0, eval_items: 60", "max_steps: 5, eval_every: 0, eval_items: 8"),
    ("seed: [0, 1]", "seed: [0]"),
]  # In YAML
NEEDS = {
    "README.md": (10,),
    "serving.md": (7,),
}  # Runs that a page takes for granted: the base without this layer, untrained


def shortened(line):
    words = shlex.split(line, comments=True)
    notebook = (
        dict(study="layer_study.ipynb", train="train.ipynb", evaluate="evaluate.ipynb").get(
            words[1]
        )
        if words[0] == "finetune-kit" and len(words) > 1
        else None
    )
    notebook = (
        notebook or next((Path(w).name for w in words if w.endswith(".ipynb")), None)
        if words[0] in ("finetune-kit", "papermill")
        else None
    )
    return " ".join(filter(None, (shlex.join(words), SMALL.get(notebook))))


class Reader:
    "Somebody who does what a page says, in a folder of their own."

    def __init__(self, folder, port):
        self.folder, self.port, self.namespace, self.servers = folder, port, {}, []
        self.env = os.environ | dict(
            FINETUNE_KIT_RUNS=str(folder / "runs"),
            PYTHONPATH=str(ROOT),
            OMP_NUM_THREADS="1",
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        )

    def sh(self, line):
        if why := next((why for pattern, why in SKIPPED if re.match(pattern, line)), None):
            return print(f"not run ({why}): {line}")
        if line.startswith("finetune-kit serve"):
            return self.serve(line)
        done = subprocess.run(
            ["bash", "-c", shortened(line)],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2400,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        print(f"$ {line}\n{done.stdout[-1500:]}")

    def serve(self, line):
        words = shlex.split(line, comments=True)
        words += [] if "--port" in words else ["--port", str(self.port)]
        self.servers.append(
            subprocess.Popen(
                words,
                cwd=self.folder,
                env=self.env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        for _ in range(600):
            assert self.servers[-1].poll() is None, f"{line}: it ended"
            try:
                return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"{line}: it never answered")

    def read(self, text):
        for language, code in blocks(text.replace("8000", str(self.port))):
            if language == "sh":
                for line in filter(
                    None, (re.sub(r"\s+#.*", "", o).strip() for o in code.splitlines())
                ):
                    self.sh(line)
            elif language == "python":
                exec(compile(code, "page", "exec"), self.namespace)
            elif language == "yaml":
                for a, b in SUBSTITUTED:
                    code = code.replace(a, b)
                (self.folder / re.match(r"# (\S+)", code)[1]).write_text(code)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    "A folder with the notebooks, data and sweeps of the checkout, and a registry of its own; what a page registers is forgotten afterwards."
    from finetune_kit.read import loaders
    from finetune_kit.metrics import metrics
    from finetune_kit.architecture import LAYERS
    from finetune_kit.training import methods

    before = [(r, dict(r)) for r in (loaders, metrics, LAYERS, methods)]
    for name in ("nbs", "data", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("runs"))
    shutil.copy(ROOT / "data/domains/chat/test.jsonl", tmp_path / "my.jsonl")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    r = Reader(tmp_path, port)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_KIT_RUNS", r.env["FINETUNE_KIT_RUNS"])
    try:
        yield r
    finally:
        for s in r.servers:
            s.terminate()
            s.wait(60)
        for registry, was in before:
            registry.clear()
            registry.update(was)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PROSE if p.name != "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_a_page_does_what_it_says(page, reader):
    from test_evaluate import make_runs

    if page.name in NEEDS:
        make_runs(reader.folder / "runs", NEEDS[page.name])
    reader.read(text_of(page))


if __name__ == "__main__":
    (ROOT / "nbs/llms.txt").write_text(llms_txt())
