"""S3, Google Cloud Storage and Azure Blob Storage by bucket and key, through the filesystems of fsspec.

The filesystems bring credentials and connections. Their own methods take one path, and parse `?versionId=`, `#` or a
trailing slash of a key as something else; so each request here passes its bucket and its key separately.
"""

import json
import logging
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

from shardsight.errors import UsageError

# Keys of `--storage` by scheme.
OPTIONS = {
    "s3": ("anon", "endpoint_url", "key", "profile", "region_name", "requester_pays", "secret", "token"),
    "gs": ("anon", "endpoint_url", "project", "requester_pays", "token"),
    "az": (
        *("account_host", "account_key", "account_name", "anon", "client_id", "client_secret", "connection_string"),
        *("sas_token", "tenant_id"),
    ),
}
CONNECT_SECONDS, READ_SECONDS = 10, 60
# Error codes of S3 that tell more than their HTTP status: wrong credentials, and failures worth a retry.
_S3_DENIED = {
    *("ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidToken"),
    *("RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired"),
}
_S3_TRANSIENT = {
    *("BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "OperationAborted"),
    *("RequestTimeout", "ServiceUnavailable", "SlowDown", "XAmzContentSHA256Mismatch"),
}
_NO_CACHE = {"use_listings_cache": False, "skip_instance_cache": True}  # of each filesystem
_AZURE_ONCE = {"retry_total": 0, "permit_redirects": False}  # of each request, as storage.Storage retries
_REDIRECTS = (301, 302, 303, 307, 308)

T = TypeVar("T")


class StorageError(UsageError):
    """A store that cannot be used at all: one sentence for the user."""


class Unavailable(StorageError, OSError):
    """The store did not answer, was too busy, or cut the answer short: the same request may succeed later."""


class NoAccess(StorageError, OSError):
    """The credentials are missing, wrong or expired, so that no request would succeed."""


class Rejected(ValueError):
    """The store refuses this request, and would refuse it again."""


class MissingBucket(FileNotFoundError):
    """The bucket, or container, does not exist."""


class MissingObject(FileNotFoundError):
    """The bucket exists, and holds no such object."""


class Changed(Exception):
    """The condition of a conditional write does not hold."""


class Redirected(Rejected):
    """The store redirected the request to another address. Redirects are not followed."""

    def __init__(self) -> None:
        super().__init__("the store redirects to another address, which is not followed")


class Item(NamedTuple):
    """An object of a listing. tag: changes when the object is written again."""

    key: str
    size: int
    tag: str


class Store(ABC):
    """One service. Every method raises the errors above, PermissionError for an object or a bucket that these
    credentials may not use, and lets the exceptions of programming errors through."""

    def __init__(self, filesystem: Any) -> None:
        self.filesystem = filesystem  # of fsspec

    @abstractmethod
    def get(self, bucket: str, key: str, start: int = 0, stop: int | None = None) -> bytes: ...

    @abstractmethod
    def put(self, bucket: str, key: str, data: bytes, tag: str | None = None) -> str:
        """Returns the new object's tag. With a tag, writes only if the object still has that one; with "", only if
        there is none. Raises Changed, unless the service ignores conditions."""

    @abstractmethod
    def delete(self, bucket: str, key: str) -> None: ...

    @abstractmethod
    def head(self, bucket: str, key: str) -> Item: ...

    @abstractmethod
    def page(self, bucket: str, prefix: str, token: str | None) -> tuple[list[Item], str | None]:
        """Some thousand objects in the order of their keys, and the token of the next page."""

    @abstractmethod
    def translate(self, error: Exception, text: str) -> Exception | None:
        """An error of the service's own library as one of this module's; None for others."""

    def run(self, request: Callable[[], Awaitable[T]]) -> T:
        """Run a request in the filesystem's event loop."""
        import aiohttp
        from fsspec.asyn import sync

        try:
            return sync(self.filesystem.loop, request)
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            if any(isinstance(cause, Redirected) for cause in _chain(error)):
                raise Redirected from error
            if translated := self.translate(error, text):
                raise translated from error
            if isinstance(error, aiohttp.ClientError | OSError):
                raise Unavailable(text) from error
            if isinstance(error, ValueError):  # a malformed endpoint_url, say
                raise Rejected(text) from error
            raise


def _flags(options: dict[str, str]) -> dict[str, Any]:
    yes = ("1", "true", "yes")
    return {
        name: value.lower() in yes if name in ("anon", "requester_pays") else value for name, value in options.items()
    }


def _unquoted(etag: str) -> str:
    """Services quote it in some answers only."""
    return etag.strip('"')


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__


def _of_status(status: int, text: str) -> Exception:
    """The error for an HTTP status, where the service says no more."""
    if status in (408, 429) or (status >= 500 and status != 501):
        return Unavailable(text)
    kinds: dict[int, type[Exception]] = {401: NoAccess, 403: PermissionError, 404: MissingObject, 412: Changed}
    return kinds.get(status, Rejected)(text)


class S3(Store):
    """options: OPTIONS["s3"]; what is missing comes from the AWS environment."""

    def __init__(self, options: dict[str, str]) -> None:
        import s3fs  # here, as it takes a second in every process

        region = {name: value for name, value in options.items() if name == "region_name"}
        config = {
            **{"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "max_pool_connections": 64},
            **{"retries": {"max_attempts": 0}, "http_session_cls": _without_redirects()},  # storage.Storage retries
            # Most stores but AWS refuse the new checksums.
            **{"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"},
        }
        given = _flags({name: value for name, value in options.items() if name not in region})
        super().__init__(s3fs.S3FileSystem(**given, config_kwargs=config, client_kwargs=region, **_NO_CACHE))

    def _ask(self, method: str, **arguments: Any) -> Any:
        return self.run(lambda: self.filesystem._call_s3(method, self.filesystem.req_kw, **arguments))

    def get(self, bucket: str, key: str, start: int = 0, stop: int | None = None) -> bytes:
        part = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}

        async def request() -> bytes:
            filesystem = self.filesystem
            answer = await filesystem._call_s3("get_object", filesystem.req_kw, Bucket=bucket, Key=key, **part)
            async with answer["Body"] as body:
                return bytes(await body.read())

        return self.run(request)

    def put(self, bucket: str, key: str, data: bytes, tag: str | None = None) -> str:
        condition = {} if tag is None else {"IfMatch": f'"{tag}"'} if tag else {"IfNoneMatch": "*"}
        answer = self._ask("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        return _unquoted(answer["ETag"])

    def delete(self, bucket: str, key: str) -> None:
        self._ask("delete_object", Bucket=bucket, Key=key)

    def head(self, bucket: str, key: str) -> Item:
        try:
            answer = self._ask("head_object", Bucket=bucket, Key=key)
        except (FileNotFoundError, PermissionError, Rejected):
            self.get(bucket, key, 0, 1)  # fails in the same way, with the reason, which a HEAD response cannot hold
            raise
        return Item(key, int(answer["ContentLength"]), _unquoted(answer["ETag"]))

    def page(self, bucket: str, prefix: str, token: str | None) -> tuple[list[Item], str | None]:
        more = {"ContinuationToken": token} if token else {}
        answer = self._ask("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        items = [Item(entry["Key"], entry["Size"], _unquoted(entry["ETag"])) for entry in answer.get("Contents", [])]
        return items, answer["NextContinuationToken"] if answer.get("IsTruncated") else None

    def translate(self, error: Exception, text: str) -> Exception | None:
        from botocore import exceptions as botocore

        answer = next((cause.response for cause in _chain(error) if isinstance(cause, botocore.ClientError)), None)
        if answer is not None:
            code = str(answer.get("Error", {}).get("Code", ""))
            if code in _S3_DENIED:
                return NoAccess(text)
            if code in _S3_TRANSIENT:
                return Unavailable(text)
            if code == "NoSuchBucket":
                return MissingBucket(text)
            return _of_status(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), text)
        if isinstance(error, botocore.HTTPClientError | botocore.ConnectionError):
            return Unavailable(text)
        if isinstance(error, botocore.BotoCoreError):
            about_keys = ("Credential", "Token", "Profile", "SSO")
            return (NoAccess if any(word in type(error).__name__ for word in about_keys) else Rejected)(text)
        return None


def _without_redirects() -> type:
    """A session of aiobotocore that follows no redirect.

    aiohttp follows them anywhere, which botocore itself does not. Where a redirect does not name the bucket's region,
    botocore would ask for it forever.
    """
    from aiobotocore.httpsession import AIOHTTPSession

    class Session(AIOHTTPSession):  # type: ignore[misc]
        async def _get_session(self, proxy_url: str | None) -> Any:
            session = await super()._get_session(proxy_url)

            async def request(*args: Any, **kwargs: Any) -> Any:
                response = await session.request(*args, allow_redirects=False, **kwargs)
                if response.status in _REDIRECTS and "x-amz-bucket-region" not in response.headers:
                    response.close()
                    raise Redirected
                return response

            return SimpleNamespace(request=request)

    return Session


class GoogleCloud(Store):
    """options: OPTIONS["gs"]; what is missing comes from Google's environment (GOOGLE_APPLICATION_CREDENTIALS, …)."""

    def __init__(self, options: dict[str, str]) -> None:
        import aiohttp
        import gcsfs
        from google.auth.exceptions import GoogleAuthError

        async def refuse(*_: object) -> None:
            raise Redirected

        tracing = aiohttp.TraceConfig()
        tracing.on_request_redirect.append(refuse)
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it also logs each error that it raises
        given = _flags(options)
        if given.pop("anon", False):
            given["token"] = "anon"
        try:
            filesystem = gcsfs.GCSFileSystem(
                **given,
                requests_timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS),
                session_kwargs={"trace_configs": [tracing]},
                **_NO_CACHE,
            )
        except GoogleAuthError as error:
            raise NoAccess(str(error)) from error
        super().__init__(filesystem)

    def _ask(self, method: str, path: str, *parts: str, **arguments: Any) -> Any:
        try:
            return self.run(lambda: self.filesystem._call(method, path, *parts, **arguments))
        except MissingObject:
            bucket, *key = parts
            if not key:
                raise MissingBucket(f"no bucket {bucket}") from None
            with suppress(PermissionError):
                self.page(bucket, key[0], None)  # raises MissingBucket if the bucket is what is missing
            raise

    def get(self, bucket: str, key: str, start: int = 0, stop: int | None = None) -> bytes:
        part = {} if stop is None else {"headers": {"Range": f"bytes={start}-{stop - 1}"}}
        return self._ask("GET", "b/{}/o/{}", bucket, key, alt="media", **part)[1]

    def put(self, bucket: str, key: str, data: bytes, tag: str | None = None) -> str:
        line = f"--{uuid.uuid4().hex}"
        head = f"{line}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps({'name': key})}\r\n"
        head += f"{line}\r\nContent-Type: application/octet-stream\r\n\r\n"
        answer = self._ask(
            "POST",
            f"{self.filesystem._location}/upload/storage/v1/b/{{}}/o",
            bucket,
            **({} if tag is None else {"ifGenerationMatch": tag or "0"}),
            uploadType="multipart",
            headers={"Content-Type": f"multipart/related; boundary={line[2:]}"},
            data=head.encode() + data + f"\r\n{line}--".encode(),
            json_out=True,
        )
        return str(answer["generation"])

    def delete(self, bucket: str, key: str) -> None:
        self._ask("DELETE", "b/{}/o/{}", bucket, key)

    def head(self, bucket: str, key: str) -> Item:
        return self._item(self._ask("GET", "b/{}/o/{}", bucket, key, json_out=True))

    def page(self, bucket: str, prefix: str, token: str | None) -> tuple[list[Item], str | None]:
        more = {"pageToken": token} if token else {}
        answer = self._ask("GET", "b/{}/o", bucket, prefix=prefix, json_out=True, **more)
        return [self._item(entry) for entry in answer.get("items", [])], answer.get("nextPageToken")

    @staticmethod
    def _item(entry: dict[str, Any]) -> Item:
        return Item(entry["name"], int(entry["size"]), str(entry["generation"]))

    def translate(self, error: Exception, text: str) -> Exception | None:
        from gcsfs.retry import HttpError
        from google.auth.exceptions import GoogleAuthError, TransportError

        if isinstance(error, FileNotFoundError):
            return MissingObject(text)
        if isinstance(error, FileExistsError):
            return Changed(text)
        if isinstance(error, HttpError):
            return _of_status(int(error.code or 0), text)
        if isinstance(error, GoogleAuthError):
            return Unavailable(text) if isinstance(error, TransportError) else NoAccess(text)
        return PermissionError(text) if isinstance(error, OSError) and text.startswith("Forbidden") else None


class Azure(Store):
    """options: OPTIONS["az"]; what is missing comes from Azure's environment (AZURE_STORAGE_ACCOUNT_NAME, …).

    account: of an address that names one, abfs://container@account.dfs.core.windows.net/…
    """

    def __init__(self, options: dict[str, str], account: str | None = None) -> None:
        import adlfs

        filesystem = adlfs.AzureBlobFileSystem(
            **(_flags(options) | ({"account_name": account} if account else {})),
            connection_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            **_NO_CACHE,
        )
        super().__init__(filesystem)

    def _blob(self, bucket: str, key: str) -> Any:
        return self.filesystem.service_client.get_blob_client(bucket, key)

    def get(self, bucket: str, key: str, start: int = 0, stop: int | None = None) -> bytes:
        part = {} if stop is None else {"offset": start, "length": stop - start}

        async def request() -> bytes:
            return await (await self._blob(bucket, key).download_blob(**part, **_AZURE_ONCE)).readall()

        return self.run(request)

    def put(self, bucket: str, key: str, data: bytes, tag: str | None = None) -> str:
        from azure.core import MatchConditions

        condition: dict[str, Any] = {}
        if tag is not None:
            condition["match_condition"] = MatchConditions.IfNotModified if tag else MatchConditions.IfMissing
        if tag:
            condition["etag"] = f'"{tag}"'
        upload = self._blob(bucket, key).upload_blob
        return _unquoted(self.run(lambda: upload(data, overwrite=True, **condition, **_AZURE_ONCE))["etag"])

    def delete(self, bucket: str, key: str) -> None:
        self.run(lambda: self._blob(bucket, key).delete_blob(**_AZURE_ONCE))

    def head(self, bucket: str, key: str) -> Item:
        return self._item(self.run(lambda: self._blob(bucket, key).get_blob_properties(**_AZURE_ONCE)))

    def page(self, bucket: str, prefix: str, token: str | None) -> tuple[list[Item], str | None]:
        container = self.filesystem.service_client.get_container_client(bucket)

        async def request() -> tuple[list[Item], str | None]:
            pages = container.list_blobs(name_starts_with=prefix, **_AZURE_ONCE).by_page(token)
            items = [self._item(blob) async for blob in await anext(pages)]
            return items, pages.continuation_token or None

        return self.run(request)

    @staticmethod
    def _item(blob: Any) -> Item:
        return Item(blob.name, blob.size, _unquoted(blob.etag))

    def translate(self, error: Exception, text: str) -> Exception | None:
        from azure.core import exceptions as azure

        text = text.partition(" RequestId:")[0]
        code = getattr(error, "error_code", None)
        code = str(getattr(code, "value", code))
        denied = code in ("AuthenticationFailed", "InvalidAuthenticationInfo")
        if denied or isinstance(error, azure.ClientAuthenticationError):
            return NoAccess(text)
        if code.startswith("Container") and isinstance(error, azure.ResourceNotFoundError):
            return MissingBucket(text)
        if isinstance(error, azure.ResourceExistsError | azure.ResourceModifiedError):
            return Changed(text)
        if isinstance(error, azure.HttpResponseError) and error.status_code:
            return _of_status(error.status_code, text)
        return Unavailable(text) if isinstance(error, azure.AzureError) else None
