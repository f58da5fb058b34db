"""Task names as users type them, and where their data comes from.

Tasks are lm-eval's own (stock prompts and metrics) plus the YAMLs in `tasks/`. `--data-dir` changes nothing but the
data source of each task, group members included.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval.tasks
import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager, _factory
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind

from dart_eval.evaluation import documents as data
from dart_eval.evaluation import task_names
from dart_eval.evaluation.settings import check_generation
from dart_eval.evaluation.task_names import tasks_dir
from dart_eval.evaluation.unsafe import block_local_code, read_safely, sandbox_templates
from dart_eval.models.loading import work_offline_if_unreachable
from dart_eval.util.errors import UserError, naming, summary
from dart_eval.util.text import LENGTHS, Json

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
OFFLINE = (  # errors of the hub's libraries and of those below them
    "ConnectionError", "ConnectError", "ConnectTimeout", "OfflineModeIsEnabled", "LocalEntryNotFoundError",
)  # fmt: skip

# Documents that share this field are no independent draws: they form a cluster for the statistics. A task of our own
# names the field itself (`metadata.cluster`). Members of a group are clustered by task, whatever this says.
CLUSTERS: dict[str, str] = {
    "boolq": "passage", "cb": "premise", "drop": "passage", "hellaswag": "ctx", "race": "article", "record": "passage",
    "rte": "sentence1", "sglue_rte": "premise", "squadv2": "context", "multirc": "paragraph",
    **dict.fromkeys(("qa4mre_2011", "qa4mre_2012", "qa4mre_2013"), "document_str"),
}  # fmt: skip


class RollingLogLikelihood(float):
    """Log-likelihood of the scored half of a document, with the share of the document's bytes that it covers."""

    coverage: float = 1.0


