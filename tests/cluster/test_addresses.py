"""The address that was given, and it alone, gets every request; what comes back is one line."""

import contextlib
import json
import os
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import pytest

from cluster.__main__ import main
from cluster.errors import ClusterError
from cluster.jobs.addresses import dashboard_address, is_loopback
from cluster.jobs.auth_token import new_token
from cluster.jobs.client import ASKS_FOR_TOKEN, Client
from tests.helpers.strangers import strangers_port

JOB = {"submission_id": "x", "status": "SUCCEEDED", "entrypoint": "true", "driver_node_id": "n", "start_time": 1}
ANSWERS = {
    "/api/version": {"ray_version": version("ray")},
    "/nodes": {"data": {"summary": []}},
    "/api/jobs/": [JOB],
    "/api/jobs/x": JOB,
}
WORDS = {
    "submit": ("submit", "--no-wait", "--id", "x", "--", "true"),
    "status": ("status",),
    "status of one": ("status", "x"),
    "logs": ("logs", "x"),
    "logs --follow": ("logs", "--follow", "x"),
    "stop": ("stop", "x"),
    "doctor": ("doctor",),
}
Server = namedtuple("Server", "address port asked")


@contextlib.contextmanager
def dashboard(prefix="", status=200, headers=(), body=None, missing=(), asks=None):
    """A stand-in on loopback that notes who asks for what.

    Args:
        missing: packages that must be sent to it.
        asks: what it says, with 401, to who sends no token; None: it asks nobody.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("Content-Length") or 0)
            sent = self.rfile.read(length)
            asked.append((self.command, self.path, self.headers.get("Authorization"), sent))
            path = self.path.removeprefix(prefix).partition("?")[0]
            lacks = self.command == "GET" and any(path.startswith(start) for start in missing)
            text = json.dumps(ANSWERS.get(path, {})).encode() if body is None else body
            refused = asks is not None and not self.headers.get("Authorization")
            text = asks.encode() if refused else text
            self.send_response(401 if refused else 404 if lacks else status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_PUT = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield Server(f"http://127.0.0.1:{server.server_port}{prefix}", server.server_port, asked)
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def token(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    new_token(tmp_path / "token")
    return (tmp_path / "token").read_text()


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("prefix", ["", "/some/path"], ids=["root", "path"])
def test_every_request_goes_to_the_given_address_with_its_token(monkeypatch, tmp_path, token, words, prefix):
    """Whatever the environment says: Ray's variables, proxies in any case, ~/.netrc."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    with dashboard(prefix, missing=("/api/packages",), asks=ASKS_FOR_TOKEN) as ours, dashboard() as other:
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, other.address)
            if "PROXY" in name:
                monkeypatch.setenv(name.lower(), other.address)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        before = dict(os.environ)
        main([words[0], "--address", f"{ours.address}/", *words[1:]])
    assert dict(os.environ).items() - before.items() <= {("RAY_CLIENT_MODE", "0")}  # which importing Ray sets
    assert ours.asked and not other.asked
    assert all(path.startswith(f"{prefix}/") and "//" not in path for _, path, _, _ in ours.asked)
    without = [auth for _, _, auth, _ in ours.asked].count(None)
    assert without == (2 if words[0] == "doctor" else 1), "each client asks once without it, doctor to see what it says"
    assert {auth for _, _, auth, _ in ours.asked} == {None, f"Bearer {token}"}
    methods = [method for method, *_ in ours.asked]
    if words[0] == "submit":
        assert methods.count("PUT") == methods.count("POST") == 1
        assert next(sent for method, _, _, sent in ours.asked if method == "PUT")[:2] == b"PK"  # the tree, zipped
        job = json.loads(next(sent for method, _, _, sent in ours.asked if method == "POST"))
        assert job["submission_id"] == "x" and job["runtime_env"]["working_dir"].startswith("gcs://_ray_pkg_")


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_told_and_not_followed(words, status, capsys):
    with dashboard() as other:
        place = [("Location", f"{other.address}/\x1b[2J")]
        with dashboard(status=status, headers=place) as ours:
            assert main([words[0], "--address", ours.address, *words[1:]]) == 2
        assert not other.asked
    said = capsys.readouterr()
    (line,) = [line for line in (said.err + said.out).splitlines() if "sends requests on" in line]
    assert f"{ours.address} sends requests on to {other.address}/\\x1b[2J" in line


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize(
    "asks", [None, "", "Unauthorized", "<html>Login</html>"], ids=["nobody", "empty", "word", "page"]
)
def test_a_server_that_does_not_ask_for_it_as_ray_does_gets_no_token(words, asks, capsys):
    """An open dashboard, and another program on the port that asks for a password of its own."""
    with dashboard(asks=asks, headers=[("WWW-Authenticate", "Basic realm=x")]) as server:
        code = main([words[0], "--address", server.address, *words[1:]])
    assert server.asked and not [auth for _, _, auth, _ in server.asked if auth]
    said = capsys.readouterr()
    if asks is not None:
        assert code == 2 and "the token was not sent" in said.err + said.out


