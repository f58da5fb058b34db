"""Options of lm-eval and of other tools, and their names here. Nothing here imports torch.

`rewritten` works on words of the command line, `translate` on options by name, as in run.yaml and `evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dart_eval.sweep import values
from dart_eval.sweep.options import DEFAULTS, option_of, typed
from dart_eval.sweep.values import short_repr
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.text import LENGTHS, Json

# Other names of options, accepted without a note.
SYNONYMS = {
    "apply_chat_template": "chat_template", "output_path": "output", "overwrite": "force", "rerun": "force",
    "dry_run": "plan", "methods": "method", "sparsities": "sparsity", "models": "model", "rows": "row",
    "prompt_length": "prompt", "prompt_tokens": "prompt", "max_new_tokens": "tokens",
}  # fmt: skip
SHORT = {
    "-t": "--tasks", "-M": "--model", "-m": "--model", "-a": "--model-args", "-b": "--batch-size", "-o": "--output",
    "-f": "--num-fewshot", "-L": "--limit", "-C": "--config", "-v": "--verbosity", "-s": "--log-samples",
    "-c": "--use-cache", "-w": "--write-out", "-x": "--predict-only", "-E": "--samples", "-q": "--quiet",
}  # fmt: skip
# Options of lm-eval that are always on here. True: a value follows.
NEEDLESS = {"--log-samples": False, "--resume": False, "--check-integrity": False, "--cache-requests": True}
ANSWERS = {
    "--use-cache": "finished work is always kept in --output: leave it out",
    "--predict-only": "every run scores; generated texts are in --output: `dart_eval.samples` reads them",
    "--write-out": "prompts and answers are in --output: `dart-eval report` shows them",
    "--show-config": "every record in --output has its configuration",
    "--samples": "give --limit N: the first N items",
    "--max-batch-size": "--batch-size auto takes what fits",
    "--hf-hub-log-args": "`dart-eval export` writes files as lm-eval does",
    "--metadata": "set it in a task's YAML file in a folder of --include-path",
    **dict.fromkeys(("--wandb-args", "--wandb-config-args", "--trackio-args"), "docs/recipes.md has a tracker's lines"),
    "--quiet": "progress goes to stderr: add 2>/dev/null",
    **dict.fromkeys(map(option_of, ("tokens", *LENGTHS)), "write --gen-kwargs max_gen_toks=N"),
}
FORMATS = {"--json": "json", "--csv": "csv", "--markdown": "md", "--latex": "tex"}
FORMAT_WORDS = {"latex": "tex", "markdown": "md"}

MODEL_ARGS = {
    "pretrained": "model", "revision": "revision", "dtype": "dtype", "trust_remote_code": "trust_remote_code",
    "max_length": "max_length", "device": "device", "device_map": "device_map", "peft": "peft",
    "enable_thinking": "enable_thinking", "think_end_token": "think_end_token", "tokenizer": "tokenizer",
    "attn_implementation": "attn_implementation", "add_bos_token": "add_bos_token",
}  # fmt: skip
SWITCHES = {  # of model_args that are true or false
    "parallelize": ("device_map", "auto"), "load_in_4bit": ("load_in", "4bit"), "load_in_8bit": ("load_in", "8bit"),
}  # fmt: skip
OF_OTHER_TYPES = ("trust_remote_code", "max_length", "enable_thinking", "add_bos_token")  # than text
FEW_BITS = ("autogptq", "gptqmodel", "gguf_file")
OF_FEW_BITS = "give a checkpoint that is stored in few bits, or write load_in_4bit=true"
BACKENDS = ("hf", "hf-auto", "huggingface")  # lm-eval's names for the models of transformers
OTHER_BACKENDS = (
    "vllm", "sglang", "sglang-generate", "gguf", "ggml", "local-completions", "local-chat-completions", "nemo_lm",
    "openai-completions", "openai-chat-completions", "anthropic", "hf-multimodal", "vllm-vlm", "mamba_ssm", "dummy",
)  # fmt: skip


def spelled(name: str) -> str:
    """Return our name of an option: lm-eval writes underscores, and has other names for some."""
    field = name.replace("-", "_")
    return SYNONYMS.get(field, field).replace("_", "-")


def rewritten(words: Sequence[str]) -> list[str]:
    """Return the words of a command line as its parser knows them.

    `run -t arc hellaswag --json` -> `run --tasks arc,hellaswag --format json`.

    Raises:
        UserError: an option of lm-eval that is missing here, with its counterpart.
    """
    if not words or words[0] not in ("run", "paper", "bench", "tables", "compare", "trace", "ls"):
        return [*words]
    made, rest = [words[0]], [*words[1:]]
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        name = SHORT.get(name, name) if words[0] == "run" else name
        option = option_of(spelled(name[2:]).replace("-", "_")) if name.startswith("--") else name
        if words[0] == "run" and option in NEEDLESS:
            if NEEDLESS[option] and not equals and rest and not rest[0].startswith("-"):
                rest.pop(0)
        elif words[0] == "run" and option in ANSWERS:
            raise UserError(f"there is no {name} here", ANSWERS[option])
        elif option == "--verbosity":
            level = value if equals else rest.pop(0) if rest else ""
            made += ["--verbose"] if level.upper() == "DEBUG" else []
        elif option in FORMATS:
            made += ["--format", FORMATS[option]]
        elif option == "--format" and (value or (rest[0] if rest else "")) in FORMAT_WORDS:
            made += ["--format", FORMAT_WORDS[value or rest.pop(0)]]
        else:
            made.append(f"{option}={value}" if equals else option)
            if words[0] in ("run", "bench") and not equals and _is_list(option):
                made += _joined(rest)
    return made


def _is_list(option: str) -> bool:
    name = option[2:].replace("-", "_")
    return option.startswith("--") and (name == "model_args" or (name in DEFAULTS and typed(name) is list))


def _joined(rest: list[str]) -> Iterator[str]:
    """Take the values of a list from the words behind its option, and yield them as one text with commas."""
    items = []
    while rest and not (rest[0].startswith("-") and len(rest[0]) > 1 and not rest[0][1:2].isdigit()):
        items.append(rest.pop(0))
    if items:
        yield ",".join(item.strip(",") for item in items) if len(items) > 1 else items[0]


def translate(given: Json) -> None:
    """Rename lm-eval's options to ours, in place.

    Raises:
        UserError: one has no counterpart here, or both are given.
    """
    found = [(ours, given.pop(theirs)) for theirs, ours in SYNONYMS.items() if theirs in given and ours in DEFAULTS]
    model_args = values.pairs("model_args", given.pop("model_args", {}))
    backend = given.get("model")
    if backend in OTHER_BACKENDS and not Path(str(backend)).exists():
        name = model_args.get("pretrained", "NAME")
        raise UserError(f"dart-eval runs models with transformers, not {backend}", f"write --model {name}")
    if backend in BACKENDS and not Path(str(backend)).exists():
        if not model_args:
            raise UserError(f"--model {backend} names no model", "give its hub id or folder")
        del given["model"]
    for name, value in model_args.items():
        if name in SWITCHES and value in (True, False):
            found += [SWITCHES[name]] if value else []
        elif name not in MODEL_ARGS:
            remedy = OF_FEW_BITS if name in FEW_BITS else nearest(name, MODEL_ARGS)
            raise UserError(f"model_args {name} is not known here", remedy)
        else:
            own = MODEL_ARGS[name]
            found.append((own, value if own in OF_OTHER_TYPES else str(value)))
    for name, value in found:
        if given.setdefault(name, value) != value:
            raise UserError(
                f"{name} is given twice: {short_repr(given[name])} and {short_repr(value)}", "leave one of them out"
            )
