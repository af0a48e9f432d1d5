"""The docs as data, for the tests that check them: pages, their text, code, links.

`python tests/docs.py` writes nbs/llms.txt.
"""

import json
import re
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text())
REPO = SITE["website"]["repo-url"]
GUIDE = sorted((ROOT / "nbs/guide").glob("*.md"))
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDE]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@cache
def text_of(path):
    "A page's Markdown; of a notebook, that of its Markdown cells."
    if path.suffix == ".md":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def blocks(text):
    "(language, code) of the fenced blocks; one that begins with an import is Python."
    for language, code in FENCE.findall(text):
        if not language and re.match(r"(from|import) ", code):
            language = "python"
        yield language, code


def without_blocks(text):
    return FENCE.sub("", text)


def without_code(text):
    return re.sub(r"`[^`\n]+`", "``", without_blocks(text))


# The sidebar


def pages_in(contents):
    "The pages of a part of the sidebar, in order."
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        else:
            yield from pages_in(entry["contents"])


def title_of(page):
    "Title and description, as nbdev and Quarto read them."
    text = text_of(ROOT / "nbs" / page)
    if page.endswith(".md"):
        head = yaml.safe_load(text.split("---")[1])
        return head["title"], head["description"]
    title = re.search(r"^# (.*)", text)[1]
    return title, re.search(r"^> (.*)", text, re.M)[1]


def url_of(page):
    path = re.sub(r"(?:^|(?<=/))[0-9]+_", "", page).rsplit(".", 1)[0]
    return f"{SITE['website']['site-url']}/{path}.html"


def llms_txt():
    "An index for language models (llmstxt.org), out of the sidebar."
    lines = [
        f"# {SITE['website']['title']}",
        "",
        f"> {SITE['website']['description']}",
        "",
        "A research kit of notebooks, with a package and a command line made from them. "
        "A layer plan takes layers out of a model, a study measures what each is worth, "
        "a run fine-tunes what is left beside a control.",
    ]
    for entry in SITE["website"]["sidebar"]["contents"]:
        is_section = isinstance(entry, dict)
        lines += ["", f"## {entry['section'] if is_section else 'Overview'}", ""]
        for page in pages_in([entry]):
            title, description = title_of(page)
            lines.append(f"- [{title}]({url_of(page)}): {description}")
    return "\n".join(lines) + "\n"


# Links


def anchors(text):
    "Each heading's anchor, where GitHub and Quarto make the same."
    names = set()
    for heading in re.findall(r"^#+ +(.*?) *$", without_blocks(text), re.M):
        github = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        words = re.sub(r"[^\w\-. ]", "", heading.lower()).split()
        quarto = re.sub(r"^[^a-z]+", "", "-".join(words))
        if github == quarto:
            names.add(github)
    return names


def links_of(path):
    "Where a page leads: Markdown's links, and those of HTML."
    text = without_code(text_of(path))
    return re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def link_fault(path, target):
    "What is wrong with a link on a page, or None. Other people's addresses are not looked up."
    in_repository = re.sub(rf"^{re.escape(REPO)}/(?:blob|tree)/main/", "", target)
    is_relative = in_repository == target
    if is_relative and re.match(r"https?:|mailto:", target):
        return None
    file, _, anchor = in_repository.partition("#")
    folder = path.parent if is_relative else ROOT
    goal = (folder / file).resolve() if file else path.resolve()
    site = ROOT / "nbs"
    if not goal.exists():
        return "no such file"
    if is_relative and path.is_relative_to(site) and not goal.is_relative_to(site):
        return "not on the site, where only nbs/ is; link to the repository"
    if anchor and anchor not in anchors(text_of(goal)):
        return f"no such heading; there are {', '.join(sorted(anchors(text_of(goal))))}"
    return None


if __name__ == "__main__":
    (ROOT / "nbs/llms.txt").write_text(llms_txt())
