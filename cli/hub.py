"""Hub ids with a revision, and whether the Hub answers."""

import functools
from pathlib import Path

import datasets
import huggingface_hub

from cli.errors import require


def split_revision(name: str, flag_name: str = "--model") -> tuple[str, str | None]:
    """Return the id and the revision of ``ID@REVISION``; the revision is None if the name has none.

    A path that exists keeps its @. Raise UserError, which names the flag, for an empty part and for a directory with a
    revision.
    """
    if "@" not in name or Path(name).exists():
        return name, None
    repo_id, _, revision = name.rpartition("@")
    require(bool(repo_id and revision), f"{flag_name} {name}: lacks an id or a revision. Use ID@REVISION.")
    is_local = Path(repo_id).exists()
    require(not is_local, f"{flag_name} {name}: {repo_id} is local and has no revisions. Remove @{revision}.")
    return repo_id, revision


@functools.cache
def find_hub() -> None:
    """Switch the Hub's libraries to their cache if the Hub does not answer; else each file would take half a minute."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # the class depends on the HTTP library that the Hub's client uses
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
