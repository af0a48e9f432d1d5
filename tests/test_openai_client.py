"""What the public `openai` client sends, by default and by its common arguments, and its errors.

Likelihoods are compared with a naive twin: plain transformers, one forward pass over the text.
"""

import asyncio
import math
import re
import socket
import time

import pytest
from conftest import ROOT

openai = pytest.importorskip("openai")
KEY = "sk-test"
QUESTION = [dict(role="user", content="Where does the otter live?")]


@pytest.fixture(scope="module")
def url():
    from finetune_kit.serve import create_app, serving

    models = {"base": ROOT / "data/tiny-base"}
    app = create_app(models, runs=False, api_key=KEY, body_seconds=1)
    with serving(app, quiet_seconds=1) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def twin():
    "Plain transformers: the log-probabilities of all tokens, after each token of a text."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "data/tiny-base"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def logprobs_after(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    return tokenizer, logprobs_after


def chat(client, **changes):
    given = dict(model="base", messages=QUESTION, max_tokens=12) | changes
    return client.chat.completions.create(**given)


def complete(client, **changes):
    given = dict(model="base", prompt="The otter lives", max_tokens=4) | changes
    return client.completions.create(**given)


# What is taken, and changes nothing
NEUTRAL = [
    dict(n=1),
    dict(response_format=dict(type="text")),
    dict(store=False),
    dict(store=True, metadata=dict(study="cut 7")),
    dict(seed=-1),
    dict(seed=2**63 - 1),
    dict(logprobs=None),
    dict(logprobs=False),
    dict(logit_bias={}),
    dict(frequency_penalty=0, presence_penalty=0.0),
    dict(user="me", safety_identifier="me", prompt_cache_key="k", service_tier="auto"),
    dict(stop=None, stream=None, top_p=None, temperature=None, n=None, seed=None),
    dict(tools=[], tool_choice="none", parallel_tool_calls=True),
    dict(modalities=["text"], audio=None, prediction=None, reasoning_effort="none"),
    dict(max_tokens=None, max_completion_tokens=12),
    dict(extra_body=dict(chat_template_kwargs={})),
]


@pytest.mark.parametrize("given", NEUTRAL, ids=str)
def test_what_clients_send_by_default_is_taken(client, given):
    expected = chat(client).choices[0]
    answer = chat(client, **given).choices
    assert len(answer) == 1
    assert answer[0].message == expected.message
    assert answer[0].finish_reason == expected.finish_reason


def test_roles_names_and_answers_sent_back(client):
    system = [dict(role="system", content="Answer briefly.")]
    developer = [dict(role="developer", content="Answer briefly.", name="Ada")]
    by_system = chat(client, messages=system + QUESTION).choices[0].message
    by_developer = chat(client, messages=developer + QUESTION).choices[0].message
    assert by_developer.content == by_system.content

    named = [dict(role="user", name="Ada", content=QUESTION[0]["content"])]
    message = chat(client, messages=named).choices[0].message
    follow_up = [*QUESTION, message, dict(role="user", content="And what does it eat?")]
    assert chat(client, messages=follow_up).choices[0].message.content
    empty = [*QUESTION, dict(role="assistant", content=None), *QUESTION]
    assert chat(client, messages=empty).choices[0].message.content


def test_several_answers_each_with_its_own_draws(client):
    drawn = dict(temperature=2.0, max_tokens=16)
    choices = chat(client, n=3, seed=5, **drawn).choices
    texts = [choice.message.content for choice in choices]
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    for place, text in enumerate(texts):
        alone = chat(client, seed=5 + place, **drawn).choices[0].message.content
        assert alone == text

    usage = chat(client, n=3).usage
    assert usage.prompt_tokens == chat(client).usage.prompt_tokens
    prompts = ["The otter", "The puffin"]
    choices = complete(client, prompt=prompts, n=2, best_of=2).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert choices[0].text == choices[1].text != choices[2].text


def test_a_bias_and_a_penalty_change_the_answer(client, twin):
    tokenizer, _ = twin
    [token] = tokenizer(" rivers", add_special_tokens=False).input_ids
    text = chat(client).choices[0].message.content
    assert " rivers" in text
    assert " rivers" not in chat(client, logit_bias={str(token): -100}).choices[0].message.content
    forced = complete(client, logit_bias={token: 100}, max_tokens=3).choices[0].text
    assert forced == " rivers" * 3
    varied = complete(client, logit_bias={token: 100}, frequency_penalty=2, max_tokens=60)
    assert varied.choices[0].text != " rivers" * 60


def test_logprobs_of_a_chat_are_the_models(client, twin):
    tokenizer, logprobs_after = twin
    choice = chat(client, logprobs=True, top_logprobs=5).choices[0]
    text = "<s><|user|>Where does the otter live?<|end|><|assistant|>"
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    answer = tokenizer(choice.message.content, add_special_tokens=False).input_ids
    expected = logprobs_after(prompt + answer)[len(prompt) - 1 :]

    tokens = choice.logprobs.content
    assert b"".join(bytes(each.bytes) for each in tokens).decode() == choice.message.content
    assert len(tokens) == len(answer)
    for place, each in enumerate(tokens):
        assert each.token == tokenizer.decode([answer[place]])
        assert each.logprob == pytest.approx(expected[place][answer[place]].item(), abs=1e-4)
        likeliest = expected[place].topk(5)
        assert [top.token for top in each.top_logprobs] == [
            tokenizer.decode([token]) for token in likeliest.indices.tolist()
        ]
        found = [top.logprob for top in each.top_logprobs]
        assert found == pytest.approx(likeliest.values.tolist(), abs=1e-4)

    # Drawn tokens have the model's own likelihood, whatever temperature and bias
    drawn = chat(client, logprobs=True, temperature=2.0, seed=1, logit_bias={"9": 5}).choices[0]
    answer = tokenizer(drawn.message.content, add_special_tokens=False).input_ids
    first = drawn.logprobs.content[0]
    [token] = [token for token in range(768) if tokenizer.decode([token]) == first.token][:1]
    assert first.logprob == pytest.approx(expected[0][token].item(), abs=1e-4)
    assert first.top_logprobs == []


def test_echo_scores_a_text(client, twin):
    tokenizer, logprobs_after = twin
    text = "The otter lives in rivers. Zoë’s 🦦 eats fish."
    ids = tokenizer(text).input_ids
    expected = logprobs_after(ids)
    given = dict(prompt=text, max_tokens=0, echo=True, logprobs=3)
    choice = complete(client, **given).choices[0]
    assert choice.text == text
    logprobs = choice.logprobs
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.tokens) == len(ids)
    for place in range(1, len(ids)):
        score = expected[place - 1][ids[place]].item()
        assert logprobs.token_logprobs[place] == pytest.approx(score, abs=1e-4)
        best = max(logprobs.top_logprobs[place].values())
        assert best == pytest.approx(expected[place - 1].max().item(), abs=1e-4)
    assert logprobs.text_offset[-1] == len(text) - 1

    by_ids = complete(client, **given | dict(prompt=ids)).choices[0]
    assert by_ids.logprobs.token_logprobs == logprobs.token_logprobs
    assert by_ids.text == f"<s>{text}"

    # The answer's scores come after the prompt's
    longer = complete(client, prompt=ids[:4], echo=True, logprobs=0, max_tokens=3).choices[0]
    found = longer.logprobs.token_logprobs[1:4]
    assert found == pytest.approx(logprobs.token_logprobs[1:4], abs=1e-4)
    assert len(longer.logprobs.tokens) == 4 + 3
    assert longer.text.startswith("<s>The otter lives")


