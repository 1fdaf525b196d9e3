"""Rewards over HTTP: a real server and its client, and servers that mean no good."""

import base64
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import urllib3

from ddpo_fast.rewards.jpeg_compressibility import jpeg_compressibility
from ddpo_fast.scoring import remote
from ddpo_fast.scoring.pixels import MAX_PIXELS, decode_png, encode_png
from ddpo_fast.scoring.remote import MAX_ANSWER_BYTES, TOKEN_VARIABLE
from ddpo_fast.scoring.scorer import RewardError, open_reward, score_or_nan
from ddpo_fast.scoring.server import MAX_REQUEST_BYTES, RewardServer
from ddpo_fast.scoring.threaded import ThreadedReward

ROOT = Path(__file__).resolve().parents[1]
IMAGES = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
PROMPTS = ["cat", "a “dog”", "horse\n"]
TOKEN = "correct-horse-battery-staple"


def ask(url: str, timeout_s: float = 60.0) -> list[float]:
    return open_reward(url, {}, timeout_s, isolate=False)(IMAGES, PROMPTS).tolist()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(remote, "BACKOFF_S", (0.01, 0.02))


@contextmanager
def serving(function, timeout_s: float = 600.0):
    with RewardServer(ThreadedReward(lambda: function, timeout_s), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def raw_server(*answers, pause_s: float = 0.0):
    """Gives each request the next of the answers, byte by byte if there is a pause, and closes. Yields its address and the requests."""
    requests, closing = [], threading.Event()

    def received(connection: socket.socket) -> bytes:
        if not (part := connection.recv(65536)):
            raise ConnectionError("the client is gone")
        return part

    def read(connection: socket.socket) -> bytes:
        request = b""
        while b"\r\n\r\n" not in request:
            request += received(connection)
        head, _, body = request.partition(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head, re.I)[1])
        while len(body) < length:
            body += received(connection)
        return head + b"\r\n\r\n" + body

    def serve():
        for answer in answers:
            try:
                connection, _ = listener.accept()
            except OSError:  # nobody asks any more
                return
            with connection:
                try:
                    requests.append(read(connection))
                    for part in [answer] if not pause_s else [answer[i : i + 1] for i in range(len(answer))]:
                        connection.sendall(part)
                        if pause_s and closing.wait(pause_s):
                            return
                except OSError:  # the client has had enough
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/score", requests
        closing.set()
        listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for a client
        thread.join()


def http(body: bytes | str, status: str = "200 OK", *headers: str) -> bytes:
    body = body.encode() if isinstance(body, str) else body
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


GOOD = http('{"rewards": [1, 2.5, null]}')


# --- client and server ---


def test_the_server_program_scores_as_the_function_does(monkeypatch):
    """As users run it: its own process, a token from the environment."""
    command = [sys.executable, "-m", "ddpo_fast.scoring.server", "--reward.name=jpeg_compressibility", "--port=0"]
    environment = os.environ | {TOKEN_VARIABLE: TOKEN}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        name, _, url = server.stdout.readline().split()
        assert name == "jpeg_compressibility" and url.startswith("http://127.0.0.1:")
        with pytest.raises(RewardError, match="answered 401: .*the token is missing or wrong"):
            ask(url)
        monkeypatch.setenv(TOKEN_VARIABLE, "wrong")
        with pytest.raises(RewardError, match="answered 401"):
            ask(url)
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        assert ask(url) == jpeg_compressibility(IMAGES, PROMPTS).tolist()
    finally:
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=600)
    assert server.returncode == 130 and err.count('"POST / HTTP/1.1" 401') == 2 and TOKEN not in out + err and "Traceback" not in err
    with pytest.raises(RewardError, match="could not be asked: .*refused"):
        ask(url)


