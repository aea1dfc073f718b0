"""Asking a remote service for one picture, within a deadline, and telling whose fault it is when there is none.

What the service refuses of the call's own words or pictures is `CallFailed`, with the service's reason. A key or a
configuration that it does not accept, a service that is down, slow, overloaded, or answers something else than one
whole picture is `ServiceFailed`: infrastructure. The key goes into one header and nowhere else.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from replay.record import Blob
from tools.base import CallFailed
from tools.download import Downloader
from tools.fetch import Fetcher, FetchFailed
from tools.picture import Unreadable, decode, encode

MOST_BYTES = 128 * 2**20  # of an answer: a picture of 25 megapixels in base64 is less
WAIT_S = 1.0  # before an overloaded service is asked again, where it does not say how long; doubled each time
_QUOTED = 300  # characters of a service's reason that an error repeats

#: What services call a refusal of content: OpenAI's `moderation_blocked`, Ark's `InputTextSensitiveContentDetected`.
_REFUSED = re.compile(r"moderation|content_?(policy|filter)|sensitive|safety|risk|image_generation_user", re.I)
#: ... and an account that must be paid before anything else.
_UNPAID = re.compile(r"quota|billing|overdue|balance", re.I)
#: The parameters that are the call's own, and how an error that names none speaks of them.
_OWN = ("prompt", "image")
_OF_THE_CALL = re.compile(r"\bprompt\b|`image`|\b(input|source) images?\b|\bimage (file|format|data)\b", re.I)


class ServiceFailed(RuntimeError):
    """The service gave no picture, and not for what the call asked. Says which one and what to do."""


class Service:
    """One service's URL, key and deadline; calls may come from several threads.

    Args:
        name: of the service, for its errors.
        url: up to the paths, as "https://api.openai.com/v1".
        key_variable: the environment variable with the key. It is sent over https and to this machine only.
        needs_key: whether it is an error here that there is none.
        timeout_s: of a whole call: connecting, waiting, reading, asking again.

    Raises:
        ValueError: the URL is none, the key is missing or cannot be a key, or the deadline is not positive.
    """

    def __init__(self, name: str, url: str, key_variable: str, needs_key: bool, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError(f"url of {name} must be as 'https://HOST/v1', without a user or a query")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s of {name} must be above 0, not {timeout_s}")
        self.host = parts.hostname
        self._name, self._url, self._variable, self._timeout_s = name, url.rstrip("/"), key_variable, timeout_s
        key = os.environ.get(key_variable, "").strip()
        if needs_key and not key:
            raise ValueError(f"{name} needs a key: set the environment variable {key_variable}")
        if not re.fullmatch(r"[!-~]*", key):
            raise ValueError(f"{key_variable} holds characters that no key has")
        safe = parts.scheme == "https" or is_here(parts.hostname)
        self._key = key if safe else ""
        self.downloader = Downloader(Fetcher(max_bytes=MOST_BYTES, timeout_s=timeout_s))
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{name} client", daemon=True)
        self._thread.start()
        self._client = httpx.AsyncClient(timeout=None)  # no redirects; the deadline is the call's

    def picture(self, path: str, **request: Any) -> Blob:
        """POST and read one picture from `data[0]`, encoded anew without metadata; a link is fetched with care.

        Args:
            path: after the URL.
            request: `json`, or `data` and `files`, as httpx has them.

        Raises:
            CallFailed: the service refuses what the call asks for.
            ServiceFailed: anything else.
        """
        end = time.monotonic() + self._timeout_s
        return self._read(self.post(path, **request), end)

    def post(self, path: str, **request: Any) -> bytes:
        """POST and give the body of a good answer. Arguments and errors are those of `picture`."""
        if self._closed:
            raise self._failed("is closed")
        future = asyncio.run_coroutine_threadsafe(self._asked(path, request), self._loop)
        try:
            return future.result(self._timeout_s + 5)
        except TimeoutError:
            raise self._failed("was closed while it was asked") from None

    def close(self) -> None:
        """End the connections; calls that wait fail."""
        if not self._closed:
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(5)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)

    async def _asked(self, path: str, request: Mapping[str, Any]) -> bytes:
        """The body of a good answer."""
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                wait = WAIT_S
                while True:
                    status, headers, body = await self._once(path, request)
                    if status == 200:
                        return body
                    wait = _seconds(headers.get("retry-after"), wait)
                    left = (deadline.when() or 0) - self._loop.time()
                    if status not in (429, 503) or wait >= left or _UNPAID.search(_error(body)[0]):
                        raise self._failure(status, body)
                    await asyncio.sleep(wait)
                    wait *= 2
        except TimeoutError:
            raise self._failed(f"did not answer in {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise self._failed(f"cannot be reached, or broke off: {type(error).__name__}: {error}") from None

    async def _once(self, path: str, request: Mapping[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        async with self._client.stream("POST", f"{self._url}/{path}", headers=headers, **request) as answer:
            body = bytearray()
            async for chunk in answer.aiter_bytes():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise self._failed(f"answered more than {MOST_BYTES} bytes")
            return answer.status_code, answer.headers, bytes(body)

    def _failure(self, status: int, body: bytes) -> Exception:
        """What an answer other than 200 means."""
        code, message = _error(body)
        if status == 401:  # its message may quote the key
            known = "is not accepted" if self._key else "is not set, or not sent because the URL is plain http"
            return self._failed(f"refused the request (401): the key in {self._variable} {known}")
        reason = self._without_key(message) or "no reason given"
        if _REFUSED.search(code) and status < 500:
            return CallFailed(f"{self._name} refused the content: {reason}")
        if status == 403:
            return self._failed(f"forbids the request (403); see what the key in {self._variable} may do: {reason}")
        if status == 404:
            return self._failed(f"knows no such model or path (404); set `model` and `url`: {reason}")
        if status == 402 or _UNPAID.search(code):
            return self._failed(f"wants to be paid ({status}), for the account of {self._variable}: {reason}")
        if status == 413 or (status in (400, 422) and (_parameter(body) in _OWN or _OF_THE_CALL.search(message))):
            return CallFailed(f"{self._name} cannot do this: {reason}")
        if status in (400, 422):
            return self._failed(f"does not take the request ({status}); see `model`, `size` and `extra`: {reason}")
        return self._failed(f"answered {status}: {reason}")

    def _read(self, body: bytes, end: float) -> Blob:
        """The picture in a good answer, or where it leads; `end` is the call's on the monotonic clock."""
        try:
            answer = json.loads(body)
            data = answer["data"][0]
            if isinstance(data.get("error"), dict):
                raise self._failure(400, json.dumps(data).encode())
            if not data.get("b64_json") and isinstance(data.get("url"), str):
                return self.downloader.picture(data["url"], max(0.1, end - time.monotonic()))
            encoded = base64.b64decode(data["b64_json"], validate=True)
        except FetchFailed as error:
            raise self._failed(f"answered with a link that cannot be followed: {error}") from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, binascii.Error, RecursionError) as error:
            raise self._failed(f"answered without a picture: {type(error).__name__}") from None
        try:
            return Blob(encode(decode(encoded)))
        except Unreadable as error:
            raise self._failed(f"answered with a picture that {error}") from None

    def _failed(self, what: str) -> ServiceFailed:
        return ServiceFailed(self._without_key(f"{self._name} at {self._url} {what}"))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _error(body: bytes) -> tuple[str, str]:
    """Code (with its type) and message of an error, as OpenAI, Ark and FastAPI write it; texts, maybe empty."""
    try:
        said = json.loads(body)
        error = said.get("error", said)
        if isinstance(error, str):
            return "", error[:_QUOTED]
        code = f"{error.get('code') or ''} {error.get('type') or ''}"
        return code, str(error.get("message") or error.get("detail") or "")[:_QUOTED]
    except (ValueError, AttributeError, RecursionError):
        return "", body[:_QUOTED].decode(errors="replace").strip()


def _parameter(body: bytes) -> str:
    """The parameter that an error names, "" if none; an item of a list is its list."""
    try:
        return str(json.loads(body)["error"].get("param") or "").partition("[")[0]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""


def _seconds(retry_after: str | None, otherwise: float) -> float:
    return float(retry_after) if retry_after and re.fullmatch(r"\d{1,6}(\.\d+)?", retry_after) else otherwise


def is_here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
