"""One writer a run: who holds the lease, who may take it, and who finds out that it is gone."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from streamswav.config import StorageSection
from streamswav.errors import EXIT_CONFIG, ChangedError, LeaseError, NotFoundError, UnavailableError
from streamswav.stream.store import Store
from streamswav.training.checkpoint import CheckpointFolder
from streamswav.training.lease import Holder, Lease

FOREVER = 3600.0


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """A run's folder and its store."""
    if request.param == "local":
        return str(tmp_path / "run"), Store()
    s3 = request.getfixturevalue("s3")
    return s3.make_bucket()[0] + "/run", Store(s3.section)


def held(place, **changes):
    """Leave a lease in a folder as another holder does."""
    lease = Lease(*place, seconds=FOREVER)
    lease.acquire()
    holder = replace(lease._held[0], token="another", **changes)
    place[1].write(lease.url, holder.to_bytes())
    lease.release()
    return holder


def read(place):
    return Holder(**json.loads(place[1].read(place[0] + "/lease.json")))


def test_a_lease_names_its_holder_and_goes_with_it(place):
    lease = Lease(*place, seconds=FOREVER)
    lease.acquire()
    assert read(place).host == socket.gethostname()
    assert lease.number == 1
    lease.check()
    lease.release()
    assert not place[1].exists(lease.url)


def test_the_number_grows_beyond_that_of_the_checkpoints(place):
    lease = Lease(*place, seconds=FOREVER)
    lease.acquire(above=6)
    folder = CheckpointFolder(place[0] + "/checkpoints", place[1], lease=lease)
    folder.save({"model.pt": b"x"}, step=1, images=1, about={})
    assert lease.number == folder.last_writer() == 7
    lease.release()


def test_without_seconds_there_is_no_lease(tmp_path):
    lease = Lease(str(tmp_path), Store(), seconds=0)
    lease.acquire()
    lease.check()
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused_by_the_name_of_the_first_once_that_one_renews(place):
    first, said = Lease(*place, seconds=5.0), []
    first.acquire()
    second = Lease(*place, seconds=5.0, tell=said.append)
    with pytest.raises(
        LeaseError, match=f"another run writes here .{socket.gethostname()}, process"
    ) as error:
        second.acquire()
    assert error.value.exit_code == EXIT_CONFIG
    assert "held by" in said[0]
    first.check()
    first.release()
    second.acquire()
    second.release()


def answering(*answers):
    """Answers as these, one after the other; an error is raised."""
    left = iter(answers)

    def answer(*given, **named):
        given = next(left)
        if isinstance(given, Exception):
            raise given
        return given

    return answer


def test_a_renewal_that_failed_is_tried_again_soon(tmp_path, monkeypatch):
    lease, waits = Lease(str(tmp_path), Store(), seconds=9), []
    lease._held = held((str(tmp_path), Store())), None
    failed = UnavailableError(lease.url, "timed out")
    monkeypatch.setattr(lease._hurried, "swap", answering(failed, "1", "2"))
    over = SimpleNamespace(wait=lambda seconds: waits.append(seconds) or len(waits) > 3)
    monkeypatch.setattr(lease, "_over", over)
    lease._renew()
    assert waits == [3, 1, 3, 3]
    assert lease._held[0].renewed == 2


def test_a_lease_that_is_not_there_for_a_moment_while_it_is_renewed_is_held(tmp_path, monkeypatch):
    store = Store()
    holder = held((str(tmp_path), store), host="pod-7")
    lease = Lease(str(tmp_path), store, seconds=9)
    found, renewed = store.read_version(lease.url), (replace(holder, renewed=1).to_bytes(), "2")
    missing = NotFoundError(lease.url, "is being replaced")
    monkeypatch.setattr(store, "read_version", answering(found, missing, renewed))
    with pytest.raises(LeaseError, match=re.escape("another run writes here (pod-7")):
        lease.acquire()


def test_a_lease_that_is_given_back_meanwhile_is_taken(place):
    holder, said = held(place, host="pod-7", seconds=20.0), []
    threading.Timer(0.3, place[1].delete, (place[0] + "/lease.json",)).start()
    lease = Lease(*place, seconds=FOREVER, tell=said.append)
    lease.acquire()
    assert lease.number == holder.number + 1
    assert len(said) == 1  # it waited, and did not have to take over
    lease.release()


def test_a_dead_process_of_this_machine_is_succeeded_at_once(place):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    before = held(place, pid=gone.pid, number=4)
    assert before.is_dead
    lease = Lease(*place, seconds=FOREVER, tell=pytest.fail)
    lease.acquire()
    assert lease.number == 5
    lease.release()


def test_the_number_of_a_process_that_another_has_now_counts_as_dead(place):
    assert held(place, began=1).is_dead


@pytest.mark.parametrize("elsewhere", [{"host": "pod-7"}, {"world": "another boot or container"}])
def test_who_cannot_be_looked_at_is_succeeded_once_the_lease_is_over(place, elsewhere):
    before, said = held(place, pid=1, began=1, seconds=0.4, **elsewhere), []
    assert not before.is_dead
    lease = Lease(*place, seconds=FOREVER, tell=said.append)
    lease.acquire()
    assert "who is not known to be dead" in said[0]
    assert "taken over" in said[1]
    lease.release()


