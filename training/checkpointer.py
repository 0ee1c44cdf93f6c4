"""Save checkpoints, and the model with the best evaluation loss."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cli.errors import UserError
from distributed.parallel import full_tensor, reshard
from distributed.saving import FILE_SIZE, save_sharded
from modeling.adapters import adapter_of, save_adapter
from training import atomic, checkpoint
from training.log import EVALUATION, RunLog, evaluations
from training.model_card import model_card
from training.monitor import StepMonitor, memory_advice
from training.run import Run
from training.state import TrainState, describe, moments, trained_weights

SAVE_MEMORY = memory_advice("out of memory in a save", "Run again with --resume when other programs have freed memory")


class Checkpointer:
    """Save checkpoints/step-N: tensors, state, and the settings that `--resume` compares. All ranks call its methods.

    ``in_background`` is on with CUDA. `start_save` then returns after it has copied the tensors to host memory, and a
    thread writes them. A CPU has neither the memory nor the idle cores for that.
    """

    _path: Path | None = None  # of the current save

    def __init__(
        self,
        run: Run,
        state: TrainState,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        data: Any,
        log: RunLog,
        monitor: StepMonitor,
    ):
        self.state, self.log = state, log
        self._run, self._model, self._optimizer, self._scaler = run, model, optimizer, scaler
        self._data, self._monitor, self._first_step = data, monitor, state.step
        self.in_background = model.device.type == "cuda"
        self._decay_step = run.phases[1] if run.config.schedule == "wsd" else None
        monitor.before_error = self.wait

    def is_due(self, save_every: int) -> bool:
        """Return whether a save is due: not at the step at which this process began.

        With --schedule wsd a save is due before the learning rate falls. It is kept, so that the run can be extended.
        """
        is_due = self.state.step % save_every == 0 or self.state.step == self._decay_step
        return is_due and self.state.step > self._first_step

    @contextmanager
    def saving_if_text_fails(self) -> Iterator[None]:
        """Save before an error of streamed text, such as a lost connection, ends a run of one process.

        The user may correct the text before the run resumes, so its identity is left out.
        """
        try:
            yield
        except UserError:
            if self._run.world.size == 1:  # other ranks do not know of the error and would not save
                self._run.identity.pop("training text")
                self.save()
            raise

    def save(self) -> None:
        """Save the state after the last step. Raise NonFiniteError or SaveError instead of a bad checkpoint."""
        self.start_save(in_background=False)
        self.wait()

    @SAVE_MEMORY
    def start_save(self, in_background: bool = True) -> None:
        """Save, or start a save in the background if `in_background` is on. Complete an earlier save first."""
        self.wait()
        self._monitor.check()
        self.log.sync()
        world, path = self._run.world, self._run.directory / f"checkpoints/step-{self.state.step:06}"
        tensors = {"weights": trained_weights(self._model), "optimizer": moments(self._model, self._optimizer)}
        shards = dict(chain(*map(dict.items, world.on_all(partial(self._data.state, world.rank, world.size)))))
        state = {
            "train_state": self.state.to_json(),
            "moments": describe(tensors["optimizer"]),
            "shards": [shards[s] for s in sorted(shards)],  # of streamed text
            "scaler": self._scaler.state_dict(),
            "identity": self._run.identity,
            "settings": self._run.settings,
            "compiled": self._model.is_compiled,
            "phases": self._run.phases,
            "machine": self._run.machine,
            "is_one_command": self._run.is_one_command,
        }
        steps = checkpoint.start_save(path, tensors, state, world, in_background and self.in_background)
        self._written = next(steps, None)
        self._path, self._steps = path, steps
        if not self._written:
            self.wait()

    def complete_if_written(self) -> None:
        """Complete a save in the background if the threads of all ranks have ended. Called between two steps."""
        if self._path and not self._run.world.union([] if self._written.done() else [0]):
            self.wait()

    @SAVE_MEMORY
    def wait(self) -> None:
        """Complete the current save, if there is one. Raise SaveError if it failed."""
        path, self._path = self._path, None
        if path:
            next(self._steps, None)
            keep = self._run.config.keep_checkpoints
            self._run.world.on_main(lambda: checkpoint.prune(path.parent, keep, path, self._decay_step))


class BestModel:
    """Keep in model/ the weights with the best evaluation loss, or with --keep last the weights of the last evaluation.

    evaluation.json holds their step and loss.
    """

    def __init__(self, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]):
        self._run, self._model, self._tokenizer, self._facts = run, model, tokenizer, facts

    def save_if_better(self, state: TrainState, loss: float) -> None:
        """Save the model, but never at step 0: that is the model that training started from."""
        if not state.step:
            return
        is_better = self._run.config.keep == "last" or state.best_step is None or loss < state.best_loss
        state.evaluations_since_best = 0 if is_better else state.evaluations_since_best + 1
        if is_better:
            self._save({"step": state.step, "loss": loss})
            state.best_step, state.best_loss = state.step, loss

    def write_card(self) -> None:
        """Write the model card with all evaluations and the SHA-256 of the weights."""
        model = self._run.directory / "model"
        weights = {path.name: checkpoint.sha256(path) for path in sorted(model.glob("*.safetensors"))}
        self._card(weights).save(model / "README.md")

    def _card(self, weights: dict[str, str] | None = None) -> Any:
        run = self._run
        return model_card(
            run.settings, run.changed, self._facts, evaluations(run.directory), weights or {}, run.is_one_command
        )

    @SAVE_MEMORY
    def _save(self, evaluation: dict[str, float]) -> None:
        model, world = self._model, self._run.world
        path, temporary = atomic.real_paths(self._run.directory / "model")
        num_bytes = 4 * model.num_parameters(only_trainable=bool(self._run.config.lora_rank))

        def write(directory: Path) -> None:
            if world.shards:
                save_sharded(model, directory, full_tensor, writes=True)
            elif adapter_of(model):
                save_adapter(model, directory)
            else:
                model.save_pretrained(directory, max_shard_size=FILE_SIZE)
            self._tokenizer.save_pretrained(directory)
            self._card().save(directory / "README.md")
            (directory / EVALUATION).write_text(json.dumps(evaluation), encoding="utf-8")

        def save() -> None:
            with atomic.saving(path, num_bytes):
                if world.is_main:
                    write(temporary)
                    atomic.put(temporary, path)
                elif world.shards:
                    save_sharded(model, path, full_tensor, writes=False)

        reshard(model)
        try:
            world.on_main(lambda: atomic.begin(path, num_bytes))
            world.on_all(save)
        finally:
            if world.is_main:
                atomic.end(path, num_bytes)
