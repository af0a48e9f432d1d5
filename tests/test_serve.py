"The service as its clients see it: a real server on loopback, the public `openai` client, and requests that nobody would send on purpose."

import json, os, threading, time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

openai = pytest.importorskip("openai")
KEY = "sk-test"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    "A server with the base, a run of the registry that cannot be loaded, and a small queue."
    from finetune_kit.engine import Engine
    from finetune_kit.serve import create_app, serving

    d = tmp_path_factory.mktemp("served")
    os.environ["FINETUNE_KIT_RUNS"] = str(d)
    (d / "train-broken-1" / "model").mkdir(parents=True)
    (d / "train-broken-1" / "items.jsonl").write_text("")
    from finetune_kit.dials import RunConfig

    (d / "train-broken-1" / "run.json").write_text(
        json.dumps(
            dict(
                id="train-broken-1",
                experiment="train",
                status="done",
                config=RunConfig().model_dump(),
                artifacts=dict(model="model"),
            )
        )
    )
    app = create_app(
        {"base": ROOT / "data/tiny-base"},
        api_key=KEY,
        max_body=20_000,
        max_tokens=450,
        engine=Engine(max_queue=40, wait_ms=30),
    )
    with serving(app) as url:
        yield url, app
    del os.environ["FINETUNE_KIT_RUNS"]
    assert not app.state.engine.thread.is_alive()


@pytest.fixture(scope="module")
def client(service):
    return openai.OpenAI(base_url=service[0] + "/v1", api_key=KEY, max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def own():
    "The same model, asked without a service."
    from finetune_kit.infer import generate
    from finetune_kit.model import load_model

    model, tok = load_model(ROOT / "data/tiny-base", backend="transformers")
    return lambda prompts, n: generate(model, tok, prompts, n, batch_size=1)


def ask(client, text, **more):
    return client.chat.completions.create(
        model="base", messages=[dict(role="user", content=text)], **more
    )


def test_models_are_listed(client):
    assert {m.id for m in client.models.list()} == {"base", "train-broken-1"}
    assert client.models.retrieve("base").owned_by == "finetune_kit"


def test_chat_streams_and_stops(client, own):
    question = "Where does the otter live?"
    whole = ask(client, question, max_tokens=12)
    said = whole.choices[0].message.content
    assert (
        said.strip() == own([[dict(role="user", content=question)]], 12)[0]
        and whole.choices[0].finish_reason == "stop"
    )
    assert (
        whole.usage.completion_tokens <= 12
        and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    )
    chunks = list(
        ask(client, question, max_tokens=12, stream=True, stream_options=dict(include_usage=True))
    )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert (
        "".join(pieces) == said
        and sum(map(bool, pieces)) > 2
        and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )
    assert ask(client, question, max_tokens=2).choices[0].finish_reason == "length"
    cut = ask(client, question, max_tokens=12, stop=[said[5:8]])
    assert (
        cut.choices[0].message.content == said[: said.find(said[5:8])]
        and cut.choices[0].finish_reason == "stop"
    )


def test_text_is_continued(client, own):
    done = client.completions.create(
        model="base", prompt=["The otter lives in", "The puffin eats"], max_tokens=4
    )
    assert [c.text.strip() for c in done.choices] == own(
        ["The otter lives in", "The puffin eats"], 4
    )


def test_draws_come_again_with_their_seed(client):
    draws = [
        ask(client, "Hello!", temperature=2.0, seed=s, max_tokens=16).choices[0].message.content
        for s in (1, 1, 2, 3)
    ]
    assert draws[0] == draws[1] and len(set(draws)) > 1


@pytest.mark.parametrize(
    "error, status, text, change",
    [
        ("NotFoundError", 404, "choices: base", dict(model="bass")),
        ("NotFoundError", 404, "unknown model", dict(model="../../etc/passwd")),
        (
            "BadRequestError",
            400,
            "context of 512",
            dict(messages=[dict(role="user", content="word " * 600)]),
        ),
        ("UnprocessableEntityError", 422, "logit_bias", dict(logit_bias={"1": 1})),
        ("APIStatusError", 413, "20,000", dict(messages=[dict(role="user", content="a" * 30_000)])),
        ("InternalServerError", 503, "cannot be loaded", dict(model="train-broken-1")),
        ("BadRequestError", 400, "1..450", dict(max_tokens=451)),
    ],
)
def test_errors_say_what_is_wrong(client, error, status, text, change):
    with pytest.raises(getattr(openai, error)) as e:
        client.chat.completions.create(
            **dict(model="base", messages=[dict(role="user", content="a")]) | change
        )
    assert e.value.status_code == status and text in e.value.body["message"]
    assert ask(client, "Hello!", max_tokens=2).choices  # it is still there


def test_key_and_json(service):
    import httpx

    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=service[0] + "/v1", api_key="wrong", max_retries=0).models.list()
    bad = httpx.post(
        service[0] + "/v1/chat/completions",
        content='{"model": ',
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    assert bad.status_code == 422 and bad.json()["error"]["code"] == "malformed"
    assert httpx.get(service[0] + "/health").json()["status"] == "ok"


def test_many_at_once_answer_as_alone(service, client, own):
    "32 at the same time, half of them streams: each answer is its single-request twin's."
    words = "moon gate duck wolf rain cup hill boat".split()
    asked = [
        f"{verb}: {a} {b} {c}"
        for verb in ("Repeat", "Reverse")
        for a, b, c in zip(words * 2, words[1:] * 3, words[3:] * 4)
    ][:32]

    def one(i):
        if i % 2:
            return ask(client, asked[i], max_tokens=10).choices[0].message.content
        return "".join(
            c.choices[0].delta.content or ""
            for c in ask(client, asked[i], max_tokens=10, stream=True)
        )

    service[1].state.engine.batches.clear()
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(one, range(32)))
    assert [t.strip() for t in together] == own([[dict(role="user", content=q)] for q in asked], 10)
    assert max(service[1].state.engine.batches) > 4  # they did share batches


