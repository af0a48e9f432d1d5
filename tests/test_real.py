"Weights and text that nobody here made."
import html, json, re

import pytest
from conftest import p, papermill


def test_reference_perplexities_of_stories260K(real):
    "Independent figures: fp32, the first 200 stories, each alone with its BOS, cut at 512 ids, mean over 79,210 predicted tokens."
    import torch
    from finetune_kit.chat import batches, encode_rows
    from finetune_kit.data import load_rows
    from finetune_kit.metrics import scores
    from finetune_kit.model import load_model
    from finetune_kit.surgery import drop, skipping
    model, tok = load_model(real/"stories260K", backend="transformers", dtype=torch.float32)
    rows = load_rows(real/"tinystories_clean.json")[:200]
    bs = batches(encode_rows(rows, tok, max_length=512), 8)
    def nll(plan):
        with skipping(model, plan): df = scores(model, bs)
        assert df.n_tokens.sum() == 79210
        return df.nll.sum()/df.n_tokens.sum()
    assert nll(drop(model, None)) == pytest.approx(1.4766105, abs=2e-6)
    for layer, expect in enumerate((4.6725456, 2.7709516, 2.2642010, 2.3986497, 2.3993564)): assert nll(drop(model, layer)) == pytest.approx(expect, abs=5e-6), layer


def test_row_counts_match_a_plain_reading(real):
    from finetune_kit.data import load_rows
    lines = lambda name: sum(1 for o in (real/name).read_text().splitlines() if o.strip())
    for name, n in [("gsm8k/train.jsonl", lines("gsm8k/train.jsonl")), ("gsm8k/test.jsonl", lines("gsm8k/test.jsonl")), ("v1_sft_demo.jsonl", lines("v1_sft_demo.jsonl")),
                    *[(f, len(json.loads((real/f).read_text()))) for f in ("alpaca_en_demo.json", "rasbt_instruction_1100.json", "tinystories_clean.json")]]:
        rows = load_rows(real/name)
        assert len(rows) + len(rows.rejects) == n and all("duplicate" in r["reason"] for r in rows.rejects)


@pytest.mark.parametrize("data, max_rows", [("tinystories_clean.json", 300), ("gsm8k/train.jsonl", 300)])
def test_train_on_real_weights_and_text(real, data, max_rows, tmp_path):
    done = papermill(tmp_path/"o.ipynb", tmp_path/"runs", *p(model=real/"stories260K", data=real/data, drop_layer=2, max_steps=25, batch_size=4, max_rows=max_rows, eval_items=16, eval_every=0))
    assert done.returncode == 0, done.stderr[-3000:]
    folder = next((tmp_path/"runs").glob("train-drop2-*"))
    m = json.loads((folder/"run.json").read_text())["metrics"]
    assert m["cut"]["nll"] > m["base"]["nll"] and m["healed_minus_cut"]["nll"]["hi"] < 0
    page = (folder/"report.html").read_text()
    if data.startswith("gsm8k"):
        assert m["healed"]["exact_match"] is not None
        assert "### Instruction:" in html.unescape(re.sub("<[^>]*>", "", page))             # no template of its own: Alpaca
        left_out = [json.loads(o) for o in (folder/"rejects.jsonl").read_text().splitlines()]
        assert left_out and all("too long" in r["reason"] and r["source"] for r in left_out)
    else: assert m["healed"]["exact_match"] is None and "Once upon a time" in page
