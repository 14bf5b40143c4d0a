"""Takes secrets out of events before they are written or handed to anybody.

A secret is known by the name it stands under (`api_key`, `--password`, `HF_TOKEN=`) or by its own
shape (`ghp_…`, a JWT, a password in a URL). What only says where a secret lies stays: a path, the
name of a variable, a placeholder. Nothing here raises on a value; what can't be looked at goes.
"""

from __future__ import annotations

import base64
import re
from functools import lru_cache, partial
from typing import Any

import msgspec

from trainbus import events

REDACTED = "[redacted]"

_MAX_DEPTH = 20  # more than normalize leaves
# What a name says of its value. Each makes a secret of more than the one before: text that looks
# random, a longer word, any text, numbers too, whatever it is.
_NONE, _RANDOM, _TOKEN, _KEY, _PASSWORD, _ANY = range(6)

_TEXTS: dict[type[Any], tuple[str, ...]] = {
    events.RunStarted: ("name", "project", "group", "job_type", "tags", "notes", "task", "params"),
    events.ParamsUpdated: ("params",),
    events.ImageLogged: ("caption",),
    events.TextLogged: ("text",),
    events.TableLogged: ("rows",),
    events.CheckpointSaved: ("metadata",),
    events.ArtifactLogged: ("metadata",),
    events.AlertRaised: ("title", "text"),
    events.RunEnded: ("reason", "error"),
    events.Failure: ("message", "traceback"),
}


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Singular, and what is written as two words also as one.
_PASSWORDS = _set("""
    password passwd passphrase passcode passwort pwd secret pin pincode mnemonic mnemonicphrase
    seedphrase recoveryphrase secretphrase recoverycode backupcode accesscode securitycode kennwort
    senha contrasena contrase motdepasse""")
_SECRETS = _set("""
    credential cred cookie bearer auth oauth authorization pw authcode connectionstring
    connectionstr connstring connstr accesssignature""")
_SERVICES = _set("""
    anthropic aws azure clearml cohere comet cosmos dagshub databricks datadog deepseek discord
    gcp gemini github gitlab google groq hf hub huggingface kaggle langsmith mistral mlflow neptune
    ngc nvidia openai openrouter pinecone replicate roboflow runpod sendgrid sentry slack snowflake
    stripe supabase swanlab telegram twilio ultralytics wandb weaviate""")
_OWNERS = _SERVICES | _set("""
    login storage session client server function bot modal lambda vast together""")
_LOGINS = _SERVICES | _set("""
    admin amqp api app basic become bind broker ca cert client database db docker email ftp git
    grafana host http https imap key keystore ldap login mail minio mongo mongodb mq mqtt mssql
    mysql oracle os pg postgres postgresql proxy rabbitmq rclone redis registry root server service
    sftp smb smtp sql ssh ssl sudo system tls truststore user vault vpn wallet web wifi zip""")
# What may stand behind the word that counts: `password_hash`, `API_KEY_PROD`, `token_github`.
_FORMS = _set("bytes digest hash hashed input md plaintext salt sha str text")
_TRAILING = _set("""
    again backup base b64 cleartext confirm confirmation content contents current data decoded
    decrypted default dev enc encoded encrypted given global header json literal live main new next
    old pem plain prev previous primary private prod production provided raw read readonly repeat ro
    rw sandbox secondary stage staging string test testing used val value write""")
_BEHIND = _TRAILING | _FORMS | _SERVICES
# What before it makes a harmless thing of it: a switch, a count, or a piece of a text or picture.
_ABOUT = _set("allow enable has is max min num require requires use pull")
_PIECES = _set("""
    2 added additional audio begin beginning blank boi bos box byte chat class cls common
    completion concept cutoff decoder delimiter dist distill encoder end eod eoi eom eos eot
    expected extra fim first forced frequent generated hidden ignore image img initializer input
    label lang language last longest mask masked middle modality modifier n newline next nl oov
    output pad padding patch per placeholder pred predicted prefix prev previous prompt query rare
    reasoning register role seg sentinel sep separator sot source space speaker special src start
    stop sub suffix system target text tgt think thinking timestamp to top total unexpected unk
    unknown video vision vocab word""")
