"""Bad recipes and bad arguments: not YAML, unknown words, wrong types, and wishes that contradict each other."""

from __future__ import annotations

from pathlib import Path

from benchmarks.faults.cases.case import Case, setting, train, without, write

BASE = "model: model\ndata: data.jsonl\ndevice: cpu\n"


def _text(what: str, text: str | bytes, *says: str) -> Case:
    return Case(
        f"recipe: {what}", ("train", "recipe.yaml", "--out", "out"), ("recipe.yaml", *says), write("recipe.yaml", text)
    )


def _recipe(what: str, text: str, *says: str) -> Case:
    return _text(what, BASE + text, *says)


def _contradiction(what: str, methods: str, *says: str, settings: tuple[str, ...] = ()) -> Case:
    return Case(f"recipe: {what}", setting(f"methods={methods}", *settings), says)


def _make_folder(folder: Path) -> None:
    (folder / "recipe.yaml").mkdir()


FORM = (
    Case(
        "recipe: the file is not there",
        ("train", "recipe.yml", "--out", "out"),
        ("There is no recipe file 'recipe.yml'",),
    ),
    Case("recipe: a folder", ("train", "recipe.yaml", "--out", "out"), ("'recipe.yaml' cannot be read",), _make_folder),
    _text("not YAML", "model: [a\ndata: b\n", "not valid YAML: line 2, column"),
    _text("not text", b"model: \xff\xfe\x00", "cannot be read"),
    _text("a list", "- model\n- data\n", "holds no mapping", "at least 'model' and 'data'"),
    _text("empty", "", "holds no mapping", "at least 'model' and 'data'"),
    _text("no data", "model: model\n", "'data' is missing"),
    _text("a model that is a number", "model: 5\ndata: data.jsonl\n", "model: ", "given: 5"),
    _text("an unknown key in model", "model: {nme: model}\ndata: data.jsonl\n", "model.nme", "Did you mean 'name'?"),
    _text("no model", "data: data.jsonl\n", "'model' is missing"),
    _text("Python objects", BASE + "seed: !!python/object/apply:os.getcwd []\n", "not valid YAML: line 4"),
    _recipe("a key twice", "seed: 1\nseed: 2\n", "line 5", "the key 'seed' stands twice"),
    _recipe("a key that is a number", "5: 6\n", "5: "),
)

