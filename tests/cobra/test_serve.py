"""The server, over real connections: OpenAI's own client, what is refused, clients that go away, the page."""

import asyncio
import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator

import pytest

import cobra
from tests.cobra.serve_ways import NAME, fresh, image, linked, lively, png, prompt, user, wait_until

fastapi = pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from cobra.serve.app import create_app  # noqa: E402
from cobra.serve.engine import Engine  # noqa: E402
from cobra.serve.limits import Limits  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return lively(layers=cobra.PRESETS["tiny"].lm.layers[:2])


@contextlib.contextmanager
def serving(
    model, limits: Limits | None = None, api_key: str | None = None, is_endless: bool = False, **options
) -> Iterator[tuple[str, Engine]]:
    """A server in a thread: its address, and its engine, whose answers may never come to an end by themselves."""
    engine = Engine(model, **options)
    if is_endless:
        engine._end_id = -1
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app = create_app(engine, NAME, limits, api_key)
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive() and not engine.is_running


@pytest.fixture(scope="module")
def server(model):
    with serving(model, Limits(images=5, pixels=10**6, prompt_tokens=2000, new_tokens=400, body_bytes=2**20)) as made:
        yield made


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def ask(client, *messages, **options):
    return client.chat.completions.create(
        **{"model": NAME, "messages": list(messages), "temperature": 0, "max_tokens": 10, **options}
    )


def test_the_clients_answer_is_the_models(model, client):
    plain = ask(client, {"role": "user", "content": "What is it?"})
    assert plain.choices[0].message.content == model.answer("What is it?", max_new_tokens=10)
    seen = ask(client, user("What is it?", image(png(1)), image(png(2))))
    conversation = prompt(model, [png(1), png(2), "What is it?"])
    assert seen.choices[0].message.content == fresh(model, conversation, 10)
    assert seen.usage.prompt_tokens == conversation.num_tokens
    assert seen.usage.total_tokens == conversation.num_tokens + seen.usage.completion_tokens
    assert (seen.object, seen.model, seen.choices[0].message.role) == ("chat.completion", NAME, "assistant")


def test_a_conversation_goes_on_from_what_was_read(model, client):
    first = ask(client, user("What is picture 77?", image(png(77))))
    said = first.choices[0].message.content
    messages = [user("What is picture 77?", image(png(77))), {"role": "assistant", "content": said}, user("And now?")]
    second = ask(client, *messages)
    conversation = prompt(model, [png(77), "What is picture 77?"], said, "And now?")
    assert second.choices[0].message.content == fresh(model, conversation, 10)
    known = conversation.num_tokens - conversation.segments[-1].num_tokens
    assert second.usage.prompt_tokens_details.cached_tokens == known
    assert second.usage.state_bytes == model.lm.allocate_state(1).nbytes


def test_a_system_message_stands_in_front(model, client):
    told = ask(client, {"role": "system", "content": "Be brief."}, user("Hello", image(png(5))))
    conversation = prompt(model, ["Be brief.", "\n\n", "Hello", png(5)])
    assert told.choices[0].message.content == fresh(model, conversation, 10)


def test_pieces_of_a_stream_join_to_the_answer(client):
    whole = ask(client, user("Tell me"), max_tokens=20)
    pieces = list(ask(client, user("Tell me"), max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == whole.choices[0].message.content
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]][-1] == whole.choices[0].finish_reason
    assert pieces[-1].choices == [] and pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({piece.id for piece in pieces}) == 1 and len(pieces) > 5
    assert all(piece.usage is None for piece in ask(client, user("Tell me"), stream=True))


