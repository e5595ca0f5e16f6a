"""Pictures at http:// and https:// uris."""

import os
import threading
import time
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.utils import get_environ_proxies

from shardsight.row import Failure
from shardsight.sources.units import MAX_BYTES, too_large

ATTEMPTS = 4
PAUSE = 0.5  # seconds before the second attempt, twice as many before each further one
MAX_PAUSE = 30.0  # seconds, even if Retry-After asks for more
TIMEOUT = (10.0, 30.0)  # seconds to connect, and to wait for the next byte
MAX_SECONDS = 120.0  # for a whole answer
MAX_REDIRECTS = 5
CHUNK = 1 << 16
RETRIED = (408, 425, 429, 500, 502, 503, 504)

_local = threading.local()


class _Retry(Exception):
    """Another attempt may succeed. failure: for the last one. pause: seconds, as the server asks for."""

    def __init__(self, failure: Failure, pause: float = 0.0) -> None:
        self.failure, self.pause = failure, pause


def is_web(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def fetch(uri: str) -> bytes:
    """The content of a uri, requested without cookies, and without credentials but those in the uri itself.

    Timeouts, broken connections and the answers of a busy server are retried with exponential backoff. Raises Failure
    after that, as one site that is down must not stop a job.
    """
    pause = PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _get(uri)
        except _Retry as retry:
            if attempt == ATTEMPTS:
                raise retry.failure from None
            time.sleep(min(max(pause, retry.pause), MAX_PAUSE))
            pause *= 2
    raise AssertionError


def _session() -> requests.Session:
    """One for each thread, which keeps its connections."""
    if not hasattr(_local, "session"):
        session = requests.Session()
        session.trust_env = False  # it would send the credentials in ~/.netrc
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        session.headers["User-Agent"] = "shardsight"
        _local.session = session
    session = _local.session
    assert isinstance(session, requests.Session)
    return session


def _get(uri: str) -> bytes:
    try:
        for _ in range(MAX_REDIRECTS + 1):
            with _request(uri) as response:
                if not response.is_redirect:
                    return _content(uri, response)
                uri = urljoin(uri, response.headers["Location"])
            if not is_web(uri):
                raise Failure("UnsupportedUri", f"a redirect to {uri}, where only those of http and https are followed")
    except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL, ValueError) as error:
        raise Failure("UnsupportedUri", f"not a uri that can be requested: {error}") from None
    except requests.exceptions.SSLError as error:
        raise Failure("HttpError", f"no secure connection: {error}") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        late = isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError)
        reason = f"no answer, or not all of it: {error}"
        raise _Retry(Failure("HttpTimeout" if late else "HttpError", reason)) from None
    raise Failure("TooManyRedirects", f"more than {MAX_REDIRECTS} redirects")


def _request(uri: str) -> requests.Response:
    """Without following redirects, with which a session would send cookies."""
    verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or True
    proxies = get_environ_proxies(uri)
    return _session().get(uri, stream=True, timeout=TIMEOUT, proxies=proxies, verify=verify, allow_redirects=False)


def _content(uri: str, response: requests.Response) -> bytes:
    if response.status_code == HTTPStatus.OK:
        return _body(response)
    status = f"{response.status_code} {response.reason}".strip()
    failure = Failure("HttpError", f"{urlsplit(uri).hostname} answers {status}")
    if response.status_code in RETRIED:
        raise _Retry(failure, _retry_after(response.headers.get("Retry-After", "")))
    raise failure


def _body(response: requests.Response) -> bytes:
    announced = response.headers.get("Content-Length", "")
    if announced.isdecimal() and int(announced) > MAX_BYTES:
        raise too_large(int(announced))
    deadline, parts, size = time.monotonic() + MAX_SECONDS, [], 0
    while part := response.raw.read1(CHUNK, decode_content=True):
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise Failure("TooManyBytes", f"more than {MAX_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise Failure("HttpTimeout", f"{size:,} bytes in {MAX_SECONDS:.0f} seconds, and not all of them")
    if announced.isdecimal() and response.raw.tell() < int(announced):
        raise _Retry(Failure("HttpError", f"only {size:,} bytes came of {int(announced):,}"))
    return b"".join(parts)


def _retry_after(text: str) -> float:
    """Seconds to wait, of a header that holds them or a date."""
    if text.strip().isdecimal():
        return min(float(text), MAX_PAUSE)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