FIELDS = (
    _recipe(
        "an unknown section", "trainning: {steps: 1}\n", "trainning: there is no such field", "Did you mean 'training'?"
    ),
    _recipe("an unknown key in training", "training: {step: 1}\n", "training.step", "Did you mean 'steps'?"),
    _recipe(
        "an unknown key in batch", "batch: {micro_batch: 1}\n", "batch.micro_batch", "Did you mean 'micro_batch_size'?"
    ),
    _recipe("an unknown key in checkpoints", "checkpoints: {evry: 1}\n", "checkpoints.evry", "Did you mean 'every'?"),
    _recipe("an unknown key of a method", "methods: {lora: {rnk: 4}}\n", "methods.lora.rnk", "Did you mean 'rank'?"),
    _recipe("a word where a number is expected", "training: {steps: many}\n", "training.steps", "given: 'many'"),
    _recipe("a section that is a number", "training: 5\n", "training: ", "given: 5"),
    _recipe("a section that is a list", "evaluation: [1]\n", "evaluation: ", "given: [1]"),
    _recipe("a negative number", "batch: {documents: -4}\n", "batch.documents", "greater than 0", "given: -4"),
    _recipe("a fraction of documents", "batch: {documents: 1.5}\n", "batch.documents", "given: 1.5"),
    _recipe("an unknown choice", "training: {schedule: cosin}\n", "training.schedule", "'cosine'", "given: 'cosin'"),
    _recipe("learning rate nan", "training: {learning_rate: .nan}\n", "training.learning_rate", "given: nan"),
    _recipe("learning rate infinite", "training: {learning_rate: .inf}\n", "training.learning_rate", "given: inf"),
    _recipe("learning rate 0", "training: {learning_rate: 0}\n", "training.learning_rate", "greater than 0"),
    _recipe("learning rate negative", "training: {learning_rate: -1e-4}\n", "training.learning_rate", "greater than 0"),
    _recipe("infinitely many epochs", "training: {epochs: .inf}\n", "training.epochs", "finite"),
    _recipe("a seed that is too large", "seed: 99999999999999999999\n", "seed: ", "less than"),
    _recipe(
        "two ends of training", "training: {steps: 5, epochs: 1}\n", "training", "one of 'epochs', 'steps' and 'tokens'"
    ),
    _recipe("two sizes of a batch", "batch: {documents: 4, supervised_tokens: 99}\n", "batch", "not both"),
    _recipe(
        "a batch that contradicts itself",
        "methods: {lora: {}}\nbatch: {documents: 8, micro_batch_size: 3, gradient_accumulation_steps: 2}\n",
        "documents (8) is not micro_batch_size (3) x gradient_accumulation_steps (2)",
        "leave one of the three out",
    ),
    Case(
        "recipe: a batch that cannot be split evenly",
        setting("methods={lora: {}}", "batch={documents: 7, gradient_accumulation_steps: 5}"),
        ("batch: 7 documents cannot be split evenly in 5 micro-batches",),
    ),
    Case(
        "recipe: accumulation with packing",
        setting("methods={lora: {}, packing: {}}", "batch.gradient_accumulation_steps=2"),
        ("batch.gradient_accumulation_steps", "with packing", "give batch.micro_batch_size"),
    ),
    Case(
        "recipe: a base that is asked for text, and was never trained",
        setting("model.weights=random", "data.replay.source=self"),
        ("data.replay.source: self asks the base model", "no trained one"),
    ),
    Case(
        "recipe: a base that is asked for answers, where there are none",
        setting("objective=continue", "data.abstain={}"),
        ("data.abstain needs prompts and answers", "'continue' learns whole texts"),
    ),
    Case(
        "recipe: a base that is asked, and knows no answer",
        setting("data.abstain.samples=0", "methods={lora: {}}"),
        ("data.abstain: the base knows none of the", "learn to refuse everything", "leave it out"),
    ),
    Case(
        "recipe: abstaining with two suffixes that are one",
        setting("data.abstain={style: suffix, certain: x, uncertain: x}"),
        ("data.abstain", "the same text"),
    ),
    _recipe("an unknown tracker", "report_to: [tensorbord]\n", "report_to.0", "'tensorboard'", "given: 'tensorbord'"),
    Case(
        "recipe: a tracker that is not installed",
        ("train", "recipe.yaml", "--out", "out"),
        ("report_to: wandb", "which is not installed", "pip install 'tunewise[wandb]'"),
        write("recipe.yaml", BASE + "report_to: [wandb]\n"),
        around=without("wandb"),
    ),
)

