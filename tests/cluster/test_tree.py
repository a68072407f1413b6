"""What `submit` sends: what git knows, never a key or a password, and a list that says so."""

import io
import json
import os
import re
import subprocess
import zipfile

import pytest

from cluster.__main__ import main
from cluster.errors import ClusterError
from cluster.jobs import tree
from cluster.jobs.tree import PARTS, TREE, choose, copy, looks_secret, pack

KEY = "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nx\n"  # in two pieces: this file is sent, too
ACCOUNT = json.dumps({"type": "service" + "_account", "private_key": "x"})


def git(folder, *words):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, env=environment)


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def checkout(tmp_path):
    """Two tracked files, one that is ignored, one that .rayignore leaves out, one that git does not know."""
    folder = tmp_path / "tree"
    folder.mkdir()
    git(folder, "init", "-q")
    write(folder, {".gitignore": "ignored\n", ".rayignore": "big/\n", "a.py": "1", "sub/b.py": "2", "big/c": "3"})
    git(folder, "add", "-A")
    write(folder, {"ignored": "4", "new.txt": "5"})
    return folder


def test_tracked_files_as_they_are_now(checkout):
    (checkout / "a.py").write_text("changed")
    (checkout / "sub" / "b.py").unlink()
    found = choose(checkout)
    assert found.files == (".gitignore", ".rayignore", "a.py")
    with zipfile.ZipFile(io.BytesIO(pack(found)[1])) as package:
        assert package.read("a.py") == b"changed"


def test_what_git_does_not_know_is_sent_only_when_asked_for(checkout, monkeypatch):
    assert choose(checkout).unknown == ("new.txt",)
    assert choose(checkout, untracked=True).files == (".gitignore", ".rayignore", "a.py", "new.txt", "sub/b.py")
    monkeypatch.chdir(checkout / "sub")
    assert set(choose(checkout, ["../ignored", "big"]).files) - set(choose(checkout).files) == {"ignored", "big/c"}
    for outside in ("/etc/passwd", "../..", "nothing", str(checkout)):
        with pytest.raises(ClusterError, match=f"--include {re.escape(outside)}: "):
            choose(checkout, [outside])


