"""Words that have left the program, each with the nearest word that stays. There are no aliases."""

from __future__ import annotations

from dart_eval.util.errors import UserError

PAGE = "docs/findings.md#retired"
VERSION = "0.3"
METHODS = {
    **dict.fromkeys(("dart-plus", "dart-choice", "preview", "prox", "graded-experts"), "grinqh reads as few bytes"),
    "pop": "griffin is as good", "coreinfer": "griffin is as good",
    "glass": "griffin is as good", "probe": "griffin is as good", "mag-sp": "magnitude is its like",
    "top-p": "oracle-token is the upper bound", "graded-rows": "graded-both is better",
    "graded-layers": "--ffn-bits q4_k is level with it", "oracle-layers": "--ffn-bits q4_k is level with it",
    "bits-by-position": "--ffn-bits q4_k is level with it", "wanda": "wanda-sp leaves out neurons",
    "fewer-experts": "griffin chooses neurons inside experts", "drop-experts": "griffin chooses neurons inside experts",
}  # fmt: skip
SETTINGS = {  # of methods; some have them still
    "score": "a score is a method's own: griffin, static, wanda-sp, magnitude, random", "mask": "griffin or static",
    "choice": "a token's choice is a method: cats, m-countdown, oracle-token",
    "entries": "what is read of columns is a method: teal, wina, grinqh, decdec, graded-both, rounding",
    "compensation": "flap adds the mean output of what it leaves out", "draw": "griffin:draw=sample draws its mask",
    "remask": "dart:allocation=uniform re-masks", "allocation": "dart spreads by depth, flap over all layers",
}  # fmt: skip
VALUES = {"every": "remask=drift", "ends": "allocation=depth", "global": "flap ranks the neurons of all layers"}
OPTIONS = {
    **dict.fromkeys(("log", "log-project"), "dart_eval.records() gives the results to wandb (docs/recipes.md)"),
    "share-prefix": "prefixes are always shared", "read-at-batch": "results/README.md has its page",
    **dict.fromkeys(("calibration-tokens", "calibration-seed"), "cut the file of --calibration"),
    "allocation": "write dart:allocation=NAME", "cue": "write a task of your own for --include-path",
    **dict.fromkeys(("executor", "ray-address"), "--ray ADDRESS runs cells on Ray"),
    "cpus-per-cell": "--gpus-per-cell stays", "tables": "paper makes every table of a file",
    "shards": "give more cells", "compile": "prune() refuses compiled models",
    "explain": "docs/concepts.md explains the columns",
    "save-allocation": "trace --output has the neurons kept in each layer",
    **dict.fromkeys((f"compare --{name}" for name in ("method", "sparsity", "model")), "--row A,B names two rows"),
    "check --force": "delete the file first", "plan": "the run names its cells, and finished ones are skipped",
    "run --format": "tables --format json has every number",
    **dict.fromkeys(("report --title", "report --force"), "a page has its models' names, and replaces the file"),
}  # fmt: skip
VIEWS = {
    "flops": "--view costs has them", "memory": "--view costs has it", "detector": "--view costs has re-masks",
    "frontier": "--save FILE.svg draws it", "time": "the board has the speed",
    "batch": "results/README.md has its page", "all": "--view board, long and costs",
}  # fmt: skip
KINDS = {"method": METHODS, "setting": SETTINGS, "value": VALUES, "option": OPTIONS, "view": VIEWS}


def retired(kind: str, word: str) -> UserError | None:
    """Return the answer to a word that has left; None if it never was one.

    Args:
        kind: "method", "setting" or "value" (of a method), "option" or "view".
        word: as typed, without dashes before an option; of one verb as `compare --model`.
    """
    nearest = KINDS[kind].get(word)
    if nearest is None:
        return None
    numbers = "its numbers: " if kind == "method" else ""
    what = f"the option {word!r}" if kind == "setting" else word
    return UserError(f"{what} left in {VERSION} ({numbers}{PAGE})", nearest)
