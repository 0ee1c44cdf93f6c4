"""Parse Hub ids with a revision, test whether the Hub answers, and upload to it."""

import functools
import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from cli.errors import UserError, require, root_cause

MODEL_NAME = "PATH_OR_ID"  # in the model card, until it is uploaded


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


def datasets_cache() -> Path:
    """Return the cache directory of `datasets`, which takes a second to import."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(huggingface_hub.constants.HF_HOME, "datasets"))


@functools.cache
def find_hub() -> None:
    """Switch the Hub's libraries to their cache if the Hub does not answer. A try takes half a minute per file."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # the class depends on the HTTP library that the Hub's client uses
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def check_login(repo_id: str) -> None:
    """Raise UserError if `push` would fail: the id is invalid, or nobody is logged in. Called before training."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {repo_id}: is no Hub id ({root_cause(error)}). Use user/name.") from error
    try:
        HfApi().whoami()
    except Exception as error:  # no login or no network; the class depends on the HTTP library of the Hub's client
        raise UserError(
            f"--push_to_hub {repo_id}: not logged in to the Hub ({root_cause(error)}). "
            f"Run `hf auth login`, set HF_TOKEN, or remove the flag and upload later."
        ) from error


def push(model_dir: Path, repo_id: str) -> str:
    """Upload model, tokenizer and card. Return the address and, if the repository is private, how to publish it.

    A new repository is private. The token comes from the environment or from the saved login. Only the card on the Hub
    names the repository.
    """
    try:
        api = HfApi()
        repo_id = api.create_repo(repo_id, private=True, exist_ok=True).repo_id
        is_private = api.repo_info(repo_id).private
        card = (model_dir / "README.md").read_text(encoding="utf-8").replace(MODEL_NAME, repo_id).encode()
        api.upload_folder(repo_id=repo_id, folder_path=model_dir, ignore_patterns="README.md")
        api.upload_file(repo_id=repo_id, path_or_fileobj=card, path_in_repo="README.md")
        publish = f" (private; to publish it: hf repos settings {repo_id} --public)"
        return f"{api.endpoint}/{repo_id}{publish if is_private else ''}"
    except Exception as error:
        raise UserError(
            f"--push_to_hub {repo_id}: the upload failed ({root_cause(error)}). The model is safe in {model_dir}. "
            f"Pass --resume --push_to_hub {repo_id} to try again."
        ) from error