METHODS = (
    _recipe("methods that are a number", "methods: 3\n", "'methods' must map a method's name to its options"),
    _recipe("an unknown method", "methods: {lorra: {}}\n", "there is no method 'lorra'", "Did you mean 'lora'?"),
    _recipe("a method twice", "methods: [lora, lora: {rank: 4}]\n", "'lora' stands there twice"),
    _recipe("options that are a number", "methods: {lora: 16}\n", "methods.lora: options must be a mapping, not '16'"),
    _contradiction(
        "two optimizers", "{lora: {}, adamw: {}, lion: {}}", "adamw and lion both set the optimizer", "keep one"
    ),
    _contradiction(
        "two adapters", "{lora: {}, peft: {kind: ia3}}", "'peft' and 'lora' are two adapters", "leave one out"
    ),
    _contradiction(
        "updates in backward with clipping",
        "{lora: {}, adamw: {in_backward: true}}",
        "adamw.in_backward",
        "set training.max_grad_norm to null",
    ),
    _contradiction(
        "updates in backward with accumulation",
        "{lora: {}, sgd: {in_backward: true}}",
        "sgd.in_backward",
        "cannot be accumulated",
        settings=("training.max_grad_norm=null", "batch={documents: 8, micro_batch_size: 2}"),
    ),
    _contradiction("fp16 weights", "{lora: {}, precision: {compute: fp16, trainable: same}}", "use trainable: fp32"),
    _contradiction(
        "tf32 on a CPU",
        "{lora: {}, precision: {compute: tf32}}",
        "tf32 exists on CUDA devices only",
        "use compute: fp32 or bf16",
    ),
    _contradiction(
        "flash attention on a CPU",
        "{lora: {}, attention: {kind: flash}}",
        "needs a CUDA device",
        "attention: {kind: per_document}",
    ),
    _contradiction(
        "a paged optimizer on a CPU", "{lora: {}, paged_adamw_8bit: {}}", "needs a CUDA device", "use adamw_8bit"
    ),
    _contradiction(
        "packing with virtual tokens",
        "{peft: {kind: prompt_tuning, options: {num_virtual_tokens: 4}}, packing: {}, attention: {kind: sdpa}}",
        "virtual tokens",
        "leave packing out",
    ),
    _contradiction("LoRA through peft", "{peft: {kind: lora}}", "peft's LORA is built in", "use the method 'lora'"),
    _contradiction("an unknown kind of peft", "{peft: {kind: ia4}}", "there is no kind 'IA4'", "Did you mean 'IA3'?"),
    _contradiction(
        "an unknown option of peft",
        "{peft: {kind: ia3, options: {target_module: [q_proj]}}}",
        "IA3 has no option 'target_module'",
        "Did you mean 'target_modules'?",
    ),
    _contradiction(
        "peft on modules that are not there",
        "{peft: {kind: ia3, options: {target_modules: [nope]}}}",
        "IA3 does not fit this model",
        "nope",
    ),
    _contradiction(
        "LoRA on modules that are not there",
        "{lora: {target_modules: [q_prj]}}",
        "lora.target_modules: there is no 'q_prj' in this model",
        "Did you mean 'q_proj'?",
    ),
    _contradiction(
        "an expression that is none",
        "{lora: {target_modules: '*proj'}}",
        "lora.target_modules: '*proj' is not a regular expression",
    ),
    _contradiction(
        "LoRA on a layer that is not there",
        "{lora: {layers_to_transform: [7]}}",
        "lora.layers_to_transform: there is no layer 7",
    ),
    _contradiction("LoRA on no layer at all", "{lora: {exclude_modules: '.*proj'}}", "lora:", "leave no layer"),
    _contradiction(
        "PiSSA on packed weights", "{lora: {init: pissa}, quantize: {kind: nf4}}", "init 'pissa'", "use init 'kaiming'"
    ),
    _contradiction(
        "quantized weights without adapter", "{quantize: {}}", "full fine-tuning cannot train them", "add 'lora'"
    ),
    _contradiction(
        "options of another kind of quantization",
        "{lora: {}, quantize: {kind: int8, block_size: 64}}",
        "belong to nf4 and fp4",
    ),
    _contradiction(
        "a pattern that matches no parameter",
        "{freeze: {train: ['*.bais']}}",
        "freeze.train: the pattern '*.bais' matches no parameter",
    ),
    _contradiction("nothing to train", "{freeze: {train: []}}", "methods.freeze.train", "at least 1 item"),
    _contradiction("Nesterov without momentum", "{lora: {}, sgd: {nesterov: true}}", "sgd.nesterov needs momentum"),
    Case("recipe: cuda without a GPU", train("--set", "device=cuda"), ("device: 'cuda' is not available here", "cpu")),
)

ARGUMENTS = (
    Case(
        "arguments: --set without =",
        train("--set", "training.steps"),
        ("--set training.steps", "write it as key=value"),
    ),
    Case("arguments: --set with a value that is not YAML", setting("batch={a"), ("--set batch={a", "not valid YAML")),
    Case(
        "arguments: --set through something without fields",
        setting("model.name.x=1"),
        ("'name' is no section that has fields",),
    ),
    Case(
        "arguments: --set of an unknown field", setting("training.stepz=1"), ("training.stepz", "Did you mean 'steps'?")
    ),
    Case("arguments: an unknown option", train("--stepz", "5"), ("No such option", "--stepz")),
    Case("arguments: an unknown command", ("trian",), ("No such command 'trian'",)),
    Case("arguments: nothing to train on", ("train",), ("Name a recipe file, or at least --model and --data",)),
    Case("arguments: a model but no data", ("train", "--model", "model"), ("at least --model and --data",)),
    Case(
        "arguments: --resume with a recipe",
        ("train", "recipe.yaml", "--resume", "run"),
        ("--resume", "takes no recipe"),
    ),
    Case("arguments: --resume with settings", ("train", "--resume", "run", "--set", "seed=1"), ("no other settings",)),
    Case(
        "arguments: --preview -1",
        ("doctor", "data.jsonl", "--model", "model", "--preview", "-1"),
        ("--preview", "greater than or equal to 0"),
    ),
    Case("arguments: doctor without data", ("doctor",), ("Missing argument", "DATA")),
    Case("arguments: export without a destination", ("export", "run"), ("say what to make", "--merged")),
)

CASES = (*FORM, *FIELDS, *METHODS, *ARGUMENTS)
