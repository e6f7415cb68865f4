"""``loralab report --watch``: a server of this machine alone that writes the report anew while its sweep runs."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from loralab.errors import ConfigError, LoralabError
from loralab.reporting.report import report

HOST = "127.0.0.1"
PAGE, STATE = "/report/index.html", "/report/state"
EVERY_S = 2  # between two questions of the page whether there is something new
WATCHED = ("sweep.json", "result.json", "metrics.jsonl")
# In what is served only: the file on disk asks for nothing.
RELOAD = f"""<script>
"use strict";
(() => {{
  let seen = null;
  setInterval(async () => {{
    try {{
      const now = await (await fetch("{STATE}")).text();
      if (seen !== null && now !== seen) location.reload();
      seen = now;
    }} catch {{ /* the server has ended: the page stays as it is */ }}
  }}, {EVERY_S * 1000});
}})();
</script>
</body>"""


class Watched:
    """A sweep's folder and the state of its records when the report was last written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.written, self.lock = folder, "", threading.Lock()

    def state(self) -> str:
        """Changes when a record, a curve or the sweep's list does; the report is then written anew. A record that is
        torn or gone meanwhile leaves the report as it is."""
        with self.lock:
            now = _stamp(self.folder)
            if now != self.written:
                try:
                    report(self.folder)
                except LoralabError:
                    return self.written
                self.written = now
            return self.written


def server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """Bound to the loopback interface; port 0 takes a free one. The report has been written. Raises ArtifactError where
    there is nothing to report, ConfigError where the port is taken."""
    report(folder)
    watched = Watched(folder)
    watched.written = _stamp(folder)
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, watched))
    except OSError as error:
        raise ConfigError(f"port {port}: {error.strerror}; name another: --port 0 takes a free one") from error


def address(served: ThreadingHTTPServer) -> str:
    """Of the page."""
    return f"http://{HOST}:{served.server_address[1]}{PAGE}"


class _Handler(SimpleHTTPRequestHandler):
    """The files below the folder, to whom asks for this machine by its own name; nothing is listed or written."""

    def __init__(self, watched: Watched, *args: Any) -> None:
        self.watched = watched
        super().__init__(*args, directory=str(watched.folder))

    def do_GET(self) -> None:
        if self._is_foreign():
            self.send_error(403)
        elif (path := unquote(urlsplit(self.path).path)) == STATE:
            self._answer(self.watched.state(), "text/plain")
        elif path in ("/", "/report/", PAGE):
            self.watched.state()
            text = (self.watched.folder / PAGE[1:]).read_text(encoding="utf-8")
            self._answer(RELOAD.join(text.rsplit("</body>", 1)), "text/html")
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        self.send_error(403) if self._is_foreign() else super().do_HEAD()

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _is_foreign(self) -> bool:
        """Whether the address names another host: a page from elsewhere that points its own name here reads nothing."""
        return self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost")

    def _answer(self, text: str, kind: str) -> None:
        content = text.encode("utf-8")
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)


def _stamp(folder: Path) -> str:
    """Sizes and times of what a report is made of."""
    paths = [folder / name for name in WATCHED] + [path for name in WATCHED for path in folder.glob(f"*/{name}")]
    stats = [(path, path.stat()) for path in sorted(paths) if path.exists()]
    return str(hash(tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in stats)))
