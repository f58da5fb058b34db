"""A paper from one file: its tables with their methods, sparsities and columns, the sweeps for them, and its claims.

The file is YAML; docs/paper.md shows one. A method or a column more is a line more in it. Settings of a run stand in
the file, in a table or in a column, and the nearest one counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pandas as pd
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, model_validator
from typing_extensions import Self

from dart_eval.evaluation.task_names import aliases
from dart_eval.models.demo_model import ALIAS
from dart_eval.results.inputs import DENSE
from dart_eval.results.labels import grouped
from dart_eval.results.metrics import BY_SECOND_FORWARD, kind_of
from dart_eval.results.paper import ANY, FIELDS, MEAN, Claim, Part, Sheet
from dart_eval.sweep.options import RunConfig, checked, read_settings
from dart_eval.sweep.plan import methods_of, settings_of
from dart_eval.util.bits import parse as parse_bits
from dart_eval.util.errors import UserError, naming, nearest
from dart_eval.util.text import LENGTHS, Json
from dart_eval.util.yamls import read_mapping

if TYPE_CHECKING:
    from dart_eval.pruning.method import Method

SHIPPED = Path(__file__).parents[1] / "data"
TAKEN = {MEAN, ANY, "method", "sparsity", "effective", "read"}  # columns of these names have another meaning


def _of_run(value: object, info: ValidationInfo) -> Any:
    """Return an option of `dart-eval run` as it has it; of methods and bits one."""
    name = str(info.field_name).replace("task", "tasks")
    try:
        option = None if value is None else checked(name, value)
    except UserError as error:
        raise ValueError(str(error)) from None
    if name in ("method", "ffn_bits") and option is not None and len(option) != 1:
        raise ValueError("one is allowed")
    return option


Option = Annotated[Any, BeforeValidator(_of_run)]


class Settings(Part):
    """Options of a run, and two of papers: the length of generated texts, and the share of --limit."""

    model: Option = None
    scope: Option = None
    ffn_bits: Option = None
    num_fewshot: Option = None
    limit: Option = None
    max_length: Option = None
    chat_template: Option = None
    gen_kwargs: Option = None
    max_new_tokens: int | None = None
    limit_share: float | None = None

    def over(self, far: Json) -> Json:
        """Return the settings that are given on top of others, without a length of theirs if `gen_kwargs` has one."""
        near = self.model_dump(include={*Settings.model_fields}, exclude_unset=True)
        lengths = set(LENGTHS) & read_settings(near.get("gen_kwargs") or {}).keys()
        return {**{name: value for name, value in far.items() if not (lengths and name == "max_new_tokens")}, **near}


class Row(Part):
    """A method, with a scope, bits and sparsities of its own, or for `only` one model."""

    method: Option
    sparsity: Option = ()
    scope: Option = None
    ffn_bits: Option = None
    only: str = ""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return given if isinstance(given, dict) else {"method": given}


class Column(Settings):
    """A metric of one task or its mean over several, or a cost."""

    task: Option
    metric: str = ""
    field: Literal[("", *FIELDS)] = ""  # type: ignore[valid-type]


class Reported(Part):
    """Numbers of another publication, by column. They have another model or protocol, and enter no test."""

    label: str
    sparsity: float
    values: dict[str, float]
    source: str


class Table(Settings):
    """A table, whose methods and sparsities are the file's where it has none."""

    name: str = Field(pattern=r"^[^/\x00]+$")  # of its files
    title: str
    methods: dict[str, Row] = Field({})
    sparsity: Option = ()
    columns: dict[str, Column] = Field(min_length=1)
    mean: bool = False
    picture: bool = False
    note: str | None = None
    reported: tuple[Reported, ...] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        metrics = {column.metric for column in self.columns.values()}
        if self.mean and (len(metrics) > 1 or "" in metrics or kind_of(*metrics).kind != "mean"):
            raise ValueError("a mean needs columns of one metric, no cost or perplexity")
        if any(bool(column.metric) == bool(column.field) for column in self.columns.values()):
            raise ValueError("a column has either a metric or a field")
        unknown = {head for reported in self.reported or () for head in reported.values} - self.columns.keys()
        if wrong := unknown | (TAKEN & self.columns.keys()):
            raise ValueError(f"these cannot be columns, or are reported without one: {', '.join(sorted(wrong))}")
        return self


