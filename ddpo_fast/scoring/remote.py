"""A reward over HTTP: POST of {"images": [PNG in base64, ...], "prompts": [...]}, answer {"rewards": [...]}; see docs/rewards.md.

If the prompts have metadata, the request has "metadata": [...], too.

The server is not trusted: nothing but numbers is taken from its answer.
"""

import base64
import json
import math
import os
import re
import time

import urllib3
from torch import Tensor
from urllib3.util import parse_url

from ddpo_fast.scoring.function import RewardError
from ddpo_fast.scoring.pixels import encode_png

TOKEN_VARIABLE = "DDPO_REWARD_TOKEN"
"""Environment variable with the token that client and server share. It is not an option: those are in config.yaml and in process lists."""
MAX_ANSWER_BYTES = 2**20
CONNECT_TIMEOUT_S = 10.0
BACKOFF_S = (0.5, 1, 2, 4, 8, 16)
"""Pauses before a request is sent again. Together they give a server half a minute to come back."""


def read_token() -> str:
    """The shared token, empty if there is none. Raises ValueError if it cannot be sent; the message does not contain it."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not re.fullmatch(r"[!-~]*", token):
        raise ValueError(f"environment variable {TOKEN_VARIABLE}: valid are visible ASCII characters, without spaces")
    return token


class RemoteReward:
    """Sends pictures to a reward server and takes numbers back: (images, prompts, metadata) -> list of B floats."""

    def __init__(self, url: str, timeout_s: float):
        """Raises ValueError if `url` is not an address or has a password in it."""
        try:
            address = parse_url(url)
        except urllib3.exceptions.LocationParseError:
            address = urllib3.util.Url()
        if address.auth is not None:  # not repeated in the error, which goes to the log
            raise ValueError(f"reward.name: valid is an address without user name and password; a token goes into {TOKEN_VARIABLE}")
        if not address.host:
            raise ValueError(f"reward.name={url}: valid is an address such as http://127.0.0.1:8000/")
        self.url, self.timeout_s = url, timeout_s
        self.server = f"the reward server {address.netloc}"
        self.headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if token := read_token():
            self.headers["Authorization"] = f"Bearer {token}"
        self.http = urllib3.PoolManager(retries=False)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> list[float]:
        """Raises RewardError for anything but B numbers. null, which a server sends for no reward, becomes NaN.

        The pictures are sent again if there is no answer, or one that says that the server is busy or broken (429, 5xx).
        """
        deadline = time.monotonic() + self.timeout_s
        request = {"images": [base64.b64encode(file).decode() for file in encode_png(images)], "prompts": prompts}
        if metadata is not None:
            request["metadata"] = metadata
        for pause_s in (*BACKOFF_S, math.inf):  # urllib3's own retries have no deadline
            try:
                status, body = self._post(json.dumps(request).encode(), deadline)
            except urllib3.exceptions.HTTPError as error:
                failure = f"could not be asked: {error}"
            else:
                if status == 200:
                    return self._parse(body, len(prompts))
                if 300 <= status < 400:
                    raise RewardError(f"{self.server} answered with a redirect ({status}), which is not followed")
                failure = f"answered {status}: {_shown(body)}"
                if status != 429 and status < 500:
                    break
            if time.monotonic() + pause_s > deadline:
                break
            time.sleep(pause_s)
        raise RewardError(f"{self.server} {failure}")

    def _post(self, body: bytes, deadline: float) -> tuple[int, bytes]:
        """Status and body of the answer to one request."""
        left_s = max(0.001, deadline - time.monotonic())
        timeout = urllib3.Timeout(connect=min(left_s, CONNECT_TIMEOUT_S), read=left_s)
        with self.http.request(
            "POST", self.url, body=body, headers=self.headers, timeout=timeout, redirect=False, preload_content=False
        ) as response:
            answer = bytearray()
            while part := response.read1(MAX_ANSWER_BYTES, decode_content=False):
                answer += part
                if len(answer) > MAX_ANSWER_BYTES:
                    raise RewardError(f"{self.server} answered with more than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise RewardError(f"{self.server} took longer than timeout_s={self.timeout_s}")
        return response.status, bytes(answer)

    def _parse(self, body: bytes, count: int) -> list[float]:
        try:
            answer = json.loads(body, parse_int=float, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"{self.server} answered with invalid JSON ({error}): {_shown(body)}") from None
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or not all(reward is None or isinstance(reward, float) for reward in rewards):
            raise RewardError(f'{self.server} answered {_shown(body)}; valid is {{"rewards": [numbers or null]}}')
        if len(rewards) != count:
            raise RewardError(f"{self.server} answered with {len(rewards)} rewards for {count} pictures")
        return [math.nan if reward is None else reward for reward in rewards]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _shown(body: bytes) -> str:
    """The beginning of what a server wrote, on one line, without anything that a terminal would act on."""
    return ascii(body[:200].decode(errors="replace")) + ("..." if len(body) > 200 else "")
