"""A progress bar that says which run it shows and counts its steps, also where it goes on in the middle."""

from lightning.pytorch.callbacks import RichProgressBar


class RunBar(RichProgressBar):
    """Lightning's bar for trainings that are measured in steps, and for what is answered afterwards.

    Args:
        name: What to call the run; None says in which epoch it is.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__(leave=True)
        self._name = name

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch; Lightning's own count leaves out those that a resumed run has done before."""
        trainer = self.trainer
        if trainer.max_epochs != -1 or trainer.max_steps <= 0:
            return super().total_train_batches
        done_before = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, done_before + left)

    @property
    def predict_description(self) -> str:
        """Say what answers."""
        return self._name or super().predict_description

    def _get_train_description(self, current_epoch: int) -> str:
        """Leave out the number of epochs where steps are counted: it would read -2."""
        if self._name is None and self.trainer.max_epochs != -1:
            return super()._get_train_description(current_epoch)
        return self._name or f"Epoch {current_epoch}"