# What may follow `password: ` or `token=` in a text and is no secret.
_STOP = _set("""
    a all an and any args argument as auth base64 be bool bytes can cfg config data does empty
    error expired false file flag for from has have if in incorrect int invalid is kwargs md5
    missing must needed no none not null of on only option optional or provided redacted
    required secretbytes secretstr self set sha256 should str string text that the this to token
    true type undefined unknown unset use used utf8 val valid value was when will with wrong""")

_re = partial(re.compile, flags=re.VERBOSE)

_WORD = _re(r"[A-Z]+(?![a-z]) | [A-Z]?[a-z]+ | [0-9]+")
_GLUED = _re(r"(.+?)(passw(?:or)?d|passphrase|pass|pwd|pw|secret|token|key|cookie|credential)")
_KEYS = _re(r"""
    api|access|private|secret|sign(?:ing|ature)|(?:en|de)cryption|ssh|license|account|master|service
    |auth|subscription|shared|deploy|fernet|jwt|hmac|aes|recovery|app|application|consumer""")
_PLACEHOLDER = _re(r"""
    (?is:none|null|nil|true|false|undefined|\[?redacted\]?|[*x•.]{1,99}|%\(?\w*\)?s|%\w+%
    |<[^<>]{0,99}>|\$?\{\{[^{}]{0,99}\}\}|\$?\{(?:[a-z.]+:)?[^{}:,-]{0,99}\})
    |\$\(?[A-Z][A-Z0-9_]*\)?""")
_PLACE = _re(r"""
    (?:/(?:home|root|workspace|usr|opt|tmp|var|run|mnt|data|content|app|etc|kaggle|Users)/
    |~/|\.\.?/|[A-Za-z]:\\)[\w./\\ -]{0,300}
    |(?:/[a-z][a-z0-9_.-]{0,30}){2,20}/?
    |[\w./~ -]{1,300}\.(?:json|pem|key|ya?ml|txt|crt|cer|p12|pfx|ppk|pub|env|ini|cfg|toml)""")
_VARIABLE = _re(r"(?:os\.environ/|env:)?[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")
_CHOICE = _re(r"""
    (?i:basic|bearer|digest|oauth2?|token|iam|kerberos|ntlm|ldap|saml|oidc|sso|anonymous|auto
    |default|required|optional|enabled?|disabled?|prompt|env|environment|netrc|keyring|empty
    |authorization|x-api-key|[a-z][a-z0-9+]*://[^?@\s]{0,99})""")
_PIECE = _re(r"\s | ^[<\[{].*[>\]}]$ | ^(?:▁|Ġ|\#\#)")
_RUN = _re(r"""
    (?<![A-Za-z0-9])(?:(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{16,}
    |[a-f0-9]{8}(?:-[a-f0-9]{4}){3})""")
_MIXED = _re(r"(?=\D*\d)(?=[^A-Za-z]*[A-Za-z])\S{6,}")

_PEM = _re(r"""
    -----BEGIN\ [A-Z0-9 ]{0,30}PRIVATE\ KEY(?:\ BLOCK)?-----
    (?=(?:\s|\\+[nr]){0,9}[\w+/=:-]{8})
    (?s:.*?)(?:-----END\ [A-Z0-9 ]{0,30}PRIVATE\ KEY(?:\ BLOCK)?-----|\Z)""")
