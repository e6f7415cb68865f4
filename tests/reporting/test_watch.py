"""``report --watch``: the page on the loopback interface, written anew when a record changes, for this host alone."""

import json
import shutil
import threading
import urllib.error
import urllib.request

import pytest

from loralab.cli import main
from loralab.reporting.watch import HOST, RELOAD, address, server


@pytest.fixture
def watched(synthetic_sweep, tmp_path):
    shutil.copytree(synthetic_sweep, tmp_path / "s")
    served = server(tmp_path / "s")
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield tmp_path / "s", address(served)
    served.shutdown()
    served.server_close()
    thread.join()


def read(url, host=None):
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    return urllib.request.urlopen(request, timeout=20).read().decode()


def test_the_page_follows_the_records(watched):
    folder, url = watched
    assert f"http://{HOST}:" in url
    page, state = read(url), read(url.replace("index.html", "state"))
    assert RELOAD in page
    assert "11 of 12" in page
    assert "fetch(" not in (folder / "report" / "index.html").read_text().rpartition("<script>")[2]
    assert read(url.replace("index.html", "state")) == state
    stored = folder / "none,r=2,seed=0" / "result.json"
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "status": "failed", "error": "a new one"}))
    assert read(url.replace("index.html", "state")) != state
    assert "10 of 12" in read(url)


@pytest.mark.parametrize(
    ("path", "host", "code"), [("index.html", "evil.example:80", 403), ("", None, None), ("figures/", None, 404)]
)
def test_only_this_machine_reads_and_nothing_is_listed(watched, path, host, code):
    url = watched[1].replace("index.html", path)
    if code is None:
        assert "11 of 12" in read(url)
        return
    with pytest.raises(urllib.error.HTTPError) as error:
        read(url, host)
    assert error.value.code == code
    error.value.close()


@pytest.mark.parametrize(("words", "wanted"), [(["--watch", "--port", "x"], "--port x"), (["--port", "1"], "--watch")])
def test_a_port_that_is_none_is_named(tmp_path, capsys, words, wanted):
    assert main.run(["report", str(tmp_path), *words]) == 2
    assert wanted in capsys.readouterr().err
