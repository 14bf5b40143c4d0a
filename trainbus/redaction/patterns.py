"""Finds secrets in texts: by their own format, or by the text before them.

Training waits for this, and most texts have no secret. So each pattern has signs: strings of which
every match contains at least one. Searching for them first is a hundred times faster.

To recognize a new kind of token, add a line to `_TOKENS`. A secret that follows a fixed text
belongs in `_AFTER` and `AFTER_SIGNS`, and one that follows a name in `names.py`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from functools import partial

from trainbus.redaction.names import (
    KEY,
    MIXED,
    PASSWORD,
    PLACEHOLDER,
    STOP,
    WORD,
    is_secret,
    kind_of,
    looks_random,
    squash,
)

REDACTED = "[redacted]"

_re = partial(re.compile, flags=re.VERBOSE)

_PEM = _re(r"""
    -----BEGIN\ [A-Z0-9 ]{0,30}PRIVATE\ KEY(?:\ BLOCK)?-----
    (?=(?:\s|\\+[nr]){0,9}[\w+/=:-]{8})
    (?s:.*?)(?:-----END\ [A-Z0-9 ]{0,30}PRIVATE\ KEY(?:\ BLOCK)?-----|\Z)""")
_URL = _re(r"""(://)([^\s/:@"'<>\[\](){}]*)(?::([^\s/"'<>]+))?@""")
# Tokens with a format of their own: signs, and the format as a verbose regular expression.
_TOKENS = (
    ("sk-", r"sk-(?:(?:ant|proj|svcacct|admin|or|lf)-[\w-]{16,}|[A-Za-z0-9]{32,})"),
    ("sk-", r"sk-(?=[A-Za-z]{0,40}[0-9])[A-Za-z0-9]{20,}"),
    ("AKIA ASIA ABIA ACCA", r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    ("LTAI", r"LTAI[A-Za-z0-9]{16,24}(?![A-Za-z0-9])"),
    ("ghp_ gho_ ghu_ ghs_ ghr_", r"gh[pousr]_[A-Za-z0-9]{20,}"),
    ("github_pat_", r"github_pat_\w{20,}"),
    (
        "glpat- glptt- glrt- gldt- glcbt- glsoat- glft-",
        r"gl(?:pat|ptt|rt|dt|cbt|soat|ft)-[\w-]{20,}",
    ),
    ("hf_ api_org_ npm_ r8_ rpa_", r"(?:hf|api_org|npm|r8|rpa)_[A-Za-z0-9]{30,}"),
    ("gsk_ _v1_ pcsk_ lsv2_", r"(?:gsk|wandb_v1|pcsk|tgp_v1|lsv2_[a-z]{2})_\w{40,}"),
    ("xox", r"xox[a-z](?:\.xox[a-z])?-[\w-]{10,}"),
    ("xapp-", r"xapp-\d-[\w-]{10,}"),
    ("AIza", r"AIza[\w-]{30,}"),
    ("ya29.", r"ya29\.[\w-]{20,}"),
    ("GOCSPX-", r"GOCSPX-[\w-]{20,}"),
    ("1//0", r"1//0[\w-]{30,}"),
    ("eyJ", r"(?<![-_])eyJ[\w-]{5,}\.[\w-]{5,}(?:\.[\w-]*){1,3}"),
    ("eyJ", r"(?<![-_])eyJhcGlf[\w+/=-]{40,}"),
    ("pypi-", r"pypi-(?:Ag[\w-]{16,}|[\w-]{60,})"),
    ("SG.", r"SG\.[\w-]{16,}\.[\w-]{16,}"),
    ("k_live_ k_test_", r"[sr]k_(?:live|test)_[A-Za-z0-9]{10,}"),
    ("whsec_", r"whsec_[\w+/=-]{20,}"),
    ("SK", r"SK[0-9a-fA-F]{32}(?![A-Za-z0-9])"),
    ("_v1_", r"do[opr]_v1_[a-f0-9]{30,}"),
    ("dapi", r"dapi[a-f0-9]{32}"),
    ("nvapi-", r"nvapi-[\w-]{40,}"),
    ("xai-", r"xai-[A-Za-z0-9]{40,}"),
    ("pplx-", r"pplx-[A-Za-z0-9]{40,}"),
    ("hvs. hvb.", r"hv[sb]\.[\w-]{24,}"),
    ("dckr_", r"dckr_[op]at_[\w-]{20,}"),
    ("ATATT3", r"ATATT3[\w=-]{50,}"),
    ("shp", r"shp[a-z]{2}_[a-fA-F0-9]{32}"),
    ("glsa_", r"glsa_\w{32,}"),
    ("AGE-SECRET", r"AGE-SECRET-KEY-1[A-Z0-9]{40,}"),
    ("Q~", r"\w{3}\dQ~[\w.~-]{31,34}"),
    (":AA", r"(?:bot)?\d{8,10}:AA[\w-]{32,}"),
    ("", r"[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,40}"),  # a bot token; its sign is `_DOTTED`
)
_SHAPE_SIGNS = tuple(dict.fromkeys(sign for signs, _ in _TOKENS for sign in signs.split()))
_DOTTED = _re(r"\.[\w-]{6}\.[\w-]{27}")
_SHAPES = _re(
    r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt])|(?<=%[0-9A-F]{2}))(?a:"
    + "|".join(token for _, token in _TOKENS)
    + ")"
)