@pytest.mark.skipif(os.getuid() != 0, reason="another user can only be played by root")
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_another_users_program_on_the_port_gets_no_token(words, host, capsys):
    """It asks for the token exactly as Ray does; it answers with what it was sent, and must not be heard."""
    body = ASKS_FOR_TOKEN.encode()
    head = f"HTTP/1.1 401 Unauthorized\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    with strangers_port(head + body) as port:
        assert main([words[0], "--address", f"http://{host}:{port}", *words[1:]]) == 2
    said = capsys.readouterr()
    assert "another user of this machine (uid 65534): the token was not sent" in said.err + said.out


def test_a_port_that_changes_hands_is_asked_again_without_the_token(token):
    """A job is followed for hours; the cluster ends meanwhile, and another program takes its port."""
    with dashboard(asks=ASKS_FOR_TOKEN) as ours:
        client = Client(ours.address)
        client.version()
    with pytest.raises(ClusterError):
        client.version()
    assert not client.asks_for_token


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("head:8265", "http://head:8265"),
        ("head", "http://head:8265"),
        ("https://head:443/", "https://head:443"),
        ("https://ray.example.org", "https://ray.example.org"),
        ("HTTPS://ray.example.org/a/b//", "https://ray.example.org/a/b"),
        ("http://127.0.0.1:8265/#/jobs", "http://127.0.0.1:8265"),  # from the browser's line
        ("head/ray", "http://head:8265/ray"),
        ("[::1]:8265", "http://[::1]:8265"),
        ("http://[::1]", "http://[::1]"),
        ("[::1]", "http://[::1]:8265"),
    ],
)
def test_addresses(given, url):
    assert dashboard_address(given) == url


NO_ADDRESSES = [
    *(
        "",
        " ",
        "auto",
        "local",
        "ray://h:10001",
        "ftp://h:1",
        "http://",
        "http://:8265",
        "http://h:0",
        "http://h:99999",
    ),
    *(
        "http://h:x",
        "http://h:",
        "h:",
        "http://[::1",
        "http://[::g]:1",
        "http://a b:1",
        "http://h\n:1",
        "-h:1",
        "a..b:1",
    ),
    *("http://h:1?x=1", "http:/h:1", "//h:1", "http://" + "a" * 300, "h\\x:1", "\x1b[2J:1"),
]