class File(Settings):
    """A paper's file."""

    about: str | None = None
    methods: dict[str, Row] = Field({})
    sparsity: Option = ()
    tables: tuple[Table, ...] = Field(min_length=1)
    claims: tuple[Claim, ...] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        tables = {table.name: table for table in self.tables}
        if len(tables) < len(self.tables):
            raise ValueError("two tables have one name, which is that of their files")
        for claim in (claim for claim in self.claims or () if not claim.shape):
            known: dict[object, Collection[object]] = {claim.table: tables}
            if table := tables.get(claim.table):
                costs = [head for head, column in table.columns.items() if column.field]
                known[claim.column] = [MEAN, ANY, *table.columns] if claim.at_most is None else costs
                known[claim.sparsity] = table.sparsity or self.sparsity
                known |= dict.fromkeys(claim.rows, table.methods or self.methods)
            for name in (name for name, names in known.items() if name not in names):
                near = nearest(str(name), map(str, known[name]))
                raise ValueError(f"claim {claim.claim!r}: {name!r} is not in table {claim.table!r}; {near}")
        return self


@dataclass(frozen=True)
class PaperSpec:
    """A paper: its subject, its tables, the sweeps that fill them, and the claims that they test."""

    about: str
    sheets: Sequence[Sheet]
    sweeps: Sequence[RunConfig]
    claims: Sequence[Claim]


def runs(spec: PaperSpec) -> list[list[RunConfig]]:
    """Return the sweeps of a paper, each once, those together that one loaded model can serve."""
    return [*grouped(dict.fromkeys(spec.sweeps), lambda c: (c.model, c.max_length, c.chat_template)).values()]


def load(name: str, base: RunConfig, only: Sequence[str] | None = None) -> PaperSpec:
    """Return the paper of a file, or a shipped one (`smoke`, `dart`), to be run with the settings of `base`.

    Args:
        base: model, data, output and the rest; its limit overrides those in the file.
        only: the names of these tables; None: of all.

    Raises:
        UserError: the file cannot be read, or something in it is not understood, with its place.
    """
    shipped = {p.stem.removeprefix("paper-"): p for p in sorted(SHIPPED.glob("paper-*.yaml"))}
    path = shipped.get(name, Path(name))
    data = read_mapping(path, "paper", "tables: ...", f"give a YAML file, or one of: {', '.join(shipped)}")
    try:
        file = File.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        words = {word for part in (File, Table, Column, Row, Reported, Claim) for word in part.model_fields}
        *_, last = place = ["claims", *map(str, first["loc"])][-len(first["loc"]) :]
        near = nearest(last, words) if first["type"] == "extra_forbidden" else "see docs/paper.md"
        raise UserError(f"{path}, {'.'.join(place)}: {first['msg'].removeprefix('Value error, ')}", near) from None
    names = [table.name for table in file.tables]
    for unknown in {*(only or ())} - {*names}:
        raise UserError(f"{path} has no table {unknown!r}", nearest(unknown, names))
    metrics = {column.metric.partition(",")[0] for table in file.tables for column in table.columns.values()}
    base = replace(base, kl=base.kl and not BY_SECOND_FORWARD.isdisjoint(metrics))  # it takes time
    with naming(f"{path}: "):
        tables = [_sheet(table, file, base) for table in file.tables if only is None or table.name in only]
    sheets, sweeps = [sheet for sheet, _ in tables], [config for _, configs in tables for config in configs]
    there = {(sheet.name, row) for sheet in sheets for row in sheet.cells["row"]}  # some rows are of another model
    claims = [c for c in file.claims or () if {(c.table, row) for row in c.rows} <= there and (c.rows or only is None)]
    return PaperSpec(file.about or "", sheets, sweeps, claims)


def _config(asked: Json, base: RunConfig) -> RunConfig:
    """Return the configuration of cells with these settings; the limit of the command goes before their own."""
    given = {name: value for name, value in asked.items() if value is not None}
    share, tokens = given.pop("limit_share", 1.0), given.pop("max_new_tokens", None)
    if tokens is not None:
        told = read_settings(given.get("gen_kwargs") or {})
        given["gen_kwargs"] = checked("gen_kwargs", {**told, "max_gen_toks": tokens})
    if base.limit is not None:
        given["limit"] = base.limit * share if base.limit < 1 else max(1, round(base.limit * share))
    if base.model is not None and given.get("model", base.model) != base.model:
        given["revision"] = None  # which is of the command's model
    return replace(base, **given)


