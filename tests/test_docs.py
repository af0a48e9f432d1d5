"The site's configuration, and every link and picture of its pages."

import re
from configparser import ConfigParser

import pytest
import yaml
from docs import (
    GUIDE,
    NOTEBOOKS,
    PROSE,
    REPO,
    ROOT,
    SITE,
    link_fault,
    links_of,
    llms_txt,
    name_of,
    pages_in,
    text_of,
    url_of,
    without_code,
)


def test_the_sidebar_lists_every_page():
    pages = list(pages_in(SITE["website"]["sidebar"]["contents"]))
    site = ROOT / "nbs"
    files = [path.relative_to(site).as_posix() for path in (*NOTEBOOKS, *GUIDE)]
    assert sorted(pages) == sorted(files), "the sidebar and nbs/ list the same pages, each once"
    numbered = [page for page in pages if page[:1].isdigit()]
    assert pages[:2] == ["index.ipynb", "guide/tutorial.md"]
    assert numbered == sorted(numbered), "in reading order"
    assert pages[-len(numbered) :] == numbered, "the library last"


def test_nbdev_finds_the_configuration():
    top = yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text())
    assert top["metadata-files"] == ["../_quarto.yml"]
    assert top["project"]["type"] == "website"


def test_the_configuration_is_complete():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    ini = parser["DEFAULT"]
    site = SITE["website"]
    page = SITE["format"]["html"]
    assert SITE["project"]["output-dir"] == ini["doc_path"], "nbdev_docs moves _proc/<doc_path>"
    assert site["repo-url"] == ini["git_url"]
    assert site["repo-branch"] == ini["branch"]
    assert site["repo-subdir"] == ini["nbs_path"]
    assert site["site-url"] == ini["doc_host"] + ini["doc_baseurl"]
    assert site["description"] == ini["description"]
    assert set(site["repo-actions"]) == {"edit", "source", "issue"}
    assert site["search"]
    assert set(page["theme"]) == {"light", "dark"}
    assert page["code-tools"]
    assert page["toc"]
    assert ini["procs"] == "finetune_kit.report:SitePage", "keeps what stands below the titles"
    for resource in SITE["project"]["resources"]:
        assert (ROOT / "nbs" / resource).exists(), resource


def test_llms_txt_is_the_sidebar():
    assert (ROOT / "nbs/llms.txt").read_text() == llms_txt(), "python tests/docs.py writes it"
    assert url_of("000_core.ipynb").endswith("/core.html")
    assert url_of("guide/sweep.md").endswith("/guide/sweep.html")


def test_every_link_leads_somewhere():
    faults = []
    pages_with_links = set()
    n_links = 0
    for path in (*PROSE, *NOTEBOOKS):
        for target in links_of(path):
            n_links += 1
            pages_with_links.add(path)
            fault = link_fault(path, target)
            if fault:
                faults.append(f"{name_of(path)}: {target}: {fault}")
    assert not faults, "\n".join(faults)
    assert n_links > 25
    assert pages_with_links >= set(GUIDE)


@pytest.mark.parametrize(
    "target, fault",
    [
        ("sweeep.md", "no such file"),
        ("sweep.md#nowhere", "no such heading"),
        ("../../README.md", "not on the site"),
        (f"{REPO}/blob/main/data/tiny-bass", "no such file"),
    ],
)
def test_a_wrong_link_is_noticed(target, fault):
    assert fault in link_fault(ROOT / "nbs/guide/tutorial.md", target)


def test_every_picture_says_what_it_shows():
    descriptions = []
    for path in (*PROSE, *NOTEBOOKS):
        descriptions += re.findall(r"!\[([^\]]*)\]\([^)\s]+", without_code(text_of(path)))
    assert len(descriptions) >= 3
    for description in descriptions:
        assert len(description) > 30, description
