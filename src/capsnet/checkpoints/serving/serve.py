"""Predict images by the network beside this file: as JSON for files, else on a page and for POST /predict.

The server is for this machine unless --host says otherwise. It reads a limited body in a limited time, computes one
image at a time, and answers requests from its own page and from programs, not from other sites in the same browser.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import socket
import socketserver
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qsl

from capsnet.checkpoints.serving.hosts import is_ours
from capsnet.errors import InputError

if TYPE_CHECKING:
    from capsnet.checkpoints.serving.predictor import Predictor

__all__ = ["BODY_LIMIT", "Handler", "Refusal", "Server", "main"]

BODY_LIMIT = 16 << 20  # bytes of an image file
PIXEL_LIMIT = 32_000_000  # half a gigabyte while it is read; telephones take 12 or 24 million
CONNECTIONS = 16  # at a time; beyond, they are closed
QUIET_SECONDS = 10.0  # without a byte
REQUEST_SECONDS = 60.0  # from the connection to the end of the answer
PACKAGES = {"numpy": "numpy", "PIL": "Pillow", "onnxruntime": "onnxruntime"}
CHOICES = {"invert": ("auto", "yes", "no"), "images": ("no", "yes")}
HEADERS = {
    "cache-control": "no-store",
    "connection": "close",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Refusal(Exception):
    """A request that is answered with a status of 400 to 499 and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(socketserver.ThreadingTCPServer):
    """Serves a page and the predictions of `predictor` at an address of this machine; port 0 is any that is free.

    Raises:
        InputError: the port is taken or not allowed, or the host is not this machine's.
    """

    allow_reuse_address = True  # or a restart would wait for a minute
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, predictor: "Predictor", page: str) -> None:
        self.host, self.predictor, self.page = host, predictor, page.encode()
        self.computing, self.places = threading.Lock(), threading.BoundedSemaphore(CONNECTIONS)
        script, style = (_hash(page, tag) for tag in ("script", "style"))
        self.policy = (
            f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        if not 0 <= port <= 65535:
            raise InputError(f"--port must be 0 to 65535; got {port}")
        try:
            address: Any
            self.address_family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            super().__init__(address, Handler)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no name"
            raise InputError(
                f"--host and --port must be free on this machine; got {host!r} and {port}: {reason}"
            ) from None

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{name}]' if ':' in name else name}:{self.server_address[1]}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own, or close it where there are too many."""
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection, and make room for another."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, unless it is only that the client is gone."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    """Answers one request: GET / with the page, POST /predict with JSON, all others with `{"error": one line}`."""

    protocol_version = "HTTP/1.1"
    timeout = QUIET_SECONDS
    server: Server

    def setup(self) -> None:
        """Begin the time that a request may take: a byte a second is not quiet."""
        super().setup()
        self.deadline = threading.Timer(REQUEST_SECONDS, self._end)
        self.deadline.daemon = True
        self.deadline.start()

    def finish(self) -> None:
        """End it."""
        self.deadline.cancel()
        super().finish()

    def do_GET(self) -> None:
        """Answer with the page."""
        try:
            self._check_origin()
            if self.path != "/":
                raise Refusal(404, "address must be / or /predict")
            self._answer(200, self.server.page, "text/html; charset=utf-8")
        except Refusal as refusal:
            self._refuse(refusal.status, str(refusal))

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        """Answer with the prediction for the image in the body, and images if `?images=yes` asks for them."""
        try:
            self._check_origin()
            options = self._options()
            found = self._predict(self._body(), options)
        except Refusal as refusal:
            self._refuse(refusal.status, str(refusal))
        except InputError as error:
            self._refuse(422, str(error))
        except OSError:
            raise
        except Exception:
            traceback.print_exc()
            self._refuse(500, "the server failed at this image; its terminal says how")
        else:
            self._answer(200, json.dumps(found).encode())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request that is known, in place of the page of the standard library."""
        self._refuse(code, f"request must be GET / or POST /predict; got: {message or explain or code}")

    def version_string(self) -> str:
        """Name of the server in its answers."""
        return "capsnet"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is logged."""

    def _check_origin(self) -> None:
        """Refuse requests under another name than this server's, and those of other sites' pages."""
        hosts = self.headers.get_all("host", [])
        if len(hosts) != 1 or not is_ours(hosts[0], self.server.host):
            raise Refusal(403, f"Host must be the address of this server; got {', '.join(hosts)[:80] or 'none'}")
        site, origin = self.headers.get_all("sec-fetch-site", []), self.headers.get_all("origin", [])
        if self.command != "POST":
            return
        if site not in ([], ["same-origin"]):
            raise Refusal(403, f"request must come from the page of this server; got {', '.join(site)[:80]}")
        if origin and [one.lower() for one in origin] not in ([f"{s}://{hosts[0].lower()}"] for s in ("http", "https")):
            raise Refusal(403, f"request must come from the page of this server; got Origin {', '.join(origin)[:80]}")

    def _options(self) -> dict[str, Any]:
        """What follows the ? of the address, checked."""
        path, _, query = self.path.partition("?")
        if path != "/predict":
            raise Refusal(404, "address must be / or /predict")
        options = {name: choices[0] for name, choices in CHOICES.items()}
        for name, value in parse_qsl(query, keep_blank_values=True):
            if name not in CHOICES or value not in CHOICES[name]:
                allowed = ", ".join(f"{name}={'|'.join(choices)}" for name, choices in CHOICES.items())
                raise Refusal(422, f"options must be {allowed}; got {f'{name}={value}'[:80]}")
            options[name] = value
        return options

    def _body(self) -> bytes:
        """The body of the request, of which no more than the limit is ever held."""
        declared = self.headers.get_all("content-length", [])
        if len(declared) != 1 or not re.fullmatch("[0-9]{1,18}", declared[0]) or "transfer-encoding" in self.headers:
            raise Refusal(
                411, f"Content-Length must say the bytes of the image; got {', '.join(declared)[:80] or 'none'}"
            )
        length = int(declared[0])
        if length > BODY_LIMIT:
            raise Refusal(413, f"image file must have at most {BODY_LIMIT:,} bytes; got {length:,}")
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise Refusal(408, f"image must arrive without a pause of {QUIET_SECONDS:g} seconds") from None
        if len(body) < length:
            raise Refusal(400, f"image must have {length:,} bytes, as Content-Length says; got {len(body):,}")
        return body

    def _predict(self, body: bytes, options: dict[str, Any]) -> dict[str, Any]:
        from capsnet.checkpoints.serving.predictor import data_url

        with self.server.computing:
            answer = self.server.predictor(body, "image", invert=options["invert"], most=PIXEL_LIMIT)
        if options["images"] == "no":
            return answer.fields
        seen = {"image": answer.image, "reconstruction": answer.reconstruction}
        return {**answer.fields, **{name: None if one is None else data_url(one) for name, one in seen.items()}}

    def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        own = {"content-type": kind, "content-length": len(body), "content-security-policy": self.server.policy}
        for name, value in (HEADERS | own).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, json.dumps({"error": message}).encode())
        if self.command == "POST":  # what is still sent is dropped: closed before, the client would not see the answer
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
                left = 8 * BODY_LIMIT
                while left > 0 and (dropped := len(self.rfile.read1(1 << 16))):
                    left -= dropped

    def _end(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict the files among `arguments`, or serve the page until Ctrl-C; returns the exit code."""
    try:
        return _run(_arguments(arguments), Path(__file__).parent)
    except InputError as error:
        return _complain(error)
    except KeyboardInterrupt:
        return 130


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser("serve.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("files", nargs="*", help="image files to predict as JSON; - for standard input; none: serve")
    parser.add_argument("--invert", choices=CHOICES["invert"], default="auto", help="swap dark and light in the files")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 for other machines too")
    parser.add_argument("--port", type=int, default=8000, help="0 finds a free one")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace, folder: Path) -> int:
    if missing := [package for name, package in PACKAGES.items() if find_spec(name) is None]:
        raise InputError(f"{missing[0]} is not installed (pip install -r {folder / 'requirements.txt'})")
    from capsnet.checkpoints.serving.predictor import Predictor

    predictor = Predictor(folder / "model.onnx")
    if not options.files:
        page = (folder / "page.html").read_text(encoding="utf-8")
        with Server(options.host, options.port, predictor, page) as server:
            print(f"serve.py: {server.url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
            with suppress(KeyboardInterrupt):
                server.serve_forever()
        return 0
    found, code = list[dict[str, Any]](), 0
    for name in options.files:
        try:
            source = sys.stdin.buffer.read() if name == "-" else Path(name)
            found.append(predictor(source, name, invert=options.invert).fields)
        except InputError as error:
            code = _complain(error)
    try:
        print(json.dumps(found, indent=2), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python writes the rest at the end
        if not isinstance(error, BrokenPipeError):  # `| head`
            code = _complain(InputError(f"standard output must be writable; got: {error.strerror}"))
    return code


def _complain(error: InputError) -> int:
    text = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(error))
    print(f"serve.py: error: {text}", file=sys.stderr)
    return 2


def _hash(page: str, tag: str) -> str:
    """What lets a browser run or apply what stands in a tag of the page, and nothing else."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    content = found[1] if found else ""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


if __name__ == "__main__":
    sys.exit(main())
