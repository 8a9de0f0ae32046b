"""An S3 endpoint on loopback that fails as real ones do: errors 500, answers that come too late, connections that are cut."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import pyarrow.fs as pafs
import pyarrow.parquet as pq
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

HERE, KEY = "127.0.0.1", "testing"
LATE = 3.5  # seconds: the AWS SDK gives up after 3


class Bucket:
    """A bucket at two ports: what is tested uses the one that fails, the test looks through the other."""

    def __init__(self, name: str, share: float) -> None:
        self.name, self._share, self._random = name, share, random.Random(0)
        self.faults, self.requests = Counter[str](), Counter[str]()  # of what is tested
        self.torn, self.read = list[str](), 0
        self._app = DomainDispatcherApplication(create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._servers = [make_server(HERE, 0, app, threaded=True) for app in (self._faulty, self._app)]
        self._end = threading.Event()

    def __enter__(self) -> Bucket:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        self.fs.create_dir(self.name)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        for server in self._servers:
            server.shutdown()

    @property
    def fs(self) -> pafs.S3FileSystem:
        """A way without faults."""
        endpoint = f"{HERE}:{self._servers[1].port}"
        return pafs.S3FileSystem(
            access_key=KEY,
            secret_key=KEY,
            region="us-east-1",
            scheme="http",
            endpoint_override=endpoint,
            allow_bucket_creation=True,
        )

    @property
    def settings(self) -> dict[str, str]:
        """Variables that anyone may see."""
        return {"AWS_ENDPOINT_URL": f"http://{HERE}:{self._servers[0].port}", "AWS_REGION": "us-east-1"}

    @property
    def secrets(self) -> dict[str, str]:
        """Variables that only the machines have."""
        return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": KEY, "AWS_EC2_METADATA_DISABLED": "true"}

    def _faulty(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Passes on most requests."""
        self.requests["LIST" if "list-type" in environ["QUERY_STRING"] else environ["REQUEST_METHOD"]] += 1
        fault = self._random.choice(("error", "late", "cut")) if self._random.random() < self._share else None
        if fault:
            self.faults[fault] += 1
        if fault == "error":
            start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [b"<Error><Code>InternalError</Code><Message>Try again.</Message></Error>"]
        if fault == "cut":
            raise ConnectionAbortedError
        if fault == "late":
            time.sleep(LATE)
        return self._app(environ, start_response)

    def _watch(self) -> None:
        """Reads every shard as soon as it is seen: one that cannot be read was visible before it was whole."""
        seen, pause = set[str](), 0.05
        while not self._end.wait(pause):
            began = time.monotonic()
            for path in {f"{self.name}/{file}" for file in self.files() if file.endswith(".parquet")} - seen:
                seen.add(path)
                self.read += 1
                try:
                    pq.read_table(path, filesystem=self.fs)
                except Exception:
                    self.torn.append(path)
            pause = max(0.05, 5 * (time.monotonic() - began))  # many shards take long to list

    def write(self, name: str, content: bytes) -> None:
        """A file, by a way without faults."""
        with self.fs.open_output_stream(f"{self.name}/{name}", compression=None) as stream:
            stream.write(content)

    def files(self) -> list[str]:
        """All there is, by name."""
        found = self.fs.get_file_info(pafs.FileSelector(self.name, recursive=True))
        return [info.path.removeprefix(f"{self.name}/") for info in found if info.is_file]