# A secret after a text that announces it. Every branch starts with a literal, so the search skips
# all other characters quickly.
_QUERY = r"""(?:pass=|[\w-]{0,30}[Ss]ig(?:nature)?=
    |(?:code|key)=(?=[^\s&]{0,99}\d)(?=[\w%+=.~-]{20}))"""
_BEARER = r"\s{1,4}(?=[\w.~+/=-]{0,200}?\d)(?=[\w.~+/=-]{8})"
_AFTER = _re(rf"""(
    \?{_QUERY} | &{_QUERY} | ;{_QUERY} | Bearer{_BEARER} | bearer{_BEARER} | BEARER{_BEARER}
    |hooks\.slack\.com/[a-z]{{1,20}}/ | webhook\.office\.com/webhookb2/
    |discord(?:app)?\.com/api/(?:v\d+/)?webhooks/
    |wandb\ login\ (?:--\S{{1,20}}\ ){{0,3}}(?=[\w-]{{40}})
    |wandb\.login\([^()\n]{{0,99}}?key\s?=\s?["'] | BasicAuth\(["'][^"'\n]{{0,60}}["'],\s?["']
    |sshpass\ -p\ ?["']? | login\ [^\n]{{0,60}}?-p[ ]["']? | mysql\ [^\n]{{0,60}}?-p(?=\S)
    |login\s{{1,4}}\S{{1,99}}\s{{1,4}}password\s{{1,4}}
    |curl\ [^\n]{{0,60}}?-(?:u|-user)[ =]["']?[^\s:"']{{1,60}}:
    )(?!\[redacted|\{{)[^\s"'<>&\#;)]{{3,}}""")
_BASIC = _re(r"([Bb]asic\s{1,4})([A-Za-z0-9+/]{8,}={0,2})")

# A name, its closing characters (`cfg["password"]`), and the separator before its value. The whole
# name is matched, so that a text is scanned once. The value of a flag may follow a space.
NAME = _re(r"""
    (?<![\w./-])(?P<flag>--?(?=[A-Za-z]))?-{0,9}(?P<name>[\w./][\w./-]*)(?:
    (?P<close>\\{0,3}["'\]]{0,3})[ \t]{0,9}
        (?P<sep>:[ ]?(?:str|bytes|[Aa]ny|Secret\w+|Optional\[\w+\])(?:[ ]\|[ ]None)?[ ]=(?=[ ])
        |:=|=>|[:=](?!=)|%3[ADad])[ \t]{0,9}(?:[|>][+-]?\n[ ]{1,20}|\n[ ]{1,20}(?=["']))?
    |(?P<tag>>) | (?P<prose>[ ](?:(?:is|was|set[ ]to)[ ]|(?=["']|[\w+/=-]{20})))
    |["'],[ ]?(?=["']) | (?(flag)[ \t]{1,9}(?!-)|(?!)))""")

