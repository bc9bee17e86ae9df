"""What must not be written down: values that look like credentials, by key name, by environment, by form."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"
_NAMES_A_SECRET = re.compile(r"(?:key|token|secret|password|passwd|credential)s?(?:[_\-.]|$)", re.IGNORECASE)
_NAMES_A_PLACE = re.compile(r"(?:path|file|dir|home)$", re.IGNORECASE)
_SHORTEST = 8
"""Shorter values of such variables (`1`, `true`) are flags, and would blank out innocent text."""

_FORMS = (
    (re.compile(r"(?<=://)[^/\s@]+(?=@)"), HIDDEN),
    (re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    (
        re.compile(r"(?i)(\b[\w-]{0,40}(?:api_?key|token|secret|password|passwd)=)[^\s&'\",;]{8,}"),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)[\w-]{16,}"), HIDDEN),
)


def names_a_secret(name: str) -> bool:
    """Whether a key or variable of this name holds a credential: WANDB_API_KEY yes, TOKENIZER_PATH no."""
    return bool(_NAMES_A_SECRET.search(name)) and not _NAMES_A_PLACE.search(name)


def environment_secrets() -> dict[str, str]:
    """Environment variables that hold credentials, longest value first."""
    found = {n: v for n, v in os.environ.items() if names_a_secret(n) and len(v) >= _SHORTEST}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def redact(value: Any) -> Any:
    """The same text, list or mapping with every credential replaced; numbers are never one."""
    return _redact(value, tuple(environment_secrets().values()))


def _redact(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        for form, replacement in _FORMS:
            value = form.sub(replacement, value)
        return value
    if isinstance(value, Mapping):
        return {
            _redact(k, secrets): HIDDEN if _is_secret(k, v) else _redact(v, secrets) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(v, secrets) for v in value]
    return value


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and bool(value) and names_a_secret(key)
