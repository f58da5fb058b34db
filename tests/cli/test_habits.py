"""What people type who come from lm-eval or elsewhere: it works, or the answer names what to write."""

import argparse

import pytest

from dart_eval.sweep import habits
from dart_eval.sweep.config import RunConfig, configs_from
from dart_eval.sweep.options import DEFAULTS
from dart_eval.util.errors import UserError, nearest
from tests.helpers.commands import command

WORKS = [  # typed after `dart-eval`, and what it means
    ("run --tasks arc hellaswag --limit 4", "run --tasks arc,hellaswag --limit 4"),
    ("run --tasks arc, hellaswag", "run --tasks arc,hellaswag"),
    ("run --tasks arc --tasks hellaswag", "run --tasks arc --tasks hellaswag"),
    ("run --sparsity .5 .7 --method dense griffin", "run --sparsity .5,.7 --method dense,griffin"),
    ("run --model_args a=b c=d", "run --model-args a=b,c=d"),
    ("run -t arc -M m -a pretrained=x -b 4 -o out -f 5 -L 3 -C run.yaml",
     "run --tasks arc --model m --model-args pretrained=x --batch-size 4 --output out --num-fewshot 5 --limit 3 "
     "--config run.yaml"),
    ("run -t arc -s", "run --tasks arc"),
    ("run --log_samples --resume --check_integrity --tasks arc", "run --tasks arc"),
    ("run --cache_requests true --tasks arc", "run --tasks arc"),
    ("run --cache_requests --tasks arc", "run --tasks arc"),
    ("run --verbosity DEBUG", "run --verbose"), ("run --verbosity INFO", "run"),
    ("run --dry-run --overwrite --output_path o", "run --plan --force --output o"),
    ("run --apply_chat_template", "run --chat-template"),
    ("run --json", "run --format json"), ("tables out --json", "tables out --format json"),
    ("tables out --format latex", "tables out --format tex"), ("tables out --markdown", "tables out --format md"),
    ("tables out --format markdown --view long", "tables out --format md --view long"),
    ("compare out --methods a,b --metric all", "compare out --method a,b --metric all"),
    ("compare out --sparsities 0,.5", "compare out --sparsity 0,.5"),
    ("compare out --models a,b --rows x,y", "compare out --model a,b --row x,y"),
    ("trace --max-new-tokens 9", "trace --tokens 9"), ("bench decode --prompt-length 9", "bench decode --prompt 9"),
    ("run --limit -1", "run --limit -1"), ("run --tasks=arc --limit=4", "run --tasks=arc --limit=4"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "meant"), WORKS)
def test_other_spellings_work(typed, meant):
    assert habits.rewritten(typed.split()) == meant.split()