def test_a_server_is_one_of_a_weighted_sum():
    """And a picture that it has no reward for has none; an answer that does not come in time is no answer."""
    with raw_server(GOOD) as (url, requests):
        reward = open_reward("weighted_sum", {"rewards": {url: 2, "jpeg_compressibility": {"weight": 0.5}}}, 10.0, isolate=False)
        found = reward(IMAGES, PROMPTS)
    expected = 2 * torch.tensor([1, 2.5, torch.nan]) + 0.5 * torch.as_tensor(jpeg_compressibility(IMAGES, PROMPTS))
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0, equal_nan=True)
    assert json.loads(requests[0].partition(b"\r\n\r\n")[2])["prompts"] == PROMPTS
    with raw_server(GOOD, pause_s=0.1) as (url, _):
        reward = open_reward("weighted_sum", {"rewards": {url: 1}, "timeout_s": 0.3}, 60.0, isolate=False)
        with pytest.raises(RewardError, match="127.0.0.1:.* (took longer than (reward.)?timeout_s=0.3|could not be asked)"):
            reward(IMAGES, PROMPTS)
    for timeout_s in (0, float("inf"), "1", True):
        with pytest.raises(ValueError, match=f"reward.kwargs.timeout_s={timeout_s}: valid is a finite number > 0"):
            open_reward("weighted_sum", {"rewards": {url: 1}, "timeout_s": timeout_s}, 60.0, isolate=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--host 0.0.0.0", f"--host=0.0.0.0: valid without a token in {TOKEN_VARIABLE} is 127.0.0.1 or localhost"),
        ("--reward.name beauty", "reward.name=beauty: valid is one of"),
        ("--port 99999", "port"),
        ("--port many", "port"),
        ("--reward.max_bad_fraction 1", "max_bad_fraction"),
    ],
)
def test_a_wrong_option_of_the_server_is_one_line(arguments, message, capsys):
    from ddpo_fast.scoring.server import main

    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_pictures_and_prompts_arrive_as_they_were():
    asked = []

    def reward(images, prompts):
        asked.append((images, prompts))
        return [1.0, float("nan"), 2**70]

    with serving(reward) as url:
        answer = ask(url)
    ((images, prompts),) = asked
    assert answer[0] == 1 and answer[1] != answer[1] and answer[2] == 2**70
    assert prompts == PROMPTS and torch.equal(images, (IMAGES * 255).round() / 255)


def test_metadata_arrives_as_it_was():
    metadata = [{"count": 2}, {}, {"names": ["cät"], "nested": {"weight": 0.1}, "none": None}]

    def reward(images, prompts, metadata):
        asked.append(metadata)
        return [1.0] * 3

    asked = []
    with serving(reward) as url:
        for name, kwargs in ((url, {}), ("weighted_sum", {"rewards": {url: 1}})):
            assert open_reward(name, kwargs, 5.0, isolate=False)(IMAGES, PROMPTS, metadata=metadata).tolist() == [1] * 3
        with pytest.raises(RewardError, match="answered 422: .*missing 1 required positional argument: .*metadata"):
            ask(url)
    assert asked == [metadata, metadata]


