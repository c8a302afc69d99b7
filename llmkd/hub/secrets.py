"""Take tokens out of text before anybody reads it: errors, logs, cards."""

from __future__ import annotations

import os
import re

MASK = "***"

# `hf_` and letters or digits is a user token; the OAuth and OIDC kinds carry a dotted JWT behind.
TOKEN_LIKE = re.compile(r"hf_(?:oauth|jwt)_+[A-Za-z0-9._~+/=-]{8,}|hf_[A-Za-z0-9]{8,}")
# What is certainly a token (34 characters follow in real ones), and not a name such as hf_transfer.
TOKEN_SURELY = re.compile(rb"hf_[A-Za-z0-9]{30,}|hf_(?:oauth|jwt)_+[A-Za-z0-9._-]{20,}")
URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")


def redact(text: str, *secrets: str | None) -> str:
    """`text` with `***` for every one of `secrets`, for what looks like a Hub token and for the
    login part of a URL."""
    text = hide(text, *secrets)
    return URL_LOGIN.sub(MASK + "@", TOKEN_LIKE.sub(MASK, text))


def hide(text: str, *secrets: str | None) -> str:
    """`text` with `***` for every one of `secrets` and nothing else; None and blanks are none."""
    # The longest first: a secret inside another one would leave the rest of it standing.
    for secret in sorted((s.strip() for s in secrets if s and s.strip()), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def holds_token(content: bytes, token: str) -> bool:
    """Whether `content` holds `token`, or something that can only be a Hub token."""
    return token.encode() in content or TOKEN_SURELY.search(content) is not None


def environment_tokens() -> list[str]:
    """Tokens this process was given by environment variables."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return [value for name in names if (value := os.environ.get(name, "").strip())]
