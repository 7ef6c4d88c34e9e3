"""Secrets that stand in settings or in a text: one rule for all that is written down or said.

A secret is replaced by a ${NAME} that may stand there, so that settings written so run again once the variable is set.

*Covered*: headers, but for those known to be harmless; whatever stands under a name that speaks of a secret, in a
mapping, an argument or the query of a URL; user and password of a URL; what looks like a key in a URL, an argument or
an environment; in every text keys in the form of well-known services, and private keys; in what is said also the
values that ${NAME}s stood for in this process, word for word (`keep_secret`).
*Not covered*: a word of its own under a name that says nothing of it (`-p hunter2`); rows; in prompts and in the
sources of graders all but the URLs and the keys of a well-known form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

VARIABLE = re.compile(r"\$\{(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}")
"""`${NAME}`, `${env:NAME}` or `${NAME:-text}`: the name, and what stands for a variable that is not set."""

_NAME = re.compile(
    r"auth(?!or(?:s|ed|ship)?(?![a-z]))|token(?!s(?![a-z])|i[sz])|secret|passw|passphrase|passcode|credential|cookie"
    r"|bearer|jwt|signature|mnemonic|session(?:[-_]?(?:id|key))?$|(?:^|[-_.])(?:pat|pass|pwd?|sig|dsn|creds?)$"
    r"|(?:api|access|refresh|hub|lab|bot|user|service)[-_.]?tokens(?![a-z])"
    r"|(?:api|access|private|sign(?:ing)?|encrypt(?:ion)?|master|account|subscription|functions?|service|client"
    r"|app(?:lication)?|licen[cs]e|deploy|admin|user|server)[-_.]?keys?(?![a-z])",
    re.IGNORECASE,
)
_KEY = re.compile(r"(?:^|[-_.]|(?<=[a-z])(?=K))keys?$", re.IGNORECASE)
"""May also be the key of a row: asked only where settings of other programs stand."""
_NO_NAME = re.compile(
    r"(?:^|[-_])(?:no|use|enable|disable|require|skip|max|min|num)[-_]"
    r"|(?:[be]os|pad|unk|sep|cls|mask|stop|start|end|special)[-_]?token"
    r"|(?:sort|order|group|primary|foreign|partition|public|row|item|cache)[-_]?key"
    r"|(?:file|path|dir|env|ur[il]|type|method|mode|scheme|endpoint|issuer|audience|scopes?|ttl|expiry|timeout|limit"
    r"|length|count|size|budget)$",
    re.IGNORECASE,
)
_HARMLESS_HEADER = re.compile(
    r"accept(?:-\w+)*|content-\w+|user-agent|host|origin|cache-control|connection|prefer|expect|te|via|traceparent"
    r"|(?:[\w-]*-)?(?:trace|request|correlation)-id|(?:[\w-]*-)?version",
    re.IGNORECASE,
)
_NO_VALUE = re.compile(
    r"|\d|true|false|on|off|yes|no|none|null|basic|bearer|digest|oauth2?|(?:~|\.{1,2})?(?:/[\w.-]+)+/?", re.IGNORECASE
)
"""Switches, schemes and paths."""
_KNOWN = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:(?:sk|rk|pk|xox[a-z]|xapp|nvapi|tvly|pplx|xai|pypi|dapi|csk|GOCSPX|glsa|sntry[su]|lsv2|AGE-SECRET-KEY)[-_]"
    r"|gl(?:pat|ptt|dt|rt|cbt|ft|soat|agent)-|gh[opsur]_|github_pat_|hf_|npm_|gsk_|r8_|fw_|whsec_|shpat_|lin_api_"
    r"|dop_v1_|dckr_pat_|sbp_|figd_|ntn_|hvs\.|ATATT|AIza|ya29\.|SG\.)(?=[\w.-]{0,99}\d)[\w.-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{12,}|eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?)"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    r"(?:[\w+/=\s\\:,-]{0,9000}?-----END [A-Z ]{0,30}KEY-----|[\w+/=\s\\:,-]{0,9000})"
)
_AUTH = re.compile(r"(?:Bearer|Basic|Token)\s+", re.IGNORECASE)
_SHORT = re.compile(r"(?:Bearer|Basic|Token)\s|sk-|gh[opsur]_|github_pat_|xox[a-z]-|AKIA|hf_|glpat-|eyJ", re.IGNORECASE)
"""How a value begins that is a key, where nothing but a value stands."""
_LONG = re.compile(r"[A-Za-z0-9]{20,}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""A commit's, an image's."""
# Bounded repeats: what a server says is searched too, however long it is, in time that grows with its length alone.
_URL = re.compile(r"(?<![A-Za-z0-9])([A-Za-z][A-Za-z0-9+.-]{0,40}(?:://|:/(?=[^/\s]{1,99}@)))([^\s'\"<>`]+)")
_PARAMETER = re.compile(r"([?&#;])([^=&#;?/]+)(?:=([^&#;]*))?")
_SCHEME = re.compile(
    r"\b((?i:Authorization)['\"]?\s{0,9}[:=]\s{0,9}['\"]?(?:(?i:Bearer|Basic|Token)\s{1,9}"
    r"|(?:[A-Za-z][\w-]{2,20}\s{1,9})?(?=\S{0,99}\d))|(?:Bearer|Basic)\s+(?=\S{0,99}[\d=]))"
    r"([^\s'\",]+)"
)
_VALUE = r"""("[^"]*"|'[^']*'|[^\s"';&,)]+)"""
_ASSIGNED = re.compile(r"(?<![\w$./-])(-{0,2}[A-Za-z_][\w.-]{0,99})(=)" + _VALUE)
_FLAG = re.compile(r"(?<![\w-])(--?[A-Za-z][\w.-]{0,99})(\s{1,9})(?!-)" + _VALUE)
_FIELD = re.compile(
    r"(?<![\w-])(-{0,2}[A-Za-z][\w-]{0,99})(['\"]?:\s{0,9}(?:(?:Bearer|Basic|Token)\s{1,9})?)(?!/)" + _VALUE
)
_WORD = re.compile(r"(?<!\S)[^\s/]+(?!\S)")
"""No path and no URL."""
_BARE_USER = re.compile(r"(?<![\w@/])[^\s:@/'\"]{1,99}:[^\s:@/'\"]{1,99}@(?=[A-Za-z]|\d+(?:\.\d+){3})")
_SHORTEST_KEPT = 8
_FREE = re.compile(r"env|bind|arguments|metadata|\w*kwargs", re.IGNORECASE)
"""Mappings whose keys are not ours; of these the names of variables alone end in KEY where they hold one."""


