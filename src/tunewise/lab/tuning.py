"""The paper's procedure: describe, find the batch size, find the methods, confirm.

`Tuning` holds what is known so far; each of its methods is one part of the procedure and can be called alone. What was
found is written to `findings.json` after every part, so that nothing is lost and a report can be made at any time.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import AutoModelForCausalLM

from tunewise.engine.checkpoint import storage_errors
from tunewise.engine.run_folder import write_whole
from tunewise.errors import DoesNotFit, InputError
from tunewise.lab.arms import RecipeArms, beta2_of, half_life_kept, with_beta2
from tunewise.lab.batch_study import BatchQuestion, BatchStudy
from tunewise.lab.confirm import Candidate, confirm
from tunewise.lab.contributions import method_findings
from tunewise.lab.executor import Executor
from tunewise.lab.factors import FactorSpace, On, factor_space
from tunewise.lab.findings import BatchFindings, Confirmation, MethodFindings
from tunewise.lab.laboratory import Laboratory, Tell
from tunewise.lab.method_study import MethodStudy
from tunewise.lab.micro_batch import choose_micro_batch, throughput_of
from tunewise.lab.outcome import Failed, Measurement, OutOfMemory
from tunewise.lab.storage import Storage
from tunewise.lab.throughput import predict_seconds
from tunewise.lab.trial import Trial
from tunewise.lab.workplace import open_workplace
from tunewise.methods import Packing
from tunewise.recipe import BatchSpec, Recipe, TrainingSpec
from tunewise.units import format_seconds

BATCH_SHARE, METHODS_SHARE, CONFIRM_SHARE = 0.55, 0.35, 0.1
"""Of what may be spent on finding out."""

LEAST_SEARCH_SHARE = 0.2
"""Of the budget at least this part must be left for finding out; else there is nothing to find out with."""

SHORTEST_SEARCH_SECONDS = 120.0
FEWEST_EVALUATED = 32
"""Validation documents of an arm, where there are so many."""

LARGEST_MICRO_BATCH = 64
TIMED_SECONDS = 1.2
"""About how long the timed steps of a trial of methods take together, at the speed of the recipe so far."""

MOST_TIMED = 16


@dataclass(frozen=True)
class Options:
    """What a user asks of a tuning besides the recipe.

    Attributes:
        budget_seconds: for everything, the final training included; None: as long as the training itself takes.
        memory_bytes: use no more than this.
        machine: "here" or the file of a measured machine.
        wanted, unwanted: methods that must or must not be in the result.
        storage: an Optuna URL; None for SQLite in the folder.
        retry_failed: try again what failed before.
    """

    budget_seconds: float | None = None
    memory_bytes: int | None = None
    machine: str = "here"
    price_per_hour: float | None = None
    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    storage: str | None = None
    retry_failed: bool = False


@dataclass
class Tuning:
    """A tuning on its way.

    Attributes:
        recipe: the user's.
        folder: of the tuning.
        trains_at_the_end: whether the budget must also pay for the final training.
        base: the recipe with the best that is known so far.
        speed: supervised tokens to seconds, from measured throughput.
    """

    recipe: Recipe
    options: Options
    folder: Path
    tell: Tell = lambda what, seconds: None
    trains_at_the_end: bool = True
    batch: BatchFindings | None = None
    methods: MethodFindings | None = None
    confirmation: Confirmation | None = None
    winner: On = frozenset()
    _space: FactorSpace | None = None
    _study: MethodStudy | None = None
    _throughput: Measurement | None = None
    _base: Recipe | None = None

    def open(self) -> None:
        """Prepare data, machine, storage and the process that starts trials.

        Raises:
            InputError: recipe, data or options are wrong, or the folder holds another tuning.
        """
        self._refuse_another_tuning()
        self.place = open_workplace(self.recipe, self.folder, self.options.machine, self.options.memory_bytes)
        storage = (
            Storage(self.options.storage, f"{self.folder.name}: ")
            if self.options.storage
            else Storage.in_folder(self.folder)
        )
        is_cpu = self.place.plan.device.type == "cpu"
        model_class = AutoModelForCausalLM._model_mapping[type(self.place.plan.config)]
        self.executor = Executor(self.place.host_bytes if is_cpu else None, preload=[model_class.__module__])
        self.laboratory = Laboratory(
            storage,
            self.executor,
            self.folder / "trials",
            self.place.data_folder,
            self.place.circumstances,
            retry_failed=self.options.retry_failed,
            tell=self.tell,
        )

    def close(self) -> None:
        """End the process that starts trials."""
        executor = getattr(self, "executor", None)
        if executor is not None:
            executor.close()

    @property
    def has_begun(self) -> bool:
        """Whether anything is known that is worth writing."""
        return self._throughput is not None

    @property
    def base(self) -> Recipe:
        """The recipe with what is known so far: the user's, then with the batch, then with the methods."""
        return self._base or self.place.recipe

    def measure_throughput(self) -> None:
        """Time micro-batches of growing size; everything that is planned in seconds comes from this.

        Raises:
            DoesNotFit: not even a single row fits.
        """
        recipe = self.place.recipe
        batch = recipe.batch.model_copy(update={"micro_batch_size": 1})
        rows = self.place.predictor(recipe).load.laid_out(recipe.get(Packing), 1).rows_per_step
        largest = min(LARGEST_MICRO_BATCH, max(2, 2 ** math.ceil(math.log2(rows))))
        trial = Trial.of("throughput", recipe.replace(batch=batch), largest=largest)
        outcome = self.laboratory.run(
            "methods", trial, params={"largest": largest}, role="throughput by micro-batch", expected_seconds=30.0
        )
        if not isinstance(outcome, Measurement) or not outcome.micro_batches:
            reason = outcome.reason if isinstance(outcome, OutOfMemory | Failed) else "no row could be timed"
            raise DoesNotFit(
                f"The recipe cannot run here as it is: {reason}\n  What fits is said by: tunewise plan "
                f"{recipe.model.name} --data {recipe.data.source}"
            )
        self._throughput = outcome
        points, _ = throughput_of(outcome)
        chosen = choose_micro_batch(points, rows, self.place.limit_bytes)
        self._base = recipe.replace(batch=recipe.batch.model_copy(update={"micro_batch_size": chosen.size}))

    def run_seconds(self, batch_tokens: int) -> float:
        """Return what the steps of the whole training take at a batch."""
        return self.place.run_tokens / batch_tokens * self._step_seconds(batch_tokens)

    def search_seconds(self) -> float:
        """Return what may be spent on finding out.

        Raises:
            InputError: the budget is about what the training alone takes.
        """
        training = self.run_seconds(self.place.batch_tokens) if self.trains_at_the_end else 0.0
        budget = self.options.budget_seconds
        if budget is None:
            return max(SHORTEST_SEARCH_SECONDS, self.run_seconds(self.place.batch_tokens))
        left = budget - training
        if left < LEAST_SEARCH_SHARE * budget:
            raise InputError(
                f"--budget: the training alone takes about {format_seconds(training)} of {format_seconds(budget)}, "
                f"which leaves too little to find anything out. Give at least "
                f"{format_seconds(training / (1 - LEAST_SEARCH_SHARE))}, or train with: tunewise train"
            )
        return left

    def study_batch(self, budget_seconds: float) -> None:
        """Find the batch size and its learning rate, then how it passes through the machine."""
        place, recipe = self.place, self.base
        rate = recipe.training.learning_rate
        assert rate is not None, "complete() fills in the learning rate"
        documents = place.batch_tokens / place.supervised_per_document
        evaluated = self._evaluated_documents()
        arms = RecipeArms(
            self.laboratory,
            recipe,
            step_seconds=self._step_seconds,
            overhead_seconds=self._overhead_seconds(evaluated),
            noise_documents=max(1, math.ceil(documents / 3)),
            max_documents=evaluated,
        )
        question = BatchQuestion(
            batch_tokens=place.batch_tokens,
            learning_rate=rate,
            beta2=beta2_of(recipe.methods or ()),
            run_tokens=place.run_tokens,
            document_tokens=place.supervised_per_document,
            budget_seconds=budget_seconds,
            run_seconds=self.run_seconds,
            seed=recipe.seed,
        )
        study = BatchStudy(arms, question)
        verdict = study.answer()
        chosen = verdict.chosen
        tokens = chosen.batch_tokens if chosen else place.batch_tokens
        rate = chosen.learning_rate if chosen else rate
        assert self._throughput is not None
        points, line = throughput_of(self._throughput)
        beta2 = half_life_kept(question.beta2, tokens / question.batch_tokens)
        draft = self._with_batch(tokens, rate, beta2, recipe.batch.micro_batch_size or 1)
        rows = place.predictor(draft).load.laid_out(draft.get(Packing), 1)
        micro = choose_micro_batch(points, rows.rows_per_step, place.limit_bytes)
        self._base = self._with_batch(tokens, rate, beta2, micro.size)
        self.batch = BatchFindings(
            throughput=points,
            line=line,
            noise=study.noise,
            arms=tuple(result.arm for result in study.results),
            curve=verdict.curve,
            seed_noise=verdict.seed_noise,
            tie_band=verdict.tie_band,
            critical_batch=verdict.critical_batch,
            chosen_tokens=tokens,
            documents=tokens / place.supervised_per_document,
            learning_rate=rate,
            beta2=beta2,
            undecided=verdict.undecided,
            micro_batch_size=micro.size,
            num_micro_batches=micro.count,
            micro_batch_reason=micro.reason,
            sentences=verdict.sentences,
        )

    def study_methods(self, budget_seconds: float) -> None:
        """Find the methods, and what each of them contributes."""
        place, recipe = self.place, self.base
        space = factor_space(recipe, place.plan.config, place.machine, place.predictor(recipe))
        step_seconds = self._step_seconds(self._batch_tokens())
        spent = self.laboratory.spent.get("methods")
        study = MethodStudy(
            self.laboratory,
            space,
            place.limit_bytes,
            budget_seconds + (spent.seconds if spent else 0.0),
            step_seconds,
            wanted=frozenset(_factor_names(self.options.wanted)),
            unwanted=frozenset(_factor_names(self.options.unwanted)),
            steps=max(2, min(MOST_TIMED, round(TIMED_SECONDS / step_seconds))),
            max_forgetting=self._max_forgetting,
        )
        study.run()
        self._study, self._space, self.winner = study, study.space, study.winner
        self.methods = method_findings(study)
        self._base = study.space.recipe(study.winner)

    def confirm(self, budget_seconds: float) -> None:
        """Train winner and runner-up with fresh seeds; the runner-up may turn out to be the winner."""
        study = self._study
        assert study is not None, "the methods come first"
        winner = self._candidate(study, study.winner)
        runner_up = None if study.runner_up is None else self._candidate(study, study.runner_up)
        batch = self._batch_tokens()
        # A slow runner-up takes as much longer as its steps did.
        contenders, weight = 1, 1.0
        if study.runner_up is not None:
            contenders, weight = 2, 1.0 + study.tried[study.runner_up].seconds / study.tried[study.winner].seconds
        tokens = max((arm.budget_tokens for arm in self.batch.arms), default=8 * batch) if self.batch else 8 * batch
        overhead = self._overhead_seconds(self.recipe.evaluation.max_documents)
        pace = self.laboratory.pace("batch size")
        per_token = pace * self.run_seconds(batch) / self.place.run_tokens
        affordable = (budget_seconds / 2 - contenders * overhead) / (weight * per_token)
        tokens = int(max(8 * batch, min(tokens, affordable)))
        seconds = weight * tokens * per_token + contenders * overhead
        self.confirmation, swap = confirm(
            self.laboratory,
            winner,
            runner_up,
            budget_tokens=tokens,
            num_seeds=2 if 2 * seconds <= 1.5 * budget_seconds else 1,
            expected_seconds=seconds / contenders / pace,
            tie_band=self.batch.tie_band if self.batch else 0.01,
            max_forgetting=self._max_forgetting,
        )
        if swap and study.runner_up is not None and self.methods is not None:
            self.winner = study.runner_up
            self.methods = self.methods.model_copy(update={"chosen": study.space.label(self.winner)})
            self._base = study.space.recipe(self.winner)

    def best_recipe(self) -> Recipe:
        """Return the recipe that was found, ready to train: the user's, with its batch, rate and methods replaced."""
        return self.base.replace(evaluation=self.recipe.evaluation, checkpoints=self.recipe.checkpoints)

    @property
    def _max_forgetting(self) -> float | None:
        """The recipe's budget of forgetting; None where trials do not measure it."""
        return self.place.recipe.quality.max_forgetting if self.place.measures_forgetting else None

    def _candidate(self, study: MethodStudy, on: On) -> Candidate:
        tried = study.tried[on]
        peak = None if math.isinf(tried.peak_bytes) else int(tried.peak_bytes)
        return Candidate(study.space.label(on), study.space.recipe(on), peak)

    def _with_batch(self, tokens: int, rate: float, beta2: float | None, micro_batch_size: int) -> Recipe:
        """Return the recipe with another batch, at the same number of tokens of the whole training."""
        recipe = self.base
        training = {**recipe.training.model_dump(), "learning_rate": rate}
        if recipe.training.steps is not None:  # steps of another size would be another amount of training
            training |= {"steps": None, "tokens": self.place.run_tokens}
        return recipe.replace(
            batch=BatchSpec(supervised_tokens=tokens, micro_batch_size=micro_batch_size),
            training=TrainingSpec(**training),
            methods=with_beta2(recipe.methods or (), beta2),
        )

    def _batch_tokens(self) -> int:
        return self.base.batch.supervised_tokens or self.place.batch_tokens

    def _seconds_per_supervised_token(self) -> float:
        assert self._throughput is not None, "throughput comes first"
        share = self._supervised_share()
        fastest = max(each.tokens / each.seconds.middle for each in self._throughput.micro_batches)
        return 1 / (fastest * share)

    def _supervised_share(self) -> float:
        corpus = self.place.plan.data.train
        return float(corpus.num_supervised.sum() / corpus.lengths.sum())

    def _step_seconds(self, batch_tokens: int) -> float:
        """Return the seconds of a step: full micro-batches, a last one that is not full, and the update."""
        assert self._throughput is not None, "throughput comes first"
        points, line = throughput_of(self._throughput)
        assert line is not None
        size = self.base.batch.micro_batch_size or 1
        tokens_of_row = points[0].tokens / points[0].micro_batch_size
        rows = batch_tokens / self._supervised_share() / tokens_of_row
        full, rest = divmod(rows, size)
        seconds = full * predict_seconds(line, size) + (predict_seconds(line, rest) if rest > 0 else 0.0)
        return seconds + (line.update_seconds or 0.0)

    def _evaluated_documents(self) -> int:
        """Validation documents of an arm: no more tokens than eight steps of the user's batch learn from."""
        counts = self.place.plan.data.validation.num_supervised[: self.recipe.evaluation.max_documents]
        within = int((counts.cumsum() <= 8 * self.place.batch_tokens).sum())
        return max(1, min(len(counts), max(FEWEST_EVALUATED, within)))

    def _overhead_seconds(self, documents: int) -> float:
        """Start-up, and an evaluation, whose tokens cost a third of learning from them."""
        tokens = float(self.place.plan.data.validation.num_supervised[:documents].sum())
        return 1.0 + tokens * self._seconds_per_supervised_token() / 3

    def _refuse_another_tuning(self) -> None:
        """A folder holds one tuning; the same command continues it."""
        file = self.folder / "tuning.json"
        content = {"recipe": self.recipe.to_mapping(), "options": asdict(replace(self.options, retry_failed=False))}
        text = json.dumps(content, indent=1, sort_keys=True, default=list)
        if file.is_file():
            if json.loads(file.read_text(encoding="utf-8")) != json.loads(text):
                raise InputError(
                    f"'{self.folder}' holds a tuning of another recipe, or with other options. Name another folder "
                    "with --out, or repeat the same command to continue it."
                )
            return
        left_by_a_kill = {f".{file.name}.partial"}
        if self.folder.exists() and {path.name for path in self.folder.iterdir()} - left_by_a_kill:
            raise InputError(f"'{self.folder}' is not empty and holds no tuning; name another folder with --out.")
        with storage_errors(f"cannot write to the tuning's folder {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, text)


def _factor_names(methods: tuple[str, ...]) -> list[str]:
    """Return the factors that the user's names of methods stand for."""
    words = {"supervised_loss": "supervised loss", "precision": "bf16", "quantize": "nf4"}
    return [words.get(name, name) for name in methods]
