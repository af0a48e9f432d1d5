"""A short request beside many long streams: time to its first token, and the streams' throughput.

    python benchmarks/fair.py [--streams 30] [--tokens 200] [--rounds 2] [--shorts 8]

Before and after in one run: whole batches of 16, each answered to its end before the next one
begins (what models get whose requests cannot join), against the steps of `finetune_kit.steps`,
which requests join and leave. Each has a server process of its own; rounds alternate.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from finetune_kit.chat import end_ids
from finetune_kit.core import ROOT, resolve_path

NAME = "m"
WAYS = ("whole batches", "steps")
SHORT = "Where does the otter live?"


def serve(way, model):
    "Serve until the input ends; the first line of the output is the URL."
    from finetune_kit import engine
    from finetune_kit.serve import create_app, serving
    from finetune_kit.steps import WholeBatch

    batch_size = 32
    if way == "whole batches":
        engine.running_batch = WholeBatch
        batch_size = 16
    running = engine.Engine(batch_size=batch_size)
    with serving(create_app({NAME: model}, runs=False, engine=running)) as url:
        print(url, flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def server(way, model):  # yields the URL
    command = [sys.executable, __file__, "--serve", way, "--model", model]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ, **pipes)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(120)


def no_ends(model):
    "A bias that keeps answers from ending, so that each has all of its tokens."
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_path(model))
    return {str(token): -100 for token in end_ids(tokenizer)}


async def stream(client, text, n_tokens, bias, first=None):
    "Read one answer; its tokens. `first` is called with the seconds to the first text."
    start = time.perf_counter()
    body = dict(
        model=NAME,
        messages=[dict(role="user", content=text)],
        max_tokens=n_tokens,
        logit_bias=bias,
        stream=True,
        stream_options=dict(include_usage=True),
    )
    usage = None
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if first and '"content"' in line:
                first(time.perf_counter() - start)
                first = None
            if '"usage": {' in line:
                usage = json.loads(line.removeprefix("data: "))["usage"]
    return usage["completion_tokens"]


class Round(NamedTuple):
    "One round of one way."

    alone: list[float]  # seconds to the first text, with nothing else to do
    beside: list[float]  # beside the streams
    tokens_per_s: float  # of the streams, without short requests
    with_shorts: float  # of the streams while short requests come


async def measure(url, args, bias):
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=limits) as client:
        texts = [f"Tell me about animal number {n}." for n in range(args.streams)]

        async def streams():
            start = time.perf_counter()
            answers = [stream(client, text, args.tokens, bias) for text in texts]
            return sum(await asyncio.gather(*answers)) / (time.perf_counter() - start)

        await stream(client, SHORT, 2, {})  # loads the model
        alone, beside = [], []
        for _ in range(args.shorts):
            await stream(client, SHORT, 4, {}, alone.append)
        tokens_per_s = await streams()
        running = asyncio.ensure_future(streams())
        await asyncio.sleep(0.5)
        for _ in range(args.shorts):
            if running.done():
                break
            await stream(client, SHORT, 4, {}, beside.append)
        return Round(alone, beside, tokens_per_s, await running)


def report(way, rounds):
    alone = statistics.median([seconds for each in rounds for seconds in each.alone])
    beside = [seconds for each in rounds for seconds in each.beside]
    ratio = statistics.median(beside) / alone
    speed = ", ".join(f"{each.tokens_per_s:.0f}" for each in rounds)
    with_shorts = ", ".join(f"{each.with_shorts:.0f}" for each in rounds)
    return (
        f"{way}: first token alone {alone * 1000:.0f} ms, beside the streams "
        f"{statistics.median(beside) * 1000:.0f} ms (median of {len(beside)}, longest "
        f"{max(beside) * 1000:.0f}): {ratio:.1f} times; "
        f"streams {speed} tokens/s, with the short requests {with_shorts}"
    )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=30, help="long answers at the same time")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=2, help="alternating rounds")
    parser.add_argument("--shorts", type=int, default=8, help="short requests in each round")
    parser.add_argument("--model", default="data/tiny-base", help="folder or hub id")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.serve:
        serve(args.serve, args.model)
        return
    bias = no_ends(args.model)
    rounds = {way: [] for way in WAYS}
    with contextlib.ExitStack() as stack:
        urls = {way: stack.enter_context(server(way, args.model)) for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                rounds[way].append(asyncio.run(measure(urls[way], args, bias)))
                print(f"round {len(rounds[way])}:", report(way, rounds[way][-1:]), flush=True)
    print(
        f"{args.streams} streams of {args.tokens} tokens, {args.model}, "
        f"{torch.get_num_threads()} threads a process, {platform.machine()}, "
        f"torch {torch.__version__}"
    )
    for way in WAYS:
        print(report(way, rounds[way]))


if __name__ == "__main__":
    main()
