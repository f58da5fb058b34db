"""The tables of a paper from one file: which methods, sparsities, columns; what to run for them; how to lay them out.

The file is YAML; docs/paper.md shows one. A method or a column more is a line more in it. Settings of a run
(`SETTINGS`) stand in the file, in a table or in a column, and the nearest one counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_eval.evaluation.task_names import aliases, is_pattern
from dart_eval.models.demo_model import ALIAS
from dart_eval.results.claims import ANY, Claim
from dart_eval.results.labels import grouped
from dart_eval.results.metrics import BY_SECOND_FORWARD, kind_of
from dart_eval.results.paper_layout import COLUMNS, FIELDS, MEAN, PaperColumn, PaperRow, Reported, TableLayout
from dart_eval.sweep import values
from dart_eval.sweep.options import RunConfig, checked
from dart_eval.sweep.paper_claims import SEE, claims_of
from dart_eval.sweep.plan import methods_of, settings_of
from dart_eval.util.bits import parse as parse_bits
from dart_eval.util.errors import UserError, naming, nearest, summary
from dart_eval.util.text import LENGTHS, Json, short_repr
from dart_eval.util.yamls import known, read_mapping

SHIPPED = Path(__file__).parents[1] / "data"
NEW_TOKENS = "max_new_tokens"
# Options of `dart-eval run`, and two of papers: the length of generated texts, and the share of the command's --limit.
SETTINGS = (
    "model", "scope", "ffn_bits", "num_fewshot", "limit", "max_length", "chat_template", "gen_kwargs", NEW_TOKENS,
    "limit_share",
)  # fmt: skip
FILE_KEYS = ("about", "methods", "sparsity", "tables", "claims", *SETTINGS)
TABLE_KEYS = ("name", "title", "methods", "sparsity", "columns", "mean", "reported", "note", "picture", *SETTINGS)
COLUMN_KEYS = ("task", "metric", "field", *SETTINGS)
ROW_KEYS = ("method", "sparsity", "scope", "ffn_bits", "only")
REPORTED_KEYS = ("label", "sparsity", "values", "source")


@dataclass(frozen=True)
class PaperSpec:
    """A paper's tables: their subject, the sweeps that they need, their layouts, and the claims that they test.

    Attributes:
        sweeps: table -> its sweeps.
    """

    about: str
    sweeps: Mapping[str, Sequence[RunConfig]]
    layouts: tuple[TableLayout, ...]
    claims: tuple[Claim, ...] = ()

    def only(self, names: Sequence[str]) -> PaperSpec:
        """Return a paper of some of the tables, and of the claims on them.

        Raises:
            UserError: there is no such table.
        """
        for name in names:
            if name not in self.sweeps:
                raise UserError(f"the paper has no table {name!r}", nearest(name, self.sweeps))
        kept = {name: some for name, some in self.sweeps.items() if name in names}
        layouts = tuple(layout for layout in self.layouts if layout.name in names)
        claims = tuple(claim for claim in self.claims if claim.table in names)
        return dataclasses.replace(self, sweeps=kept, layouts=layouts, claims=claims)

    @property
    def configs(self) -> tuple[RunConfig, ...]:
        """All sweeps, each once."""
        return tuple(dict.fromkeys(config for some in self.sweeps.values() for config in some))

    @property
    def runs(self) -> list[list[RunConfig]]:
        """The sweeps, those together that one loaded model can serve."""
        return [*grouped(self.configs, lambda config: (config.model, config.max_length, config.chat_template)).values()]


@dataclass(frozen=True)
class Row:
    """A row with the configuration of its cells: settings of its own go before a column's."""

    row: PaperRow
    spec: str
    own: Json


