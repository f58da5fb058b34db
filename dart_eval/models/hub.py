"""Reachability of the Hugging Face hub, checked once, so that a machine without a network responds in seconds."""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from urllib.parse import urlparse

import datasets
import huggingface_hub

TIMEOUT = 5.0  # seconds
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@lru_cache(maxsize=1)
def work_offline_if_unreachable() -> bool:
    """Switch the libraries to offline mode if the hub does not answer; cached files still load.

    Without this, each request is retried for most of a minute. Behind a proxy the hub is not tried.

    Returns:
        Whether the libraries are offline now.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True
    if any(os.environ.get(name) for name in PROXIES):
        return False
    address = urlparse(huggingface_hub.constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=TIMEOUT).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
        return True
    return False
