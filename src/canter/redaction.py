"""URLs without their secrets: user names and passwords, signatures and tokens of a query.

Messages of Canter's errors pass through `redacted` (`canter.errors`), and so do the paths in result files.
"""

import re

# scheme://user:password@host; the second form has a "/" in its password, which is no port. A member of a container
# ends with @START+BYTES (see canter.corpus.audio).
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
LONGEST_PLAIN = 32  # characters of a parameter's value from which on it is taken for a secret


def redacted(text: str) -> str:
    """Return the text with the secrets of all URLs in it left out: the user name and password before a host, and
    parameters of a query that may sign or authorise the request, by their names or their length. A URL without any is
    returned as it is."""
    if "://" in text:
        text = _USER.sub("", text)
    return _without_parameters(text) if "=" in text and ("?" in text or "://" in text) else text


def _without_parameters(text: str) -> str:
    """Return the text without the parameters that may be secrets; where the first of a query goes, the next one gets
    its "?"."""
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