def _sheet(table: Table, file: File, base: RunConfig) -> tuple[Sheet, list[RunConfig]]:
    """Return a table with the cells that it wants, and the sweeps that fill it."""
    typed = [name for name in ("model", "chat_template") if getattr(base, name)]  # these go before the file's
    settings = table.over({name: value for name, value in file.over({}).items() if name not in typed})
    model = Path(settings.get("model") or base.model or ALIAS).name.lower()
    rows = {label: row for label, row in (table.methods or file.methods).items() if row.only.lower() in ("", model)}
    # Settings of rows that go before those of columns.
    above = {label: row.model_dump(include={"scope", "ffn_bits"}, exclude_none=True) for label, row in rows.items()}
    sparsity, short = table.sparsity or file.sparsity, aliases(base.include_path)
    configs = {head: _config(column.over(settings), base) for head, column in table.columns.items()}
    metrics = {head: column.metric or column.field for head, column in table.columns.items()}
    tasks = {head: [t for name in c.task for t in short.get(name, (name,))] for head, c in table.columns.items()}
    sweeps = []
    for config, heads in grouped(configs, configs.__getitem__).items():
        names = tuple(dict.fromkeys(task for head in heads for task in tasks[head]))
        for alike in grouped(rows, lambda label: (tuple(above[label].items()), rows[label].sparsity)).values():
            methods, blocks = tuple(rows[label].method[0] for label in alike), rows[alike[0]].sparsity
            levels = tuple(level for level in sparsity if not blocks or level in blocks)
            if levels:
                sweeps.append(replace(config, method=methods, sparsity=levels, tasks=names, **above[alike[0]]))

    def cells_of(label: str, method: Method, level: float) -> Iterator[Json]:
        """Yield the cells of a line, for each column and task, those of the mean among them."""
        parts = {**{head: [head] for head in tasks}, **({MEAN: [*tasks]} if table.mean else {})}
        for head, part, task in ((h, p, t) for h, of_head in parts.items() for p in of_head for t in tasks[p]):
            config = replace(configs[part], **above[label])
            bits, others = (parse_bits(c.ffn_bits[0]) for c in (config, configs[part]))
            cell = {"method": method.name, "params": method.params(), "task": task, "sparsity": level * method.sized}
            asked = settings_of(config) | cell | {"ffn_bits": bits and bits.text}
            asked |= {"scope": "scored"} if method.name == DENSE else {}  # no other matters to it
            apart = bits != others and metrics[part].partition(",")[0] in BY_SECOND_FORWARD  # from a dense of its own
            yield {
                **cell, "row": label, "column": head, "metric": metrics[part], "model": config.model, "value": None,
                "share": 1 / len(parts[head]) / len(tasks[part]), "scope": asked["scope"],
                "bits": str(asked["ffn_bits"]), "asked": None if apart else asked,
            }  # fmt: skip

    cells, lines = list[Json](), itertools.count()
    sources = list(dict.fromkeys(reported.source for reported in table.reported or ()))
    for block, level in enumerate((0.0, *sparsity)):
        in_block: list[Iterable[Json]] = []
        for label, row in rows.items():
            method = methods_of(replace(base, method=row.method, sparsity=row.sparsity or sparsity))[0]
            if (block > 0 and level in row.sparsity) if row.sparsity else method.sized == (block > 0):
                in_block.append(cells_of(label, method, level))
        for reported in (r for r in table.reported or () if in_block and r.sparsity == level):
            label = f"{reported.label} [{sources.index(reported.source) + 1}]"
            in_block.append([
                {"row": label, "sparsity": level, "column": head, "metric": metrics[head], "value": value}
                for head, value in reported.values.items()
            ])  # fmt: skip
        for of_line, line in zip(in_block, lines, strict=False):
            cells += [{"line": line, "block": block, "level": level, **cell} for cell in of_line]
    if not cells or not sparsity:
        raise UserError(f"table {table.name!r} has no row for this model, or no sparsity", "see docs/paper.md")
    notes = [*filter(None, [table.note]), *(f"[{i}] reported: {source}." for i, source in enumerate(sources, 1))]
    return Sheet(table.name, table.title, notes, table.picture, pd.DataFrame(cells, dtype=object)), sweeps
