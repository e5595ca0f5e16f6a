"""Local paths and s3:// uris alike: list, read with patience, write all or nothing."""

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

from shardsight.errors import UsageError

if TYPE_CHECKING:
    import s3fs

OPTIONS = ("anon", "endpoint_url", "key", "profile", "region_name", "requester_pays", "secret", "token")
CHUNK = 8 << 20  # of a remote file read in order: large enough to be fast, small enough to ask again
PATIENCE = 300.0  # seconds that a store may be away in the middle of a job


def _without_redirects() -> type:
    """aiohttp follows a store's redirect wherever it leads, which botocore itself does not; and botocore asks without
    end what region is meant, where the redirect does not say so."""
    from aiobotocore.httpsession import AIOHTTPSession

    class Session(AIOHTTPSession):  # type: ignore[misc]
        async def _get_session(self, proxy_url: str | None) -> Any:
            session = await super()._get_session(proxy_url)

            async def request(*args: Any, **kwargs: Any) -> Any:
                response = await session.request(*args, allow_redirects=False, **kwargs)
                if response.status in (301, 302, 303, 307, 308) and "x-amz-bucket-region" not in response.headers:
                    response.close()
                    raise ConnectionError("the store sends us to another address, where nobody is asked")
                return response

            return SimpleNamespace(request=request)

    return Session


class StorageError(UsageError):
    """A store that cannot be used at all: one sentence for the user."""


@dataclass(frozen=True)
class Storage:
    """options: those of `--storage`, for s3:// uris; what is missing comes from the AWS environment."""

    options: dict[str, str] = field(default_factory=dict)
    patience: float = PATIENCE

    @cached_property
    def s3(self) -> "s3fs.S3FileSystem":
        import s3fs  # here, for the second that it takes in every process

        options: dict[str, Any] = dict(self.options)
        for name in ("anon", "requester_pays"):
            if name in options:
                options[name] = options[name].lower() in ("1", "true", "yes")
        region = options.pop("region_name", None)
        # Finite times, and checksums only where they are asked for: most stores but AWS refuse the new ones.
        config = {
            **{"connect_timeout": 10, "read_timeout": 60, "max_pool_connections": 64},
            **{"retries": {"max_attempts": 3}},
            **{"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"},
            "http_session_cls": _without_redirects(),
        }
        return s3fs.S3FileSystem(
            **options,
            config_kwargs=config,
            client_kwargs={"region_name": region} if region else {},
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def read(self, uri: str) -> bytes:
        if not is_remote(uri):
            with open(uri, "rb") as file:
                return file.read()
        return self._patiently(lambda: self.s3.cat_file(uri))

    def size(self, uri: str) -> int:
        if not is_remote(uri):
            return os.path.getsize(uri)
        return int(self._patiently(lambda: self.s3.info(uri))["size"])

    def open(self, uri: str) -> BinaryIO:
        """A seekable file that holds no more than a chunk of a remote one in memory."""
        if not is_remote(uri):
            return open(uri, "rb")
        return io.BufferedReader(_RemoteFile(self, uri), 1 << 20)

    def write(self, uri: str, data: bytes) -> None:
        """Readers see the whole of it or nothing, and what was there before is replaced."""
        if is_remote(uri):
            self._patiently(lambda: self.s3.pipe_file(uri, data))
            return
        folder, name = os.path.split(uri)
        handle, path = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(path, 0o666 & ~_umask())
            os.replace(path, uri)
        except BaseException:
            os.unlink(path)
            raise

    def remove(self, uri: str) -> None:
        if is_remote(uri):
            self._patiently(lambda: self.s3.rm_file(uri))
        else:
            os.unlink(uri)

    def exists(self, uri: str) -> bool:
        return bool(self._patiently(lambda: self.s3.exists(uri))) if is_remote(uri) else os.path.exists(uri)

    def is_folder(self, uri: str) -> bool:
        """Whether something lies below a path or a prefix."""
        if is_remote(uri):
            return next(self.walk(uri), None) is not None
        return os.path.isdir(uri)

    def walk(self, uri: str) -> Iterator[str]:
        """Every file below a folder or prefix, in a stable order and a page at a time. Hidden ones are left out."""
        prefix = uri.rstrip("/") + "/"
        if not is_remote(uri):
            yield from _walk_local(prefix)
            return
        bucket, _, key = prefix.removeprefix("s3://").partition("/")
        token: dict[str, str] = {}
        while True:
            page = self._patiently(
                lambda: self.s3.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, **token)  # noqa: B023
            )
            for entry in page.get("Contents", []):
                name = entry["Key"]
                if not name.endswith("/") and "/." not in name[len(key) - 1 :]:
                    yield f"s3://{bucket}/{name}"
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _patiently(self, action: Callable[[], Any]) -> Any:
        """Ask again, ever more slowly, as long as the store's trouble can pass."""
        deadline, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return action()
            except Exception as error:
                if not _can_pass(error) or time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 15)


def is_remote(uri: str) -> bool:
    return uri.startswith("s3://")


def explain(uri: str, error: Exception) -> str:
    """A store's error as one sentence that says what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    bucket = uri.removeprefix("s3://").partition("/")[0]
    if isinstance(error, PermissionError) or "credentials" in text.lower() or "SignatureDoesNotMatch" in text:
        if not is_remote(uri):
            return f"{uri} may not be accessed: check its permissions"
        return f"{uri} may not be accessed ({text}): check the keys in the AWS environment or --storage"
    if is_remote(uri) and ("bucket" in text.lower() or isinstance(error, FileNotFoundError)):
        return f"there is no bucket {bucket} ({text}): check the name and --storage endpoint_url=…"
    if isinstance(error, FileNotFoundError):
        return f"{uri} does not exist"
    return f"{uri} cannot be reached ({text}): check the address and try again"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _can_pass(error: Exception) -> bool:
    """FileNotFoundError and PermissionError are answers; most else of a remote store is trouble on the way."""
    answers = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError)
    return not isinstance(error, answers) and "credentials" not in str(error).lower()


def _walk_local(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """folder: with a slash at its end."""
    real = os.path.realpath(folder)
    if real in above:  # a link back to a folder that we are in
        return
    with os.scandir(folder) as listing:  # names, since a million entries of it take four times the memory
        names = [entry.name + "/" * entry.is_dir() for entry in listing if not entry.name.startswith(".")]
    for name in sorted(names):
        if name.endswith("/"):
            yield from _walk_local(folder + name, above | {real})
        else:
            yield folder + name


class _RemoteFile(io.RawIOBase):
    """Reads by ranges, each asked again when the store cuts it short."""

    def __init__(self, storage: Storage, uri: str) -> None:
        self.storage, self.uri = storage, uri
        self.length = storage.size(uri)
        self.position = 0
        self.start, self.chunk = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        if self.position >= self.length:
            return 0
        if not self.start <= self.position < self.start + len(self.chunk):
            self.start, end = self.position, min(self.position + CHUNK, self.length)
            self.chunk = self.storage._patiently(lambda: self._range(self.start, end))
        offset = self.position - self.start
        part = self.chunk[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)

    def _range(self, start: int, end: int) -> bytes:
        data: bytes = self.storage.s3.cat_file(self.uri, start=start, end=end)
        if len(data) != end - start:
            raise OSError(f"{self.uri}: {len(data)} bytes came of {end - start}")
        return data