_URL = _re(r"""(://)([^\s/:@"'<>\[\](){}]*)(?::([^\s/"'<>]+))?@""")
_SHAPES = _re(r"""
    (?:(?<![A-Za-z0-9])|(?<=\\[nrt])|(?<=%[0-9A-F]{2}))(?a:
    sk-(?:(?:ant|proj|svcacct|admin|or|lf)-[\w-]{16,}|[A-Za-z0-9]{32,}
        |(?=[A-Za-z]{0,40}[0-9])[A-Za-z0-9]{20,})
    |(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9]) | LTAI[A-Za-z0-9]{16,24}(?![A-Za-z0-9])
    |gh[pousr]_[A-Za-z0-9]{20,} | github_pat_\w{20,} | gl(?:pat|ptt|rt|dt|cbt|soat|ft)-[\w-]{20,}
    |(?:hf|api_org|npm|r8|rpa)_[A-Za-z0-9]{30,} | (?:gsk|wandb_v1|pcsk|tgp_v1|lsv2_[a-z]{2})_\w{40,}
    |xox[a-z](?:\.xox[a-z])?-[\w-]{10,} | xapp-\d-[\w-]{10,}
    |AIza[\w-]{30,} | ya29\.[\w-]{20,} | GOCSPX-[\w-]{20,} | 1//0[\w-]{30,}
    |(?<![-_])eyJ[\w-]{5,}\.[\w-]{5,}(?:\.[\w-]*){1,3} | (?<![-_])eyJhcGlf[\w+/=-]{40,}
    |pypi-(?:Ag[\w-]{16,}|[\w-]{60,}) | SG\.[\w-]{16,}\.[\w-]{16,}
    |[sr]k_(?:live|test)_[A-Za-z0-9]{10,} | whsec_[\w+/=-]{20,} | SK[0-9a-fA-F]{32}(?![A-Za-z0-9])
    |do[opr]_v1_[a-f0-9]{30,} | dapi[a-f0-9]{32} | nvapi-[\w-]{40,} | xai-[A-Za-z0-9]{40,}
    |pplx-[A-Za-z0-9]{40,} | hv[sb]\.[\w-]{24,} | dckr_[op]at_[\w-]{20,} | ATATT3[\w=-]{50,}
    |shp[a-z]{2}_[a-fA-F0-9]{32} | glsa_\w{32,} | AGE-SECRET-KEY-1[A-Z0-9]{40,}
    |\w{3}\dQ~[\w.~-]{31,34} | (?:bot)?\d{8,10}:AA[\w-]{32,}
    |[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,40})""")
# A secret behind what says that it is one. Every branch begins with a letter of its own: so the
# search skips what can't begin any.
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
# A name, what may close it (`cfg["password"]`), and what says that a value follows. The name is
# taken whole, so that a text is walked once; a flag's value may follow a space.
_NAME = _re(r"""
    (?<![\w./-])(?P<flag>--?(?=[A-Za-z]))?-{0,9}(?P<name>[\w./][\w./-]*)(?:
    (?P<close>\\{0,3}["'\]]{0,3})[ \t]{0,9}
        (?P<sep>:[ ]?(?:str|bytes|[Aa]ny|Secret\w+|Optional\[\w+\])(?:[ ]\|[ ]None)?[ ]=(?=[ ])
        |:=|=>|[:=](?!=)|%3[ADad])[ \t]{0,9}(?:[|>][+-]?\n[ ]{1,20}|\n[ ]{1,20}(?=["']))?
    |(?P<tag>>) | (?P<prose>[ ](?:(?:is|was|set[ ]to)[ ]|(?=["']|[\w+/=-]{20})))
    |["'],[ ]?(?=["']) | (?(flag)[ \t]{1,9}(?!-)|(?!)))""")
