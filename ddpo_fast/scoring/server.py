"""A reward function behind HTTP, for trainers that ask for it with --reward.name=http://HOST:PORT/.

    ddpo-fast serve --reward.name path/to/file.py:function --port 8000

docs/rewards.md has the format. With DDPO_REWARD_TOKEN set, it answers only clients that know the token.
"""

import base64
import hmac
import json
import math
import re
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jsonargparse
import torch
from torch import Tensor

from ddpo_fast.config.options import RewardConfig
from ddpo_fast.distributed.preemption import handle_here
from ddpo_fast.scoring.function import RewardError
from ddpo_fast.scoring.pixels import decode_png
from ddpo_fast.scoring.remote import TOKEN_VARIABLE, read_token
from ddpo_fast.scoring.scorer import Metadata, Reward, open_reward
from ddpo_fast.terminal import steady_streams, user_error

MAX_REQUEST_BYTES = 2**28
LOOPBACK = ("127.0.0.1", "localhost")


class RewardServer(ThreadingHTTPServer):
    """Answers POST requests with a reward's numbers. Requests are read in parallel and scored one at a time."""

    daemon_threads = True
    request_queue_size = 128  # a trainer's ranks all come at once

    def __init__(self, reward: Reward, host: str, port: int):
        """`port` 0 is any free one. Raises ValueError if other machines may ask and there is no token, OSError if the port is taken."""
        self.reward, self.token, self.lock = reward, read_token(), threading.Lock()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if host not in LOOPBACK and not self.token:
            raise ValueError(f"--host={host}: valid without a token in {TOKEN_VARIABLE} is {' or '.join(LOOPBACK)}")
        super().__init__((host, port), Handler)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> list[float | None]:
        """Rewards, None where they are not finite. Raises RewardError when the call fails."""
        with self.lock:
            rewards = self.reward(images.to(self.device), prompts, metadata=metadata).tolist()
        return [reward if math.isfinite(reward) else None for reward in rewards]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    timeout = 60  # seconds for a client to send something more
    server_version, sys_version = "ddpo_fast", ""

    def do_POST(self) -> None:
        """Answers 200 and the rewards, or an error: 401 token, 411 no length, 413 too large, 400 format, 422 the reward failed."""
        sent = self.headers.get("Authorization", "")
        if self.server.token and not hmac.compare_digest(sent.encode(), f"Bearer {self.server.token}".encode()):
            return self.answer(401, error=f"the token is missing or wrong; valid is {TOKEN_VARIABLE} of the server")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            return self.answer(411, error="a Content-Length is needed")
        if int(length) > MAX_REQUEST_BYTES:
            return self.answer(413, error=f"valid are at most {MAX_REQUEST_BYTES} bytes; a smaller sample.batch_size has smaller requests")
        try:
            self.answer(200, rewards=self.server.score(*parse_request(self.rfile.read(int(length)))))
        except ValueError as error:
            self.answer(400, error=str(error))
        except RewardError as error:
            self.log_error("%s", error)
            self.answer(422, error=str(error))

    def answer(self, status: int, **content) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def parse_request(body: bytes) -> tuple[Tensor, list[str], Metadata]:
    """Images (B, 3, H, W) in [0, 1], B prompts and their metadata of a request. Raises ValueError that says what is wrong with it."""
    try:
        request = json.loads(body)
        images, prompts, metadata = request["images"], request["prompts"], request.get("metadata")
        if not prompts or not isinstance(prompts, list) or len(images) != len(prompts):
            raise TypeError
        if not all(isinstance(text, str) for text in [*images, *prompts]):
            raise TypeError
        if metadata is not None and (len(metadata) != len(prompts) or not all(isinstance(entry, dict) for entry in metadata)):
            raise TypeError
        files = [base64.b64decode(image, validate=True) for image in images]
    except (ValueError, TypeError, KeyError, RecursionError):
        valid = '{"images": [PNG in base64, ...], "prompts": [as many strings]}, with "metadata": [as many objects] or without'
        raise ValueError(f"valid is {valid}") from None
    return decode_png(files), prompts, metadata


def main(argv: list[str] | None = None) -> None:
    """Serves until it is interrupted. A wrong option is one line on standard error and exit code 2."""
    if argv is None:
        steady_streams()
    parser = jsonargparse.ArgumentParser(prog="ddpo-fast serve", description="Serves a reward function to trainers.", exit_on_error=False)
    parser.add_class_arguments(RewardConfig, "reward", skip={"max_bad_fraction"})
    parser.add_argument("--host", default=LOOPBACK[0], help="Address to listen at; 0.0.0.0 is any of this machine's.")
    parser.add_argument("--port", type=int, default=8000, help="TCP port to listen at; 0 is any free one.")
    try:
        options = parser.parse_args(argv)
        reward = open_reward(**vars(options.reward))
        server = RewardServer(reward, options.host, options.port)
    except (jsonargparse.ArgumentError, ValueError, OSError, OverflowError) as error:
        user_error(" ".join(str(error).split()))
    with server:
        print(f"{options.reward.name} at http://{options.host}:{server.server_port}/", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT, too: a shell's background job starts with it ignored
            handle_here(number, lambda number, frame: sys.exit(128 + number))
        server.serve_forever()


if __name__ == "__main__":
    main()
