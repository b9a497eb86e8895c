"""Serve a reward over HTTP, for `HTTPReward` in another process or on another machine.

    python -m rewards.serve --reward hpsv2
    python -m rewards.serve --reward image-reward --device cuda --host 0.0.0.0 --port 8001

Listens to this machine alone unless told otherwise: there is no password, and whoever reaches it can keep it busy.
Requests are JSON, nothing in them is executed (see `rewards.remote` for the format).
"""

from __future__ import annotations

import argparse
import json
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn

from .base import Reward
from .combine import checked, name_of
from .registry import REWARDS, make_reward
from .remote import decode_images

MAX_MEGABYTES = 256
READ_TIMEOUT = 60.0  # seconds that a client may be silent while it sends


class RewardServer(ThreadingHTTPServer):
    """Answers POST requests with scores, one batch at a time: the model is one, and threads only wait for it.

    Args:
        reward: scores the images; called with float32 images in [0, 1] on `device`.
        host: the address to listen on.
        port: 0 takes a free one, see `server_address`.
        device: where the images go.
        max_bytes: longer requests are refused unread.
    """

    daemon_threads = True

    def __init__(
        self,
        reward: Reward,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        device: str = "cpu",
        max_bytes: int = MAX_MEGABYTES * 1_000_000,
    ) -> None:
        self.reward, self.device, self.max_bytes = reward, device, max_bytes
        self._lock = threading.Lock()
        super().__init__((host, port), _Handler)

    def scores(self, request: Any) -> list[float]:
        """Scores of a decoded request.

        Raises:
            ValueError: the request is not as it should be.
            RuntimeError: the reward did not give one finite number an image.
        """
        if not isinstance(request, dict) or not isinstance(request.get("prompts"), list):
            raise ValueError("expected a JSON object with prompts, a list of strings, and images.")
        prompts = request["prompts"]
        images = decode_images(request.get("images"), request.get("shape"))
        if len(prompts) != len(images) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts, expected one string an image.")
        if not images.isfinite().all():
            raise ValueError("some values of the images are not finite.")
        with self._lock, torch.no_grad():
            values = self.reward(images.to(self.device), prompts)
        try:
            return checked(values, len(prompts), name_of(self.reward)).tolist()
        except ValueError as error:
            raise RuntimeError(str(error)) from error  # not the client's fault


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = READ_TIMEOUT

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            return self._refuse(411, "expected a Content-Length.")
        if int(length) > self.server.max_bytes:
            return self._refuse(
                413, f"{length} bytes came, at most {self.server.max_bytes} are read: send fewer images."
            )
        body = self.rfile.read(int(length))
        try:
            request = json.loads(body)
        except ValueError as error:
            return self._refuse(400, f"the body is no JSON: {error}")
        try:
            scores = self.server.scores(request)
        except ValueError as error:
            return self._refuse(400, str(error))
        except Exception as error:  # whatever a model fails with, the client must hear of it and the server live on
            traceback.print_exc()
            return self._refuse(500, f"{type(error).__name__}: {error}")
        self._send(200, {"scores": scores})

    def do_GET(self) -> None:
        self._send(200, {"reward": name_of(self.server.reward)})

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""

    def _refuse(self, status: int, message: str) -> None:
        self.close_connection = True  # what was not read would be taken for the next request
        self._send(status, {"error": message})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Parse the command line, load the reward, serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m rewards.serve", description="Serve a reward over HTTP.")
    parser.add_argument("--reward", required=True, choices=list(REWARDS), help="`python -m rewards` describes them")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for every machine that reaches this one")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--device", default="cpu", help="where the reward is computed")
    parser.add_argument("--max-megabytes", type=int, default=MAX_MEGABYTES, help="longer requests are refused")
    options = parser.parse_args()
    reward = make_reward(options.reward)
    if isinstance(reward, nn.Module):
        reward.to(options.device)
    with RewardServer(
        reward, options.host, options.port, device=options.device, max_bytes=options.max_megabytes * 1_000_000
    ) as server:
        print(
            f"{options.reward} at http://{options.host}:{server.server_port}", flush=True
        )  # whoever started this waits for the line
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