_SPOKEN = _re(r"((?:(?<![\w-])[\w-]{1,20}[ ]){1,2})$")
_BEFORE = {  # what adds to a name that says too little: `API key: …`, `name: TOKEN, value: …`
    **dict.fromkeys(("key", "string", "token", "tokens", "provided"), (_SPOKEN, 22)),
    "pass": (_re(r"""(user|login)(?:name)?["']?[:=&]"""), 60),
    "value": (_re(r"""(?:name|key)["']?[ ]?[:=][ ]?["']?([\w.-]{1,40})["']?,?\s{0,9}["']?$"""), 60),
    "input_value": (_re(r"\b([\w.]{1,40})\n[^\n]*$"), 200),  # of a fault that Pydantic found
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
_FLAG = _re(r"--?([A-Za-z][\w./-]*)(=|\Z)")


def text(value: str) -> str:
    """Return the text with what looks like a secret replaced, and the rest of it as it was."""
    if not isinstance(value, str):
        return value
    new = value if type(value) is str else str.__getitem__(value, slice(None))
    for _ in range(3):  # what is put in for one secret may uncover the next
        old, new = new, _pass(new)
        if old == new:
            break
    return value if new == value else new


def params(values: Any, keys: frozenset[str] = frozenset()) -> Any:
    """Return plain nested data with secrets replaced; the same object if there are none.

    What stands under a name of `keys`, however it is written, is replaced whatever it is.
    """
    return _walk(values, frozenset(map(_squash, keys)), _NONE, 0)


def event(value: Any, keys: frozenset[str] = frozenset()) -> Any:
    """Return the event with secrets replaced in its params and texts; the same one if none."""
    fields = _TEXTS.get(type(value))
    if fields is None:
        return value
    names = frozenset(map(_squash, keys))
    changed: dict[str, Any] = {}
    for field in fields:
        old = getattr(value, field)
        try:
            new = event(old, keys) if field == "error" else _field(value, field, old, names)
        except Exception:  # not normalised, and not to be trusted
            new = REDACTED
        if new is not old:
            changed[field] = new
    return msgspec.structs.replace(value, **changed) if changed else value


def _field(value: Any, field: str, old: Any, keys: frozenset[str]) -> Any:
    if field == "rows":  # in which a secret is known by its column, or by the cell before it
        kinds = [_named(column, keys) for column in value.columns]
        new = [_list(row, keys, _NONE, 0, "", kinds) for row in old]
        return old if all(a is b for a, b in zip(old, new, strict=True)) else new
    kind = _named(value.key, keys) if type(value) is events.TextLogged else _NONE
    return _walk(old, keys, kind, 0)


def _walk(value: Any, keys: frozenset[str], kind: int, depth: int, name: Any = "") -> Any:
    """Return a value that stands under a name, of which `kind` is said, with secrets replaced."""
    try:
        if kind == _ANY:
            return REDACTED
        if isinstance(value, str):
            new = REDACTED if _hides(kind, value) else text(value)
            return REDACTED if new is not value and _hides(kind, new) else new
        if isinstance(value, dict | list | tuple):
            if depth > _MAX_DEPTH:
                return REDACTED
            if isinstance(value, dict):
                return _dict(value, keys, kind, depth + 1, name)
            return _list(value, keys, kind, depth + 1, name, [])
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return REDACTED if number and kind == _PASSWORD else value
    except Exception:  # not plain, and not to be trusted
        return REDACTED


def _dict(value: dict[Any, Any], keys: frozenset[str], kind: int, depth: int, name: Any) -> Any:
    new: dict[Any, Any] = {}
    same = True
    login = not {"user", "username", "login"}.isdisjoint(value)
    for key, old in value.items():
        clean = text(key) if isinstance(key, str) else key
        here = max(kind, _named(key, keys), _named(clean, keys))
        if key in ("pass", "key"):  # of {"username": …, "key": …} or {"wandb": {"key": …}}
            here = max(here, _kind(f"login_{key}" if login else f"{name}_{key}"[-80:]))
        elif key == "value":  # of {"name": "WANDB_API_KEY", "value": …}
            here = max(here, _named(value.get("name", value.get("key")), keys))
        while clean is not key and clean in new:
            clean += "*"
        new[clean] = _walk(old, keys, here, depth, key)
        same = same and clean is key and new[clean] is old
    return value if same else new


def _list(
    value: Any, keys: frozenset[str], kind: int, depth: int, name: Any, columns: list[int]
) -> Any:
    new: list[Any] = []
    before = _NONE  # what the item before says of this one, being a flag or the name in a pair
    for index, old in enumerate(value):
        here = max(kind, columns[index] if index < len(columns) else _NONE)
        flag = _FLAG.match(old) if isinstance(old, str) else None
        if flag:
            named = _named(flag[1], keys)
            mine = named == _ANY and flag[2]
            new.append(flag[0] + REDACTED if mine else _walk(old, keys, here, depth, name))
            before = _NONE if flag[2] else named
        else:
            new.append(_walk(old, keys, max(here, before), depth, name))
            before = _NONE
            if index == 0 and len(value) == 2:
                named = _named(old, keys)
                before = named if named == _ANY or _odd(named, str(value[1])) else _NONE
    return value if all(a is b for a, b in zip(new, value, strict=True)) else new


def _squash(name: Any) -> str:
    return "".join(filter(str.isalnum, str(name))).lower()


def _named(name: Any, keys: frozenset[str]) -> int:
    if not isinstance(name, str):
        return _NONE
    if keys and not keys.isdisjoint((_squash(name), _squash(re.split(r"[./]", name)[-1]))):
        return _ANY
    return _kind(name[-80:])


@lru_cache(maxsize=1024)
def _kind(name: str) -> int:
    """Return what a key, a flag or a variable of this name says of its value."""
    words = [word.lower() for word in _WORD.findall(name)]
    for preposition in ("for", "of"):
        if preposition in words[1:-1]:
            words = words[: words.index(preposition, 1)]
    tail = set()
    while len(words) > 1 and words[-2] + words[-1] not in _SECRETS:
        if len(words[-1]) > 1 and not words[-1].isdigit() and words[-1] not in _BEHIND:
            break
        tail.add(words.pop())
    if words[-2:] in (["key", "id"], ["webhook", "url"]):
        tail.add(words.pop())
    front, last = ("", "", *words)[-2:]
    many = last.endswith("s") and not last.endswith("ss")
    last = last[:-1] if many else last
    if last not in _PASSWORDS | _SECRETS and (glued := _GLUED.fullmatch(last)):
        front, last = glued.groups()
    kind = _NONE
    pair = front + last if len(front) > 1 else last
    if not {last, pair}.isdisjoint(_PASSWORDS) or (last == "pass" and front in _LOGINS):
        kind = _PASSWORD
    elif not {last, pair}.isdisjoint(_SECRETS):
        kind = _KEY
    elif last == "key" and ("id" not in tail or front.endswith(("access", "private"))):
        kind = _KEY if _KEYS.search(front) else _RANDOM if front in _OWNERS else _NONE
    elif last == "token" and front not in _PIECES:
        one = not many or front in ("api", "access", "auth", "refresh", "bearer", "session")
        kind = _TOKEN if one else _RANDOM
    elif pair == "secretid" or last in ("pat", "sa", "webhook"):  # `sas` has lost its s
        kind = _RANDOM
    return _NONE if front in _ABOUT or (kind < _KEY and tail & _FORMS) else kind


def _hides(kind: int, value: str) -> bool:
    """Tell whether a text is a secret, where a name says `kind` of it."""
    value = value.strip() if kind else ""
    if not value or _PLACEHOLDER.fullmatch(value) or _PLACE.fullmatch(value):
        return False
    if _VARIABLE.fullmatch(value) and _kind(value[-80:]):
        return False
    if kind == _RANDOM:
        return bool(_RUN.search(value)) and value == "".join(value.split())
    if kind < _PASSWORD and _CHOICE.fullmatch(value):
        return False
    return kind >= _KEY or (len(value) >= 8 and not _PIECE.search(value))


def _odd(kind: int, value: str) -> bool:
    """Tell whether a text is more than a word, where it is not sure to be the value of a name."""
    return bool(_RUN.search(value) if kind == _TOKEN else _MIXED.fullmatch(value))


def _pass(value: str) -> str:
    if "PRIVATE KEY" in value:
        value = _PEM.sub(REDACTED, value)
    if "://" in value:
        value = _URL.sub(_login, value)
    value = _SHAPES.sub(REDACTED, value)
    value = _AFTER.sub(rf"\1{REDACTED}", value)
    value = _BASIC.sub(_basic, value)
    parts: list[str] = []
    done = 0
    for found in _NAME.finditer(value):
        name = found["name"]
        if found.start() < done or not (_kind(name[-80:]) or name.lower() in _BEFORE):
            continue
        if span := _value_of(found, value):
            parts += (value[done : span[0]], REDACTED)
            done = span[1]
    return "".join((*parts, value[done:]))


def _login(found: re.Match[str]) -> str:
    start, user, password = found.groups()
    if len(user) >= 20 and _MIXED.fullmatch(user):
        user = REDACTED
    if password and not _PLACEHOLDER.fullmatch(password):
        password = REDACTED
    return f"{start}{user}{':' + password if password else ''}@"


def _basic(found: re.Match[str]) -> str:
    try:
        sure = b":" in base64.b64decode(found[2])
    except ValueError:
        sure = found[2].endswith("=")
    return found[1] + REDACTED if sure else found[0]


def _value_of(found: re.Match[str], value: str) -> tuple[int, int] | None:
    """Return where the secret stands that follows a name in a text, if one does.

    It decides by the first characters, so that no text makes it look at the same ones often.
    """
    name, sep, start = found["name"], found["sep"] or "", found.start("name")
    before, reach = _BEFORE.get(name.lower(), (None, 0))
    if before and (more := before.search(value, max(0, start - reach), start)):
        name = f"{more[1]}_{name}"
    kind = _kind(name[-80:])
    after = _VALUE.match(value, found.end()) if kind else None
    if after is None:
        return None
    if after["list"]:
        return after.span() if kind >= _KEY and sep else None
    quoted = after["quoted"]
    begin = after.start() if quoted is None else after.start("quoted")
    at = scheme.end() if (scheme := _SCHEME.match(value, begin)) else begin
    pattern = _LINE if sep == ":" and _SPACED.search(name) else _BARE
    end = after.end() if quoted else _end(pattern, value, at, at + 99)
    word = value[at:end] if quoted else value[at:end].rstrip(_CLOSING)
    first = _FIRST.match(word)
    if first is None or (word if quoted else first[1]).lower() in _STOP or not _hides(kind, word):
        return None
    if word == name or (kind < _PASSWORD and len(word) < 10 and word.isdigit()):
        return None
    if found["prose"] or (quoted and not (sep or found["flag"])):
        harmless = not _odd(kind, word)
    elif quoted:
        harmless = _is_closed(found, after, value)
    elif _PLACEHOLDER.fullmatch(value[at:end].rstrip(",;.")) or word.startswith(_NO_VALUE):
        harmless = True
    elif found["tag"]:  # of `<password>hunter2</password>`
        harmless = value[start - 1 : start] != "<" or value[end : end + 2] != "</"
    elif found["flag"] or scheme:  # though not of a usage message
        harmless = word.isupper() and _squash(word) in _squash(name)
    else:
        harmless = _is_code(word, kind, found, value, at)
    if harmless:
        return None
    end = end if quoted else _end(pattern, value, at, len(value))
    return at, end if quoted else at + len(value[at:end].rstrip(_CLOSING))


def _is_closed(found: re.Match[str], after: re.Match[str], value: str) -> bool:
    """Tell whether what stands between quotes is no literal, but what follows one, or is built."""
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
    """Tell whether a bare word is a call, a variable, a type or prose, rather than a literal."""
    name, start, sep = found["name"], found.start("name"), found["sep"]
    plain = word.isidentifier()
    if _CODE.match(value, at) or (plain and _squash(word) == _squash(name.rpartition(".")[2])):
        return True
    if sep == ":" and value[max(0, start - 1) : start] == ":":  # of `arn:aws:…:secret:name`
        return True
    head = value[max(0, start - 200) : start]
    plain = plain and not re.search(r"\d", word)
    if plain and found["close"] and ("]" in found["close"] or ":" in sep):
        return True  # where a literal would have quotes
    if "=" in sep:
        return plain and not name.isupper() and bool(_IN_CODE.search(head))
    last = _WORD.findall(name)[-1].lower().rstrip("s")
    if plain and kind < _PASSWORD and word[0].isupper() and last in word.lower():
        return True  # of `api_key: ApiKeyType`
    plain = word.isalpha() and (word[1:] == word[1:].lower() or word.isupper())
    return plain and not (_STRUCTURE.search(head) and _LAST.match(value, at + len(word)))


def _end(pattern: re.Pattern[str], value: str, at: int, limit: int) -> int:
    found = pattern.match(value, at, limit)
    return found.end() if found else at
