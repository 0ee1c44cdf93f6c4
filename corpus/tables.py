"""Read datasets of the Hub, and directories that save_to_disk wrote."""

import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi

from cli.errors import UserError, require, root_cause
from cli.hub import find_hub, split_revision
from corpus.files import Files, Place
from corpus.flags import TextConfig
from corpus.readers import reading, rows_at_once, without_nulls


@dataclass(frozen=True)
class Table:
    """The records of a dataset, from the Hub or made by save_to_disk. They may be streamed."""

    flag_text: str
    table: datasets.Dataset | datasets.IterableDataset
    fingerprint: str  # dataset, configuration and split, with the commit on the Hub or the state of the local files
    identity: str  # the same, but with the content of the local files
    max_shards = sys.maxsize

    def __str__(self) -> str:
        return self.flag_text

    def name(self, place: Place) -> str:
        return self.flag_text

    def read(
        self, place: Place | None = None, columns: set[str] | None = None, index: int = 0, count: int = 1
    ) -> Iterator[tuple[dict[str, Any], Place]]:
        """Yield (record, place) of shard ``index`` of ``count``, from ``place`` on."""
        number, table = place["record"] if place else 0, self.table
        if columns is not None and table.column_names:
            table = table.select_columns([name for name in table.column_names if name in columns])
        if isinstance(table, datasets.Dataset):
            rest = table.select(range(number, len(table)))
            batches = rest.iter(rows_at_once(table.data.nbytes, len(table)))
            rows = (row for batch in batches for row in _rows(batch))
            for number, row in enumerate(rows, number + 1):  # noqa: B020
                if (number - 1) % count == index:
                    yield without_nulls(row), {"record": number}
            return
        # Shards are whole files if they divide evenly, or if there are at least ten per shard. Readers that share a
        # table change each other's state, so each has its own.
        table = table.shard(1, 0)
        table = split_dataset_by_node(table, index, count, "shards" if table.num_shards >= 10 * count else "auto")
        if place:
            table.load_state_dict(place["state"])
        with reading(f"{self.flag_text}: record {number + 1} or one soon after it"):
            for number, row in enumerate(table, number + 1):  # noqa: B020
                yield without_nulls(row), {"record": number, "state": table.state_dict()}


def _rows(batch: dict[str, list]) -> Iterator[dict[str, Any]]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def open_table(flag_name: str, name: str, config: TextConfig, split: str, streaming: bool = False) -> Table:
    """Return a Hub dataset, ``ID`` or ``ID@REVISION``, or one made by save_to_disk. Raise UserError if it fails.

    A streamed dataset keeps its commit, even if the Hub gets a newer one.
    """
    datasets.logging.set_verbosity(logging.CRITICAL)  # a message would hide the one line that matters
    if not sys.stdout.isatty():
        datasets.disable_progress_bars()
    path, fix = Path(name), "Use another id, split or revision, check login and network, or pass local files."
    try:
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            table = datasets.load_from_disk(path)
            unused = f"--dataset_config {config.dataset_config}: {name} is a local directory without configurations"
            require(config.dataset_config is None, f"{unused}. Remove it.")
            splits = table if isinstance(table, datasets.DatasetDict) else {"train": table}
            missing = f"{flag_name} {name}: split {split} does not exist. Use one of {', '.join(splits)}."
            require(split in splits, missing)
            return Table(f"{flag_name} {name}", splits[split], *[f"{splits[split]._fingerprint} {split}"] * 2)
        dataset_id, revision = split_revision(name, flag_name)
        part, cache_dir = f"{dataset_id} {config.dataset_config} {split}", None
        if path.exists():
            files = Files(flag_name, tuple(sorted(str(file) for file in path.rglob("*") if file.is_file())))
            fingerprint, identity = f"{part} {files.fingerprint}", f"{config.dataset_config} {split} {files.identity}"
            # `datasets` takes the old text if a file is rewritten and keeps its time of modification. So each state of
            # the files has its own cache.
            state = hashlib.sha256(files.fingerprint.encode()).hexdigest()[:16]
            cache_dir = os.path.join(datasets.config.HF_DATASETS_CACHE, "directories", state)
        else:
            find_hub()
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE
            if streaming:
                revision = HfApi().dataset_info(dataset_id, revision=revision).sha
            fingerprint = identity = f"{revision} {part}"
        options = {"split": split, "revision": revision, "streaming": streaming, "cache_dir": cache_dir}
        table = datasets.load_dataset(dataset_id, config.dataset_config, **options)
        if not streaming:
            fingerprint = f"{fingerprint} {table._fingerprint}"
        return Table(f"{flag_name} {name}", table, fingerprint, identity)
    except UserError:
        raise
    except Exception as error:  # the class depends on the HTTP library of the Hub's client
        if not isinstance(error, (OSError, ValueError, RuntimeError, DatasetGenerationError)) and not streaming:
            raise
        if "scripts are no longer supported" in str(error):
            fix = "Use a copy in Parquet (for ELI5: dany0407/eli5_category) or --train_files."
        raise UserError(f"{flag_name} {name}: cannot be loaded ({root_cause(error)}). {fix}") from error