_kept: dict[str, str] = {}
"""What ${NAME}s stood for in this process: the value, and what is said in its place."""


def keep_secret(name: str, value: str) -> None:
    """A variable's value went where secrets go: it is left out of all that is said from here on.

    Where the variable's name speaks of one, or its value has the form of a key; not of less than 8 characters, which
    would be found everywhere.
    """
    if _speaks_of_secrets(name, asks_key=True) or _is_key(value):
        _keep(name, value)


def keep_header(name: str, value: str) -> None:
    """Likewise of a header, but for those known to be harmless."""
    if not _HARMLESS_HEADER.fullmatch(name):
        _keep(name, value)


def _keep(name: str, value: str) -> None:
    bare = _AUTH.sub("", value.strip())
    if len(bare) >= _SHORTEST_KEPT:
        # As it stands, and as URLs and JSON write it.
        for text in (bare, quote(bare, safe=""), json.dumps(bare)[1:-1]):
            _kept[text] = _variable(name)


def not_kept(text: str) -> str:
    """A text without the values that were kept: what a server sends back of its own key is no model's to learn."""
    for value in sorted(_kept, key=len, reverse=True):
        text = text.replace(value, _kept[value])
    return text


def without_secrets(value: Any) -> Any:
    """Settings as JSON values, for whatever is written down."""
    if isinstance(value, Mapping):
        return {_in_key(key): _of_key(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    return _in_text(value) if isinstance(value, str) else value


def hidden_in(text: str) -> str:
    """An error's or a log's text without the secrets of URLs, headers, arguments and assignments in it."""
    text = _SCHEME.sub(lambda m: m[0] if "${" in m[2] else f"{m[1]}${{AUTHORIZATION}}", _in_text(not_kept(text)))
    text = _BARE_USER.sub(_bare_user, text)
    text = _ASSIGNED.sub(lambda m: _named(m, asks_key=False), text)
    for pattern in (_FLAG, _FIELD):
        # Words without a digit explain: `token: expected a text`.
        text = pattern.sub(lambda m: _named(m, asks_key=False) if re.search(r"\d", m[3]) else m[0], text)
    return text


# ---- settings


def _of_key(key: str, value: Any, within: str = "") -> Any:
    """The value under a key; `within` names the mapping around it whose keys are another program's, if there is one."""
    if isinstance(value, Mapping):
        if key.lower().endswith("headers"):
            return {name: _header(str(name), text) for name, text in value.items()}
        if (named := _named_value(value)) is not None:
            return named
        within = key if _FREE.fullmatch(key) else within
        # All that stands under `credentials` is one, whatever it is called there.
        outer = f"{key}." if within and _speaks_of_secrets(key, asks_key=False) else ""
        return {_in_key(name): _of_key(f"{outer}{name}", inner, within) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        if key.lower().endswith("headers") and all(isinstance(x, list | tuple) and len(x) == 2 for x in value):
            return [[name, _header(str(name), text)] for name, text in value]
        return _arguments(value) if key == "args" else [_of_key(key, inner, within) for inner in value]
    if isinstance(value, bool) or not isinstance(value, str | int):
        return value
    if _speaks_of_secrets(key, asks_key=within == "env"):
        return _hidden(key, value)
    if isinstance(value, int):
        return value
    if key.endswith("_env"):
        # The key itself, where the name of its variable was asked for.
        return value if re.fullmatch(r"\w*", value) and not _is_key(value) else _variable(key)
    return _words(value) if within or key in ("command", "cwd") else _in_text(value)


def _named_value(about: Mapping[str, Any]) -> dict[str, Any] | None:
    """`{name: Authorization, value: ...}`, as other programs write headers and variables; None for anything else."""
    name = about.get("name", about.get("key"))
    if "value" not in about or not isinstance(name, str) or not _speaks_of_secrets(name, asks_key=True):
        return None
    return {key: _hidden(name, inner) if key == "value" else inner for key, inner in about.items()}


def _in_key(key: Any) -> Any:
    return _in_text(key) if isinstance(key, str) else key


def _header(name: str, value: Any) -> Any:
    tells = _speaks_of_secrets(name, asks_key=True) or (isinstance(value, str) and _is_key(value))
    if _HARMLESS_HEADER.fullmatch(name) and not tells:
        return _in_text(value) if isinstance(value, str) else value
    return _hidden(name, value)


def _arguments(args: Sequence[Any]) -> list[Any]:
    """The arguments of a command: `--token X`, `--token=X`, `NAME=X`, `Header: X`, JSON, a whole command."""
    out: list[Any] = []
    before = ""
    for arg in args:
        text = arg if isinstance(arg, str) else ""
        flag = before if re.fullmatch(r"--?[A-Za-z][\w.-]*", before) else ""
        header = re.fullmatch(r"([A-Za-z][\w-]*)(:\s*)(.+)", text)
        if header and flag.lower() in ("-h", "--header", "--headers"):
            out.append(header[1] + header[2] + str(_header(header[1], header[3])))
        elif flag.lower() in ("-u", "--user", "--proxy-user") and ":" in text and "${" not in text:
            out.append("${USER}")
        elif flag and not text.startswith("-") and _speaks_of_secrets(flag, asks_key=True):
            out.append(_hidden(flag, arg))
        else:
            out.append(_words(text) if text else arg)
        before = text
    return out


def _words(text: str) -> str:
    """A text that another program reads: a value, `NAME=value`, JSON, or a command with its arguments."""
    if text.lstrip().startswith(("{", "[")):
        try:
            read = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            kept = _of_key("arguments", read)
            return text if kept == read else json.dumps(kept, ensure_ascii=False)
    if _AUTH.match(text):
        return str(_hidden("secret", text))
    text = _BARE_USER.sub(_bare_user, _URL.sub(_url, _without_defaults(text)))
    for pattern in (_FLAG, _FIELD, _ASSIGNED):
        text = pattern.sub(lambda m: _named(m, asks_key=True), text)
    return _WORD.sub(lambda m: "${SECRET}" if _is_key(m[0]) else m[0], _KNOWN.sub("${SECRET}", text))


def _named(match: re.Match[str], *, asks_key: bool) -> str:
    """A name, what stands between, and its value; the value may be in quotes."""
    name, between, value = match.groups()
    if not _speaks_of_secrets(name, asks_key=asks_key):
        return match[0]
    quote = value[0] if value[0] in "'\"" else ""
    return f"{name}{between}{quote}{_hidden(name, value.strip(quote) if quote else value)}{quote}"


# ---- names and values


def _speaks_of_secrets(name: str, *, asks_key: bool) -> bool:
    name = name.lstrip("-")
    found = _NAME.search(name) or (asks_key and _KEY.search(name))
    return bool(found) and not _NO_NAME.search(name)


def _hidden(name: str, value: Any) -> Any:
    """The value's variable, but for values that are none or that are read from somewhere else anyway."""
    if not isinstance(value, str):
        return value if value is None or isinstance(value, bool) else _variable(name)
    rest = _AUTH.sub("", VARIABLE.sub("", value))
    if "{{" in value or ("${" in value and "${" not in rest and not _is_key(rest)):
        return VARIABLE.sub(r"${\1}", value)
    return value if _NO_VALUE.fullmatch(value) and not _is_key(value) else _variable(name)


def _variable(name: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|\W", "_", name.strip("-"))
    return f"${{{'_' * words[:1].isdigit()}{words.upper()}}}"


def _is_key(text: str) -> bool:
    """Whether a value has the form of a key: a well-known beginning, or many letters and digits at a stretch."""
    if _SHORT.match(text) or _KNOWN.search(text):
        return True
    return any(_is_mixed(piece) for piece in _LONG.findall(VARIABLE.sub(" ", text)))


def _is_mixed(piece: str) -> bool:
    return not _DIGEST.fullmatch(piece) and not piece.isalpha() and not piece.isdigit()


def _without_defaults(text: str) -> str:
    """`${TOKEN:-the token itself}` without what stands there."""

    def bare(match: re.Match[str]) -> str:
        held = match[2] or ""
        holds = _speaks_of_secrets(match[1], asks_key=True) or _is_key(held) or _URL.sub(_url, held) != held
        return f"${{{match[1]}}}" if held and holds else match[0]

    return VARIABLE.sub(bare, text)


# ---- texts


def _in_text(text: str) -> str:
    """A text with URLs and keys of a well-known form replaced."""
    return _KNOWN.sub("${SECRET}", _URL.sub(_url, _without_defaults(text)))


def _url(match: re.Match[str]) -> str:
    user, rest = _user_of(match[2])
    if user:
        parts = zip(("USER", "PASSWORD"), user.split(":", 1), strict=False)
        user = ":".join(part if VARIABLE.fullmatch(part) or not part else f"${{URL_{of}}}" for of, part in parts) + "@"
    end = min((rest.find(mark) for mark in "?#;" if mark in rest), default=len(rest))
    return match[1] + user + "/".join(_pieces(rest[:end])) + _PARAMETER.sub(_parameter, rest[end:])


def _bare_user(match: re.Match[str]) -> str:
    return match[0] if "${" in match[0] else "${URL_USER}@"


def _user_of(text: str) -> tuple[str, str]:
    """What stands before the @ of a URL, and the rest. A password may hold what ought to be escaped in it."""
    authority = re.split(r"[/?#]", text, maxsplit=1)[0]
    if "@" in authority:
        user = authority.rpartition("@")[0]
    elif re.search(r":(?!\d*$)", authority) and "@" in text:
        user = text.rpartition("@")[0]
    else:
        return "", text
    return user, text[len(user) + 1 :]


def _pieces(path: str) -> Iterator[str]:
    host, *rest = path.split("/")
    yield host
    for piece in rest:
        yield "${URL_KEY}" if _is_key(piece) else piece


def _parameter(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    if value is None:
        return f"{mark}${{URL_KEY}}" if _is_key(name) else match[0]
    asked = unquote(name)
    speaks = _speaks_of_secrets(asked, asks_key=True) or asked == "code"
    return f"{mark}{name}={_hidden(asked, value) if speaks or _is_key(value) else value}"
