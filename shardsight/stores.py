"""S3, Google Cloud Storage and Azure Blob Storage by bucket and key, through the filesystems of fsspec.

The filesystems bring credentials and connections. Their own methods take an address, and read `?versionId=`, `#` or a
slash at the end of a key as something else than a part of it; so each request names its bucket and key apart.
"""

import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

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
# Error codes of S3 about the credentials themselves, and of what passes though its HTTP status does not say so.
_S3_DENIED = {
    *("ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidToken"),
    *("RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired"),
}
_S3_PASSING = {
    *("BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "OperationAborted"),
    *("RequestTimeout", "ServiceUnavailable", "SlowDown", "XAmzContentSHA256Mismatch"),
}
# Of every request to Azure; storage.Storage retries.
_AZURE_ONCE = {"retry_total": 0, "permit_redirects": False}
_REDIRECTS = (301, 302, 303, 307, 308)


class StorageError(UsageError):
    """A store that cannot be used at all: one sentence for the user."""


class Unavailable(StorageError, OSError):
    """The store did not answer, was too busy, or cut the answer short: the same request may succeed later."""


class NoAccess(StorageError, OSError):
    """The credentials themselves are missing, wrong or expired, so that no request would succeed."""


class Rejected(ValueError):
    """The store refuses this request, and would refuse it again."""


class MissingBucket(FileNotFoundError):
    """There is no such bucket, or container."""


class MissingObject(FileNotFoundError):
    """The bucket is there, and holds no such object."""


class Changed(Exception):
    """The object is not in the state that a conditional write asked for."""


class Redirected(Exception):
    """The store pointed to another address."""

    def __init__(self) -> None:
        super().__init__("the store sends us to another address, where nobody is asked")


class Item(NamedTuple):
    """An object of a listing. tag: changes when the object is written again."""

    key: str
    size: int
    tag: str


class Store(Protocol):
    """What storage.Storage asks of a service. Each raises the errors above, PermissionError for an object or a bucket
    that these credentials may not use, and whatever a mistake of ours causes."""

    filesystem: Any  # of fsspec

    def get(self, bucket: str, key: str, start: int = 0, stop: int | None = None) -> bytes: ...

    def put(self, bucket: str, key: str, data: bytes, tag: str | None = None) -> str:
        """Returns the new object's tag. With a tag, only if the object still has that one; with "", only if there is
        none. Raises Changed, unless the service ignores conditions."""
        ...

    def delete(self, bucket: str, key: str) -> None: ...

    def head(self, bucket: str, key: str) -> Item: ...

    def page(self, bucket: str, prefix: str, token: str | None) -> tuple[list[Item], str | None]:
        """Some thousand objects in the order of their keys, and the token of the next page."""
        ...


def _flags(options: dict[str, str]) -> dict[str, Any]:
    yes = ("1", "true", "yes")
    return {
        name: value.lower() in yes if name in ("anon", "requester_pays") else value for name, value in options.items()
    }


def _unquoted(etag: str) -> str:
    """Services quote it in one answer, and not in another."""
    return etag.strip('"')


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__


def _of_status(status: int, text: str) -> Exception:
    """The error that an HTTP status stands for, where the service says no more."""
    if status in (408, 429) or (status >= 500 and status != 501):
        return Unavailable(text)
    kinds: dict[int, type[Exception]] = {401: NoAccess, 403: PermissionError, 404: MissingObject, 412: Changed}
    return kinds.get(status, Rejected)(text)


class _Remote:
    """Runs requests in the event loop of a filesystem of fsspec."""

    def __init__(self, filesystem: Any) -> None:
        self.filesystem = filesystem

    def run(self, request: Callable[[], Awaitable[Any]]) -> Any:
        from fsspec.asyn import sync

        try:
            return sync(self.filesystem.loop, request)
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            if redirect := next((cause for cause in _chain(error) if isinstance(cause, Redirected)), None):
                raise Rejected(str(redirect)) from error
            raise self.translate(error, text) from error

    def translate(self, error: Exception, text: str) -> Exception:
        """An error of the service's library as one of this module's; one that is none of its own as it is."""
        raise NotImplementedError


class S3(_Remote):
    """options: OPTIONS["s3"]; what is missing comes from the AWS environment."""

    def __init__(self, options: dict[str, str]) -> None:
        import s3fs  # here, for the second that it takes in every process

        region = {name: value for name, value in options.items() if name == "region_name"}
        # Checksums only where they are asked for: most stores but AWS refuse the new ones.
        config = {
            **{"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "max_pool_connections": 64},
            **{"retries": {"max_attempts": 0}},  # storage.Storage retries
            **{"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"},
            "http_session_cls": _without_redirects(),
        }
        filesystem = s3fs.S3FileSystem(
            **_flags({name: value for name, value in options.items() if name not in region}),
            config_kwargs=config,
            client_kwargs=region,
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        super().__init__(filesystem)

    def _ask(self, method: str, **arguments: Any) -> Any:
        return self.run(lambda: self.filesystem._call_s3(method, self.filesystem.req_kw, **arguments))

    def get(self, bucket: str, key: str, start: int = 0, stop: int | None = None) -> bytes:
        part = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}

        async def request() -> bytes:
            filesystem = self.filesystem
            answer = await filesystem._call_s3("get_object", filesystem.req_kw, Bucket=bucket, Key=key, **part)
            async with answer["Body"] as body:
                return bytes(await body.read())

        data: bytes = self.run(request)
        return data

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
            self.get(bucket, key, 0, 1)  # fails alike, but says why, which the answer to a HEAD request cannot
            raise
        return Item(key, int(answer["ContentLength"]), _unquoted(answer["ETag"]))

    def page(self, bucket: str, prefix: str, token: str | None) -> tuple[list[Item], str | None]:
        more = {"ContinuationToken": token} if token else {}
        answer = self._ask("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        items = [Item(entry["Key"], entry["Size"], _unquoted(entry["ETag"])) for entry in answer.get("Contents", [])]
        return items, answer["NextContinuationToken"] if answer.get("IsTruncated") else None

    def translate(self, error: Exception, text: str) -> Exception:
        import aiohttp
        from botocore import exceptions as botocore

        answer = next((cause.response for cause in _chain(error) if isinstance(cause, botocore.ClientError)), None)
        if answer is not None:
            code = str(answer.get("Error", {}).get("Code", ""))
            if code in _S3_DENIED:
                return NoAccess(text)
            if code in _S3_PASSING:
                return Unavailable(text)
            if code == "NoSuchBucket":
                return MissingBucket(text)
            return _of_status(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), text)
        if isinstance(error, botocore.HTTPClientError | botocore.ConnectionError | aiohttp.ClientError | OSError):
            return Unavailable(text)
        if isinstance(error, botocore.BotoCoreError):
            about_keys = ("Credential", "Token", "Profile", "SSO")
            return (NoAccess if any(word in type(error).__name__ for word in about_keys) else Rejected)(text)
        return Rejected(text) if isinstance(error, ValueError) else error  # an endpoint that is no address, say


def _without_redirects() -> type:
    """aiohttp follows a store's redirect wherever it leads, which botocore itself does not; and botocore asks without
    end what region is meant, where the redirect does not say so."""
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


class GoogleCloud(_Remote):
    """options: OPTIONS["gs"]; what is missing comes from Google's environment (GOOGLE_APPLICATION_CREDENTIALS, …)."""

    def __init__(self, options: dict[str, str]) -> None:
        import aiohttp
        import gcsfs
        from google.auth.exceptions import GoogleAuthError

        async def refuse(*_: object) -> None:
            raise Redirected

        tracing = aiohttp.TraceConfig()
        tracing.on_request_redirect.append(refuse)
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs each error that it raises as well
        given = _flags(options)
        if given.pop("anon", False):
            given["token"] = "anon"
        try:
            filesystem = gcsfs.GCSFileSystem(
                **given,
                requests_timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS),
                session_kwargs={"trace_configs": [tracing]},
                use_listings_cache=False,
                skip_instance_cache=True,
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
                self.page(bucket, key[0], None)  # raises MissingBucket where that is what is missing
            raise

    def get(self, bucket: str, key: str, start: int = 0, stop: int | None = None) -> bytes:
        part = {} if stop is None else {"headers": {"Range": f"bytes={start}-{stop - 1}"}}
        data: bytes = self._ask("GET", "b/{}/o/{}", bucket, key, alt="media", **part)[1]
        return data

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

    def translate(self, error: Exception, text: str) -> Exception:
        import aiohttp
        import google.auth.exceptions
        import requests
        from gcsfs.retry import HttpError

        if isinstance(error, FileNotFoundError):
            return MissingObject(text)
        if isinstance(error, FileExistsError):
            return Changed(text)
        if isinstance(error, HttpError):
            return _of_status(int(error.code or 0), text)
        if isinstance(error, google.auth.exceptions.GoogleAuthError):
            passing = isinstance(error, google.auth.exceptions.TransportError)
            return Unavailable(text) if passing else NoAccess(text)
        if isinstance(error, OSError) and text.startswith("Forbidden"):
            return PermissionError(text)
        if isinstance(error, aiohttp.ClientError | requests.RequestException | OSError):
            return Unavailable(text)
        return Rejected(text) if isinstance(error, ValueError) else error


class Azure(_Remote):
    """options: OPTIONS["az"]; what is missing comes from Azure's environment (AZURE_STORAGE_ACCOUNT_NAME, …).

    account: of an address that names one, abfs://container@account.dfs.core.windows.net/…
    """

    def __init__(self, options: dict[str, str], account: str | None = None) -> None:
        import adlfs

        filesystem = adlfs.AzureBlobFileSystem(
            **(_flags(options) | ({"account_name": account} if account else {})),
            connection_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        super().__init__(filesystem)

    def _blob(self, bucket: str, key: str) -> Any:
        return self.filesystem.service_client.get_blob_client(bucket, key)

    def get(self, bucket: str, key: str, start: int = 0, stop: int | None = None) -> bytes:
        part = {} if stop is None else {"offset": start, "length": stop - start}

        async def request() -> bytes:
            return bytes(await (await self._blob(bucket, key).download_blob(**part, **_AZURE_ONCE)).readall())

        data: bytes = self.run(request)
        return data

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

        found: tuple[list[Item], str | None] = self.run(request)
        return found

    @staticmethod
    def _item(blob: Any) -> Item:
        return Item(blob.name, blob.size, _unquoted(blob.etag))

    def translate(self, error: Exception, text: str) -> Exception:
        from azure.core import exceptions as azure

        text = text.partition(" RequestId:")[0]
        code = getattr(error, "error_code", None)
        code = str(getattr(code, "value", code))
        if isinstance(error, azure.ClientAuthenticationError) or code in (
            "AuthenticationFailed",
            "InvalidAuthenticationInfo",
        ):
            return NoAccess(text)
        if code.startswith("Container") and isinstance(error, azure.ResourceNotFoundError):
            return MissingBucket(text)
        if isinstance(error, azure.ResourceExistsError | azure.ResourceModifiedError):
            return Changed(text)
        if isinstance(error, azure.HttpResponseError) and error.status_code:
            return _of_status(error.status_code, text)
        if isinstance(error, azure.AzureError | OSError):
            return Unavailable(text)
        return Rejected(text) if isinstance(error, ValueError) else error