def test_prompts_in_tokens(client, twin):
    tokenizer, _ = twin
    texts = ["The otter lives", "The puffin eats"]
    by_text = [choice.text for choice in complete(client, prompt=texts).choices]
    ids = [tokenizer(text).input_ids for text in texts]
    assert [choice.text for choice in complete(client, prompt=ids).choices] == by_text
    assert complete(client, prompt=ids[0]).choices[0].text == by_text[0]
    assert complete(client, best_of=1, suffix=None, echo=False).choices[0].text == by_text[0]
    echoed = complete(client, echo=True).choices[0].text
    assert echoed == f"{texts[0]}{by_text[0]}"


def test_streams_carry_the_same(client):
    "Text, scores, several answers, usage: put together they are the answer that comes at once."
    wants = dict(n=2, logprobs=True, top_logprobs=1, temperature=1.5, seed=3, stop=["ver"])
    whole = chat(client, **wants)
    texts = ["", ""]
    tokens = [[], []]
    roles = [[], []]
    for chunk in chat(client, stream=True, stream_options=dict(include_usage=True), **wants):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.delta.role:
                roles[choice.index].append(choice.delta.role)
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.content
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [choice.logprobs.content for choice in whole.choices]
    assert roles == [["assistant"], ["assistant"]]
    assert usage == whole.usage

    wants = dict(echo=True, logprobs=1, max_tokens=6)
    whole = complete(client, **wants).choices[0]
    text = ""
    offsets = []
    for chunk in complete(client, stream=True, **wants):
        choice = chunk.choices[0]
        text += choice.text
        offsets += choice.logprobs.text_offset if choice.logprobs else []
    assert text == whole.text
    assert offsets == whole.logprobs.text_offset