def load(name: str, base: RunConfig) -> PaperSpec:
    """The tables of a file, or of one that is shipped (`smoke`, `dart`), to be run with the settings of `base`.

    Args:
        base: model, data, output and the rest; `base.limit` overrides the limits in the file.

    Raises:
        UserError: the file cannot be read, or something in it is not understood.
    """
    shipped = {p.stem.removeprefix("paper-"): p for p in sorted(SHIPPED.glob("paper-*.yaml"))}
    path = shipped.get(name, Path(name))
    data = read_mapping(path, "paper", "tables: ...", f"give a YAML file, or one of: {', '.join(shipped)}")
    known(data, FILE_KEYS, str(path), SEE)
    if not isinstance(data.get("tables"), list) or not data["tables"]:
        raise UserError(f"{path} has no tables", SEE)
    typed = {"model"} if base.model is not None else set()  # the command line goes before the file's own
    typed |= {"chat_template"} if base.chat_template else set()
    layouts: list[TableLayout] = []
    sweeps: dict[str, list[RunConfig]] = {}
    for table in data["tables"]:
        where = f"{path}, table {short_repr(table.get('name'))}" if isinstance(table, dict) else f"{path}, a table"
        known(table, TABLE_KEYS, where, SEE)
        common = {key: data[key] for key in ("methods", "sparsity", *SETTINGS) if key in data and key not in typed}
        with _placed(where):
            layout, found = _layout(_nearest(common, table), base)
        layouts.append(layout)
        sweeps[layout.name] = found
    if len(sweeps) < len(layouts):
        raise UserError(f"{path}: two tables have the same name", "rename one: names become file names")
    with _placed(f"{path}, claims"):
        claims = claims_of(data.get("claims") or [], layouts)
    shown = {column.metric.partition(",")[0] for layout in layouts for column in layout.columns}
    if not shown & BY_SECOND_FORWARD:  # no table needs it, and scoring takes less time without
        sweeps = {name: [dataclasses.replace(config, kl=False) for config in some] for name, some in sweeps.items()}
    return PaperSpec(str(data.get("about", "")), sweeps, tuple(layouts), claims)


@contextlib.contextmanager
def _placed(where: str) -> Iterator[None]:
    """Name the place in the file in the errors of a block, and turn values of a wrong kind into such errors."""
    try:
        with naming(f"{where}: "):
            yield
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: a value is of the wrong kind ({summary(error)})", SEE) from None


def _layout(table: Json, base: RunConfig) -> tuple[TableLayout, list[RunConfig]]:
    """The layout of a table, and the sweeps that fill it."""
    for key in ("name", "title", "methods", "sparsity", "columns"):
        if not table.get(key):
            raise UserError(f"it needs {key}", SEE)
    name, methods, heads = str(table["name"]), table["methods"], table["columns"]
    if Path(name).name != name or "\0" in name:
        raise UserError("the name is not a file name", "rename it: names become file names")
    if not isinstance(methods, dict):
        raise UserError("methods must map labels to methods", "for example `DART: dart`")
    if not isinstance(heads, dict):
        raise UserError("columns must map heads to tasks", "for example `BoolQ: {task: boolq, metric: acc}`")
    sparsity = checked("sparsity", table["sparsity"])
    runs = str(table.get("model") or base.model or ALIAS)
    made = [_row(str(label), given, base, runs, sparsity) for label, given in methods.items()]
    rows = [row for row in made if row is not None]
    settings = {key: table[key] for key in SETTINGS if key in table}
    columns = {str(head): _column(str(head), column, settings, base) for head, column in heads.items()}
    for head in columns.keys() & {MEAN, ANY, *COLUMNS}:
        raise UserError(f"a column cannot be named {head!r}", "the table has or means one of this name: rename it")
    if not rows:
        raise UserError("no row of the table is for this model", "see the rows' key `only`, or leave out the table")
    mean, measured = bool(table.get("mean", False)), {c.metric for c, _ in columns.values()}
    if mean and (len(measured) > 1 or kind_of(next(iter(measured))).kind != "mean" or "" in measured):
        raise UserError("a mean needs columns with the same metric, no cost or perplexity", "leave `mean` out")
    reported = tuple(_reported(entry, list(columns)) for entry in table.get("reported") or [])
    layout = TableLayout(
        name, str(table["title"]), tuple(r.row for r in rows), sparsity, tuple(c for c, _ in columns.values()), mean,
        reported, str(table.get("note") or ""), bool(table.get("picture", False)),
        tuple(str(label) for label, row in zip(methods, made, strict=True) if row is None),
    )  # fmt: skip
    if layout.picture and len({c.metric for c in layout.columns}) > 1:
        raise UserError("a picture needs columns with the same metric", "leave `picture` out")
    return layout, _configs(rows, [*columns.values()], sparsity)


def _row(label: str, given: Any, base: RunConfig, model: str, sparsity: tuple[float, ...]) -> Row | None:
    """A row: a method, or one with a scope, bits, or sparsities of its own; None for another model than the table's."""
    asked = known(given if isinstance(given, dict) else {"method": given}, ROW_KEYS, f"row {label!r}", SEE)
    if not asked.get("method"):
        raise UserError(f"row {label!r} needs a method", SEE)
    if asked.get("only") and Path(model).name.lower() != str(asked["only"]).lower():
        return None
    own: Json = {key: checked(key, asked[key]) for key in ("scope", "ffn_bits") if key in asked}
    own |= {"ffn_bits": own["ffn_bits"][:1]} if "ffn_bits" in own else {}
    blocks = checked("sparsity", asked["sparsity"]) if "sparsity" in asked else None
    (spec,) = checked("method", [asked["method"]])
    method = methods_of(dataclasses.replace(base, method=(spec,), sparsity=blocks or sparsity))[0]
    return Row(PaperRow(label, method.name, method.params(), method.sized, _asked(own), blocks), spec, own)


