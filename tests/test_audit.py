"""The check of licences and vulnerabilities says what it found, and never calls unchecked what is safe."""

import importlib.metadata
from email.message import Message

import pytest

from tests import audit


def metadata(**fields: str) -> Message:
    found = Message()
    for name, value in fields.items():
        found[name.replace("_", "-")] = value
    return found


def test_all_that_is_installed_is_permissive_or_has_been_looked_at():
    assert audit.check_licences(importlib.metadata.distributions()) == []


@pytest.mark.parametrize(
    ("fields", "permissive"),
    [
        ({"License_Expression": "Apache-2.0 OR BSD-3-Clause"}, True),
        ({"Classifier": "License :: OSI Approved :: MIT License"}, True),
        ({"License": "BSD 3-Clause License\n\nCopyright"}, True),
        ({"License_Expression": "AGPL-3.0-only"}, False),
        ({"License": "MPL-2.0 AND MIT"}, False),
        ({"Classifier": "License :: Other/Proprietary License"}, False),
        ({"License": "LGPL with exceptions", "Classifier": "License :: OSI Approved :: MIT License"}, False),
        ({"Name": "says-nothing"}, False),
    ],
)
def test_a_licence_is_read_from_wherever_it_stands(fields, permissive):
    assert audit.is_permissive(audit.licence_of(metadata(**fields))) is permissive


def test_a_package_that_nobody_has_looked_at_is_named(tmp_path, capsys):
    (tmp_path / "new-1.0.dist-info").mkdir()
    (tmp_path / "new-1.0.dist-info" / "METADATA").write_text("Name: new\nVersion: 1.0\nLicense: GPLv3\n")
    assert audit.check_licences(importlib.metadata.distributions(path=[str(tmp_path)])) == ["new"]
    assert "new: GPLv3: NOT EXPECTED" in capsys.readouterr().out


def test_what_the_service_does_not_know_is_not_safe():
    rows = [
        {"name": "old", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]},
        {"name": "good", "version": "2.0", "vulns": []},
        {"name": "strange", "skip_reason": "Dependency not found on PyPI"},
    ]
    known, unchecked = audit.summarize(rows)
    assert (
        known == ["old 1.0: CVE-1, fixed in 1.1"]
        and unchecked == "1 of 3 packages are unknown to the service (strange)"
    )
    assert audit.summarize(rows[1:2]) == ([], "")


def test_without_pip_audit_nothing_counts_as_checked():
    known, unchecked = audit.check_vulnerabilities("/nowhere/pip-audit")
    assert known == [] and "cannot be run" in unchecked


def test_the_list_of_licences_has_every_package_of_the_lock_and_says_what_it_did_not_see(tmp_path, capsys):
    lock = tmp_path / "a.lock"
    lock.write_text("# head\nNumPy==1.0 \\\n    --hash=sha256:00\nno-such-package==2.0 ; python_version == '3.11' \\\n")
    assert audit.list_licences(lock) == 1
    first, second, total = capsys.readouterr().out.splitlines()
    assert first.startswith("NumPy 1.0: BSD") and second == "no-such-package 2.0: not installed here"
    assert total.startswith("2 packages of a.lock, 1 without")
