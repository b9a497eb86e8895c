"""The HTTP reward against real servers: ours, and ones that hang, lie, break off or die."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rewards
from rewards import HTTPReward, JPEGCompressibility
from rewards.serve import RewardServer
from tests.test_rewards import some_images

PROMPTS = ["a cat", "a dog", "", "ein Fuß", "a cat", "x", "y"]


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """Tells images and prompts apart."""
    return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


@contextmanager
def serving(reward: Callable, **options) -> Iterator[RewardServer]:
    with RewardServer(reward, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def url(server: HTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@contextmanager
def answering(*replies: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list[int]]]:
    """A server whose n-th request gets the n-th reply, later ones the last; and the requests' sizes."""
    sizes: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sizes.append(len(self.rfile.read(int(self.headers["Content-Length"]))))
            replies[min(len(sizes), len(replies)) - 1](self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        try:
            yield url(server), sizes
        finally:
            server.shutdown()
            thread.join()


def reply(body: bytes, status: int = 200, length: int | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return send


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr("rewards.remote.time.sleep", waits.append)
    return waits


def test_scores_come_back_in_order_and_in_batches():
    images = some_images(7, 20, 12)
    seen = []

    def counted(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append(len(images))
        return brightness(images, prompts)

    with serving(counted) as server:
        scores = HTTPReward(url(server), batch_size=3)(images, PROMPTS)
        assert seen == [3, 3, 1] and server.server_address[0] == "127.0.0.1"
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, brightness(images, PROMPTS), rtol=0, atol=1e-5)  # values on the grid of 8 bits


def test_raw_images_arrive_to_the_bit_and_png_rounded():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    got = []
    with serving(lambda images, prompts: got.append(images) or images.mean((1, 2, 3))) as server:
        HTTPReward(url(server), images="raw")(images, PROMPTS[:2])
        HTTPReward(url(server))(images, PROMPTS[:2])
    assert torch.equal(got[0], images)
    assert torch.equal(got[1], (images * 255).round() / 255)


def test_a_reward_of_this_package_in_a_process_of_its_own_until_it_is_killed(short_waits: list[float]):
    command = [sys.executable, "-m", "rewards.serve", "--reward", "jpeg-compressibility", "--port", "0"]
    root = Path(rewards.__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        name, _, address = process.stdout.readline().split()
        assert name == "jpeg-compressibility" and address.startswith("http://127.0.0.1:")
        images = some_images(5)
        reward = HTTPReward(address, retries=2, timeout=10)
        assert torch.equal(reward(images, ["a cat"] * 5), JPEGCompressibility()(images, ["a cat"] * 5))
        process.kill()
        process.wait()
        with pytest.raises(ConnectionError, match="no answer to 3 requests of 10 s each.*Is it running"):
            reward(images, ["a cat"] * 5)
    assert short_waits == [0.5, 1.0]


def test_a_server_that_hangs_runs_into_the_time_out():
    with answering(lambda handler: threading.Event().wait(1.0)) as (address, sizes):
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=r"2 requests of 0.2 s each.*[Tt]ime"):
            HTTPReward(address, timeout=0.2, retries=1)(some_images(1), ["a cat"])
        assert time.monotonic() - start < 3 and len(sizes) >= 1


def test_a_server_that_comes_back_is_asked_again(short_waits: list[float]):
    good = reply(json.dumps({"scores": [1.5]}).encode())
    half = reply(b'{"scores": [', length=40)
    with answering(half, reply(b"", 503), good) as (address, sizes):
        assert HTTPReward(address)(some_images(1), ["a cat"]).tolist() == [1.5]
        assert len(sizes) == 3 and sizes[0] == sizes[2]
    assert short_waits == [0.5, 1.0]


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (b'{"scores": [1.0, NaN]}', 200, "expected 2 finite numbers"),
        (b'{"scores": [1.0, 1e999]}', 200, "expected 2 finite numbers"),
        (b'{"scores": [1.0]}', 200, "expected 2 finite numbers"),
        (b'{"scores": [[1.0], [2.0]]}', 200, "expected 2 finite numbers"),
        (b'{"scores": ["high", "low"]}', 200, "no list of scores"),
        (b'{"points": [1, 2]}', 200, "no list of scores"),
        (b"<html>", 200, "no list of scores"),
        (b'{"error": "out of memory"}', 500, "answered 500: out of memory"),
        (b"nothing here", 404, "answered 404: b'nothing here'"),
    ],
)
def test_a_wrong_answer_is_an_error_and_not_asked_for_again(answer: bytes, status: int, message: str):
    with answering(reply(answer, status)) as (address, sizes):
        with pytest.raises(ValueError, match=message):
            HTTPReward(address)(some_images(2), ["a cat", "a dog"])
        assert len(sizes) == 1


