"""What was chosen and why, in three sentences."""

from __future__ import annotations

from tunewise.lab.tuning import Tuning
from tunewise.units import format_bytes, format_seconds


def headline(tuning: Tuning) -> tuple[str, ...]:
    """Return the sentences: the batch, the methods, and what that comes to."""
    return (_batch(tuning), _methods(tuning), _whole(tuning))


def _batch(tuning: Tuning) -> str:
    found = tuning.batch
    if found is None:
        return f"The batch was not studied: {tuning.place.batch_tokens:,} supervised tokens a step, as the recipe says."
    documents = f"about {found.documents:.0f} records" if found.documents >= 1.5 else "about one record"
    others = [batch for batch in found.undecided if batch != found.chosen_tokens]
    rate = f"learning rate {found.learning_rate:.2g}"
    said = f"Batch: {found.chosen_tokens:,} supervised tokens a step ({documents}), {rate}"
    if others:
        listed = ", ".join(f"{batch:,}" for batch in others)
        return f"{said}: the cheapest that cannot be told from the best ({listed} tokens do as well within the noise)."
    return f"{said}: the lowest validation loss at equal tokens."


def _methods(tuning: Tuning) -> str:
    found = tuning.methods
    if found is None:
        return "The methods were not studied: they are those of the recipe."
    chosen = next((trial for trial in found.trials if trial.label == found.chosen), None)
    if chosen is None or chosen.step_seconds is None or chosen.peak_tensor_bytes is None:
        return f"Methods: {found.chosen}."
    said = f"Methods: {found.chosen}, {format_seconds(chosen.step_seconds.middle)} a step"
    if found.cumulative_time is not None:
        said += f", {1 / found.cumulative_time.whole.middle:.1f} times as fast as without any"
    return f"{said}, in {format_bytes(chosen.peak_tensor_bytes)} of tensors."


def _whole(tuning: Tuning) -> str:
    seconds = tuning.run_seconds(tuning.base.batch.supervised_tokens or tuning.place.batch_tokens)
    price = tuning.options.price_per_hour
    cost = "" if price is None else f" and {price * seconds / 3600:.2f} in money"
    spent = tuning.laboratory.spent_seconds
    return (
        f"The whole training takes about {format_seconds(seconds)}{cost}; finding out took "
        f"{format_seconds(spent)} in {sum(each.num_trials for each in tuning.laboratory.spent.values())} trials."
    )
