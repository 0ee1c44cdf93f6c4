"""The directory of a run: its owner, its checkpoint to resume from, its first write and its last words."""

import glob
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from cli.errors import UserError, require, warn, without_credentials
from cli.flags import AnyPath, Count, flag
from cli.hub import check_login, push
from distributed.world import World
from training import atomic, checkpoint
from training.log import NoLog, RunLog, evaluations, finished_step, last_step, mark_finished, model_step, print_paths
from training.model_card import versions
from training.state import TrainState, make_moments, trained_weights

RUN_CONTENT = ("checkpoints", "model", "tensorboard", "config.yaml", "metrics.jsonl")

# Settings that may change, and change the numbers from there on.
SHAPING = ("attn_implementation", "compile", "gradient_checkpointing", "keep", "learning_rate", "lora_dropout")
SHAPING += ("max_grad_norm", "max_steps", "num_epochs", "precision", "warmup_steps", "weight_decay")

ONCE = ("resume", "overwrite", "dry_run", "push_to_hub")  # of a command, not settings of the run


@dataclass
class RunConfig:
    title = "run"

    output_dir: AnyPath | None = flag(None, "the run's directory (default: runs/<name of the config file>)")
    resume: bool = flag(False, "go on from the newest checkpoint in --output_dir, or start if there is none")
    overwrite: bool = flag(False, "delete the run that is in --output_dir; wins over --resume")
    keep_checkpoints: Count = flag(2, "newest checkpoints to keep")
    keep: Literal["best", "last"] = flag("best", "the weights in model/: of the best evaluation, or of the last")
    push_to_hub: str | None = flag(
        None, "Hub id to upload the model to, private; log in with `hf auth login` or HF_TOKEN"
    )
    dry_run: bool = flag(False, "print the plan, make one step with a learning rate of 0, write nothing")


@dataclass
class Saved:
    """A checkpoint, or nothing: then the state is that of a new run."""

    path: Path | None = None
    state: TrainState = field(default_factory=TrainState)
    content: dict[str, Any] = field(default_factory=dict)  # of its state.json

    @property
    def compiled(self) -> bool | None:
        """Whether the run was compiled, or None for a new run."""
        return self.content.get("compiled")