# Signs: strings without which a pattern can't match. Those of names are in lower case.
AFTER_SIGNS = (
    *("ig=", "ignature=", "pass=", "code=", "key=", "earer", "EARER", "BasicAuth", "webhook"),
    *("login", "hooks.slack", "sshpass", "mysql ", "curl "),
)
_NAME_SIGNS = (
    *("pass", "pw", "phrase", "secret", "token", "key", "auth", "cred", "cookie", "bearer"),
    *("code", "conn", "str", "signature", "mnemonic", "kennwort", "senha", "contrase", "webhook"),
    *("value", "provided"),
)
_ANY_NAME_SIGN = re.compile("|".join(_NAME_SIGNS))
_SHORT_SIGNS = _re(r"[PpSs](?:in|at|a|IN|AT|A)[sS]?(?![a-z])")  # whole words, not `pattern`
_TWO_WORDS = _re(r"""
    (?:seed|recovery|secret|mnemonic)[^a-z0-9]+phrase | conn(?:ection)?[^a-z0-9]+str
    |(?:recovery|backup|access|security|auth)[^a-z0-9]+code | access[^a-z0-9]+signature""")
_REST = _re(r"[\w./-]*")
_SPOKEN = _re(r"((?:(?<![\w-])[\w-]{1,20}[ ]){1,2})$")
_BEFORE = {  # the text that completes a generic name: `API key: …`, `name: TOKEN, value: …`
    **dict.fromkeys(("key", "string", "token", "tokens", "provided"), (_SPOKEN, 22)),
    "pass": (_re(r"""(user|login)(?:name)?["']?[:=&]"""), 60),
    "value": (_re(r"""(?:name|key)["']?[ ]?[:=][ ]?["']?([\w.-]{1,40})["']?,?\s{0,9}["']?$"""), 60),
    "input_value": (_re(r"\b([\w.]{1,40})\n[^\n]*$"), 200),  # in a validation error of Pydantic
}
_VALUE = _re(r"""
    (?P<open>[bBfFrRuU]{0,2}(?P<quote>\\{0,3}["'`]))(?P<quoted>(?:(?!(?P=quote))(?:\\.|[^\n]))+)
    |(?P<list>[\[({](?=\s{0,9}["'])[^][(){}]+[])}]) | (?=[^\s"'`<>])(?!\$?\{\{)""")
_BARE = _re(r"""
    [^\s"'`<>&;,]*(?:[&;,](?![ \t]{0,9}[\w.-]{1,40}[ \t]{0,9}[=:])[^\s"'`<>&;,]*)*""")
_LINE = _re(r"""[^\n"']*""")
_SPACED = _re(r"(?i:cookie|authorization|phrase|mnemonic)$")  # their values have spaces
_CLOSING = ".,;:!?)]}\\ \t"
_NO_VALUE = ("(", "[", "{", ":", "# ", "--")
_SCHEME = _re(r"(?i:(?:bearer|basic|token|digest|apikey|negotiate)[ \t]+)")
_CODE = _re(r"""
    [A-Za-z_.]{1,80}[(\[](?![^\s"')\]]{0,40}\d) | [A-Za-z_]\w{0,40}(?:\.\w{1,40}){1,5}[(\[]
    |[A-Za-z_]\w{0,40}(?:\[[-:\d]{1,9}\] | \((?:[)("']|[A-Za-z_][\w.]{0,40}[(,=\[.]))
    |[A-Za-z_]{1,40}(?:\.[A-Za-z_]{1,40}){1,9}(?![^\s,;:)\]}"'])""")
_IN_CODE = _re(r"(?:^|\n)(?:[ ]{2}|\t)[^\n]*$ | \w\([^()\n]*$")
_STRUCTURE = _re(r"""(?:^|[\n,{;(\[|&?])[ \t"'-]*$""")
_FIRST = _re(r"(?=\W*\w)([^\s)\]}]*)")
_LAST = _re(r"[ \t]*(?:[,;}\])\n]|$)")


