"""Whether the Hub answers."""

import functools

import datasets
import huggingface_hub


@functools.cache
def find_hub() -> None:
    """Where the Hub does not answer, only its cache is used from here on; else each file would cost half a minute."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # which ones, depends on the HTTP library that the Hub's client uses
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