class Run:
    """The run in ``config.output_dir``. A new run writes nothing before `start`. Only rank 0 writes and prints."""

    def __init__(self, config: Any, world: World):
        self.config, self.world = config, world
        self.directory = Path(config.output_dir)
        may_restart = world.size > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        wrong = "torchrun --max-restarts: starts this command again when a rank is lost"
        require(
            not may_restart or (config.resume and not config.overwrite), f"{wrong}. Pass --resume, not --overwrite."
        )
        self.settings = {key: without_credentials(value) for key, value in vars(config).items() if key not in ONCE}
        self.identity: dict[str, Any] = {}
        self._require_same_on_all_ranks(vars(config))
        self._exists = world.on_main(self._check_directory)
        if not config.dry_run:
            checkpoint.require_shared_directory(self.directory, world)
        self._resumes = self._exists and config.resume and not config.overwrite and not config.dry_run
        if config.push_to_hub and not config.dry_run:
            world.on_main(lambda: check_login(config.push_to_hub))

    # The run that is there already

    def is_uploaded(self) -> bool:
        """Upload a finished run with the same settings, if asked to: that needs no text."""
        if not (self._resumes and self.config.push_to_hub and self.world.on_main(self._is_done)):
            return False
        if self.world.is_main:
            atomic.lock_directory(self.directory)
            self._finish()
        return True

    def find_checkpoint(self, identity: dict[str, Any]) -> Saved:
        """Return the newest intact checkpoint with --resume, or an empty one.

        Raise UserError if it belongs to another run: if its ``identity`` differs.
        """
        self._require_same_on_all_ranks(identity)
        self.identity = identity
        saved = Saved()

        def lock() -> int | None:
            atomic.lock_directory(self.directory)
            for name in RUN_CONTENT:  # nothing else here is this run's
                atomic.remove_partial_writes(self.directory, name)
            atomic.remove_partial_writes(self.directory / "checkpoints", "step-*")
            atomic.remove_partial_writes(self.directory / "model", "README.md")
            return model_step(self.directory)

        if self._resumes:
            kept_step = self.world.on_main(lock)
            saved.path = checkpoint.newest(self.directory / "checkpoints", self.world)
        if saved.path:
            saved.content = checkpoint.load(saved.path)
            known = {"moments", "shards"} <= saved.content.keys()
            fix = "Use --overwrite, or another --output_dir"
            require(known, f"--resume: {saved.path} was made by an earlier version of this program. {fix}.")
            self._require_same_run(saved.content["identity"])
            saved.state = TrainState.from_json(saved.content["train_state"])
            if saved.state.best_step != kept_step:  # the run was killed after a later evaluation, or model/ is gone
                held, best = (f"of step {step}" if step else "none" for step in (kept_step, saved.state.best_step))
                warn(f"{self.directory}/model: its weights are {held}, and the best up to the checkpoint are {best}. "
                     "The next evaluation replaces them.")  # fmt: skip
                saved.state.best_step, saved.state.last_eval_step = None, -1
        return saved

    def is_finished(self, saved: Saved, num_steps: int) -> bool:
        """Return whether nothing is left to train; say so, and upload if asked to.

        Raise NoCheckpointError if the run got so far that starting over would lose something.
        """
        if not self._resumes:
            return False
        done = self.world.on_main(lambda: finished_step(self.directory))
        if saved.path:
            done = saved.state.step if saved.state.last_eval_step == saved.state.step else 0
        if done >= num_steps:
            print(f"{self.directory}: this run is finished ({done} of {num_steps} steps). "
                  f"Pass a larger --max_steps to train longer, or --overwrite to start over.")  # fmt: skip
            if self.world.is_main:
                mark_finished(self.directory)
                self._finish()
            return True
        if saved.path:
            self._note_changes(saved.content["settings"])
        elif done or self.world.on_main(lambda: last_step(self.directory) > self._recorded().get("save_every", 0)):
            fix = "Use its model as it is, or pass --overwrite"
            raise checkpoint.NoCheckpointError(f"--resume: {self.directory} has no checkpoint left. {fix}.")
        else:
            print(f"{self.directory}: the run there was stopped before its first checkpoint; starting over")
        return False

    def require_same_model(self, saved: Saved, frozen_sha256: str | None, optimizer: str) -> None:
        """Add frozen weights and optimizer to the identity. Raise UserError if they changed since the run began.

        No checkpoint holds frozen weights. The moments of one optimizer mean nothing to another.
        """
        self.identity |= {"frozen weights": frozen_sha256, "optimizer": optimizer}
        if saved.path:
            self._require_same_run(saved.content["identity"])

    # From the first write to the last word

    def start(self, saved: Saved, num_steps: int) -> RunLog:
        """Make the directory this run's own and open its log. The first write of the run."""
        logs = [NoLog()]
        self.world.on_main(lambda: logs.append(self._start(saved, num_steps)))
        return logs[-1]

    def restore(
        self,
        saved: Saved,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        data: Any,
    ) -> None:
        """Load the checkpoint, if there is one."""
        if saved.path:
            moments = make_moments(model, optimizer, saved.content["moments"])
            checkpoint.load_tensors(saved.path / "weights", trained_weights(model), self.world)
            checkpoint.load_tensors(saved.path / "optimizer", moments, self.world)
            data.restore(saved.content["shards"])
            scaler.load_state_dict(saved.content["scaler"])
            print(f"resuming from {saved.path} at step {saved.state.step}")

    def finish(self, state: TrainState, log: RunLog, signaled: int | None) -> None:
        """Mark the run as finished and print the result. Exit with the code ``signaled`` if a signal came meanwhile."""
        if self.world.is_main:
            first, *_ = evaluations(self.directory)
            log.close()
            mark_finished(self.directory)
            before, after = (torch.tensor(loss, dtype=torch.float64).exp() for loss in (first["loss"], state.best_loss))
            print(f"held-out perplexity {before:.2f} before, {after:.2f} after (step {state.best_step})")
            if state.best_loss >= first["loss"]:
                warn("training did not improve on the model it started from. Use another --learning_rate.")
        if signaled:  # everything is saved, and an upload may take long
            sys.exit(signaled)
        if self.world.is_main:
            self._finish()

    def _start(self, saved: Saved, num_steps: int) -> RunLog:
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._resumes:
            atomic.lock_directory(self.directory)
            if self._check_directory() and not self._exists:
                fix = "Use another directory"
                raise UserError(f"--output_dir {self.directory}: another run was made there meanwhile. {fix}.")
        if not saved.path:
            remove_run(self.directory)
        log = RunLog(self.directory, saved.state, num_steps)
        made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
        text = yaml.safe_dump(self._given(), sort_keys=False, allow_unicode=True)
        atomic.write_file(self.directory / "config.yaml", f"# made with {made_with}\n{text}")
        return log

    def _finish(self) -> None:
        """Upload if asked to, and print the paths of model and curves."""
        model = self.directory / "model"
        if self.config.push_to_hub:
            print(f"uploaded  {push(model, self.config.push_to_hub)}")
        print_paths(self.directory)

    def _check_directory(self) -> bool:
        """Return whether the directory holds a run. Raise UserError if a new one must not go there."""
        path, config = self.directory, self.config
        if path.is_symlink():
            raise UserError(f"--output_dir {path}: is a symbolic link. Pass its target: {os.readlink(path)}.")
        there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        require(there.is_dir(), f"--output_dir {path}: {there} is a file. Pass a directory.")
        require(os.access(there, os.W_OK), f"--output_dir {path}: {there} is read-only. Pass another directory.")
        present = [name for name in RUN_CONTENT if os.path.lexists(path / name)]
        is_run = "metrics.jsonl" in present or any((path / "checkpoints").glob(f"step-*/{checkpoint.MANIFEST}"))
        if present and not is_run:  # --overwrite must never delete the files of others
            raise UserError(f"--output_dir {path}: holds {', '.join(present)}, but no run. Pass another directory.")
        if present and not (config.resume or config.overwrite or config.dry_run):
            fix = "Pass --resume to go on, --overwrite to delete it, or another directory"
            raise UserError(f"--output_dir {path}: holds another run. {fix}.")
        if present and config.overwrite:
            self._require_sources_elsewhere()
        return bool(present)

    def _require_sources_elsewhere(self) -> None:
        """Raise UserError if --overwrite would delete a path among the settings, such as the model to start from."""
        content = {(self.directory / name).resolve() for name in RUN_CONTENT}
        for name, given in self.settings.items():
            for value in map(str, given if isinstance(given, list) else [given]):
                paths = glob.glob(value, recursive=True) or glob.glob(value.rpartition(":")[0], recursive=True)
                for path in map(Path.resolve, map(Path, paths)):  # the second glob: a source of --mix with its weight
                    inside = f"--{name} {value}: lies in --output_dir {self.directory}, which --overwrite deletes"
                    require(content.isdisjoint([path, *path.parents]), f"{inside}. Use another --output_dir.")

    def _given(self) -> dict[str, Any]:
        """Return the settings that have a value."""
        return {key: value for key, value in self.settings.items() if value not in (None, [])}

    def _recorded(self) -> dict[str, Any]:
        """Return the settings in config.yaml."""
        path = self.directory / "config.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _is_done(self) -> bool:
        """Return whether the run that is there is finished and has these settings. Its directory may have moved."""
        same = self._recorded() | {"output_dir": self.config.output_dir} == self._given()
        return same and finished_step(self.directory) > 0

    def _require_same_on_all_ranks(self, mine: dict[str, Any]) -> None:
        different = [name for name, value in self.world.broadcast(mine).items() if mine.get(name) != value]
        fix = "Pass the same command, and use the same files, on all nodes"
        self.world.on_all(lambda: require(not different, f"{', '.join(different)}: differs from rank 0. {fix}."))

    def _require_same_run(self, before: dict[str, Any]) -> None:
        for name in [name for name in before if name in self.identity]:  # another transformers may know other settings
            if before[name] != self.identity[name] and name not in ("model's transformers_version", "model's dtype"):
                was, now = (str(value)[:60] for value in (before[name], self.identity[name]))
                fix = f"Pass the value of {self.directory}/config.yaml, another --output_dir, or --overwrite"
                raise UserError(f"--resume: {name} was {was} and is now {now}, so this is another run. {fix}.")

    def _note_changes(self, before: dict[str, Any]) -> None:
        for name in SHAPING:
            now = self.settings[name]
            if before.get(name, now) != now:
                print(f"note: --{name} was {before[name]} and is {now} from here on")


def remove_run(run_dir: Path) -> None:
    """Delete a run. If the process dies half-way, the next start finds no checkpoint and begins from scratch."""
    atomic.remove(run_dir / "checkpoints")
    atomic.write_file(run_dir / "metrics.jsonl", "")
    for name in RUN_CONTENT:
        atomic.remove(run_dir / name)
