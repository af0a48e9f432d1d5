"The page to chat with, in a real browser: type, send, read the answer."

import pytest
from browser import Page, wait_for
from conftest import ROOT


@pytest.mark.slow
def test_chat_page(tmp_path):
    "Two models side by side answer what is typed, each as the model answers by itself."
    pytest.importorskip("gradio", reason="the extra `demo` is not installed")
    from finetune_kit.demo import demo
    from finetune_kit.infer import generate
    from finetune_kit.model import load_model

    base = ROOT / "data/tiny-base"
    question = "Where does the puffin live?"
    model, tokenizer = load_model(base, backend="transformers")
    [answer] = generate(model, tokenizer, [[dict(role="user", content=question)]], 128)
    interface = demo(dict(base=base, again=base), runs=False)
    _, url, _ = interface.launch(prevent_thread_lock=True, quiet=True)
    with Page(tmp_path / "profile", 1200, 900) as page:
        page.open(url)
        wait_for(lambda: page.evaluate("document.querySelectorAll('textarea').length"), "the page")
        page.evaluate("document.querySelector('textarea[placeholder*=otter]').focus()")
        page.type(question)
        try:
            wait_for(lambda: page.text().count(answer.strip()) >= 2, f"{answer!r}, twice,")
        except AssertionError as error:
            raise AssertionError(f"{error}; the page says {page.text()!r}") from None
        finally:
            page.picture(tmp_path / "chat.png")
        fits = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert fits, "something runs out of the page at the side"
        assert (tmp_path / "chat.png").stat().st_size > 20_000
