"""The service as its clients see it: a real server on loopback and the public `openai` client.

And requests that nobody would send on purpose.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

openai = pytest.importorskip("openai")
KEY = "sk-test"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    "A server with the base, a run of the registry that cannot be loaded, and a small queue."
    from finetune_kit.engine import Engine
    from finetune_kit.example_runs import THREE_LAYERS, example_record
    from finetune_kit.serve import create_app, serving

    d = tmp_path_factory.mktemp("served")
    os.environ["FINETUNE_KIT_RUNS"] = str(d)
    broken = d / "train-broken-1"
    (broken / "model").mkdir(parents=True)
    (broken / "items.jsonl").write_text("")
    record = example_record("train-broken-1", THREE_LAYERS)
    (broken / "run.json").write_text(json.dumps(record))
    app = create_app(
        {"base": ROOT / "data/tiny-base"},
        api_key=KEY,
        max_body=20_000,
        max_tokens=450,
        engine=Engine(batch_size=16, max_queue=40),
    )
    with serving(app) as url:
        yield url, app
    del os.environ["FINETUNE_KIT_RUNS"]
    assert not app.state.service.engine.thread.is_alive()


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


def streamed_text(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_models_are_listed(client):
    assert {m.id for m in client.models.list()} == {"base", "train-broken-1"}
    assert client.models.retrieve("base").owned_by == "finetune_kit"


def test_chat_streams_and_stops(client, own):
    question = "Where does the otter live?"
    response = ask(client, question, max_tokens=12)
    text = response.choices[0].message.content
    usage = response.usage
    assert text.strip() == own([[dict(role="user", content=question)]], 12)[0]
    assert response.choices[0].finish_reason == "stop"
    assert usage.completion_tokens <= 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

    with_usage = dict(stream=True, stream_options=dict(include_usage=True))
    chunks = list(ask(client, question, max_tokens=12, **with_usage))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text
    assert sum(map(bool, pieces)) > 2
    assert chunks[-1].usage.completion_tokens == usage.completion_tokens

    assert ask(client, question, max_tokens=2).choices[0].finish_reason == "length"
    stopped = ask(client, question, max_tokens=12, stop=[text[5:8]]).choices[0]
    assert stopped.message.content == text[: text.find(text[5:8])]
    assert stopped.finish_reason == "stop"


def test_text_is_continued(client, own):
    prompts = ["The otter lives in", "The puffin eats"]
    response = client.completions.create(model="base", prompt=prompts, max_tokens=4)
    assert [choice.text.strip() for choice in response.choices] == own(prompts, 4)


def test_draws_come_again_with_their_seed(client):
    draws = []
    for seed in (1, 1, 2, 3):
        response = ask(client, "Hello!", temperature=2.0, seed=seed, max_tokens=16)
        draws.append(response.choices[0].message.content)
    assert draws[0] == draws[1]
    assert len(set(draws)) > 1


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
        ("BadRequestError", 400, "top_k", dict(extra_body=dict(top_k=1))),
        ("APIStatusError", 413, "20,000", dict(messages=[dict(role="user", content="a" * 30_000)])),
        ("InternalServerError", 503, "cannot be loaded", dict(model="train-broken-1")),
        ("BadRequestError", 400, "1..450", dict(max_tokens=451)),
    ],
)
def test_errors_say_what_is_wrong(client, error, status, text, change):
    body = dict(model="base", messages=[dict(role="user", content="a")]) | change
    with pytest.raises(getattr(openai, error)) as raised:
        client.chat.completions.create(**body)
    assert raised.value.status_code == status
    assert text in raised.value.body["message"]
    assert ask(client, "Hello!", max_tokens=2).choices, "the service goes on"


def test_key_and_json(service):
    import httpx

    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=service[0] + "/v1", api_key="wrong", max_retries=0).models.list()
    bad = httpx.post(
        service[0] + "/v1/chat/completions",
        content='{"model": ',
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    assert bad.status_code == 400
    assert bad.json()["error"]["code"] == "malformed"
    assert httpx.get(service[0] + "/health").json()["status"] == "ok"


def test_strangers_names_and_pages(service):
    "A page of another name (DNS rebinding) gets nothing, nor does anybody without the key."
    import httpx

    url = service[0]
    rebound = httpx.get(f"{url}/health", headers=dict(Host="evil.example"))
    assert rebound.status_code == 421
    assert rebound.json()["error"]["code"] == "unknown_host"
    for path in ("/docs", "/openapi.json", "/metrics", "/v1/models"):
        assert httpx.get(url + path).status_code == 401
        authorized = httpx.get(url + path, headers={"Authorization": f"Bearer {KEY}"})
        assert authorized.status_code == 200
    assert httpx.get(f"{url}/redoc").status_code == 404


def test_no_reply_names_a_file_of_the_server(service, client):
    "Of a run that cannot be loaded, of a folder without a model, of a name that is a path."
    folder = os.environ["FINETUNE_KIT_RUNS"]
    for name in ("train-broken-1", "nothing", "../..", "/etc/passwd", "base/../base"):
        with pytest.raises(openai.APIStatusError) as raised:
            client.completions.create(model=name, prompt="a", max_tokens=1)
        text = raised.value.response.text
        assert folder not in text
        assert str(ROOT) not in text
        assert "config.json" not in text


def test_many_at_once_answer_as_alone(service, client, own):
    "32 at the same time, half of them streams: each answer is its single-request twin's."
    words = ["moon", "gate", "duck", "wolf", "rain", "cup", "hill", "boat"]
    triples = list(zip(words * 2, words[1:] * 3, words[3:] * 4, strict=False))
    questions = []
    for verb in ("Repeat", "Reverse"):
        questions += [f"{verb}: {' '.join(triple)}" for triple in triples]
    questions = questions[:32]

    def answer(place):
        if place % 2:
            return ask(client, questions[place], max_tokens=10).choices[0].message.content
        return streamed_text(ask(client, questions[place], max_tokens=10, stream=True))

    engine = service[1].state.service.engine
    engine.batches.clear()
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(answer, range(32)))
    alone = own([[dict(role="user", content=question)] for question in questions], 10)
    assert [text.strip() for text in together] == alone
    assert max(engine.batches) > 4, "they did share batches"


def test_a_client_that_leaves_ends_its_answer(service, client, monkeypatch):
    "A stream that is closed, and a call that is given up, stop long before their 450 tokens."
    from finetune_kit import engine, steps

    requests_begun = []
    prepare = engine.prepare
    read_tokens = steps.read_tokens

    def prepare_and_note(job, *args):
        is_ready = prepare(job, *args)
        requests_begun.append(job.request)
        return is_ready

    def read_slowly(*args):
        "Else a fast machine ends 450 tokens before the client gives up."
        time.sleep(0.01)
        return read_tokens(*args)

    monkeypatch.setattr(engine, "prepare", prepare_and_note)
    monkeypatch.setattr(steps, "read_tokens", read_slowly)
    long = dict(model="base", prompt="Once", max_tokens=450, temperature=5.0, seed=0)
    stream = client.completions.create(**long, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(**long)
    deadline = time.time() + 30
    while service[1].state.service.engine.running and time.time() < deadline:
        time.sleep(0.05)
    ask(client, "Hello!", max_tokens=1)
    abandoned = [request for request in requests_begun if request.max_new_tokens == 450]
    assert abandoned
    for request in abandoned:
        assert request.reason == "cancelled"
        assert len(request.new_ids) < 450


def test_metrics_count_tokens(service, client):
    import httpx

    def written():
        text = httpx.get(service[0] + "/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        for line in text.splitlines():
            if line.startswith('finetune_kit_tokens_total{kind="completion"}'):
                return float(line.split()[-1])
        return 0.0

    before = written()
    used = ask(client, "Hello!", max_tokens=3).usage.completion_tokens
    assert written() == before + used > 0


def test_a_full_queue_says_so(service, client):
    models = service[1].state.service.engine.models
    may_load = threading.Event()
    load = models.load

    def load_later(*args, **options):
        may_load.wait(60)
        return load(*args, **options)

    def status_of_one(_):
        try:
            ask(client, "Hello!", max_tokens=1)
        except openai.RateLimitError as error:
            assert error.response.headers["Retry-After"] == "1"
            return 429
        return 200

    models.load = load_later
    models.loaded.clear()
    with ThreadPoolExecutor(60) as pool:
        futures = [pool.submit(status_of_one, place) for place in range(60)]
        deadline = time.time() + 60
        while sum(future.done() for future in futures) < 4 and time.time() < deadline:
            time.sleep(0.1)
        may_load.set()
        statuses = [future.result() for future in futures]
    models.load = load
    assert set(statuses) == {200, 429}
    assert statuses.count(429) >= 4


@pytest.mark.slow
def test_no_request_breaks_the_service(service):
    "schemathesis makes requests from the OpenAPI document: none may end in a server error."
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(
        service[0] + "/openapi.json", headers={"Authorization": f"Bearer {KEY}"}
    )
    statuses = []

    def attack(operation, mode, names_model=False):
        @given(operation.ok().as_strategy(generation_mode=mode))
        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        def send(case):
            if names_model and isinstance(case.body, dict):
                case.body = case.body | dict(model="base", max_tokens=2)
            response = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=300)
            statuses.append(response.status_code)
            if response.status_code >= 500:
                assert response.json()["error"]["code"] == "model_not_loaded", response.text

        send()

    for operation in schema.get_all_operations():
        attack(operation, schemathesis.GenerationMode.POSITIVE)
        if operation.ok().body:
            # A made-up model would end nearly all of them
            attack(operation, schemathesis.GenerationMode.POSITIVE, names_model=True)
            attack(operation, schemathesis.GenerationMode.NEGATIVE)
    assert len(statuses) > 50
    assert {200, 400} <= set(statuses)
    assert 422 not in statuses


@pytest.fixture
def served_by_command():
    "The URL of `finetune-kit serve` in a process of its own, and that process."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [
        "serve",
        "--port",
        str(port),
        "--no-runs",
        "--model",
        f"base={ROOT / 'data/tiny-base'}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "from finetune_kit.cli import main; main()", *serve],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait(60)


def wait_until_up(client, process):
    deadline = time.time() + 300
    while True:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            assert process.poll() is None, "the service did not start"
            assert time.time() < deadline, "the service did not start"
            time.sleep(0.5)


@pytest.mark.slow
def test_a_minute_of_32_streams(served_by_command):
    "Every answer is the one that a request alone gets, and the process does not grow."
    import psutil

    url, process = served_by_command
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=300)
    wait_until_up(client, process)
    words = ["moon", "gate", "duck", "wolf", "rain", "cup", "hill", "boat"] * 2
    questions = []
    for n in range(32):
        verb = "Repeat" if n % 2 else "Reverse"
        questions.append(f"{verb}: {' '.join(words[n % 8 : n % 8 + 2 + n // 8])}")

    def stream(question):
        return streamed_text(ask(client, question, max_tokens=16, stream=True))

    alone = []
    for question in questions:
        alone.append(ask(client, question, max_tokens=16).choices[0].message.content)
    assert len(set(alone)) > 8

    memory = []  # (seconds since the start, MiB)
    start = time.time()
    with ThreadPoolExecutor(32) as pool:
        while time.time() - start < 75:  # the first fifteen seconds warm up
            assert list(pool.map(stream, questions)) == alone
            mib = psutil.Process(process.pid).memory_info().rss / 2**20
            memory.append((time.time() - start, mib))
    warm = [mib for seconds, mib in memory if seconds > 15]
    print(f"resident memory {warm[0]:.0f} MiB after 15 s, {warm[-1]:.0f} after 75 s")
    assert len(warm) > 4
    assert warm[-1] < warm[0] + 16, memory
