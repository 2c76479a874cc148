"""Names of what is nobody's business: by them values are masked wherever they are shown."""

from __future__ import annotations

import re
from itertools import pairwise

_LONGEST = 100  # characters of a name that are looked at
_WORDS = frozenset({
    "apikey", "accesskey", "accesstoken", "auth", "authorization", "authtoken", "bearer", "cardnumber", "cookie", "cookies",
    "credential", "credentials", "creditcard", "csrf", "csrftoken", "cvc", "cvv", "iban", "jwt", "otp", "pass", "passcode",
    "passphrase", "passwd", "password", "passwords", "passwort", "pin", "privatekey", "pw", "pwd", "refreshtoken", "secret",
    "secretkey", "secrets", "sessionid", "sessionkey", "ssn", "token", "tokens", "totp", "xsrf",
})  # fmt: skip
_PAIRS = frozenset({
    ("access", "key"), ("account", "number"), ("api", "key"), ("api", "keys"), ("card", "number"), ("credit", "card"),
    ("encryption", "key"), ("private", "key"), ("security", "code"), ("session", "id"), ("session", "key"),
    ("signing", "key"), ("social", "security"), ("tax", "id"),
})  # fmt: skip
_BOUNDARY = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[^\W\d_]+")


def is_secret(name: str) -> bool:
    """Tell whether *name* says that its value is a secret: `api_key`, `X-Api-Key`, `password2`; not `author`.

    It is judged by its words, however they are joined: `snake_case`, `camelCase`, `kebab-case`.
    """
    words = [word.lower() for word in _WORD.findall(_BOUNDARY.sub("_", name[:_LONGEST]))]
    return not _WORDS.isdisjoint(words) or not _PAIRS.isdisjoint(pairwise(words))
