"""Shards at an address are read as those on a disk are, in bounded room, and fetched again only where they must be."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from latentgen.data import load_pixels, read_folder, remote, write_ledger
from latentgen.data.picture import PROFILED, content_of
from latentgen.errors import InputError
from tests.forked import verb
from tests.shards import Served, png, tar, webshards

pytest.importorskip("aiohttp")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Three shards of a set, and a place of its own for what is fetched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    with Served(webshards(tmp_path / "shards")) as found:
        yield found


def lying(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "kept" / "latentgen" / "shards").glob("*.tar"))


def test_shards_at_an_address_are_those_on_the_disk(served: Served, tmp_path: Path) -> None:
    said: list[object] = []
    there = read_folder(Path(f"{served.url}/{{000..002}}.tar"), say=said.append)  # a Path folds the slashes
    here = read_folder(tmp_path / "shards")
    assert [p.path.name for p in there.pictures] == [p.path.name for p in here.pictures]
    for far, near in zip(there.pictures, here.pictures, strict=True):
        assert (far.captions, far.split, far.attributes) == (near.captions, near.split, near.attributes)
        assert far.read() == near.read() and far.content() == near.content()
    assert sorted(served.fetched) == ["000.tar", "001.tar", "002.tar"] and len(said) == 3
    arrays = [load_pixels(some, 8, tmp_path / name).array for some, name in ((there, "far"), (here, "near"))]
    np.testing.assert_array_equal(*arrays)
    assert write_ledger(there).files == write_ledger(here).files
    assert f'"folder": "{served.url}"' in write_ledger(there).as_json()

    again = read_folder(Path(f"{served.url}/{{000..002}}.tar"))  # listed and lying here: nothing is asked for
    assert [p.read() for p in again.pictures] == [p.read() for p in here.pictures] and len(served.fetched) == 3


def test_what_is_kept_stays_within_its_bound_and_is_listed_without_being_fetched_again(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = max(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar"))
    monkeypatch.setenv(remote.LIMIT, str(2.5 * size / 2**30))
    address = Path(f"{served.url}/{{000..002}}.tar")
    pixels = load_pixels(read_folder(address), 8, tmp_path / "pixels").array
    here = load_pixels(read_folder(tmp_path / "shards"), 8, tmp_path / "here").array
    np.testing.assert_array_equal(pixels, here)
    assert len(lying(tmp_path)) <= 2
    count = len(served.fetched)
    kept = load_pixels(read_folder(address), 8, tmp_path / "pixels").array  # by hashes that are written down
    np.testing.assert_array_equal(kept, here)
    assert len(served.fetched) == count > 3

    for room in (1.5, 2.5):  # one at a time, and none fetched ahead; one beside the one that is read
        monkeypatch.setenv(remote.LIMIT, str(room * size / 2**30))
        back = load_pixels(tuple(reversed(read_folder(address).pictures)), 8, tmp_path / f"back-{room}").array
        np.testing.assert_array_equal(back[::-1], here)
        assert len(lying(tmp_path)) <= int(room)

    monkeypatch.setenv(remote.LIMIT, str(0.5 * size / 2**30))
    for path in lying(tmp_path):
        path.unlink()
    with pytest.raises(InputError, match=f"{remote.LIMIT} is .*, too little for a shard of"):
        read_folder(address).pictures[0].read()
    monkeypatch.setenv(remote.LIMIT, "much")
    with pytest.raises(InputError, match="give a number of GiB"):
        read_folder(address).pictures[0].read()


def test_a_shard_listed_before_profiles_were_heeded_is_decoded_anew_once(served: Served, tmp_path: Path) -> None:
    address = Path(f"{served.url}/000.tar")
    pictures = read_folder(address).pictures
    assert [picture.content() for picture in pictures] == [content_of(picture.read()) for picture in pictures]
    (listing,) = (tmp_path / "kept").rglob("*.json")
    told = json.loads(listing.read_text())
    del told["profiles"]
    listing.write_text(json.dumps(told))
    count = len(served.fetched)
    assert all(p.content() == content_of(p.read()) + PROFILED for p in read_folder(address).pictures)
    assert len(served.fetched) == count


def test_a_shard_that_changed_at_its_address_is_another(served: Served, tmp_path: Path) -> None:
    address = Path(f"{served.url}/000.tar")
    before = read_folder(address)
    stamp = before.pictures[0].stamp
    target = tar(tmp_path / "shards" / "000.tar", ("1.png", png((9, 9, 9))), ("1.txt", b"anew"))
    os.utime(target, (1e9, 1e9))
    after = read_folder(address)
    assert [picture.captions for picture in after.pictures] == [("anew",)]
    assert after.pictures[0].read() == png((9, 9, 9)) and after.pictures[0].stamp != stamp


def test_a_broken_connection_is_tried_again_and_stops_the_run_not_the_picture(served: Served, tmp_path: Path) -> None:
    served.failing = 2
    pictures = read_folder(Path(f"{served.url}/000.tar")).pictures
    assert len(pictures) == 4 and served.fetched == ["000.tar"] * 3
    for path in lying(tmp_path):
        path.unlink()
    served.failing = 99
    with pytest.raises(InputError, match=r"000\.tar cannot be fetched .*; the same command goes on once it can be"):
        load_pixels(pictures, 8, tmp_path / "pixels")
    assert len(served.fetched) == 3 + remote.TRIES  # not once for each thread that waits for it
    assert not list((tmp_path / "kept").rglob("*.part")) and not list((tmp_path / "pixels").glob("*.npy"))
    served.failing = 0
    again = read_folder(Path(f"{served.url}/000.tar"))
    assert len(load_pixels(again, 8, tmp_path / "pixels").array) == 4


def test_a_shard_that_cannot_be_fetched_is_no_torn_one_of_which_the_rest_is_used(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.failing = 99
    with pytest.raises(InputError, match=r"000\.tar cannot be fetched .*; the same command goes on once it can be"):
        read_folder(Path(f"{served.url}/{{000..001}}.tar"))
    served.failing = 0
    for told in ("abc", "nan", "-1"):
        monkeypatch.setenv(remote.LIMIT, told)
        with pytest.raises(InputError, match=f"{remote.LIMIT} is '{told}'; give a number of GiB"):
            read_folder(Path(f"{served.url}/{{000..001}}.tar"))


def test_a_full_disk_and_what_is_not_there_are_said(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"http://127.*/003\.tar does not exist"):
        read_folder(Path(f"{served.url}/{{000..004}}.tar"))
    with pytest.raises(InputError, match="is no tar shard; give them by name"):
        read_folder(Path(f"{served.url}/pictures"))
    with pytest.raises(InputError, match="starts with gopher://, which nothing here opens"):
        read_folder(Path("gopher://host/000.tar"))
    assert len(read_folder(Path(f"file://{tmp_path}/shards/000.tar")).pictures) == 4  # fetched as any other
    served.close()
    with pytest.raises(InputError, match=r"000\.tar cannot be reached \(.*\); run again where it can be"):
        read_folder(Path(f"{served.url}/000.tar"))

    class Full:
        def get_file(self, *_: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote, "_ask", lambda url: (1000, "tag"))
    monkeypatch.setattr(remote, "_system", lambda url: (Full(), url))
    with pytest.raises(InputError, match=f"is full; free space, or set {remote.LIMIT}"):
        read_folder(Path("https://host/000.tar"))


def test_what_a_killed_process_left_half_fetched_is_cleared_away(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "kept" / "latentgen" / "shards"
    folder.mkdir(parents=True)
    dead, own = folder / "a.999999999.part", folder / f"b.{os.getpid()}.part"
    for part in (dead, own):
        part.write_bytes(b"x")
    read_folder(Path(f"{served.url}/000.tar"))
    assert own.exists() and not dead.exists()


def test_doctor_takes_an_address(served: Served, tmp_path: Path) -> None:
    done = verb("doctor", f"{served.url}/{{000..002}}.tar", "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert f"in {served.url}" in done.stdout and "10  used" in done.stdout
    assert done.stderr.count("data: fetching http") == 3
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 10
