"""The directory of a run: its lock, its checkpoint to resume from, its first write and its last output."""

import os
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from cli.errors import UserError, require, warn, without_credentials
from cli.flags import AnyPath, Count, flag
from cli.hub import check_login, push
from distributed.world import World
from modeling.precision import device_name, select_device
from training import atomic, checkpoint
from training.directory import RUN_CONTENT, check_directory, remove_run
from training.log import NoLog, RunLog, evaluations, finished_step, last_step, mark_finished, model_step, print_paths
from training.model_card import versions
from training.state import TrainState, make_moments, trained_weights

# Settings that may change when a run resumes. They change the numbers from that step on.
SHAPING = ("attn_implementation", "compile", "gradient_checkpointing", "keep", "learning_rate", "lora_dropout")
SHAPING += ("max_grad_norm", "max_steps", "num_epochs", "precision", "warmup_steps", "weight_decay")
SHAPING += ("adam_beta2", "min_learning_rate", "schedule")

ONCE = ("resume", "overwrite", "dry_run", "push_to_hub")  # of a command, not settings of the run
HARMLESS = ("output_dir", "log_every", "save_every", "keep_checkpoints", "rank_timeout")  # they change no weight


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
    """A checkpoint, or none. Without one, the state is that of a new run."""

    path: Path | None = None
    state: TrainState = field(default_factory=TrainState)
    content: dict[str, Any] = field(default_factory=dict)  # of its state.json

    @property
    def compiled(self) -> bool | None:
        """Return whether the run was compiled, or None for a new run."""
        return self.content.get("compiled")