def test_the_clients_helpers(url, client):
    "Its stream helper, `parse` without a schema, raw responses, and the asynchronous client."
    expected = chat(client).choices[0].message.content
    given = dict(model="base", messages=QUESTION, max_tokens=12)
    with client.chat.completions.stream(**given, logprobs=True) as stream:
        final = stream.get_final_completion().choices[0]
    assert (final.message.role, final.message.content) == ("assistant", expected)
    assert len(final.logprobs.content) > 3
    assert client.chat.completions.parse(**given).choices[0].message.content == expected
    raw = client.chat.completions.with_raw_response.create(**given)
    assert raw.parse().choices[0].message.content == expected

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as other:
            stream = await other.chat.completions.create(**given, stream=True)
            return [chunk.choices[0].delta.content or "" async for chunk in stream]

    assert "".join(asyncio.run(ask())) == expected


SCHEMA = dict(type="json_schema", json_schema=dict(name="a", schema={}))
IMAGE = dict(type="image_url", image_url=dict(url="http://localhost/a.png"))
TOOL = dict(type="function", function=dict(name="f", parameters={}))
THINKING = dict(extra_body=dict(chat_template_kwargs=dict(enable_thinking=True)))
REFUSED = [
    ("tools", dict(tools=[TOOL])),
    ("functions", dict(functions=[dict(name="f")])),
    ("tool_choice", dict(tool_choice="required")),
    ("response_format.type", dict(response_format=dict(type="json_object"))),
    ("response_format", dict(response_format=SCHEMA)),
    ("modalities[0]", dict(modalities=["audio"])),
    ("audio", dict(audio=dict(voice="alloy", format="wav"))),
    ("prediction", dict(prediction=dict(type="content", content="a"))),
    ("web_search_options", dict(web_search_options={})),
    ("verbosity", dict(verbosity="low")),
    ("reasoning_effort", dict(reasoning_effort="high")),
    ("top_logprobs", dict(top_logprobs=2)),
    ("top_logprobs", dict(logprobs=True, top_logprobs=21)),
    ("temperature", dict(temperature=-0.1)),
    ("n", dict(n=0)),
    ("n", dict(n=65)),
    ("seed", dict(seed=2**63)),
    ("stop", dict(stop="")),
    ("max_tokens", dict(max_tokens=0)),
    ("max_tokens", dict(max_tokens=10_000)),
    ("logit_bias", dict(logit_bias={"100000": 1})),
    ("logit_bias", dict(logit_bias={"1": 101})),
    ("messages", dict(messages=[])),
    ("messages[0].content", dict(messages=[dict(role="user", content=[IMAGE])])),
    ("messages[0].content", dict(messages=[dict(role="user", content=None)])),
    ("messages[0].role", dict(messages=[dict(role="tool", tool_call_id="1", content="a")])),
    ("top_k", dict(extra_body=dict(top_k=5))),
    ("domain", dict(extra_body=dict(domain="math"))),
    ("chat_template_kwargs", THINKING),
]