@pytest.mark.parametrize("given", NO_ADDRESSES)
def test_what_is_no_address_is_one_line_that_names_its_source(given, monkeypatch, capsys):
    assert main(["status", f"--address={given}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --address ") and "expected the dashboard as http://HOST:PORT" in line
    if given:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", given)
        assert main(["status"]) == 2
        assert capsys.readouterr().err.startswith("error: RAY_API_SERVER_ADDRESS ")


@pytest.mark.parametrize(
    "given", ["http://me:geheim@h:1", "me:geheim@h:1", "http://me:ge@heim@h:1", "me:geheim@h:99999"]
)
def test_a_password_in_an_address_is_refused_and_not_shown(given, capsys):
    assert main(["submit", "--print", "--address", given, "--", "true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "***@h:" in line and "heim" not in line


def test_loopback():
    for address in (
        "http://127.0.0.1:1",
        "https://localhost",
        "http://[::1]:1/x",
        "http://127.8.9.1:1",
        "http://0.0.0.0:1",
    ):
        assert is_loopback(address)
    for address in (
        "http://10.0.0.7:1",
        "http://localhost.example.org:1",
        "http://127.0.0.1.example.org",
        "http://[fe80::1]",
    ):
        assert not is_loopback(address)


@pytest.mark.parametrize(
    ("status", "kind", "body", "said"),
    [
        (500, "text/plain", b"Traceback\n  File\nRuntimeError: no room\n.\n", "HTTP 500: RuntimeError: no room"),
        (500, "application/json", b'{"result": false, "msg": "not found", "data": {}}', "HTTP 500: not found"),
        (502, "text/html", b"<html><title>502 Bad Gateway</title><hr>nginx</html>", "HTTP 502: 502 Bad Gateway"),
        (503, "text/plain", b"", "HTTP 503: Service Unavailable"),
        (500, "text/plain", b" .\n", "HTTP 500: Internal Server Error"),
        (500, "text/plain", b"x\x1b[2Jy\xff", "HTTP 500: x\\x1b[2Jy"),
        (413, "text/plain", b"too much", "HTTP 413: too much"),
    ],
)
def test_an_error_of_the_server_shows_its_reason(status, kind, body, said, capsys):
    for words in (("status",), ("logs", "x"), ("stop", "x"), ("submit", "--", "true")):
        with dashboard(status=status, headers=[("Content-Type", kind)], body=body) as server:
            assert main([words[0], "--address", server.address, *words[1:]]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_an_answer_of_another_shape_is_one_line(capsys):
    for body in (b'{"ray_version": "2.999.0"}', b"[1]", b'"x"', b"null"):
        for words in (("status",), ("status", "x"), ("logs", "x"), ("stop", "x"), ("submit", "--", "true")):
            with dashboard(body=body) as server:
                assert main([words[0], "--address", server.address, *words[1:]]) == 2
            assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("job_id", ["a/b", "../../nodes", "a b", "é", "a?b=1", "%2e%2e", "a\nb"])
def test_an_id_is_one_part_of_the_path(job_id):
    with dashboard() as server, pytest.raises(ClusterError):
        Client(server.address).job(job_id)
    ((_, path, _, _),) = server.asked
    assert path.startswith("/api/jobs/") and path.count("/") == 3 and "?" not in path


@pytest.mark.parametrize("job_id", ["", ".", ".."])
def test_an_id_that_would_shorten_the_path_is_not_asked_for(job_id, capsys):
    with dashboard() as server:
        assert main(["stop", "--address", server.address, job_id]) == 2
    assert not server.asked and capsys.readouterr().err.startswith(f"error: no job {job_id!r}")


def test_a_program_that_was_not_submitted_is_told_from_a_job(monkeypatch, capsys):
    monkeypatch.setitem(ANSWERS, "/api/jobs/01000000", JOB | {"submission_id": None, "type": "DRIVER"})
    with dashboard() as server:
        for command in ("status", "logs", "stop"):
            assert main([command, "--address", server.address, "01000000"]) == 2
            assert "was not submitted" in capsys.readouterr().err


def test_a_token_that_cannot_be_one_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "token").write_bytes(b"two words \xff\n")
    assert main(["status", "--address", "http://127.0.0.1:9"]) == 2
    assert f"token file {tmp_path / 'token'} holds no token" in capsys.readouterr().err
    monkeypatch.setenv("RAY_AUTH_TOKEN", "zwei\nzeilen")
    assert main(["status", "--address", "http://127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    assert "RAY_AUTH_TOKEN holds no token" in said and "zeilen" not in said


def test_https_where_none_is_spoken_and_certificates_that_are_missing(monkeypatch, capsys, tmp_path):
    with dashboard() as server:
        assert main(["status", "--address", server.address.replace("http:", "https:")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its TLS certificate is not accepted, or it speaks none" in line
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    assert main(["status", "--address", server.address]) == 2
    assert "REQUESTS_CA_BUNDLE is " in capsys.readouterr().err
