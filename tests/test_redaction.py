"""URLs without their secrets, in whatever text they stand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.corpus.manifest import Problem
from canter.errors import AudioError, CanterError
from canter.redaction import redacted

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://anna:s3cr3t@host/a.wav", "https://host/a.wav"),
        ("https://s3cr3t@host/a.wav", "https://host/a.wav"),
        ("s3://KEY:s3cr3t/with/slashes@bucket/a.wav", "s3://bucket/a.wav"),
        ("https://a:p@ss:s3cr3t@host/x", "https://host/x"),
        ("simplecache::https://u:s3cr3t@host/x", "simplecache::https://host/x"),
        ("https://host/a.wav?X-Amz-Signature=s3cr3t&X-Amz-Expires=60", "https://host/a.wav"),
        ("https://host/a.wav?id=5&X-Amz-Signature=s3cr3t&part=2", "https://host/a.wav?id=5&part=2"),
        ("https://host/a.wav?sig=s3cr3t&id=3", "https://host/a.wav?id=3"),
        ("https://account.blob.core.windows.net/a.wav?sv=2024&se=2026&sig=s3cr3t", "https://account.blob.core.windows.net/a.wav"),
        ("https://host/a.wav?access_token=s3cr3t, line 3", "https://host/a.wav, line 3"),
        ("403, url='https://host/a.wav?token=s3cr3t'", "403, url='https://host/a.wav'"),
        ("https://host/my file.wav?sig=s3cr3t is bad", "https://host/my file.wav is bad"),
        ("https://host/a.wav?v=s3cr3ts3cr3ts3cr3ts3cr3ts3cr3ts3cr3t", "https://host/a.wav"),
        ("https://u:s3cr3t@host/x.tar::a.wav@512+10", "https://host/x.tar::a.wav@512+10"),
        ("https://host/a.wav#access_token=s3cr3t", "https://host/a.wav"),
        ("https://host/a.wav?api_key=s3cr3t&codec=mp3&author=x", "https://host/a.wav?codec=mp3&author=x"),
    ],
)  # fmt: skip
def test_secrets_are_left_out(text, expected):
    assert redacted(text) == expected
    assert redacted(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8000/a@b.wav?id=5",
        "http://[::1]:80/a@b.wav",
        "memory://shard.tar::a.wav@512+1000",
        "https://host/x.tar::a/b.wav@512+1000",
        "/data/a@b.wav: no key=3 here; write me@host",
        "--lr 0.1 && key=value",
        "x == 3 and token=5",
    ],
)
def test_nothing_else_is(text):
    assert redacted(text) == text


@given(st.text(), st.sampled_from(["https", "s3", "gs"]), st.text("abcXYZ019._-~%", min_size=1))
def test_a_password_never_shows(around, scheme, password):
    password = SECRET + password
    text = f"{around} {scheme}://user:{password}@host/a.wav?x=1&X-Goog-Signature={password} {around}"
    assert SECRET not in redacted(text).replace(around, "")
    assert "host/a.wav?x=1" in redacted(text)


def test_errors_and_problems_keep_none():
    url = "https://u:s3cr3t@host/a.wav?sig=s3cr3t"
    for error in (CanterError(f"{url} is bad"), AudioError(f"{url} is bad")):
        assert str(error) == "https://host/a.wav is bad"
    assert str(Problem(url, 3, f"{url} is bad")) == "https://host/a.wav:3: https://host/a.wav is bad"
