"""The Hugging Face hub: whether it answers, checked once, and the commit of what lies there."""

from __future__ import annotations

import os
import re
import socket
from functools import cache
from urllib.parse import urlparse

import datasets
import huggingface_hub
from transformers.utils.hub import extract_commit_hash

from dart_eval.weights.checkpoint import model_file

TIMEOUT = 5.0  # seconds
UNREACHABLE = re.compile(  # words of libraries' errors
    r"connect to |connection (error|reset|refused)|your (internet )?connection|offline mode|outgoing traffic",
    re.IGNORECASE,
)
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@cache
def work_offline_if_unreachable() -> None:
    """Switch the libraries to offline mode if the hub does not answer; cached files still load.

    Without this, each request is retried for most of a minute. Behind a proxy the hub is not tried.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE or any(os.environ.get(name) for name in PROXIES):
        return
    address = urlparse(huggingface_hub.constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=TIMEOUT).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def commit_of(source: str, name: str, revision: str) -> str:
    """Return the commit that a branch or a tag of a repository names now; the revision itself where none is known.

    Transformers gives it in `config._commit_hash` in some versions only. In the hub's cache files lie in a folder of
    their commit.

    Args:
        source: the id of the repository.
        name: a file that it has.
    """
    file = model_file(source, name, revision)
    return extract_commit_hash(None if file is None else str(file), None) or revision
