"""Open the sources of the text: files, Hub datasets, directories made by save_to_disk, and mixtures of them."""

import dataclasses
import glob
import os
from importlib.util import find_spec

from cli.errors import UserError, require, warn
from corpus.files import find_files, suffix
from corpus.flags import DataConfig, TextConfig
from corpus.readers import READERS
from corpus.records import Documents
from corpus.templates import parse_source


def load_documents(config: DataConfig) -> tuple[list[Documents], Documents | None]:
    """Return the sources of the training text, and the evaluation text if it is separate."""
    if config.mix:
        training = [_open_source(parse_source(item)[0], config) for item in config.mix]
    else:
        training = [read_documents(config, "--train_files", config.train_files, config.streaming)]
    if not (config.eval_files or config.dataset_eval_split):
        return training, None
    if config.eval_fraction != DataConfig.eval_fraction:
        warn(f"--eval_fraction {config.eval_fraction} is ignored: there is separate evaluation text")
    config = dataclasses.replace(config, max_documents=None)
    if config.eval_files:
        return training, read_documents(config, "--eval_files", config.eval_files)
    # Stream the evaluation split as well: without it, `datasets` would download all splits.
    return training, _open_dataset("--dataset", config.dataset, config, config.dataset_eval_split, config.streaming)


def read_documents(config: TextConfig, flag_name: str, files: list[str], streaming: bool = False) -> Documents:
    """Return the documents of ``files``, or of the configured dataset if there are none. Read the first records."""
    if not files:
        return _open_dataset("--dataset", config.dataset, config, config.dataset_split, streaming)
    found = find_files(flag_name, files, streaming)
    has_client = find_spec("aiohttp") or not any(path.startswith(("http:", "https:")) for path in found.paths)
    missing = f"{found.name({'file': 0})}: needs aiohttp. Run pip install aiohttp, or pass downloaded files."
    require(has_client, missing)
    return Documents(found, config)


def _open_source(name: str, config: DataConfig) -> Documents:
    """Return one source of a mixture: files if the name is a path or has a file's suffix, else a dataset."""
    is_saved = any(os.path.exists(f"{name}/{file}") for file in ("state.json", "dataset_dict.json"))
    is_file = glob.has_magic(name) or suffix(name) in READERS or (os.path.exists(name) and not is_saved)
    try:
        if is_file:
            return Documents(find_files("--mix", [name]), config)
        return _open_dataset("--mix", name, config, "train")
    except UserError as error:
        raise error if name in str(error) else UserError(f"--mix {name}: {error}") from error


def _open_dataset(flag_name: str, name: str, config: TextConfig, split: str, streaming: bool = False) -> Documents:
    """Return the documents of a dataset. `datasets` takes a second to import, so files do not import it."""
    from corpus.tables import open_table

    return Documents(open_table(flag_name, name, config, split, streaming), config)