ANSWERED = [  # typed after `dart-eval`, and words of the answer
    ("run --tasks smoke --use-cache x", "there is no --use-cache here; finished work is always kept in --output"),
    ("run --tasks smoke --predict_only", "every run scores; generated texts are in --output"),
    ("run --tasks smoke --samples x", "give --limit N"),
    ("run --tasks smoke -w", "prompts and answers are in --output"),
    ("run --tasks smoke --show_config", "every record in --output has its configuration"),
    ("run --tasks smoke --max_batch_size 4", "--batch-size auto takes what fits"),
    ("run --tasks smoke --hf_hub_log_args x", "`dart-eval export` writes files as lm-eval does"),
    ("run --tasks smoke --wandb_args name=x", "docs/recipes.md has a tracker's lines"),
    ("run --tasks smoke --metadata x", "set it in a task's YAML file in a folder of --include-path"),
    ("run --max-new-tokens 8", "there is no --max-new-tokens here; write --gen-kwargs max_gen_toks=N"),
    ("run --max_gen_toks 8", "there is no --max_gen_toks here; write --gen-kwargs max_gen_toks=N"),
    ("run --tasks smoke --quiet", "progress goes to stderr: add 2>/dev/null"),
    ("run --tasks list", "unknown task 'list'; `dart-eval ls tasks` lists them"),
    ("run --tasks mmmmlu_*", "unknown task 'mmmmlu_*'"),
    ("run meta-llama/Llama-3.1-8B --tasks arc", "give the model with --model, and tasks with --tasks"),
    ("run --tasks smoke --model vllm --model_args pretrained=gpt2",
     "dart-eval runs models with transformers, not vllm; write --model gpt2"),
    ("run --tasks smoke --model_args pretrained=x,autogptq=True", "stored in few bits, or write load_in_4bit=true"),
    ("run --tasks smoke --method all", "--method all does not exist; give names; `dart-eval ls methods` lists them"),
    ("run --tasks smoke --method griffin:remask=drift,window=8", "join a method's fields with colons, as in "
     "griffin:remask=drift:remask.window=8"),
    ("run --tasks smoke --seed x", "seed must be a whole number, not 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "answer"), ANSWERED)
def test_what_is_not_here_is_answered_with_what_stands_for_it(typed, answer):
    done = command(*typed.split())
    assert done.code == 2
    assert answer in done.err, done.err


MEANT = [  # options by name, as of evaluate and run.yaml, and what they mean
    ({"dtype": "bf16"}, {"dtype": "bfloat16"}), ({"dtype": "Half"}, {"dtype": "float16"}),
    ({"seed": "0,1234,1234,1234"}, {"seed": 0}), ({"seed": "7"}, {"seed": 7}),
    ({"model_args": '{"pretrained": "m", "attn_implementation": "eager"}'},
     {"model": "m", "attn_implementation": "eager"}),
    ({"model_args": "pretrained=m,tokenizer=t,add_bos_token=True,peft=a"},
     {"model": "m", "tokenizer": "t", "add_bos_token": True, "peft": "a"}),
    ({"model_args": "pretrained=m,load_in_8bit=True,load_in_4bit=False,parallelize=True"},
     {"model": "m", "load_in": "8bit", "device_map": "auto"}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "meant"), MEANT)
def test_values_have_their_usual_short_forms(given, meant):
    assert configs_from(None, given) == [RunConfig(**meant)]


def test_several_seeds_are_several_cells():
    assert [config.seed for config in configs_from(None, {"seed": "3,1,3"})] == [3, 1]
    assert [config.seed for config in configs_from(None, {"seed": [0, 1]})] == [0, 1]


@pytest.mark.parametrize("name", ["GRIFFIN", "Dart", "wanda_sp", "Wanda-SP:allocation=uniform"])
def test_names_of_methods_may_have_capitals(name):
    from dart_eval.pruning.registry import make, parse

    assert make(*parse(name)).name == name.partition(":")[0].lower().replace("_", "-")


def test_a_suggestion_is_alike_or_there_is_none():
    assert nearest("--log-samples", ["--limit", "--load-in", "--scope"] + ["--x"] * 20) == ""
    assert nearest("griffn", ["griffin"] + ["teal"] * 30) == "did you mean griffin?"


def test_every_option_of_lm_eval_is_known_here():
    """Its parser's options, one by one: an option here, another name of one, needless, or answered."""
    from lm_eval._cli.run import Run

    parser = argparse.ArgumentParser()
    options = [o for a in Run(parser.add_subparsers())._parser._actions for o in a.option_strings if o[:2] == "--"]
    assert len(options) > 25
    others = {*habits.NEEDLESS, *habits.ANSWERS, "--verbosity", "--config", "--model-args", "--help"}
    for option in options:
        name = habits.spelled(option[2:])
        assert name.replace("-", "_") in DEFAULTS or f"--{name}" in others, option


@pytest.mark.parametrize("words", [("tables", "out"), ("compare", "a", "b"), ("run",)])
def test_a_form_that_is_missing_is_one_line(words):
    done = command(*words, "--format")
    assert done.code == 2 and done.err.startswith("error: option '--format' requires an argument")


def test_a_wrong_model_argument_is_refused():
    with pytest.raises(UserError, match="load_in is given twice: '4bit' and '8bit'"):
        configs_from(None, {"model_args": "load_in_4bit=true,load_in_8bit=true"})
    with pytest.raises(UserError, match="model_args pretraned is not known here; did you mean pretrained"):
        configs_from(None, {"model_args": '{"pretraned": "m"}'})


@pytest.mark.parametrize("form", ["table", "md", "csv", "tex", "json"])
def test_every_verb_that_prints_has_the_same_forms(form, tmp_path):
    from tests.helpers.records import answered, save

    values = [{"acc": float(i % 3 == 0)} for i in range(40)]
    out = save(tmp_path / "out", answered("arc", values, "dense", 0.0), answered("arc", values, "griffin", 0.5))
    assert command("check", out, "--baseline", tmp_path / "b.json", "--update").code == 0
    for words in (
        ["tables", out], ["compare", out, "--method", "dense,griffin"],
        ["check", out, "--baseline", tmp_path / "b.json", "--all"],
    ):  # fmt: skip
        done = command(*words, "--format", form)
        assert done.code == 0 and "griffin" in done.out, (words, done.err)
        assert (("\\begin{" in done.out) == (form == "tex") and done.out.lstrip()[:1] in "[{") or form != "json"
