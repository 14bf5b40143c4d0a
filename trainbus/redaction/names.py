"""Decides from a name whether its value is a secret.

`kind_of` splits a name into words and looks for one that means a secret; `is_secret` decides
whether a value is one. To cover another name, add a word to the sets below.
"""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import Any

# Which values a name makes secret, from few to all: text that looks random, text of 8 characters or
# more, any text, numbers too, any value.
NONE, RANDOM, TOKEN, KEY, PASSWORD, ANY = range(6)


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Words that mean a secret: in the singular, and two words also as one.
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

# Words that may follow it: `password_hash`, `API_KEY_PROD`, `token_github`.
_FORMS = _set("bytes digest hash hashed input md plaintext salt sha str text")
_TRAILING = _set("""
    again backup base b64 cleartext confirm confirmation content contents current data decoded
    decrypted default dev enc encoded encrypted given global header json literal live main new next
    old pem plain prev previous primary private prod production provided raw read readonly repeat ro
    rw sandbox secondary stage staging string test testing used val value write""")
_BEHIND = _TRAILING | _FORMS | _SERVICES

# Words before it that make it harmless: a switch, a count, or a token of a text or image.
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

# Words that follow `password: ` or `token=` in a text and are no secret.
STOP = _set("""
    a all an and any args argument as auth base64 be bool bytes can cfg config data does empty
    error expired false file flag for from has have if in incorrect int invalid is kwargs md5
    missing must needed no none not null of on only option optional or provided redacted
    required secretbytes secretstr self set sha256 should str string text that the this to token
    true type undefined unknown unset use used utf8 val valid value was when will with wrong""")

_re = partial(re.compile, flags=re.VERBOSE)

WORD = _re(r"[A-Z]+(?![a-z]) | [A-Z]?[a-z]+ | [0-9]+")
_GLUED = _re(r"(.+?)(passw(?:or)?d|passphrase|pass|pwd|pw|secret|token|key|cookie|credential)")
_KEYS = _re(r"""
    api|access|private|secret|sign(?:ing|ature)|(?:en|de)cryption|ssh|license|account|master|service
    |auth|subscription|shared|deploy|fernet|jwt|hmac|aes|recovery|app|application|consumer""")
PLACEHOLDER = _re(r"""
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

# A plain word, as in `token: classification`, but not one that looks like a password.
_ONE_WORD = _re(r"(?!.*(?:secret|pass|token|key|admin|test|chang))[A-Z]?[a-z]{1,19}")
_RUN = _re(r"""
    (?<![A-Za-z0-9])(?:(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{16,}
    |[a-f0-9]{8}(?:-[a-f0-9]{4}){3})""")
MIXED = _re(r"(?=\D*\d)(?=[^A-Za-z]*[A-Za-z])\S{6,}")


def squash(name: Any) -> str:
    """Return the letters and digits of a name in lower case, for comparison."""
    return "".join(filter(str.isalnum, str(name))).lower()


def named(name: Any, keys: frozenset[str]) -> int:
    """Return what a name says about its value; ANY if the name is in `keys` (squashed)."""
    if not isinstance(name, str):
        return NONE
    if keys and not keys.isdisjoint((squash(name), squash(re.split(r"[./]", name)[-1]))):
        return ANY
    return kind_of(name[-80:])


@lru_cache(maxsize=1024)
def kind_of(name: str) -> int:
    """Return what the name of a key, flag or variable says about its value."""
    words = [word.lower() for word in WORD.findall(name)]
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
    kind = NONE
    pair = front + last if len(front) > 1 else last
    if not {last, pair}.isdisjoint(_PASSWORDS) or (last == "pass" and front in _LOGINS):
        # A plural can be a count (`passwords: 4`), and `pins` are mostly those of a board.
        kind = PASSWORD if not many else NONE if last == "pin" else KEY
    elif not {last, pair}.isdisjoint(_SECRETS):
        kind = KEY
    elif last == "key" and ("id" not in tail or front.endswith(("access", "private"))):
        kind = KEY if _KEYS.search(front) else RANDOM if front in _OWNERS else NONE
    elif last == "token" and front not in _PIECES:
        one = not many or front in ("api", "access", "auth", "refresh", "bearer", "session")
        kind = TOKEN if one else RANDOM
    elif pair == "secretid" or last in ("pat", "sa", "webhook"):  # `sas` without its s
        kind = RANDOM
    return NONE if front in _ABOUT or (kind < KEY and tail & _FORMS) else kind


def is_secret(kind: int, value: str) -> bool:
    """Return whether a text is a secret if its name says `kind` about it."""
    value = value.strip() if kind else ""
    if not value or PLACEHOLDER.fullmatch(value) or _PLACE.fullmatch(value):
        return False
    if _VARIABLE.fullmatch(value) and kind_of(value[-80:]):
        return False
    if kind == RANDOM:
        return bool(_RUN.search(value)) and value == "".join(value.split())
    if kind < PASSWORD and _CHOICE.fullmatch(value):
        return False
    if kind == TOKEN and _ONE_WORD.fullmatch(value):
        return False
    return kind >= KEY or (len(value) >= 8 and not _PIECE.search(value))


def looks_random(kind: int, value: str) -> bool:
    """Return whether a text is more than a word, if it is uncertain that a name refers to it."""
    return bool(_RUN.search(value) if kind == TOKEN else MIXED.fullmatch(value))
