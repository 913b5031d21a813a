"""A small S3 server for tests: objects in memory, one bucket, path-style addresses, and failures on request.

It implements what obstore sends: put, get, head, delete, copy, list, bulk delete and multipart uploads. It checks the
access key id, not the signatures.
"""

import contextlib
import hashlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from xml.sax.saxutils import escape

from aiohttp import web

from support.manager_server import aiohttp_served

BUCKET, ACCESS_KEY = "workspaces", "AKIATESTTESTTESTTEST"


@dataclass
class S3:
    """The store's objects by name. If `status` is set, every request gets it."""

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    status: int | None = None
    requests: int = 0

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment variables with which the platform uses this store."""
        return {
            "BLOB_URL": f"s3://{BUCKET}/some/prefix",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": "not-a-real-secret",
            **more,
        }

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one request."""
        self.requests += 1
        body = await request.read()
        if self.status is not None:
            return _error(self.status, "InternalError")
        if f"Credential={ACCESS_KEY}/" not in request.headers.get("authorization", ""):
            return _error(403, "InvalidAccessKeyId")
        bucket, _, name = request.path.lstrip("/").partition("/")
        if bucket != BUCKET:
            return _error(404, "NoSuchBucket")
        query = request.query
        if request.method == "POST":
            return self._post(name, query.get("uploadId"), "delete" in query, body)
        if request.method == "PUT":
            return self._put(request, name, body)
        if request.method == "DELETE":
            self.objects.pop(name, None)
            return web.Response(status=204)
        if not name:
            return self._list(query.get("prefix", ""))
        if name not in self.objects:
            return _error(404, "NoSuchKey")
        found = self.objects[name]
        headers = {"etag": _etag(found), "last-modified": datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")}
        if request.method == "HEAD":
            return web.Response(headers={**headers, "content-length": str(len(found))})
        return web.Response(body=found, headers=headers)

    def _put(self, request: web.Request, name: str, body: bytes) -> web.Response:
        if (upload := request.query.get("uploadId")) is not None:
            self.uploads[upload][int(request.query["partNumber"])] = body
        elif source := request.headers.get("x-amz-copy-source"):
            self.objects[name] = self.objects[source.lstrip("/").removeprefix(f"{BUCKET}/")]
            return _xml(f"<CopyObjectResult><ETag>{escape(_etag(self.objects[name]))}</ETag></CopyObjectResult>")
        else:
            self.objects[name] = body
        return web.Response(headers={"etag": _etag(body)})

    def _post(self, name: str, upload: str | None, deletes: bool, body: bytes) -> web.Response:
        if deletes:
            names = re.findall("<Key>(.*?)</Key>", body.decode())
            for each in names:
                self.objects.pop(each, None)
            return _xml(
                f"<DeleteResult>{''.join(f'<Deleted><Key>{each}</Key></Deleted>' for each in names)}</DeleteResult>"
            )
        if upload is None:
            upload = f"upload-{len(self.uploads)}"
            self.uploads[upload] = {}
            return _xml(
                f"<InitiateMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>{escape(name)}</Key>"
                f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            )
        parts = self.uploads.pop(upload)
        self.objects[name] = b"".join(parts[number] for number in sorted(parts))
        etag = escape(_etag(self.objects[name]))
        return _xml(
            f"<CompleteMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>{escape(name)}</Key><ETag>{etag}</ETag>"
            "</CompleteMultipartUploadResult>"
        )

    def _list(self, prefix: str) -> web.Response:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        found = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{now}</LastModified><Size>{len(content)}</Size>"
            f"<ETag>{escape(_etag(content))}</ETag></Contents>"
            for name, content in sorted(self.objects.items())
            if name.startswith(prefix)
        )
        return _xml(f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>")


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def _xml(text: str) -> web.Response:
    return web.Response(text=f'<?xml version="1.0" encoding="UTF-8"?>{text}', content_type="application/xml")


def _error(status: int, code: str) -> web.Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
    return web.Response(status=status, text=text, content_type="application/xml")


@contextlib.asynccontextmanager
async def s3() -> AsyncIterator[S3]:
    """Serve an empty store on loopback."""
    store = S3()
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_route("*", "/{name:.*}", store.handle)
    async with aiohttp_served(app) as url:
        store.url = url
        yield store