@pytest.mark.parametrize("param, given", REFUSED, ids=str)
def test_what_is_not_supported_is_refused_by_name(client, param, given):
    with pytest.raises(openai.BadRequestError) as raised:
        chat(client, **given)
    error = raised.value
    assert error.status_code == 400
    assert (error.param or "").startswith(param)
    assert error.type == "invalid_request_error"
    assert error.code
    words = re.findall("[a-z_]+", error.param)
    assert any(word in error.body["message"] for word in words)


@pytest.mark.parametrize(
    "param, given",
    [
        ("prompt", dict(prompt=[5, 100_000])),
        ("prompt", dict(prompt=[])),
        ("prompt", dict(prompt="")),
        ("best_of", dict(best_of=2)),
        ("suffix", dict(suffix=" end")),
        ("max_tokens", dict(max_tokens=0)),
        ("logprobs", dict(logprobs=21)),
        ("n", dict(prompt=["a"] * 40, n=2)),
    ],
    ids=str,
)
def test_plain_text_too(client, param, given):
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, **given)
    assert (raised.value.param or "").startswith(param)


def test_errors_are_the_clients_own(url, client):
    "Each exception class of the client for what it stands for, with OpenAI's fields."

    def code_of(error, call):
        with pytest.raises(error) as raised:
            call()
        assert type(raised.value) is error
        assert raised.value.body["message"]
        return raised.value.code

    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    long = [dict(role="user", content="word " * 600)]
    assert code_of(openai.AuthenticationError, stranger.models.list) == "invalid_api_key"
    assert code_of(openai.NotFoundError, lambda: chat(client, model="x")) == "model_not_found"
    assert code_of(openai.NotFoundError, lambda: client.models.retrieve("x")) == "model_not_found"
    too_long = code_of(openai.BadRequestError, lambda: chat(client, messages=long))
    assert too_long == "context_length_exceeded"
    unknown_route = lambda: client.embeddings.create(model="base", input="a")  # noqa: E731
    assert code_of(openai.NotFoundError, unknown_route) == "not_found"
    # A refused stream is an exception at once, not a line of it
    refused = code_of(openai.BadRequestError, lambda: chat(client, stream=True, messages=long))
    assert refused == "context_length_exceeded"


def test_half_sent_requests_and_silent_connections_end(url):
    "A connection without a request, half of the headers, half of a body: each is given up."
    host, port = url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 500\r\n"
    ).encode()
    start = time.time()
    answers = []
    for sent in (b"", head, head + b'\r\n{"model": '):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(sent)
            answers.append(b"".join(iter(lambda c=connection: c.recv(4096), b"")))
    assert time.time() - start < 20
    assert answers[:2] == [b"", b""]
    assert b" 408 " in answers[2].splitlines()[0]
    assert b"body_timeout" in answers[2]


def test_a_stream_that_fails_or_is_left_is_not_counted_as_answered(url, client):
    import httpx

    def counts():
        text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        found = {}
        for line in text.splitlines():
            if line.startswith("finetune_kit_requests_total{"):
                found[line.split('"')[1]] = float(line.split()[-1])
        return found

    before = counts()
    list(complete(client, stream=True))
    with complete(client, stream=True, max_tokens=450, temperature=5.0, seed=0) as stream:
        next(iter(stream))
    deadline = time.time() + 30
    while counts().get("left", 0) == before.get("left", 0) and time.time() < deadline:
        time.sleep(0.1)
    after = counts()
    assert after["answered"] - before.get("answered", 0) == 1
    assert after["left"] - before.get("left", 0) == 1
    assert math.isfinite(after["left"])
