"""Save checkpoints, and the model with the best evaluation loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cli.errors import UserError
from training import checkpoint
from training.log import RunLog, evaluations
from training.model_card import model_card
from training.monitor import StepMonitor, memory_advice
from training.run import Run
from training.state import TrainState, training_state


class Checkpointer:
    """Save checkpoints/step-N: tensors, state, and the settings that `--resume` compares.

    All ranks call `save`; rank 0 writes.
    """

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

    def is_due(self, save_every: int) -> bool:
        """Return whether a periodic save is due: not at the step at which this process began."""
        return self.state.step % save_every == 0 and self.state.step > self._first_step

    @contextmanager
    def saving_if_text_fails(self) -> Iterator[None]:
        """Save before an error of streamed text, such as a lost connection, ends a run of one process."""
        try:
            yield
        except UserError:
            if self._run.world.size == 1:  # other ranks would not come to save
                self.save()
            raise

    @memory_advice("out of memory in a save", "Run again with --resume when other programs have freed memory")
    def save(self) -> None:
        """Save the state after the last step. Raise NonFiniteError or SaveError instead of a bad checkpoint."""
        self._monitor.check()
        self.log.sync()
        world, directory = self._run.world, self._run.directory / "checkpoints"
        path = directory / f"step-{self.state.step:06}"
        tensors = training_state(self._model, self._optimizer, world)
        data_states = world.gather(self._data.state(world.rank, world.size))

        def write() -> None:
            data_state, data_tensors = self._data.joined(data_states)
            state = {
                "train_state": self.state.to_json(),
                "data": data_state,
                "scaler": self._scaler.state_dict(),
                "identity": self._run.identity,
                "settings": self._run.settings,
                "compiled": self._model.is_compiled,
            }
            checkpoint.save(path, tensors | data_tensors, state)
            checkpoint.prune(directory, self._run.config.keep_checkpoints, path)

        world.on_main(write)


class BestModel:
    """Keep in model/ the weights with the best evaluation loss, or with --keep last those of the last evaluation."""

    def __init__(self, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]):
        self._run, self._model, self._tokenizer, self._facts = run, model, tokenizer, facts

    def save_if_better(self, state: TrainState, loss: float) -> None:
        """Save the model, but never at step 0: it would be the one that training started from."""
        is_better = self._run.config.keep == "last" or state.best_step is None or loss < state.best_loss
        if state.step and is_better:
            model = self._run.world.full_model(self._model)
            self._run.world.on_main(lambda: self._save(model))
            state.best_step, state.best_loss = state.step, loss

    def write_card(self) -> None:
        """Write the model card with all evaluations."""
        self._card().save(self._run.directory / "model" / "README.md")

    def _card(self) -> Any:
        return model_card(self._run.settings, self._facts, evaluations(self._run.directory))

    def _save(self, model: PreTrainedModel) -> None:
        def write(directory: Path) -> None:
            model.save_pretrained(directory)
            self._tokenizer.save_pretrained(directory)
            self._card().save(directory / "README.md")

        num_bytes = 4 * model.num_parameters(only_trainable=bool(self._run.config.lora_rank))
        checkpoint.write_directory(self._run.directory / "model", write, num_bytes)