def _asked(own: Json) -> Json:
    """The inputs of cells that these settings decide."""
    if "ffn_bits" not in own:
        return own
    rounding = parse_bits(own["ffn_bits"][0])
    return {**own, "ffn_bits": None if rounding is None else rounding.text}  # None overrides a column's bits, too


def _reported(entry: Any, heads: Sequence[str]) -> Reported:
    """A row of somebody else's numbers."""
    numbers = {str(k): float(v) for k, v in known(entry, REPORTED_KEYS, "reported", SEE)["values"].items()}
    for head in sorted(numbers.keys() - set(heads)):
        raise UserError(f"unknown reported column {head!r}", nearest(head, heads))
    return Reported(str(entry["label"]), float(entry["sparsity"]), numbers, str(entry["source"]))


def _column(head: str, column: Any, settings: Json, base: RunConfig) -> tuple[PaperColumn, RunConfig]:
    """A column and the configuration of its cells; the limit of the command goes before its own."""
    asked = _nearest(settings, known(column, COLUMN_KEYS, f"column {head!r}", SEE))
    metric, field = (str(asked.get(k) or "") for k in ("metric", "field"))
    if not asked.get("task") or bool(metric) == bool(field):
        raise UserError(f"column {head!r} needs a task and either a metric or a field", SEE)
    if field and field not in FIELDS:
        raise UserError(f"column {head!r}: unknown field {field!r}", nearest(field, FIELDS))
    config = _settled(asked, base)
    said = settings_of(config) | _asked({"ffn_bits": config.ffn_bits})
    names = checked("tasks", asked["task"])
    if odd := next(filter(is_pattern, names), None):
        raise UserError(f"column {head!r}: {odd} is a pattern", "name the tasks, or a group of them")
    short = aliases(base.include_path)
    tasks = tuple(task for name in names for task in short.get(name, (name,)))
    return PaperColumn(head, tasks, metric, field, said, config.model), config


def _nearest(far: Json, near: Json) -> Json:
    """Return settings on top of others, without a length of theirs that these name in `gen_kwargs`."""
    lengths = set(LENGTHS) & values.pairs("gen_kwargs", near.get("gen_kwargs") or {}).keys()
    return {**{key: value for key, value in far.items() if not (lengths and key == NEW_TOKENS)}, **near}


def _settled(asked: Json, base: RunConfig) -> RunConfig:
    """The run's configuration with the settings of a column."""
    given = {key: value for key, value in asked.items() if key in SETTINGS}
    share, new_tokens = float(given.pop("limit_share", 1)), given.pop(NEW_TOKENS, None)
    settings = {key: checked(key, value) for key, value in given.items() if value is not None}
    if "ffn_bits" in settings and len(settings["ffn_bits"]) > 1:
        raise UserError("a column has one ffn_bits", "give one number")
    if new_tokens is not None:
        told = values.pairs("gen_kwargs", settings.get("gen_kwargs") or {})
        settings["gen_kwargs"] = checked("gen_kwargs", {**told, "max_gen_toks": int(new_tokens)})
    if base.limit is not None:
        settings["limit"] = base.limit * share if base.limit < 1 else max(1, round(base.limit * share))
    if base.model is not None and settings.get("model", base.model) != base.model:
        settings["revision"] = None  # which is of the command's model
    return dataclasses.replace(base, **settings)


def _configs(
    rows: Sequence[Row], columns: Sequence[tuple[PaperColumn, RunConfig]], sparsity: tuple[float, ...]
) -> list[RunConfig]:
    """The sweeps that fill a table: one for the rows and the columns that share their settings."""
    made: list[RunConfig] = []
    below: dict[RunConfig, dict[str, None]] = {}
    for column, config in columns:
        below.setdefault(config, {}).update(dict.fromkeys(column.tasks))
    beside = grouped(rows, lambda row: (*row.own.items(), row.row.sparsity))
    for config, tasks in below.items():
        for group in beside.values():
            blocks = group[0].row.sparsity
            wanted = sparsity if blocks is None else tuple(s for s in sparsity if s in blocks)
            methods = tuple(row.spec for row in group)
            if wanted:
                own = group[0].own
                made.append(dataclasses.replace(config, method=methods, sparsity=wanted, tasks=tuple(tasks), **own))
    return made
