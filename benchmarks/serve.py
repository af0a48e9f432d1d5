"""Requests to the service at the same time against one after another; time to the first text.

    python benchmarks/serve.py [--requests 16] [--tokens 32] [--rounds 3] [--beside]

Ratios of alternating rounds on one server. `--beside` measures `transformers serve` on the same
model in the same run. `--model` takes a folder or a hub id.
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
from typing import NamedTuple

import httpx
import openai
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from finetune_kit.core import ROOT, resolve_path
from finetune_kit.serve import create_app, serving

N_STREAMS = 8  # answers whose first text is waited for
NAME = "m"  # the model's, at the kit's service


def sentence_beginnings(n):
    "Of facts that the embedded model has read: what the requests ask to go on from."
    animals = pd.read_csv(ROOT / "data/species.csv").name[:n]
    return [f"The {animal} {'lives' if i % 2 else 'eats'}" for i, animal in enumerate(animals)]


def openai_client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="-", timeout=600)


# Together against one after another


class Round(NamedTuple):
    "The same requests, sent in both ways."

    alone: float  # seconds, one after another
    together: float  # seconds, all at the same time
    n_tokens: int
    is_equal: bool  # the answers


def texts_of(completions):
    return [completion.choices[0].text for completion in completions]


def measure_rounds(client, prompts, max_tokens, n_rounds):
    def complete(prompt):
        return client.completions.create(model=NAME, prompt=prompt, max_tokens=max_tokens)

    complete(prompts[0])  # loads the model
    rounds = []
    for _ in range(n_rounds):
        start = time.perf_counter()
        alone = [complete(prompt) for prompt in prompts]
        alone_end = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            together = list(pool.map(complete, prompts))
        together_end = time.perf_counter()

        n_tokens = sum(completion.usage.completion_tokens for completion in alone)
        is_equal = texts_of(alone) == texts_of(together)
        rounds.append(Round(alone_end - start, together_end - alone_end, n_tokens, is_equal))
    return rounds


def report_rounds(rounds, args):
    n_tokens = rounds[-1].n_tokens
    equal = "equal" if all(each.is_equal for each in rounds) else "DIFFER"
    alone = statistics.median(each.alone for each in rounds)
    together = statistics.median(each.together for each in rounds)
    ratios = [each.alone / each.together for each in rounds]
    by_round = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"""\
{args.requests} requests, {n_tokens} new tokens in all, {args.model}, \
{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}; answers {equal}
one after another {alone:.2f} s ({n_tokens / alone:.0f} tokens/s), \
together {together:.2f} s ({n_tokens / together:.0f} tokens/s)
faster by {statistics.median(ratios):.2f}x (rounds: {by_round})"""


# The first text of a stream


def seconds_to_text(client, model, prompt, max_tokens):
    "How long a chat's first text takes."
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[dict(role="user", content=prompt)],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            break
    seconds = time.perf_counter() - start
    stream.close()
    return seconds


def milliseconds(seconds):
    "The median of times, as text."
    return f"{statistics.median(seconds) * 1000:.0f} ms"


# transformers serve


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(url, process):
    "Until the server answers, five minutes at most."
    for _ in range(600):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        if process.poll() is not None:
            sys.exit(f"transformers serve ended with exit code {process.returncode}")
        time.sleep(0.5)
    sys.exit(f"transformers serve does not answer at {url}/health")


@contextlib.contextmanager
def transformers_serve(model):  # yields the URL
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()


def compare_first_texts(client, prompts, args):
    "The kit's service and `transformers serve`, prompt by prompt in turn."
    model = str(resolve_path(args.model))
    kit_seconds = []
    peer_seconds = []
    with transformers_serve(model) as url:
        peer = openai_client(url)
        seconds_to_text(peer, model, prompts[0], args.tokens)  # loads the model
        for prompt in prompts[:N_STREAMS]:
            kit_seconds.append(seconds_to_text(client, NAME, prompt, args.tokens))
            peer_seconds.append(seconds_to_text(peer, model, prompt, args.tokens))
    ratios = [theirs / ours for ours, theirs in zip(kit_seconds, peer_seconds, strict=True)]
    return (
        f"beside transformers serve, alternating: {milliseconds(kit_seconds)} here, "
        f"{milliseconds(peer_seconds)} there; ratio {statistics.median(ratios):.2f}"
    )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=16, help="requests in a round")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds")
    parser.add_argument("--model", default="data/tiny-base", help="folder or hub id")
    parser.add_argument("--beside", action="store_true", help="measure transformers serve too")
    return parser.parse_args()


def main():
    args = parse_args()
    prompts = sentence_beginnings(args.requests)
    with serving(create_app({NAME: args.model}, runs=False)) as url:
        client = openai_client(url)
        print(report_rounds(measure_rounds(client, prompts, args.tokens, args.rounds), args))
        first_texts = [
            seconds_to_text(client, NAME, prompt, args.tokens) for prompt in prompts[:N_STREAMS]
        ]
        median = f"median of {len(first_texts)}"
        print(f"first piece of a stream after {milliseconds(first_texts)} ({median})")
        if args.beside:
            print(compare_first_texts(client, prompts, args))


if __name__ == "__main__":
    main()