def test_a_server_scores_one_request_at_a_time():
    active, most = [], []

    def reward(images, prompts):
        active.append(1)
        most.append(len(active))
        time.sleep(0.05)
        active.pop()
        return [1.0] * 3

    with serving(reward) as url:
        clients = [threading.Thread(target=ask, args=(url,)) for _ in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert most == [1] * 4


def test_a_reward_that_fails_is_asked_once_and_its_error_arrives():
    calls = []

    def reward(images, prompts):
        calls.append(1)
        raise KeyError("wolf")

    with serving(reward) as url, pytest.raises(RewardError, match="answered 422: .*the reward function raised KeyError: .*wolf"):
        ask(url)
    assert len(calls) == 1


def request(images: list[bytes], prompts: list) -> str:
    return json.dumps({"images": [base64.b64encode(image).decode() for image in images], "prompts": prompts})


PNG = encode_png(IMAGES)
HUGE = PNG[0][:16] + (60000).to_bytes(4, "big") * 2 + PNG[0][24:]  # a header that claims 3.6 billion pixels


@pytest.mark.parametrize(
    "body, message",
    [
        ("", "valid is"),
        ("{", "valid is"),
        ("[" * 100_000, "valid is"),
        ("[]", "valid is"),
        ('{"images": [], "prompts": []}', "valid is"),
        ('{"images": ["AAAA"], "prompts": "a"}', "valid is"),
        ('{"images": ["AAAA"], "prompts": [1]}', "valid is"),
        ('{"images": [1], "prompts": ["a"]}', "valid is"),
        ('{"images": ["?"], "prompts": ["a"]}', "valid is"),
        (request(PNG[:2], ["a"]), "valid is"),
        (request(PNG[:1], ["a"])[:-1] + ', "metadata": []}', "valid is"),
        (request(PNG[:1], ["a"])[:-1] + ', "metadata": ["a"]}', "valid is"),
        (request(PNG[:1], ["a"])[:-1] + ', "metadata": 1}', "valid is"),
        (request([b"GIF89a" + bytes(99)], ["a"]), "not a PNG file"),
        (request([PNG[0][:60]], ["a"]), "PNG file"),
        (request([PNG[0], encode_png(IMAGES[:1, :, :8])[0]], ["a", "b"]), f"one size, of no more than {MAX_PIXELS} pixels"),
        (request([HUGE], ["a"]), "PNG file|pixels"),
    ],
)
def test_a_bad_request_is_refused_before_the_reward_sees_it(body, message):
    calls = []
    with serving(lambda images, prompts: calls.append(1)) as url:
        answer = urllib3.request("POST", url, body=body, retries=False)
    assert answer.status == 400 and re.search(message, answer.json()["error"]) and not calls


@pytest.mark.parametrize("length, status", [(str(MAX_REQUEST_BYTES + 1), 413), ("-1", 411), ("1e3", 411), (None, 411)])
def test_the_length_of_a_request_is_checked_before_it_is_read(length, status):
    with serving(None) as url, socket.create_connection(("127.0.0.1", int(url.split(":")[-1][:-1])), timeout=60) as connection:
        head = "POST / HTTP/1.0\r\n" + (f"Content-Length: {length}\r\n" if length else "")
        connection.sendall(f"{head}\r\n".encode())
        assert f" {status} ".encode() in connection.recv(100)


def test_png_keeps_every_pixel():
    assert torch.equal(decode_png(PNG), (IMAGES * 255).round() / 255)
    assert decode_png(encode_png(torch.full((1, 3, 2, 2), torch.nan))).sum() == 0  # a picture that is not finite gets no reward anyway


# --- servers that fail ---


def test_good_answer():
    with raw_server(GOOD) as (url, requests):
        first, second, third = ask(url)
    assert (first, second) == (1, 2.5) and third != third
    head, _, body = requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /score HTTP/1.1") and b"authorization" not in head.lower()
    assert json.loads(body) == {"images": [base64.b64encode(file).decode() for file in PNG], "prompts": PROMPTS}


@pytest.mark.parametrize("failure", [http("", "503 Busy"), http("", "429 Slow down"), http("", "500 Oops"), b"", GOOD[:-4]])
def test_a_busy_or_broken_server_is_asked_again(failure):
    with raw_server(failure, failure, GOOD) as (url, requests):
        assert ask(url)[:2] == [1, 2.5]
    assert len(requests) == 3


def test_a_server_that_stays_broken_is_given_up():
    with raw_server(*[http("later", "503 Busy")] * 9) as (url, requests):
        with pytest.raises(RewardError, match="answered 503: 'later'"):
            ask(url)
        assert len(requests) == 1 + len(remote.BACKOFF_S)


def test_no_pause_goes_beyond_the_timeout(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF_S", (0.1, 6000.0))
    start = time.monotonic()
    with raw_server(*[http("", "503 Busy")] * 9) as (url, _), pytest.raises(RewardError, match="answered 503"):
        ask(url)
    assert time.monotonic() - start < 50  # not the 60 that `ask` allows


NOT_NUMBERS = r"answered '.*'; valid is \{\"rewards\": \[numbers or null\]\}"
BOMB = b"import os; os._exit(1)"


@pytest.mark.parametrize(
    "answer, message",
    [
        (http("", "404 Not Found"), "answered 404"),
        (http("no\x1b[2J\nway", "403 Forbidden"), re.escape(r"answered 403: 'no\x1b[2J\nway'")),
        (http("not JSON"), "answered with invalid JSON .*'not JSON'"),
        (http(b"\xff\xfe\x80\x04\x95"), "answered with invalid JSON"),
        (http(b"\x80\x04cos\nsystem\n(S'exit'\ntR."), "answered with invalid JSON"),
        (http('{"rewards": [1, NaN, 2]}'), "NaN is no JSON"),
        (http('{"rewards": [1, -Infinity, 2]}'), "-Infinity is no JSON"),
        (http("[" * 500_000), "answered with invalid JSON"),
        (http("[1, 2, 3]"), NOT_NUMBERS),
        (http('{"reward": [1, 2, 3]}'), NOT_NUMBERS),
        (http('{"rewards": 3}'), NOT_NUMBERS),
        (http('{"rewards": {"0": 1}}'), NOT_NUMBERS),
        (http('{"rewards": ["1", "2", "3"]}'), NOT_NUMBERS),
        (http('{"rewards": [true, false, true]}'), NOT_NUMBERS),
        (http('{"rewards": [[1], [2], [3]]}'), NOT_NUMBERS),
        (http('{"rewards": [1, 2]}'), "answered with 2 rewards for 3 pictures"),
        (http('{"rewards": []}'), "answered with 0 rewards for 3 pictures"),
        (http(b" " * (MAX_ANSWER_BYTES + 1)), f"answered with more than {MAX_ANSWER_BYTES} bytes"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"10000\r\n" + b" " * 65536 + b"\r\n",
            "could not be asked|invalid JSON",
        ),
        (http(BOMB, "200 OK", "Content-Encoding: gzip"), "answered with invalid JSON"),
        (GOOD[:-4], "could not be asked: .*IncompleteRead"),
        (b"", "could not be asked"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "could not be asked"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n", "could not be asked"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", "could not be asked"),
    ],
)
def test_a_hostile_answer_is_refused_with_one_line(answer, message, caplog):
    with raw_server(*[answer] * 3) as (url, _), caplog.at_level(logging.DEBUG, logger="ddpo_fast"):
        rewards = score_or_nan(open_reward(url, {}, 5.0, isolate=False), IMAGES, PROMPTS)
    assert rewards.isnan().all() and rewards.shape == (3,)
    (record,) = caplog.records
    assert re.search(message, record.getMessage()) and "\n" not in record.getMessage() and len(record.getMessage()) < 500
    assert record.getMessage().startswith("the reward server 127.0.0.1:") and "its 3 samples are left out" in record.getMessage()
    assert record.exc_info is None


def test_a_number_that_is_too_large_costs_its_sample_only(caplog):
    with raw_server(
        http('{"rewards": [1, 1e400, 2]}'), http(f'{{"rewards": [1, {"9" * 400}, 2]}}'), http('{"rewards": [1, 1e200, 2]}')
    ) as (url, _):
        for _ in range(3):
            rewards = score_or_nan(open_reward(url, {}, 5.0, isolate=False), IMAGES, PROMPTS)
            assert rewards.isfinite().tolist() == [True, False, True]
    assert caplog.text.count("1 of 3 rewards are not finite") == 3


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_not_followed_and_the_token_goes_nowhere(status, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with raw_server(GOOD) as (other, elsewhere), raw_server(http("", status, f"Location: {other}")) as (url, requests):
        with pytest.raises(RewardError, match=rf"answered with a redirect \({status[:3]}\), which is not followed"):
            ask(url)
    assert len(requests) == 1 and f"Authorization: Bearer {TOKEN}".encode() in requests[0] and not elsewhere


@pytest.mark.parametrize("answer", [GOOD, http(b" " * 1000)], ids=["headers", "body"])
def test_a_slow_drip_is_cut_at_the_timeout(answer):
    start = time.monotonic()
    with raw_server(answer, pause_s=0.05 if len(answer) > 1000 else 0.5) as (url, requests):
        with pytest.raises(RewardError, match=r"took longer than (reward.)?timeout_s=0\.7"):
            ask(url, timeout_s=0.7)
        assert 0.6 < time.monotonic() - start < 20 and len(requests) == 1


def test_a_silent_server_is_cut_at_the_timeout():
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(RewardError, match=r"took longer than (reward.)?timeout_s=0\.5|timed out"):
            ask(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout_s=0.5)
    assert time.monotonic() - start < 60


# --- options ---


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://", "reward.name=http://: valid is an address such as"),
        ("https:///path", "valid is an address such as"),
        ("http://host:port/", "valid is an address such as"),
        ("http://me:secret@127.0.0.1/", "valid is an address without user name and password"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(url, message):
    with pytest.raises(ValueError, match=message) as error:
        open_reward(url, {}, 1.0, False)
    assert "secret" not in str(error.value)


def test_what_does_not_go_with_a_server_is_refused():
    with pytest.raises(ValueError, match="reward.isolate=True: valid is False for a remote reward"):
        open_reward("http://127.0.0.1/", {}, 1.0, True)
    with pytest.raises(ValueError, match="reward.kwargs={'a': 1}: valid is {} for a remote reward"):
        open_reward("http://127.0.0.1/", {"a": 1}, 1.0, False)


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "naïve"])
def test_a_token_that_cannot_be_sent_is_refused_without_showing_it(token, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ValueError, match=f"{TOKEN_VARIABLE}: valid are visible ASCII characters") as error:
        open_reward("http://127.0.0.1/", {}, 1.0, False)
    assert token not in str(error.value)


def test_the_token_is_not_in_the_log(monkeypatch, caplog):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with caplog.at_level(logging.DEBUG), raw_server(b"", http(TOKEN[:4], "401 Unauthorized")) as (url, requests):
        score_or_nan(open_reward(url, {}, 5.0, isolate=False), IMAGES, PROMPTS)
    assert len(requests) == 2 and "answered 401" in caplog.text and TOKEN not in caplog.text
