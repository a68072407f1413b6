"""A job's secrets: in no command line, no record and no log of Ray's; two halves, of which each alone is noise."""

import json

import pytest

from cluster.__main__ import main
from cluster.errors import ClusterError
from cluster.jobs import job_secrets
from cluster.jobs.client import ASKS_FOR_TOKEN
from cluster.jobs.job_secrets import VARIABLE, join, read_secrets, split
from tests.cluster.test_addresses import dashboard, token  # noqa: F401  the fixture

SECRET = "s3cret-of-this-test"


def test_from_the_environment_and_from_a_file(monkeypatch, tmp_path):
    (tmp_path / "key").write_text(f"{SECRET}\nsecond\n")
    monkeypatch.setenv("A_KEY", SECRET)
    assert read_secrets(["A_KEY", f"B=@{tmp_path / 'key'}"]) == {"A_KEY": SECRET, "B": f"{SECRET}\nsecond"}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (f"A={SECRET}", "--secret A: expected NAME"),
        (f"{SECRET}", "--secret ...: expected NAME"),
        ("NOT_SET", "--secret NOT_SET: it is not set here"),
        ("EMPTY", "--secret EMPTY: it is empty here"),
        ("A=@/nowhere/key", "--secret A: file /nowhere/key: No such file or directory"),
        ("A=@/dev/null", "--secret A: it is empty here"),
        ("A=@/dev/zero", "--secret A: expected text of at most 64 KiB"),
        ("A=@/", "--secret A: file /: Is a directory"),
    ],
)
def test_what_is_no_secret_is_one_line_that_does_not_show_it(word, said, monkeypatch, capsys):
    monkeypatch.setenv("EMPTY", "")
    assert main(["submit", "--secret", word, "--", "true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and SECRET not in line


def test_a_secret_is_not_given_in_the_open_as_well(monkeypatch, capsys):
    monkeypatch.setenv("A", SECRET)
    assert main(["submit", "--secret", "A", "--env", "A=1", "--", "true"]) == 2
    assert "--secret A: it is given with --env too" in capsys.readouterr().err
    assert main(["submit", "--secret", "A", "--print", "--", "true"]) == 2
    assert SECRET not in capsys.readouterr().out


def test_two_halves_make_one_and_each_alone_tells_nothing():
    found = {"A": SECRET, "B": "ü\n"}
    first, second = split(found), split(found)
    for key, stored, value in (first, second):
        assert value.startswith(f"{key}:") and join(stored, value) == found
        assert SECRET.encode() not in stored and SECRET not in value
    assert first[1] != second[1] and first[2] != second[2]
    with pytest.raises(ValueError):
        join(first[1], second[2])


def test_nothing_that_submit_sends_holds_the_secret(monkeypatch):
    monkeypatch.setenv("A", SECRET)
    with dashboard(missing=("/api/packages",), asks=ASKS_FOR_TOKEN) as server:
        main(["submit", "--no-wait", "--secret", "A", "--address", server.address, "--", "true"])
    puts = [sent for method, _, _, sent in server.asked if method == "PUT"]
    (post,) = [sent for method, _, _, sent in server.asked if method == "POST"]
    assert len(puts) == 2 and SECRET.encode() not in b"".join([*puts, post])
    job = json.loads(post)
    assert job["runtime_env"]["worker_process_setup_hook"] == job_secrets.HOOK
    assert join(puts[1], job["runtime_env"]["env_vars"][VARIABLE]) == {"A": SECRET}


def test_a_cluster_that_asks_nobody_for_a_token_gets_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("A", SECRET)
    with dashboard() as server:
        assert main(["submit", "--secret", "A", "--address", server.address, "--", "true"]) == 2
    assert "asks nobody for a token" in capsys.readouterr().err
    assert not any(method == "POST" for method, *_ in server.asked)


def test_outside_a_job_there_is_nothing_to_load(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    job_secrets.load()
    job_secrets.forget()
    with pytest.raises(ClusterError):
        read_secrets(["=x"])