def post(server: RewardServer, body: bytes, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    try:
        connection.request("POST", "/", body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"\x80\x04.", "no JSON"),
        (b"[]", "expected a JSON object with prompts"),
        (b'{"prompts": ["a"]}', "expected images as a list of PNG files"),
        (b'{"prompts": ["a"], "images": ["AAAA"]}', "no readable PNG"),
        (b'{"prompts": ["a"], "images": ["!"]}', "base64|padding|characters"),
        (b'{"prompts": ["a"], "images": [3]}', "is no string"),
        (b'{"prompts": [], "images": []}', "at least one"),
        (b'{"prompts": ["a"], "images": "AAAA", "shape": [1, 3, 1, 1]}', "3 bytes of images came, expected 4 a value"),
        (b'{"prompts": ["a"], "images": "AAAA", "shape": [1, 3, -1, 1]}', "with a shape .B, 3, H, W."),
        (b'{"prompts": ["a"], "images": "AADAfwAAwH8AAMB/", "shape": [1, 3, 1, 1]}', "not finite"),
        (
            b'{"prompts": ["a", "b"], "images": "AAAAAAAAAAAAAAAA", "shape": [1, 3, 1, 1]}',
            "1 images came with 2 prompts",
        ),
        (b'{"prompts": [7], "images": "AAAAAAAAAAAAAAAA", "shape": [1, 3, 1, 1]}', "one string an image"),
    ],
)
def test_the_server_refuses_what_is_no_proper_request_and_lives_on(request_: bytes, message: str):
    import re

    with serving(brightness) as server:
        status, answer = post(server, request_)
        assert status == 400 and re.search(message, answer["error"]), answer
        assert HTTPReward(url(server))(some_images(1), ["a"]).isfinite().all()


def test_the_server_refuses_a_request_that_is_too_long_unread():
    with serving(brightness, max_bytes=1000) as server:
        status, answer = post(server, b"", **{"Content-Length": "1001"})
        assert status == 413 and "at most 1000 are read" in answer["error"]
        with pytest.raises(ValueError, match="answered 413: .*send fewer images|no answer"):
            HTTPReward(url(server), images="raw")(some_images(1, 10, 10), ["a cat"])


def test_a_reward_that_fails_is_reported_and_the_server_lives_on(capsys: pytest.CaptureFixture[str]):
    def picky(images: Tensor, prompts: list[str]) -> Tensor:
        if prompts[0] == "nan":
            return torch.full((len(images),), torch.nan)
        if prompts[0] == "column":
            return torch.zeros(len(images), 1)
        if prompts[0] == "broken":
            raise KeyError("layer 3")
        if prompts[0] == "refused":
            raise ValueError("no such animal")
        return brightness(images, prompts)

    with serving(picky) as server:
        reward = HTTPReward(url(server))
        for prompt, message in {
            "nan": "500: RuntimeError: the reward 'picky' is nan for image 0",
            "column": r"500: RuntimeError: the reward 'picky' returned \(1, 1\)",
            "broken": "500: KeyError: 'layer 3'",
            "refused": "400: no such animal",
        }.items():
            with pytest.raises(ValueError, match=message):
                reward(some_images(1), [prompt])
        assert reward(some_images(1), ["a cat"]).isfinite().all()
    assert "layer 3" in capsys.readouterr().err, "the traceback is where the server runs"


def test_two_clients_do_not_run_the_model_at_once():
    running, most = [], []

    def slow(images: Tensor, prompts: list[str]) -> Tensor:
        running.append(1)
        most.append(len(running))
        threading.Event().wait(0.05)
        running.pop()
        return brightness(images, prompts)

    with serving(slow) as server:
        threads = [
            threading.Thread(target=HTTPReward(url(server), batch_size=1), args=(some_images(3), PROMPTS[:3]))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(most) == 6 and max(most) == 1


def test_wrong_settings_and_images_are_refused_before_anything_is_sent():
    with pytest.raises(ValueError, match="begins with http"):
        HTTPReward("file:///etc/passwd")
    with pytest.raises(ValueError, match="timeout=0"):
        HTTPReward("http://127.0.0.1:9", timeout=0)
    with pytest.raises(ValueError, match="divide uint8 by 255"):
        HTTPReward("http://127.0.0.1:9")(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a cat"])