def text(value: str) -> str:
    """Return the text with everything that looks like a secret replaced."""
    if not isinstance(value, str):
        return value
    new = value if type(value) is str else str.__getitem__(value, slice(None))
    if not may_contain_secret(new):
        return value
    for _ in range(3):  # replacing one secret can reveal the next
        old, new = new, _redact_once(new)
        if old == new:
            break
    return value if new == value else new


def may_contain_secret(value: str) -> bool:
    """Return whether a text may contain a secret, or the name of one; a fast check.

    If it is True for a text, it is also True for any lines that include the text.
    """
    if "PRIVATE KEY" in value or "asic" in value or ("://" in value and "@" in value):
        return True
    if any(sign in value for sign in AFTER_SIGNS) or has_shape(value):
        return True
    return any(find_names(value)) or _has_two_words(value.lower())


def _has_two_words(lowered: str) -> bool:
    is_signed = any(sign in lowered for sign in ("phrase", "str", "code", "signature"))
    return is_signed and bool(_TWO_WORDS.search(lowered))


def has_shape(value: str) -> bool:
    """Return whether the text contains a token that has a format of its own."""
    is_signed = any(sign in value for sign in _SHAPE_SIGNS) or _DOTTED.search(value)
    # A sign also occurs in harmless words, such as `sk-` in `task-`.
    return bool(is_signed and _SHAPES.search(value))


def find_names(value: str) -> Iterator[tuple[int, str]]:
    """Yield the position and text of each name that can precede a secret."""
    lowered = value.lower()
    if len(lowered) != len(value):  # some letters have more than one character in lower case
        lowered = "".join(c if len(c.lower()) > 1 else c.lower() for c in value)
    found = []
    if any(sign in lowered for sign in _NAME_SIGNS):
        found = [sign.start() for sign in _ANY_NAME_SIGN.finditer(lowered)]
    found += [sign.start() for sign in _SHORT_SIGNS.finditer(value)]
    done = 0
    for at in sorted(found):
        if at < done:
            continue
        start = at
        while start > done and (value[start - 1].isalnum() or value[start - 1] in "_./-"):
            start -= 1
        rest = _REST.match(value, at)
        done = at if rest is None else rest.end()
        name = value[start:done]
        if kind_of(name[-80:]) or name.lstrip("-").lower() in _BEFORE:
            yield start, name


def _redact_once(value: str) -> str:
    if "PRIVATE KEY" in value:
        value = _PEM.sub(REDACTED, value)
    if "://" in value and "@" in value:
        value = _URL.sub(_login, value)
    if has_shape(value):
        value = _SHAPES.sub(REDACTED, value)
    if any(sign in value for sign in AFTER_SIGNS):
        value = _AFTER.sub(rf"\1{REDACTED}", value)
    if "asic" in value:
        value = _BASIC.sub(_basic, value)
    parts: list[str] = []
    done = 0
    for start, _ in find_names(value):
        found = NAME.match(value, start) if start >= done else None
        name = "" if found is None else found["name"]
        if not kind_of(name[-80:]) and name.lower() not in _BEFORE:
            continue
        if found is not None and (span := _value_of(found, value)):
            parts += (value[done : span[0]], REDACTED)
            done = span[1]
    return "".join((*parts, value[done:]))


def _login(found: re.Match[str]) -> str:
    start, user, password = found.groups()
    if len(user) >= 20 and MIXED.fullmatch(user):
        user = REDACTED
    if password and not PLACEHOLDER.fullmatch(password):
        password = REDACTED
    return f"{start}{user}{':' + password if password else ''}@"


def _basic(found: re.Match[str]) -> str:
    try:
        sure = b":" in base64.b64decode(found[2])
    except ValueError:
        sure = found[2].endswith("=")
    return found[1] + REDACTED if sure else found[0]