def test_a_variable_that_git_sets_in_a_hook_does_not_change_the_tree(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert "a.py" in choose(checkout).files


NAMES = (
    *(".env", "x/.env.production", "prod.env", ".ENV", "id_rsa", "ID_ED25519", "a/server.pem", "tls.key", ".netrc"),
    *(
        ".aws/credentials",
        ".ssh/config",
        "home/.kube/config",
        "kubeconfig",
        ".git-credentials",
        "auth_token",
        "my.token",
    ),
    *("gcp-service-account.json", "client_secret_1.json", ".pypirc", "x.p12", "terraform.tfstate", "secrets.yaml"),
    *(".docker/config.json", "kaggle.json", ".ray/auth_token", ".vault-token", "credentials.json", ".hf_token"),
)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_named_like_a_secret_is_refused_though_git_knows_it(checkout, name):
    write(checkout, {name: "x"})
    git(checkout, "add", "-f", name)
    with pytest.raises(ClusterError, match=f"{re.escape(name)}: looks like a secret.*--include {re.escape(name)}$"):
        choose(checkout)
    assert name in choose(checkout, [name]).files, "who names it wants it"
    if "/" in name:
        with pytest.raises(ClusterError, match="looks like a secret"):
            choose(checkout, [name.partition("/")[0]])  # a folder does not name what is in it
    (checkout / ".rayignore").write_text(f"big/\n/{name}\n")
    assert name not in choose(checkout).files


@pytest.mark.parametrize(("name", "text"), [("notes", KEY), ("deploy.txt", f"\n{KEY}"), ("x.json", ACCOUNT)])
def test_what_holds_a_key_is_refused_under_any_name(checkout, name, text):
    (checkout / name).write_text(text)
    git(checkout, "add", name)
    with pytest.raises(ClusterError, match=f"{name}: looks like a secret"):
        choose(checkout)


def test_no_file_of_this_project_looks_like_a_secret():
    for name in ("auth_token.py", "id_rsa.pub", ".env.example", "cluster/jobs/job_secrets.py", "keys.toml", "token.md"):
        assert not looks_secret(name)
    found = choose(TREE)
    assert {"cluster/jobs/tree.py", "pyproject.toml", "configs/digits.toml"} <= set(found.files)
    assert not [name for name in found.files if name.startswith((".venv", ".git/", "benchmarks/results"))]


def test_links(checkout, tmp_path):
    """One inside the tree is sent as the file it leads to; one that leads out is not, whatever git knows of it."""
    (tmp_path / "outside").write_text("theirs")
    for name, target in {
        "in": "a.py",
        "out": tmp_path / "outside",
        "gone": "nothing",
        "up": "..",
        "dir": "sub",
    }.items():
        (checkout / name).symlink_to(target)
    (checkout / "masked").symlink_to(".env")
    (checkout / ".env").write_text("x")
    git(checkout, "add", "in", "out", "gone", "up", "dir")
    found = choose(checkout)
    assert "in" in found.files and not {"out", "gone", "up", "dir"} & set(found.files)
    assert found.left_out == (
        "dir: a link to a folder",
        "gone: a link to nothing",
        "out: a link out of the tree",
        "up: a link out of the tree",
    )
    git(checkout, "add", "masked")
    with pytest.raises(ClusterError, match="masked: looks like a secret"):
        choose(checkout)


def test_a_pipe_is_neither_sent_nor_waited_for(checkout):
    (checkout / "a.py").unlink()
    os.mkfifo(checkout / "a.py")
    assert choose(checkout).left_out == ("a.py: no file",)


@pytest.mark.parametrize("inside_another", [False, True])
def test_a_tree_without_history_is_the_projects_parts_alone(tmp_path, inside_another):
    """An unpacked archive, also where it lies in a checkout of something else."""
    folder = tmp_path / "tree"
    folder.mkdir()
    if inside_another:
        git(tmp_path, "init", "-q")
    write(folder, {"pipeline/x.py": "1", "pipeline/__pycache__/x": "2", "README": "3", "data/big": "4", ".env": "5"})
    write(folder, {"trainer/.hidden/x": "6", "pyproject.toml": "7"})
    assert choose(folder).files == ("pipeline/x.py", "pyproject.toml")
    assert "data/big" in choose(folder, ["data"]).files
    with pytest.raises(ClusterError, match=r"--untracked: .* is no git checkout"):
        choose(folder, untracked=True)
    write(folder, {"pipeline/key.pem": "x"})
    with pytest.raises(ClusterError, match=r"pipeline/key\.pem: looks like a secret"):
        choose(folder)


def test_the_parts_are_the_packages_and_what_they_are_installed_from():
    assert all((TREE / part).exists() for part in PARTS)
    assert {"pipeline", "trainer", "cluster", "twotower", "configs", "pyproject.toml"} <= set(PARTS)


def test_the_package_depends_on_the_files_alone(checkout, tmp_path):
    first = pack(choose(checkout))
    os.utime(checkout / "a.py", (1, 1))
    assert pack(choose(checkout)) == first
    (checkout / "a.py").chmod(0o755)
    name, _ = pack(choose(checkout))
    assert name != first[0] and re.fullmatch(r"_ray_pkg_[0-9a-f]{32}\.zip", name)
    copy(choose(checkout), tmp_path / "copy")
    assert os.access(tmp_path / "copy" / "a.py", os.X_OK) and not os.access(tmp_path / "copy" / "sub" / "b.py", os.X_OK)


def test_a_tree_that_is_too_large_is_one_line(checkout, monkeypatch):
    monkeypatch.setattr(tree, "MAX_BYTES", 2)
    with pytest.raises(ClusterError, match=r"is larger than Ray's 512 MiB .* \.rayignore$"):
        choose(checkout)


def test_dry_run_lists_what_would_go_and_asks_nobody(capsys):
    assert main(["submit", "--dry-run", "--address", "http://127.0.0.1:9", "--", "true"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert any(line.endswith("  cluster/jobs/tree.py") for line in lines)
    assert re.fullmatch(rf"{len(lines)} files, \d+\.\d MB of .*; nothing was sent", total)