def test_stop_seed_and_length(client):
    whole = ask(client, user("Tell me")).choices[0].message.content
    cut = ask(client, user("Tell me"), stop=whole[4]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(whole[4])], "stop")
    drawn = [ask(client, user("Tell me"), temperature=2, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert ask(client, user("Tell me"), max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3


def test_many_clients_at_once_get_their_own_answers(model, server):
    async def together() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="none")
        asked = [ask(client, user(f"Question {number}", image(png(number)))) for number in range(20)]
        return [told.choices[0].message.content for told in await asyncio.gather(*asked)]

    expected = [fresh(model, prompt(model, [png(number), f"Question {number}"]), 10) for number in range(20)]
    assert asyncio.run(together()) == expected


def test_models_are_listed(client):
    assert [one.id for one in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError, match="the one that is served"):
        client.models.retrieve("other")


WRONG = [
    ({"model": "other"}, 404, "no model 'other'", "model"),
    ({"messages": []}, 400, "at least 1 item", "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "last message", "messages"),
    ({"messages": [user("a"), user("b")]}, 400, "message 2 is of role user", "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "'user'", "messages.0.role"),
    ({"messages": [{"role": "user", "content": 7}]}, 400, "valid string", "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "image_url", "messages.0.content.0"),
    ({"messages": [user(linked("https://a.org/b.png"))]}, 400, "https URLs are not", None),
    ({"messages": [user(linked("file:///etc/passwd"))]}, 400, "file URLs are not", None),
    ({"messages": [user(linked("/etc/passwd"))]}, 400, "no URLs are", None),
    ({"messages": [user(linked("data:image/png;base64,?"))]}, 400, "not base64", None),
    ({"messages": [user(image(b"no image"))]}, 400, "not an image", "messages.0.content"),
    ({"messages": [user(image(b""))]}, 400, "not an image", "messages.0.content"),
    ({"messages": [user(image(png(1, (300, 200))[:150]))]}, 400, "damaged", "messages"),
    ({"messages": [user(*[image(png(1))] * 6)]}, 400, "6 images: at most 5", "messages"),
    ({"messages": [user(image(png(1, (1001, 1000))))]}, 400, "1001 x 1000", "messages.0.content"),
    ({"messages": [user("word " * 3000)]}, 400, "at most 2000", "messages"),
    ({"messages": [user("a"), {"role": "system", "content": "b"}]}, 400, "at the beginning", None),
    ({"max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
    ({"temperature": 3}, 400, "less than or equal to 2", "temperature"),
    ({"temperature": "nan"}, 400, "", "temperature"),
    ({"top_p": 0}, 400, "greater than 0", "top_p"),
    ({"seed": 2**70}, 400, "", "seed"),
    ({"stop": ["a"] * 5}, 400, "at most 4", "stop"),
    ({"stop": ""}, 400, "none of them empty", "stop"),
    ({"n": 2}, 400, "n is not served", None),
    ({"tools": [{"type": "function"}]}, 400, "tools is not served", None),
    ({"response_format": {"type": "json_object"}}, 400, "response_format is not served", None),
]


@pytest.mark.parametrize(("change", "status", "message", "param"), WRONG)
def test_what_is_wrong_is_named_in_openais_form(server, change, status, message, param):
    body = {"model": NAME, "messages": [user("Hello")], "max_tokens": 3, **change}
    response = httpx.post(f"{server[0]}/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"] and "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"].endswith("_error")
    assert param is None or error["param"] == param


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 5000])
def test_bodies_that_are_no_requests_are_refused(server, content):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server[0]}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_passed_over(client):
    ask(client, user("Hello"), n=1, presence_penalty=0, logprobs=False, user="me", metadata={"a": "b"}, tools=[])
    ask(client, user("Hello"), response_format={"type": "text"}, extra_body={"top_k": 5, "unheard_of": 1})


def test_large_bodies_are_refused_before_they_are_read(server):
    body = json.dumps({"model": NAME, "messages": [user("x" * 2**21)]}).encode()
    response = httpx.post(f"{server[0]}/v1/chat/completions", content=body)
    assert response.status_code == 413 and "1,048,576 bytes" in response.json()["error"]["message"]

    def pieces():
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):  # it may hang up in between
        response = httpx.post(f"{server[0]}/v1/chat/completions", content=pieces())
        assert response.status_code == 413


def test_unknown_paths_and_methods_have_openais_form(server):
    assert httpx.get(f"{server[0]}/v1/nothing").json()["error"]["type"] == "not_found_error"
    response = httpx.get(f"{server[0]}/v1/chat/completions")
    assert response.status_code == 405 and "Method Not Allowed" in response.json()["error"]["message"]


def test_a_key_is_asked_for_where_there_is_one(model):
    with serving(model, api_key="secret") as (url, _):
        for key in ("x", "Secret", "secrets", "geheim"):
            response = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"})
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.post(f"{url}/v1/chat/completions", json={}).status_code == 401
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/health").status_code == httpx.get(url).status_code == 200
        assert ask(openai.OpenAI(base_url=f"{url}/v1", api_key="secret"), user("Hello"))


def test_more_than_may_wait_are_refused(model):
    with serving(model, is_endless=True, slots=1, max_waiting=1) as (url, engine):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        streams = [ask(client, user("Hello"), max_tokens=100_000, stream=True) for _ in range(1)]
        wait_until(lambda: engine.num_running == 1)
        waiting = threading.Thread(target=lambda: ask(client, user("Hello")))
        waiting.start()
        wait_until(lambda: engine.num_waiting == 1)
        with pytest.raises(openai.InternalServerError, match="try again later") as caught:
            ask(client, user("Hello"))
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
        streams[0].close()
        waiting.join(30)
        assert not waiting.is_alive()


def test_who_goes_away_leaves_no_slot_taken(model):
    with serving(model, Limits(new_tokens=10**6), is_endless=True, slots=2) as (url, engine):
        body = {"model": NAME, "messages": [user("Hello")], "max_tokens": 10**6}
        for is_stream in (True, False):
            asked = {"json": {**body, "stream": is_stream}}
            with (
                contextlib.suppress(httpx.ReadTimeout),
                httpx.Client(timeout=1) as client,
                client.stream("POST", f"{url}/v1/chat/completions", **asked) as response,
            ):
                next(response.iter_lines())
            wait_until(lambda: engine.num_running == engine.num_waiting == 0)
        assert engine.counters.cancelled == 2


def test_a_time_that_is_up_is_told(model):
    with serving(model, Limits(seconds=0.5, new_tokens=10**6), is_endless=True) as (url, engine):
        body = {"model": NAME, "messages": [user("Hello")]}
        response = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert response.status_code == 504 and response.json()["error"]["type"] == "timeout_error"
        streamed = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=30).text
        assert "timeout_error" in streamed and streamed.endswith("data: [DONE]\n\n")
        wait_until(lambda: engine.num_running == 0)


def test_metrics_count(server, client):
    def read() -> dict[str, float]:
        text = httpx.get(f"{server[0]}/metrics").text
        return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}

    before = read()
    ask(client, user("A question that was never asked", image(png(4242))))
    ask(client, user("A question that was never asked", image(png(4242))))
    after = read()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["cobra_requests_total"] == 2 and grown["cobra_images_total"] == 1
    assert grown["cobra_cache_hits_total"] == grown["cobra_cache_misses_total"] == 1
    assert 0 < grown["cobra_cached_tokens_total"] * 2 == grown["cobra_prompt_tokens_total"]
    assert after['cobra_token_gap_seconds{quantile="0.99"}'] > 0 and after["cobra_running"] == 0