class Run:
    """The run in ``config.output_dir``. A new run writes nothing before `start`. Only rank 0 writes and prints."""

    def __init__(self, config: Any, world: World):
        self.config, self.world = config, world
        self.directory = Path(config.output_dir)
        self.is_chat = False  # whether the training text is conversations
        may_restart = world.size > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        wrong = (
            "torchrun --max-restarts: starts this command again when a rank is lost. Pass --resume, not --overwrite."
        )
        require(not may_restart or (config.resume and not config.overwrite), wrong)
        self.settings = {key: without_credentials(value) for key, value in vars(config).items() if key not in ONCE}
        defaults = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(config)}
        self.changed = {key: value for key, value in self.settings.items() if value != defaults[key]}
        self.machine = f"{world}{device_name(select_device())}"
        self.is_one_command = True  # False if it was resumed with other settings
        self._require_same_on_all_ranks(vars(config))
        self._exists = world.on_main(self._find)
        if not config.dry_run:
            checkpoint.require_shared_directory(self.directory, world)
        self._resumes = self._exists and config.resume and not config.overwrite and not config.dry_run
        if config.push_to_hub and not config.dry_run:
            world.on_main(lambda: check_login(config.push_to_hub))

    # The run that exists already

    def is_uploaded(self) -> bool:
        """Upload a finished run with the same settings, if --push_to_hub is given. This needs no text."""
        if not (self._resumes and self.config.push_to_hub and self.world.on_main(self._is_done)):
            return False
        if self.world.is_main:
            atomic.lock_directory(self.directory)
            self._finish()
        return True

    def find_checkpoint(self, identity: dict[str, Any], phases: tuple[int, int, int]) -> Saved:
        """Return the newest intact checkpoint with --resume, or an empty one.

        ``phases`` are the steps at which the warmup ends, the learning rate begins to fall, and the run ends. If a run
        with --schedule wsd is extended, it resumes from before its learning rate fell. Raise UserError if the
        checkpoint belongs to another run: if its ``identity`` differs.
        """
        self._require_same_on_all_ranks(identity)
        self.identity, self.phases = identity, list(phases)
        saved, directory = Saved(), self.directory / "checkpoints"

        def lock() -> int | None:
            atomic.lock_directory(self.directory)
            for name in RUN_CONTENT:  # other files here do not belong to this run
                atomic.remove_partial_writes(self.directory, name)
            atomic.remove_partial_writes(self.directory / "checkpoints", "step-*")
            atomic.remove_partial_writes(self.directory / "model", "README.md")
            return model_step(self.directory)

        if self._resumes:
            kept_step = self.world.on_main(lock)
            saved.path = checkpoint.newest(directory, self.world)
        if saved.path:
            saved.content = checkpoint.load(saved.path)
            _, decay_step, num_steps = saved.content.get("phases", phases)
            is_wsd = self.config.schedule == saved.content["settings"].get("schedule") == "wsd"
            if is_wsd and phases[-1] > num_steps:
                saved.path = checkpoint.newest(directory, self.world, until=decay_step) or saved.path
                saved.content = checkpoint.load(saved.path)
            known = {"moments", "shards"} <= saved.content.keys()
            fix = "Use --overwrite, or another --output_dir"
            require(known, f"--resume: {saved.path} was made by an earlier version of this program. {fix}.")
            self._require_same_run(saved.content["identity"])
            saved.state = TrainState.from_json(saved.content["train_state"])
            if saved.state.best_step != kept_step:  # the run was killed after a later evaluation, or model/ is gone
                held, best = (f"of step {step}" if step else "none" for step in (kept_step, saved.state.best_step))
                warn(f"{self.directory}/model: its weights are {held}, and the best up to the checkpoint are {best}. "
                     "The next evaluation replaces them. Copy them first to keep them.")  # fmt: skip
                saved.state.best_step, saved.state.last_eval_step = None, -1
                saved.state.evaluations_since_best, saved.state.stopped_early = 0, False
        return saved

    def is_finished(self, saved: Saved, num_steps: int) -> bool:
        """Return whether the run is finished or stopped early. If so, print it, and upload if --push_to_hub is given.

        Raise NoCheckpointError if the run got past its first checkpoint and has none left.
        """
        if not self._resumes:
            return False
        done, stopped = self.world.on_main(lambda: finished_step(self.directory)), False
        if saved.path:
            done = saved.state.step if saved.state.last_eval_step == saved.state.step else 0
            stopped = saved.state.stopped_early and saved.state.is_out_of_patience(self.config.patience)
        if done >= num_steps or stopped:
            more = "--patience" if stopped else "--max_steps"
            print(f"{self.directory}: this run is finished ({done} of {num_steps} steps). "
                  f"Pass a larger {more} to train longer, or --overwrite to start over.")  # fmt: skip
            if self.world.is_main:
                mark_finished(self.directory)
                self._finish()
            return True
        if saved.path:
            self._note_changes(saved.content)
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

    # From the first write to the last output

    def start(self, saved: Saved, num_steps: int) -> RunLog:
        """Claim the directory for this run and open its log. This is the first write of the run."""
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
        """Mark the run as finished and print the result. If a signal came, exit with its code ``signaled``."""
        if self.world.is_main:
            first, *_ = evaluations(self.directory)
            log.close()
            mark_finished(self.directory)
            before, after = (torch.tensor(loss, dtype=torch.float64).exp() for loss in (first["loss"], state.best_loss))
            early = f"; stopped early at step {state.step}" if state.stopped_early else ""
            print(f"held-out perplexity {before:.2f} before, {after:.2f} after (step {state.best_step}){early}")
            if state.best_loss >= first["loss"]:
                fix = "Use more text, or another --num_epochs or --learning_rate"
                warn(f"{self.directory}/model: is no better than the model it started from. {fix}.")
        if signaled:  # everything is saved, and an upload may take long
            sys.exit(signaled)
        if self.world.is_main:
            self._finish()

    def _start(self, saved: Saved, num_steps: int) -> RunLog:
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._resumes:
            atomic.lock_directory(self.directory)
            if self._find() and not self._exists:
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
        """Upload if --push_to_hub is given, and print the paths of model and curves."""
        if self.config.push_to_hub:
            print(f"uploaded  {push(self.directory / 'model', self.config.push_to_hub)}")
        print_paths(self.directory, self.is_chat)

    def _find(self) -> bool:
        """Return whether the directory holds a run. Raise UserError if a new run must not go there."""
        config, given = self.config, self.settings if self.config.overwrite else {}
        return check_directory(self.directory, config.resume or config.overwrite or config.dry_run, given)

    def _given(self) -> dict[str, Any]:
        """Return the settings that have a value."""
        return {key: value for key, value in self.settings.items() if value not in (None, [])}

    def _recorded(self) -> dict[str, Any]:
        """Return the settings in config.yaml."""
        path = self.directory / "config.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _is_done(self) -> bool:
        """Return whether the run in the directory is finished and has these settings. The directory may have moved."""
        same = self._recorded() | {"output_dir": self.config.output_dir} == self._given()
        return same and finished_step(self.directory) > 0

    def _require_same_on_all_ranks(self, mine: dict[str, Any]) -> None:
        different = [name for name, value in self.world.broadcast(mine).items() if mine.get(name) != value]
        fix = "Pass the same command, and use the same files, on all nodes"
        self.world.on_all(lambda: require(not different, f"{', '.join(different)}: differs from rank 0. {fix}."))

    def _require_same_run(self, before: dict[str, Any]) -> None:
        for name in [name for name in before if name in self.identity]:  # transformers versions differ in settings
            if before[name] != self.identity[name] and name not in ("model's transformers_version", "model's dtype"):
                was, now = (str(value)[:60] for value in (before[name], self.identity[name]))
                is_hash = name.endswith(" text") and re.fullmatch(r"[0-9a-f]{64}", str(before[name]))
                changed = "has changed" if is_hash else f"was {was} and is now {now}"
                fix = f"Use the text and values of {self.directory}/config.yaml, --overwrite, or another --output_dir"
                raise UserError(f"--resume: {name} {changed}, so this is another run. {fix}.")

    def _note_changes(self, saved: dict[str, Any]) -> None:
        self.is_one_command = saved.get("is_one_command", True) and saved.get("machine") == self.machine
        for name, now in self.settings.items():
            was = saved["settings"].get(name, now)
            if was != now and name in SHAPING:
                print(f"note: --{name} was {was} and is {now} from here on")
            self.is_one_command &= was == now or name in HARMLESS
        (warmup, decay, end), step = self.phases, saved["train_state"]["step"]
        old_warmup, old_decay, old_end = saved.get("phases", self.phases)
        at_peak = max(warmup, old_warmup) <= step <= min(decay, old_decay)
        if (warmup, decay, end) != (old_warmup, old_decay, old_end) and not at_peak and 0 < step < end:
            fix = "Use --schedule wsd and a whole number of --warmup_steps from the start if a run may be made longer"
            warn(f"--max_steps {end}: it was {old_end}, so the learning rate jumps at this step. {fix}.")