def test_a_client_that_leaves_ends_its_answer(service, client, monkeypatch):
    "A stream that is closed, and a call that is given up, stop long before their 450 tokens."
    import finetune_kit.serve as serve

    seen, complete = [], serve.complete

    def slowly(
        model, tok, requests
    ):  # else a fast machine ends 450 tokens before the client gives up
        seen.extend(requests)
        hook = model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
        try:
            return complete(model, tok, requests)
        finally:
            hook.remove()

    monkeypatch.setattr(serve, "complete", slowly)
    long = dict(model="base", prompt="Once", max_tokens=450, temperature=5.0, seed=0)
    stream = client.completions.create(**long, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(**long)
    ask(client, "Hello!", max_tokens=1)  # comes after both
    cut = [
        r for r in seen if r.max_new_tokens == 450
    ]  # one that was given up in the queue is never begun
    assert cut and all(r.reason == "cancelled" and len(r.new_ids) < 450 for r in cut)


def test_metrics_count_tokens(service, client):
    import httpx

    def written():
        text = httpx.get(service[0] + "/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        return float(
            next(
                (
                    l
                    for l in text.splitlines()
                    if l.startswith('finetune_kit_tokens_total{kind="completion"}')
                ),
                "0",
            ).split()[-1]
        )

    before = written()
    used = ask(client, "Hello!", max_tokens=3).usage.completion_tokens
    assert written() == before + used > 0


def test_a_full_queue_says_so(service, client):
    engine, held = service[1].state.engine, threading.Event()
    load, engine.load = engine.load, lambda *a, **k: held.wait(60) and load(*a, **k)
    loaded = dict(engine.loaded)
    engine.loaded.clear()
    with ThreadPoolExecutor(60) as pool:

        def one(i):
            try:
                return ask(client, "Hello!", max_tokens=1) and 200
            except openai.RateLimitError as e:
                assert e.response.headers["Retry-After"] == "1"
                return 429

        futures = [pool.submit(one, i) for i in range(60)]
        deadline = time.time() + 60
        while sum(f.done() for f in futures) < 4 and time.time() < deadline:
            time.sleep(0.1)
        held.set()
        statuses = [f.result() for f in futures]
    engine.load = load
    assert set(statuses) == {200, 429} and statuses.count(429) >= 4 and loaded


@pytest.mark.slow
def test_no_request_breaks_the_service(service):
    "schemathesis makes requests from the OpenAPI document: none may end in a server error."
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(service[0] + "/openapi.json")
    tried = []

    def attack(operation, mode, change=lambda case: None):
        @given(operation.ok().as_strategy(generation_mode=mode))
        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        def each(case):
            change(case)
            response = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=300)
            tried.append(response.status_code)
            assert (
                response.status_code < 500 or response.json()["error"]["code"] == "model_not_loaded"
            ), response.text

        each()

    def served(case):
        case.body = (
            case.body | dict(model="base", max_tokens=2)
            if isinstance(case.body, dict)
            else case.body
        )

    for operation in schema.get_all_operations():
        attack(operation, schemathesis.GenerationMode.POSITIVE)
        if not operation.ok().body:
            continue
        attack(
            operation, schemathesis.GenerationMode.POSITIVE, served
        )  # a made-up model would end nearly all of them
        attack(operation, schemathesis.GenerationMode.NEGATIVE)
    assert len(tried) > 50 and {200, 422} <= set(tried)


@pytest.mark.slow
def test_a_minute_of_32_streams(tmp_path):
    "Every answer is the one that a request alone gets, and the process does not grow."
    import psutil, socket, subprocess, sys

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from finetune_kit.cli import main; main()",
            "serve",
            "--port",
            str(port),
            "--no-runs",
            "--model",
            f"base={ROOT / 'data/tiny-base'}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=300
    )
    asked = [
        f"{'Repeat' if n % 2 else 'Reverse'}: {' '.join(('moon gate duck wolf rain cup hill boat'.split() * 2)[n % 8 : n % 8 + 2 + n // 8])}"
        for n in range(32)
    ]

    def stream(q):
        return "".join(
            c.choices[0].delta.content or ""
            for c in ask(client, q, max_tokens=16, stream=True)
            if c.choices
        )

    try:
        deadline = time.time() + 300
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert process.poll() is None and time.time() < deadline, (
                    "the service did not start"
                )
                time.sleep(0.5)
        twins = {q: ask(client, q, max_tokens=16).choices[0].message.content for q in asked}
        assert len(set(twins.values())) > 8
        memory, wrong, rounds, start = [], [], 0, time.time()
        with ThreadPoolExecutor(32) as pool:
            while time.time() - start < 75:  # the first fifteen seconds warm up
                wrong += [q for q, said in zip(asked, pool.map(stream, asked)) if said != twins[q]]
                rounds += 1
                memory.append(
                    (time.time() - start, psutil.Process(process.pid).memory_info().rss / 2**20)
                )
        warm = [m for t, m in memory if t > 15]
        print(
            f"{32 * rounds} streams; resident memory {warm[0]:.0f} MiB after 15 s, {warm[-1]:.0f} after 75 s"
        )
        assert not wrong and len(warm) > 4 and warm[-1] < warm[0] + 16, (wrong[:3], memory)
    finally:
        process.terminate()
        process.wait(60)