def _value_of(found: re.Match[str], value: str) -> tuple[int, int] | None:
    """Return the position of the secret after a name in a text, None if there is none.

    Only the first characters decide, so that the time is linear in the length of the text.
    """
    name, sep, start = found["name"], found["sep"] or "", found.start("name")
    before, reach = _BEFORE.get(name.lower(), (None, 0))
    if before and (more := before.search(value, max(0, start - reach), start)):
        name = f"{more[1]}_{name}"
    kind = kind_of(name[-80:])
    after = _VALUE.match(value, found.end()) if kind else None
    if after is None:
        return None
    if after["list"]:
        return after.span() if kind >= KEY and sep else None
    quoted = after["quoted"]
    begin = after.start() if quoted is None else after.start("quoted")
    at = scheme.end() if (scheme := _SCHEME.match(value, begin)) else begin
    pattern = _LINE if sep == ":" and _SPACED.search(name) else _BARE
    end = after.end() if quoted else _end(pattern, value, at, at + 99)
    word = value[at:end] if quoted else value[at:end].rstrip(_CLOSING)
    first = _FIRST.match(word)
    if first is None or (word if quoted else first[1]).lower() in STOP or not is_secret(kind, word):
        return None
    if word == name or (kind < PASSWORD and len(word) < 10 and word.isdigit()):
        return None
    if found["prose"] or (quoted and not (sep or found["flag"])):
        harmless = not looks_random(kind, word)
    elif quoted:
        harmless = _is_closed(found, after, value)
    elif PLACEHOLDER.fullmatch(value[at:end].rstrip(",;.")) or word.startswith(_NO_VALUE):
        harmless = True
    elif found["tag"]:  # of `<password>hunter2</password>`
        harmless = value[start - 1 : start] != "<" or value[end : end + 2] != "</"
    elif found["flag"] or scheme:  # though not of a usage message
        harmless = word.isupper() and squash(word) in squash(name)
    else:
        harmless = _is_code(word, kind, found, value, at)
    if harmless:
        return None
    end = end if quoted else _end(pattern, value, at, len(value))
    return at, end if quoted else at + len(value[at:end].rstrip(_CLOSING))


def _is_closed(found: re.Match[str], after: re.Match[str], value: str) -> bool:
    """Return whether a quoted text is not a literal value: it belongs to the name, or is code."""
    first, start = after["quoted"][0], found.start("name")
    if "f" in after["open"].lower() and "{" in after["quoted"]:
        return True
    if after["quoted"].startswith("[redacted"):
        return True
    if found["sep"] and not found["close"]:  # of `find("token=", text)` or `input("Password: ")`
        return value[max(0, start - 1) : start] == after["quote"] or (
            found["sep"] == ":" and first in "),]};"
        )
    return not found["sep"] and first == "-"  # of `["--password", "-p"]`


def _is_code(word: str, kind: int, found: re.Match[str], value: str, at: int) -> bool:
    """Return whether an unquoted word is a call, a variable, a type or prose, not a literal."""
    name, start, sep = found["name"], found.start("name"), found["sep"]
    plain = word.isidentifier()
    if _CODE.match(value, at) or (plain and squash(word) == squash(name.rpartition(".")[2])):
        return True
    if sep == ":" and value[max(0, start - 1) : start] == ":":  # of `arn:aws:…:secret:name`
        return True
    head = value[max(0, start - 200) : start]
    plain = plain and not re.search(r"\d", word)
    if plain and found["close"] and ("]" in found["close"] or ":" in sep):
        return True  # a literal would have quotes here
    if "=" in sep:
        return plain and not name.isupper() and bool(_IN_CODE.search(head))
    last = WORD.findall(name)[-1].lower().rstrip("s")
    if plain and kind < PASSWORD and word[0].isupper() and last in word.lower():
        return True  # of `api_key: ApiKeyType`
    plain = word.isalpha() and (word[1:] == word[1:].lower() or word.isupper())
    return plain and not (_STRUCTURE.search(head) and _LAST.match(value, at + len(word)))


def _end(pattern: re.Pattern[str], value: str, at: int, limit: int) -> int:
    found = pattern.match(value, at, limit)
    return found.end() if found else at