def test_schemathesis_finds_nothing(server):
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{server[0]}/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) == 5
    for operation in operations:
        _fuzz(operation)


def _fuzz(operation) -> None:
    from hypothesis import HealthCheck, Phase, given, settings

    @given(case=operation.as_strategy())
    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
              phases=[Phase.explicit, Phase.generate], database=None)  # fmt: skip
    def check(case) -> None:
        response = case.call(timeout=60)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    check()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    import shutil

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_the_page_asks_with_images_and_again(model, server, browser, tmp_path):
    picture = tmp_path / "a picture.png"
    picture.write_bytes(png(31337))
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server[0])
    page.get_by_text(NAME, exact=True).wait_for()
    page.set_input_files("#files", picture)
    assert page.get_by_alt_text("a picture.png").is_visible()
    box = page.get_by_label("Question")
    box.fill("What is it?")
    box.press("Enter")
    page.locator(".assistant .facts").wait_for()
    expected = fresh(model, prompt(model, [png(31337), "What is it?"]), 400)
    answer = page.locator(".assistant").first
    assert expected.strip() in answer.inner_text()
    assert answer.get_attribute("aria-busy") == "false" and "0 of" in answer.locator(".facts").inner_text()
    box.fill("And now?")
    box.press("Enter")
    page.locator(".assistant .facts").nth(1).wait_for()
    facts = page.locator(".assistant .facts").nth(1).inner_text()
    cached, total = map(int, re.search(r"(\d+) of (\d+) tokens cached", facts.replace(",", "")).groups())
    assert total - 30 < cached < total and "state" in facts and "tokens/s" in facts
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0 and errors == []
    page.close()


def test_the_page_tells_what_went_wrong_and_loses_nothing(server, browser, tmp_path):
    picture = tmp_path / "big.png"
    picture.write_bytes(png(1, (1200, 1000)))
    page = browser.new_page()
    page.goto(server[0])
    page.set_input_files("#files", picture)
    page.get_by_label("Question").fill("What is it?")
    page.get_by_role("button", name="Send").click()
    page.locator(".error").wait_for()
    assert "1200 x 1000 pixels" in page.locator(".error").inner_text()
    assert page.get_by_label("Question").input_value() == "What is it?"
    page.get_by_role("button", name="Remove big.png").click()
    assert page.locator("#chosen li").count() == 0
    page.close()


def test_the_page_can_be_used_with_keys_alone(server, browser):
    page = browser.new_page()
    page.goto(server[0])
    page.get_by_text(NAME, exact=True).wait_for()
    assert page.evaluate("document.activeElement.id") == "question"
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"send", "reset", "log"} <= set(reached)
    names = page.evaluate(
        "[...document.querySelectorAll('button, textarea, input:not([aria-hidden])')]"
        ".map((one) => one.innerText || one.labels?.[0]?.innerText || one.getAttribute('aria-label'))"
    )
    assert all(names) and page.locator("[role=log], [role=status]").count() == 2
    page.close()
