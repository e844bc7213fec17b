"""The serving example: examples/serve.py. Whatever shares the cache, each answer is that of its prompt alone."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.sweep

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import serve  # noqa: E402
from lm.model import Decoder  # noqa: E402
from lm.serving import Request, Server, ServerSettings  # noqa: E402
from lm.settings import ModelSettings, Settings  # noqa: E402

SHAPE = ModelSettings(("local", "global"), window=8, width=32, kv_heads=2, head_dim=8, hidden=48)
SETTINGS = ServerSettings(rows=3, pages=13, page_size=4, max_length=40, chunk=8)
SYSTEM = tuple(b"You serve.")  # two pages and a half
RNG = np.random.default_rng(0)


def request(name, size, length, arrives):
    return Request(name, tuple(RNG.integers(32, 127, size).tolist()), length, arrives)


REQUESTS = [
    request(0, 5, 10, 0),
    request(1, 5, 4, 1),
    request(2, 23, 10, 2),
    request(3, 5, 7, 2),
    request(4, 23, 3, 9),
    request(5, 5, 10, 60),
]


@pytest.fixture(scope="module")
def model():
    return Decoder(SHAPE, Settings().attention, seed=3)


@pytest.fixture(scope="module")
def alone(model):
    return serve.continued_alone(model, REQUESTS, ())


def served(model, **changes):
    server = Server(model, dataclasses.replace(SETTINGS, **changes))
    server.submit(REQUESTS)
    server.run()
    return server


@pytest.fixture(scope="module")
def server(model):
    return served(model)


def assert_same(server, alone):
    assert sorted(server.done) == sorted(alone)
    for name, (tokens, logits) in alone.items():
        assert server.done[name].produced == tokens.tolist()
        np.testing.assert_allclose(np.stack(server.done[name].logits), logits, rtol=1e-4, atol=1e-5)


def test_every_answer_is_that_of_its_prompt_alone(server, alone):
    assert_same(server, alone)
    assert len({token for tokens, _ in alone.values() for token in tokens.tolist()}) > 4


def test_what_is_done_leaves_its_pages(server):
    assert sorted(name for step in server.steps for name in step.evicted) == sorted(server.done)
    assert server.steps[-1].pages_used == server.cache.references.sum() == 0
    assert max(step.pages_used for step in server.steps) <= SETTINGS.pages


def test_a_long_prompt_is_read_in_chunks_while_others_decode(server):
    chunks = [step for step in server.steps if step.chunk_of == 2]
    assert len(chunks) >= 3
    assert all(step.decoded for step in chunks[:3])


def test_the_youngest_is_preempted_when_pages_run_out(server):
    preempted = [(step, name) for step in server.steps for name in step.preempted]
    assert preempted
    running = []
    for step in server.steps:
        running += step.admitted
        for name in step.preempted:
            assert running.pop() == name
        running = [name for name in running if name not in step.evicted]


def test_requests_begin_in_the_order_in_which_they_arrive(server):
    first = {}
    for place, step in enumerate(server.steps):
        for name in step.admitted:
            first.setdefault(name, place)
    assert list(first) == sorted(first)
    assert all(first[one.name] >= one.arrives for one in REQUESTS)


def test_sequences_share_the_pages_of_a_system_prompt(model):
    server = Server(model, dataclasses.replace(SETTINGS, system=SYSTEM, pages=15, max_length=48))
    server.submit(REQUESTS)
    sharing = []
    server.run(lambda server: sharing.append(int(server.cache.references.max())))
    assert server.settings.shared_pages == 2
    assert max(sharing) == SETTINGS.rows
    assert server.steps[-1].pages_used == 3
    assert_same(server, serve.continued_alone(model, REQUESTS, SYSTEM))


def test_quantised_pages_take_less_and_change_logits_a_little(model, server, alone):
    small = served(model, storage="int8")
    assert small.cache.bytes < server.cache.bytes / 2
    report = serve.compared(serve.Report("int8", small, 1.0, 44, small.cache.bytes), alone)
    assert report.equal > 0.5
    assert 1e-6 < report.difference < 0.1


def test_a_request_that_never_fits_is_refused(model):
    server = Server(model, dataclasses.replace(SETTINGS, pages=8))
    with pytest.raises(ValueError, match="request 7 grows to 33 tokens; max_length is 40 and 8 pages of 4"):
        server.submit([request(7, 23, 10, 0)])
    with pytest.raises(ValueError, match="request 7 grows to 43 tokens; max_length is 40"):
        server.submit([request(7, 40, 3, 0)])
    for empty in (request(7, 0, 3, 0), request(7, 3, 0, 0)):
        with pytest.raises(ValueError, match="request 7 must have a prompt and ask for at least one byte"):
            server.submit([empty])


def test_the_command_shows_that_float32_changes_no_byte(capsys, monkeypatch):
    monkeypatch.setattr(serve, "PROMPTS", (5, 23))
    monkeypatch.setattr(serve, "ModelSettings", lambda: SHAPE)
    asked = ["--quick", "--requests", "3", "--steps", "0", "--length", "10", "--storages", "float32"]
    assert serve.main(asked) == 0
    printed = capsys.readouterr().out
    assert "float32" in printed
    assert "100.0%" in printed
    assert "request 0:" in printed


def test_the_command_fails_where_an_answer_differs(monkeypatch, model, server, alone):
    tokens, logits = alone[0]
    wrong = {**alone, 0: (tokens + 1, logits)}
    report = serve.compared(serve.Report("float32", server, 1.0, 44, 0), wrong)
    assert report.equal == pytest.approx(34 / 44)
    monkeypatch.setattr(serve, "trained", lambda *_: model)
    monkeypatch.setattr(serve, "serve", lambda *_: report)
    monkeypatch.setattr(serve, "continued_alone", lambda *_: wrong)
    assert serve.main(["--quick", "--storages", "float32"]) == serve.DIFFERENT
