"""Requests to the service at the same time against one after another, and the time to a stream's first piece.

    python benchmarks/serve.py [--requests 16] [--tokens 32] [--rounds 3] [--model data/tiny-base] [--beside]

Ratios of alternating rounds on one server; `--beside` measures `transformers serve` on the same model in the same run.
"""

import argparse
import contextlib
import platform
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from finetune_kit.core import ROOT, resolve_path
from finetune_kit.serve import create_app, serving


def questions(n):
    return [
        f"The {animal} {'lives' if i % 2 else 'eats'}"
        for i, animal in enumerate(pd.read_csv(ROOT / "data/species.csv").name[:n])
    ]


def timed(f):
    start = time.perf_counter()
    got = f()
    return time.perf_counter() - start, got


def first_piece(client, model, text, tokens):
    "Seconds to the first piece of text."
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[dict(role="user", content=text)],
        max_tokens=tokens,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            break
    seconds = time.perf_counter() - start
    stream.close()
    return seconds


@contextlib.contextmanager
def transformers_serve(model):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("transformers")),
            "serve",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--dtype",
            "float32",
            "--device",
            "cpu",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            if process.poll() is not None:
                sys.exit("transformers serve ended")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--requests", type=int, default=16)
    a.add_argument("--tokens", type=int, default=32)
    a.add_argument("--rounds", type=int, default=3)
    a.add_argument("--model", default="data/tiny-base")
    a.add_argument("--beside", action="store_true")
    a = a.parse_args()
    asked = questions(a.requests)
    with serving(create_app({"m": a.model}, runs=False)) as url:
        client = openai.OpenAI(base_url=url + "/v1", api_key="-", timeout=600)

        def one(q):
            return client.completions.create(model="m", prompt=q, max_tokens=a.tokens)

        def together():
            with ThreadPoolExecutor(a.requests) as pool:
                return list(pool.map(one, asked))

        one(asked[0])
        alone_s, together_s, same, tokens = [], [], True, 0
        for _ in range(a.rounds):
            s, alone = timed(lambda: [one(q) for q in asked])
            alone_s.append(s)
            s, got = timed(together)
            together_s.append(s)
            same &= [r.choices[0].text for r in alone] == [r.choices[0].text for r in got]
            tokens = sum(r.usage.completion_tokens for r in alone)
        firsts = [first_piece(client, "m", q, a.tokens) for q in asked[:8]]
        rounds = list(zip(alone_s, together_s))
        print(
            f"{a.requests} requests, {tokens} new tokens in all, {a.model}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}; answers {'equal' if same else 'DIFFER'}"
        )
        print(
            f"one after another {statistics.median(alone_s):.2f} s ({tokens / statistics.median(alone_s):.0f} tokens/s), together {statistics.median(together_s):.2f} s ({tokens / statistics.median(together_s):.0f} tokens/s)"
        )
        print(
            f"faster by {statistics.median(x / y for x, y in rounds):.2f}x (rounds: {', '.join(f'{x / y:.2f}' for x, y in rounds)})"
        )
        print(
            f"first piece of a stream after {statistics.median(firsts) * 1000:.0f} ms (median of {len(firsts)})"
        )
        if not a.beside:
            return
        with transformers_serve(resolve_path(a.model)) as other:
            theirs = openai.OpenAI(base_url=other + "/v1", api_key="-", timeout=600)
            name = str(resolve_path(a.model))
            first_piece(theirs, name, asked[0], a.tokens)
            pairs = [
                (first_piece(client, "m", q, a.tokens), first_piece(theirs, name, q, a.tokens))
                for q in asked[:8]
            ]
            print(
                f"beside transformers serve, alternating: {statistics.median(x for x, _ in pairs) * 1000:.0f} ms here, {statistics.median(y for _, y in pairs) * 1000:.0f} ms there; ratio {statistics.median(y / x for x, y in pairs):.2f}"
            )


if __name__ == "__main__":
    main()
