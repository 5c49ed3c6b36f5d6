"""Shards on S3 and on web servers, from servers that the tests start themselves."""

from __future__ import annotations

import importlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from loading_helpers import FAMILY, FakeTokenizer
from tar_helpers import make_shard, picture

from library.contracts import Position, RunLength
from library.data import remote_files, tar_index
from library.data.images import load_image
from library.data.opening import open_data
from library.data.options import CacheOptions, DatasetOptions, LoaderOptions, SubsetOptions
from library.data.remote_files import list_remote, remote_facts, remote_reader
from library.data.scan import ScanContext
from library.data.shard_copies import local_copy
from library.data.shards import expand_shards
from library.data.stream import batches_of
from library.data.tar_index import index_shard
from library.errors import UserError
from library.files import CannotSave


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    monkeypatch.setattr(remote_files, "_WAITS", (0.01, 0.01))


class Server(ThreadingHTTPServer):
    """Serves bytes under names; keeps the ranges that were asked for."""

    def __init__(self, contents: dict[str, bytes], *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents, self.ranges = contents, ranges
        self.asked: list[str | None] = []
        self.failures = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:  # noqa: N802
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:  # noqa: N802
        data = self.server.contents.get(self.path[1:])
        if data is None:
            self.send_error(404)
            return
        if body and self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        asked = self.headers.get("Range")
        status, start, end = 200, 0, len(data)
        if asked and self.server.ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            status, start, end = 206, int(first), min(int(last or len(data)) + 1, len(data))
        if body:
            self.server.asked.append(asked)
        self.send_response(status)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{hash(data)}"')
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(data[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(tmp_path):
    pytest.importorskip("aiohttp")
    servers = []

    def start(**settings):
        shard = make_shard(tmp_path / "source" / "a.tar", 4)
        server = Server({"a.tar": shard.read_bytes(), "page": b"<html>" + b"x" * 1000}, **settings)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_members_are_read_by_ranges(serve, tmp_path, monkeypatch):
    server = serve()
    url = server.url("a.tar")
    index = index_shard(url, cache_dir=str(tmp_path / "cache"))
    assert [sample.caption for sample in index] == [f"caption {number}" for number in range(4)]
    server.asked.clear()
    sample = index.sample(2)
    assert sample.picture.read() == picture(2)
    assert server.asked == [f"bytes={sample.picture.offset}-{sample.picture.offset + sample.picture.size - 1}"]
    assert load_image(str(sample.picture)).shape == (16, 24, 3)
    monkeypatch.setattr(tar_index, "collect", None)
    assert len(index_shard(url, cache_dir=str(tmp_path / "cache"))) == 4


def test_a_changed_file_is_indexed_anew(serve, tmp_path):
    server = serve()
    cache = str(tmp_path / "cache")
    assert len(index_shard(server.url("a.tar"), cache_dir=cache)) == 4
    server.contents["a.tar"] = make_shard(tmp_path / "b.tar", 2).read_bytes()
    assert len(index_shard(server.url("a.tar"), cache_dir=cache)) == 2


def test_passing_errors_are_tried_again(serve):
    server = serve()
    server.failures = 2
    assert remote_reader(server.url("a.tar"))(0, 5) == server.contents["a.tar"][:5]
    server.failures = 9
    with pytest.raises(OSError, match="after 3 attempts"):
        remote_reader(server.url("a.tar"))(0, 5)


def test_what_cannot_be_read(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "_AHEAD", 100)
    server = serve()
    with pytest.raises(UserError, match="none.tar.*not found"):
        index_shard(server.url("none.tar"))
    with pytest.raises(UserError, match="page.*HTML"):
        index_shard(server.url("page"))
    with pytest.raises(UserError, match="cannot be read"):
        remote_facts("http://127.0.0.1:9/a.tar")
    whole = serve(ranges=False)
    with pytest.raises(UserError, match="whole files"):
        index_shard(whole.url("a.tar"))


def test_indexing_takes_few_requests(serve, monkeypatch):
    server = serve()
    index_shard(server.url("a.tar"))
    assert len(server.asked) == 1
    server.asked.clear()
    monkeypatch.setattr(tar_index, "_AHEAD", 1)
    index_shard(server.url("a.tar"))
    assert len(server.asked) > 8


def test_without_credentials_there_are_no_further_attempts(monkeypatch):
    class NoCredentialsError(ValueError):
        pass

    def info(url):
        tried.append(url)
        raise NoCredentialsError("Unable to locate credentials")

    tried = []
    monkeypatch.setattr(remote_files, "file_system", lambda url: SimpleNamespace(info=info))
    with pytest.raises(UserError, match="Unable to locate credentials. Set AWS_ACCESS_KEY_ID"):
        remote_facts("s3://bucket/a.tar")
    assert len(tried) == 1


def test_silent_servers_are_given_up(monkeypatch):
    """One that takes connections and never answers."""
    pytest.importorskip("aiohttp")
    pytest.importorskip("s3fs")
    monkeypatch.setattr(remote_files, "_READ_SECONDS", 0.2)
    monkeypatch.setattr(remote_files, "_WAITS", ())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        for url in (f"{address}/a.tar", "s3://photos/a.tar"):
            remote_files.file_system(url)
            begin = time.monotonic()
            with pytest.raises(UserError, match="cannot be read after 1 attempts"):
                remote_facts(url)
            assert time.monotonic() - begin < 50, "as long as the clients' own patience"


def test_copies_are_made_once(serve, tmp_path):
    server = serve()
    copy = local_copy(server.url("a.tar"), tmp_path / "copies")
    assert copy.read_bytes() == server.contents["a.tar"]
    server.asked.clear()
    assert local_copy(server.url("a.tar"), tmp_path / "copies") == copy
    assert server.asked == []
    server.contents["a.tar"] += bytes(512)
    assert local_copy(server.url("a.tar"), tmp_path / "copies") != copy


def test_copies_have_names_that_every_system_takes(serve, tmp_path):
    server, name = serve(), "a" * 300 + ".tar"
    server.contents[name] = server.contents["a.tar"]
    copy = local_copy(server.url(name), tmp_path / "copies")
    assert copy.name.endswith("-shard.tar") and copy.is_file()


def test_a_folder_for_copies_that_cannot_be_made_is_told(serve, tmp_path):
    (tmp_path / "copies").touch()
    with pytest.raises(CannotSave, match="cannot save .*copies"):
        local_copy(serve().url("a.tar"), tmp_path / "copies")


def test_those_who_want_the_same_copy_wait_for_it(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("library.data.shard_copies._POLL_SECONDS", 0.01)
    server = serve()
    url = server.url("a.tar")
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(lambda _: local_copy(url, tmp_path / "copies"), range(3)))
    assert [path.read_bytes() for path in found] == [server.contents["a.tar"]]
    assert len(server.asked) == 1
    assert [path.name for path in (tmp_path / "copies").iterdir()] == [path.name for path in found]


def test_missing_packages_are_named(monkeypatch):
    inner = importlib.import_module

    def without(name, *rest):
        if name in ("s3fs", "aiohttp"):
            raise ImportError(name)
        return inner(name, *rest)

    monkeypatch.setattr(remote_files.importlib, "import_module", without)
    with pytest.raises(UserError, match=r"s3://bucket/a.tar: .* needs the package s3fs.*pip install fsspec s3fs"):
        index_shard("s3://bucket/a.tar")
    with pytest.raises(UserError, match="pip install fsspec aiohttp"):
        index_shard("https://host/a.tar")


@pytest.fixture
def bucket(monkeypatch):
    """A bucket on an S3-compatible server in this process."""
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # they remember the address of the server
    boto3 = pytest.importorskip("boto3")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="photos")
    yield client
    running.stop()


def test_s3(bucket, tmp_path):
    for number in range(2):
        shard = make_shard(tmp_path / f"{number}.tar", 3, start=3 * number)
        bucket.upload_file(str(shard), "photos", f"set/{number:04d}.tar")
    bucket.put_object(Bucket="photos", Key="set/readme.md", Body=b"text")
    shards = expand_shards("s3://photos/set/")
    assert shards == ["s3://photos/set/0000.tar", "s3://photos/set/0001.tar"] == list_remote("s3://photos/set")
    assert expand_shards("s3://photos/set/{0000..0001}.tar") == shards
    samples = [sample for shard in shards for sample in index_shard(shard, cache_dir=str(tmp_path / "cache"))]
    assert [sample.key for sample in samples] == [f"set/{number:04d}" for number in range(6)]
    assert samples[4].picture.read() == picture(4)
    assert local_copy(shards[1], tmp_path / "copies").read_bytes() == (tmp_path / "1.tar").read_bytes()
    with pytest.raises(UserError, match="cannot be read"):
        index_shard("s3://photos/none.tar")
    with pytest.raises(UserError, match="no .tar file"):
        expand_shards("s3://photos/empty/")


def served(shards, *, workers, **options):
    """The batches of a short run on remote shards, with loader processes."""
    data = open_data(
        DatasetOptions(webdataset_path=shards, resolution="64", batch_size=2, **options),
        SubsetOptions(),
        CacheOptions(),
        spec=FAMILY,
        kinds=("dreambooth",),
        tokenizers=(FakeTokenizer(),),
        context=ScanContext(run_batches=4),
    )
    length = RunLength(4, 1, data.batch_count(), 1, 1, 1)
    loader = LoaderOptions(max_data_loader_n_workers=workers)
    batches = batches_of(data, length, rank=0, seed=1, loader=loader, start_method="spawn")
    found = list(batches.iterate(Position()))
    assert not any(one.replaced for one in found)
    return [(one.record_keys, one.captions, one.pixels.numpy().tobytes()) for one in found]


@pytest.fixture
def on_s3(bucket, tmp_path):
    for number in range(2):
        shard = make_shard(tmp_path / "local" / f"{number:04d}.tar", 4, start=4 * number)
        bucket.upload_file(str(shard), "photos", f"set/{number:04d}.tar")
    return ("s3://photos/set/",)


def test_runs_on_s3_serve_what_local_files_do(on_s3, tmp_path):
    local = (str(tmp_path / "local"),)
    assert served(on_s3, workers=0) == served(local, workers=0)
    copies = str(tmp_path / "copies")
    copied = served(on_s3, workers=0, webdataset_cache_dir=copies)
    assert [one[1:] for one in copied] == [one[1:] for one in served(local, workers=0)]


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_from_s3_serve_what_local_files_do(on_s3, tmp_path, workers, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setattr("library.data.loader.available_cores", lambda: 2)
    monkeypatch.setattr("library.data.stream_source._AHEAD", 3000)
    # Shards are put in order by number, so where they lie makes no difference.
    streaming = {"webdataset_streaming": True, "webdataset_shuffle": 3}
    local = served((str(tmp_path / "local"),), workers=0, **streaming)
    assert served(on_s3, workers=workers, **streaming) == local
    if not workers:
        copies = tmp_path / "copies"
        assert served(on_s3, workers=0, webdataset_cache_dir=str(copies), **streaming) == local
        assert len(list(copies.glob("*.tar"))) == 2
