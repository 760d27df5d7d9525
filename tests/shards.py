"""Tar shards to test with, on the disk and behind HTTP."""

import functools
import io
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import pytest
from PIL import Image


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def webshards(folder: Path, count: int = 10, each: int = 4) -> Path:
    """Shards that the webdataset package wrote."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(f"{folder}/%03d.tar", maxcount=each, verbose=0) as writer:
        for n in range(count):
            table = {"caption": f"number {n}", "captions": ["a colour"], "split": "test" if n == 3 else None, "n": n}
            writer.write({"__key__": f"part/{n:05d}", "png": png((20 * n, 0, 0)), "txt": f"shade {n}", "json": table})
    return folder


class Served:
    """A folder behind HTTP. fetched: the names of what was asked for by GET; failing: how many more GETs break off."""

    def __init__(self, folder: Path) -> None:
        self.fetched: list[str] = []
        self.failing = 0
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.fetched.append(self.path.rsplit("/", 1)[-1])
                if outer.failing:
                    outer.failing -= 1
                    self.send_response(200)
                    self.send_header("Content-Length", "100000")
                    self.end_headers()
                    self.wfile.write(b"x" * 10)
                    return
                super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nobody answers there any more."""
        self.server.shutdown()
        self.server.server_close()