def test_what_is_long_over_is_not_waited_for(place):
    held(place, host="pod-7", stamp=0.0)
    lease = Lease(*place, seconds=FOREVER, tell=pytest.fail)
    lease.acquire()
    lease.release()


def test_a_writer_that_was_succeeded_finds_out_before_its_checkpoint_is_the_newest(place):
    first = Lease(*place, seconds=FOREVER)
    first.acquire()
    folder = CheckpointFolder(place[0] + "/checkpoints", place[1], lease=first)
    folder.save({"model.pt": b"1"}, step=1, images=1, about={})
    successor = replace(first._held[0], token="another", host="pod-8", number=2)

    def succeeded(file):
        """The other comes while this one writes."""
        place[1].write(first.url, successor.to_bytes())
        file.write(b"2")

    with pytest.raises(LeaseError, match="pod-8"):
        folder.save({"model.pt": succeeded}, step=2, images=2, about={})
    with pytest.raises(LeaseError, match="pod-8"):
        folder.save({"model.pt": b"3"}, step=3, images=3, about={})
    assert place[1].read(folder.url + "/latest") == b"step-000000001"
    assert folder.newest()[0].step == 1
    first.release()
    assert read(place).host == "pod-8"


def test_a_lease_that_was_removed_is_lost(place):
    lease = Lease(*place, seconds=FOREVER)
    lease.acquire()
    place[1].delete(lease.url)
    with pytest.raises(LeaseError, match="removed"):
        lease.check()
    lease.release()


def test_a_renewal_finds_out_as_well(place):
    lease = Lease(*place, seconds=0.3)
    lease.acquire()
    place[1].write(lease.url, replace(lease._held[0], token="another").to_bytes())
    lease._thread.join(10)
    assert not lease._thread.is_alive()
    with pytest.raises(LeaseError, match="taken this run over"):
        lease.check()
    lease.release()


@pytest.mark.parametrize("content", [b"{]", b"[]", b'{"number": 1}', b'{"number": []}'])
def test_what_is_no_lease_is_nobodys(place, content):
    place[1].write(place[0] + "/lease.json", content)
    lease = Lease(*place, seconds=FOREVER)
    lease.acquire()
    lease.release()


def test_a_lease_of_a_later_version_counts(place):
    lease = Lease(*place, seconds=FOREVER)
    lease.acquire()
    later = {**json.loads(place[1].read(lease.url)), "token": "another", "colour": "blue"}
    place[1].write(lease.url, json.dumps(later).encode())
    with pytest.raises(LeaseError, match="taken this run over"):
        lease.check()


def test_a_checkpoint_that_a_succeeded_writer_brought_to_its_end_is_not_taken(place):
    """It was stopped between its last look at the lease and the end of its checkpoint."""
    url = place[0] + "/checkpoints"
    first, second = Lease(place[0] + "/1", place[1], seconds=9), Lease(place[0] + "/2", place[1], seconds=9)
    first.acquire()
    second.acquire(above=1)
    behind = CheckpointFolder(url, place[1], lease=first).save({"a": b"1"}, step=9, images=9, about={})
    CheckpointFolder(url, place[1], lease=second).save({"a": b"2"}, step=5, images=5, about={})
    assert CheckpointFolder(url, place[1]).newest()[0].step == 5
    assert place[1].exists(behind.url)
    first.release()
    second.release()


# What the lease rests upon.


def test_a_swap_needs_the_version_that_there_is(place):
    url, store = place[0] + "/thing", place[1]
    first = store.swap(url, b"1", version=None)
    with pytest.raises(ChangedError, match="another process"):
        store.swap(url, b"2", version=None)
    assert store.read_version(url) == (b"1", first)
    second = store.swap(url, b"2", version=first)
    with pytest.raises(ChangedError):
        store.swap(url, b"3", version=first)
    assert store.read_version(url) == (b"2", second)


def test_of_many_that_swap_a_file_at_once_one_succeeds(tmp_path):
    store, url, won = Store(), str(tmp_path / "thing"), []
    barrier = threading.Barrier(16)

    def try_it(number):
        barrier.wait()
        with contextlib.suppress(ChangedError):
            won.append(store.swap(url, str(number).encode(), version=None))

    threads = [threading.Thread(target=try_it, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read_version(url)[1] == won[0]


class Conditional(BaseHTTPRequestHandler):
    """An S3 server of one object that another client writes after every look at it, or of no conditions."""

    protocol_version = "HTTP/1.1"
    status = 412
    object = b"theirs"

    def log_message(self, *args): ...

    def do_HEAD(self):
        self._answer(404)

    def do_GET(self):
        self._answer(200, self.object)

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if "If-None-Match" in self.headers:
            self._answer(self.status)
        else:
            type(self).object = data
            self._answer(200)

    def _answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize(("status", "stored"), [(412, b"theirs"), (501, b"ours")])
def test_a_server_that_knows_conditions_decides_and_one_that_does_not_is_asked_without(status, stored):
    handler = type("Handler", (Conditional,), {"status": status})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        store = Store(StorageSection(endpoint_url=f"http://127.0.0.1:{server.server_address[1]}"))
        if status == 412:
            with pytest.raises(ChangedError):
                store.swap("s3://bucket/thing", b"ours", version=None)
        else:
            store.swap("s3://bucket/thing", b"ours", version=None)
        server.shutdown()
    assert handler.object == stored