class Tasks(TaskFactory):
    """Finds and loads tasks: lm-eval's factory, with the data source replaced in each leaf's configuration.

    Args:
        data_dir: folder of local data (layout above); None loads from the hub as lm-eval does.
        unsafe_code: tasks may run code that the model writes, and metrics of the working directory (see `unsafe`).
        include_path: folders with more tasks; a name in a later one stands before the same name in an earlier one, and
            before lm-eval's.
        gen_kwargs: settings of generation that stand before each task's own.
        tokenizer: gives the model's, for tasks that make documents of a length (RULER).
        limit: so many documents will be asked at most, or a share of all: these tasks make no more.
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        unsafe_code: bool = False,
        include_path: Sequence[str | Path] = (),
        gen_kwargs: Json | None = None,
        tokenizer: Callable[[], object] | None = None,
        limit: float | None = None,
    ) -> None:
        super().__init__(meta={})
        self.unsafe_code, self.gen_kwargs, self.tokenizer, self.limit = unsafe_code, gen_kwargs, tokenizer, limit
        self.folders = [str(folder) for folder in include_path]
        if self.folders and not unsafe_code:
            sandbox_templates()
        self.data_dir = Path(data_dir) if data_dir is not None else None
        self.manager = TaskManager(include_path=[tasks_dir(), *self.folders], include_defaults=False)
        self.manager._factory = self
        self._complete = False
        self._loaded: dict[str, list[Task | Group]] = {}
        self._place: Path | None = None  # of the local data that were last looked for

    def _load_full_config(self, entry: Entry, overrides: Json | None = None) -> Json:
        if not self.unsafe_code:  # asked before its functions are resolved: that runs the module they stand in
            trusted, file = (Path(lm_eval.tasks.__file__).parent, tasks_dir()), entry.yaml_path
            settings = read_safely(entry.name, file, trusted) if file else entry.cfg or {}
            if {**settings, **(overrides or {})}.get("unsafe_code"):
                remedy = "add --confirm-run-unsafe-code in a safe place, such as a container"
                raise UserError(f"task {entry.name} runs code that the model writes", remedy)
        config = super()._load_full_config(entry, overrides)
        make = config.get("custom_dataset")
        if self.data_dir is not None and ("class" in config or (callable(make) and data.needs_tokenizer(make))):
            raise UserError(
                f"task {entry.name} has code of lm-eval that loads data itself, whatever --data-dir says",
                "run it without --data-dir",
            )
        return config

    def _task(self, config: Json) -> ConfigurableTask:
        """Return the task of a configuration, with its documents and their source as they are to be here."""
        if callable(make := config.get("custom_dataset")):
            config["custom_dataset"] = data.seeded(make, config["task"], self.tokenizer, self.limit)
        elif config.get("dataset_path") and self.data_dir is not None:
            self._place = data.redirect(config, self.data_dir)
        elif config.get("dataset_path"):
            work_offline_if_unreachable()
        if callable(prepare := config.get("process_docs")):  # lm-eval's constructor prepares examples already
            config["process_docs"] = data.prepared_once(prepare)
        return ConfigurableTask(config=config)

    def index_all(self) -> None:
        """Let the manager know lm-eval's own thousands of tasks, too."""
        if not self._complete:
            folder = task_names.lm_evals_dir()
            stock = {
                name: Entry(name, Kind[kind], folder / path if path else None, None, set(tags))
                for name, (kind, path, tags) in task_names.lm_evals().items()
            }
            self.manager._index = {**stock, **self.manager._index}
            self._complete = True

    def expand(self, names: Iterable[str]) -> list[str]:
        """Return lm-eval's names of tasks (see `task_names.expand`)."""
        return task_names.expand(names, self.folders)

    def load(self, name: str) -> list[Task | Group]:
        """The lm-eval task or group of that (expanded) name; tags give several. Built once, then kept.

        Raises:
            UserError: its data cannot be had, or it would run code that nobody has confirmed.
        """
        if name not in self._loaded:
            self._place = None
            try:
                index = self.manager.task_index
                if name not in index or index[name].kind is Kind.GROUP:  # which may have any task as a member
                    self.index_all()
                _forget_modules()
                with (
                    block_local_code(f"task {name}", self.unsafe_code), redirect_stdout(sys.stderr),
                    patch.object(_factory, "ConfigurableTask", self._task),
                ):  # fmt: skip
                    loaded = self.manager._load_spec(name)
            except UserError:
                raise
            except Exception as error:
                raise self._explain(name, error) from error
            items = loaded if isinstance(loaded, list) else [loaded]
            for task in leaves(items):
                self._adapt(task)
            self._loaded[name] = items
        return self._loaded[name]

    def _adapt(self, task: Task) -> None:
        """Give a task the user's settings of generation, and metrics as they are to be here."""
        if task.OUTPUT_TYPE == "generate_until":
            own_settings = task.get_config("generation_kwargs") or {}
            with naming(f"task {task.task_name}: "):
                check_generation(own_settings)
                if self.gen_kwargs:
                    task.set_config("generation_kwargs", overridden(own_settings, self.gen_kwargs))
        if getattr(task.config, "custom_dataset", None) is not None:
            data.without_other_lengths(task)
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            weigh_scored_text(type(task))
        if task.OUTPUT_TYPE in ("loglikelihood", "loglikelihood_rolling"):
            without_overflow(task)

    def _explain(self, name: str, error: Exception) -> UserError:
        """Return why a task could not be loaded, in one line."""
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        for cause in causes:
            if isinstance(cause, UserError):
                return cause
            if isinstance(error, ImportError) and isinstance(cause, ModuleNotFoundError) and cause.name:
                module = cause.name.partition(".")[0]
                remedy = f"pip install 'dart-eval[tasks]' has what tasks of lm-eval need, or pip install {module}"
                return UserError(f"task {name} needs the package {module}", remedy)
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        if self._place is not None:
            why = data.odd_split(self._place) or f"the documents of {self._place} ({summary(root)})"
            return UserError(f"task {name} cannot use its data: {why}", "fix or remove them")
        if self.data_dir is None and any(type(cause).__name__ in OFFLINE for cause in causes):
            return UserError(
                f"the data of task {name} could not be loaded: the hub cannot be reached ({summary(root)})",
                "give local data with --data-dir, or set HF_ENDPOINT / a proxy, or fill the Hugging Face cache first",
            )
        remedy = "`dart-eval ls tasks` lists names, docs/data.md data"
        return UserError(f"task {name} could not be loaded ({summary(root)})", remedy)


