"""Remove secrets from URLs: user names, passwords, and signatures and tokens in a query.

The messages of Canter's errors (`canter.errors`) and the paths in result files are redacted.
"""

import re

# scheme://user:password@host; the second form has a "/" in its password. A member of a container ends with @START+BYTES
# (see canter.corpus.containers).
_USER = re.compile(r"(?<=://)(?:[^\s/?#@]+@(?!\d+\+\d))+|(?<=://)[^\s/:@\[\]]+:(?!\d+(?:[/?#]|$))[^\s@]+@(?!\d+\+\d)")
_PARAMETER = re.compile(
    r"(?P<mark>[?&;#])(?P<name>[\w.~%+\[\]-]+)=(?P<value>[^&;#\s\"'<>()]*?)"
    r"(?=[,.:]*(?:[&;#\s\"'<>()]|$))"
)
_SECRET = re.compile(
    r"\bsig|signature|token|secret|passw|pwd|\bpass|auth(?!or\b)|cred|key(?!word|frame)|session|jwt|\bsas|policy|hmac|"
    r"hash|\bcode\b|access|hdnea|hdnts|x-(?:amz|goog|oss)-|security|bearer|nonce",
    re.IGNORECASE,
)
_SAS = {"se", "sp", "sr", "st", "sv", "spr", "sip", "ske", "skoid", "sks", "skt", "sktid", "skv", "expires"}
LONGEST_PLAIN = 32  # a parameter's value of at least 32 characters is taken for a secret


def redacted(text: str) -> str:
    """Return the text without the secrets of its URLs; a URL without secrets is unchanged.

    Secrets are user name and password, and parameters of a query that may sign or authorise the request, by their names
    or their length.
    """
    if "://" in text:
        text = _USER.sub("", text)
    return _without_parameters(text) if "=" in text and ("?" in text or "://" in text) else text


def _without_parameters(text: str) -> str:
    """Return the text without parameters that may be secrets; the first remaining one of a query gets the "?"."""
    found: list[str] = []
    end, opening = 0, ""
    for match in _PARAMETER.finditer(text):
        between = text[end : match.start()]
        if between:
            opening = ""
        found.append(between)
        end = match.end()
        mark = match["mark"]
        if _is_secret(match["name"], match["value"]):
            opening = opening or (mark if mark in "?#" else "")
            continue
        found.append((opening if opening and mark in "&;" else mark) + match[0][1:])
        opening = ""
    return "".join([*found, text[end:]])


def _is_secret(name: str, value: str) -> bool:
    return bool(_SECRET.search(name)) or name.lower() in _SAS or len(value) >= LONGEST_PLAIN
