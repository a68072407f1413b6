"""Addresses are shown and kept without what opens them."""

import pytest

from twotower.addresses import masked, masked_words

MASKED = [
    ("http://user:s3cret@host/x", "http://***@host/x"),
    ("s3://AKIA:ab/cd+ef@bucket/x", "s3://AKIA:ab/cd+ef@bucket/x"),  # what follows a slash is a path
    ("https://tok3n@host/x and ftp://a:b@c", "https://***@host/x and ftp://***@c"),
    ("https://host/x?X-Amz-Signature=abc&sv=1#t=2", "https://host/x?X-Amz-Signature=***&sv=***#t=***"),
    ("https://host/x?tok3n", "https://host/x?***"),
    ("http:/user:p@ss@host/x", "http:/***@host/x"),  # as pathlib writes it
    ("error: 'gs://a:b@c/d?k=v': no such bucket", "error: 'gs://***@c/d?k=***': no such bucket"),
    ("abfs://container@account.dfs.core.windows.net/x", "abfs://***@account.dfs.core.windows.net/x"),
    ("/data/a@b?c=d", "/data/a@b?c=d"),
    ("http://host:80/x", "http://host:80/x"),
    ("no address: a/b", "no address: a/b"),
]


@pytest.mark.parametrize(("text", "shown"), MASKED)
def test_what_opens_an_address_is_not_shown(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown


def test_options_that_are_secrets_have_no_value_in_what_is_kept() -> None:
    words = ["x", "--data", "http://u:p@h/d?s=1", "--api-key", "K", "--token=T", "AWS_SECRET_ACCESS_KEY=S", "--token"]
    assert masked_words([*words, "--quiet", "--set", "model.towers=2"]) == [
        "x", "--data", "http://***@h/d?s=***", "--api-key", "***", "--token=***", "AWS_SECRET_ACCESS_KEY=***",
        "--token", "--quiet", "--set", "model.towers=2",
    ]  # fmt: skip