def draws(kwargs: Mapping[str, object]) -> bool:
    """Whether these settings of generation draw tokens."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    return bool(normalize_gen_kwargs(given).get("do_sample"))


def overridden(own: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """Return a task's settings of generation with the user's before them, whatever name a length goes by.

    Raises:
        UserError: a temperature without effect, as the task draws no tokens; or draws at the task's temperature of 0.
    """
    settings = {name: value for name, value in own.items() if not (name in LENGTHS and given.keys() & {*LENGTHS})}
    settings.update(given)
    if given.get("temperature") and settings.get("do_sample") is False:
        raise UserError(
            f"gen_kwargs temperature={given['temperature']} has no effect with do_sample=false",
            "give do_sample=true, or leave it out",
        )
    if given.get("do_sample") and "temperature" not in given and settings.get("temperature") == 0:
        raise UserError(
            "gen_kwargs do_sample=true draws tokens, and the task's own temperature 0 draws none", "add temperature=1"
        )
    return settings


def task_draws(members: Sequence[Task]) -> bool:
    """Whether one of these tasks draws its answers."""
    return any(t.OUTPUT_TYPE == "generate_until" and draws(t.get_config("generation_kwargs") or {}) for t in members)


def leaves(items: list[Task | Group]) -> list[Task]:
    """The tasks of a list of tasks and groups, groups opened."""
    found: list[Task] = []
    for item in items:
        found += item.get_all_tasks() if isinstance(item, Group) else [item]
    return found


def documents(items: list[Task | Group]) -> dict[str, str]:
    """Task name -> field of its document that may be cut to fit (`metadata.document` in the YAML)."""
    return {t.task_name: _metadata(t)["document"] for t in leaves(items) if "document" in _metadata(t)}


def whole_tokens(items: list[Task | Group]) -> bool:
    """Whether contexts end where tokens do (`metadata.whole_tokens` in the YAML)."""
    return any(_metadata(task).get("whole_tokens") for task in leaves(items))


def _metadata(task: Task) -> Json:
    return (task.config.metadata if isinstance(task, ConfigurableTask) else None) or {}


def cluster(task: Task, doc: Json) -> str | None:
    """A name that the documents of one cluster share (same passage, same article); None: the document stands alone."""
    field = _metadata(task).get("cluster") or CLUSTERS.get(task.task_name)
    if not field or doc.get(field) in (None, ""):
        return None
    return hashlib.sha256(str(doc[field]).encode()).hexdigest()[:16]


def _forget_modules() -> None:
    """Have lm-eval load anew the modules of tasks that hold a random generator.

    Every task of the module draws from it (gpqa's shuffle of answers): documents would depend on the tasks that this
    process had loaded before.
    """
    for name, module in list(sys.modules.items()):
        inside = dict(getattr(module, "__dict__", {}))
        if "__mtime__" in inside and any(isinstance(v, GENERATORS) for v in inside.values()):  # the key is lm-eval's
            del sys.modules[name]


def weigh_scored_text(kind: type[Task] = ConfigurableTask) -> None:
    """Have a kind of task count only the text that was scored: perplexities are (log-likelihood, words or bytes)."""
    stock = kind.process_results
    if getattr(stock, "weighs", False):
        return

    @functools.wraps(stock)
    def process_results(self: Task, doc: dict, results: list[Any]) -> Json:
        if not results or not isinstance(results[0], RollingLogLikelihood):
            return stock(self, doc, results)
        share = results[0].coverage
        metrics = stock(self, doc, list(map(float, results)))  # plain: a kind above this one does not weigh once more
        return {k: (v[0], v[1] * share) if isinstance(v, tuple) else v for k, v in metrics.items()}

    setattr(process_results, "weighs", True)  # noqa: B010 - a function has no such field
    setattr(kind, "process_results", process_results)  # noqa: B010 - for mypy, methods are fixed


def without_overflow(task: Task) -> None:
    """Give a perplexity that no float holds as infinite: lm-eval's would end the cell, with its other metrics."""
    stock = task.aggregation

    def finite_or_infinite(combine: Callable[[Any], float]) -> Callable[[Any], float]:
        @functools.wraps(combine)
        def combined(items: Any) -> float:
            try:
                return combine(items)
            except OverflowError:
                return math.inf

        return combined

    def aggregation() -> Json:  # lm-eval knows the error of a mean by the function
        return {name: f if f is mean else finite_or_infinite(f) for name, f in stock().items()}

    setattr(task, "aggregation", aggregation)  # noqa: B010
