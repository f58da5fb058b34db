"""A paper from one file: its tables with their methods, sparsities and columns, the sweeps for them, and its claims.

The file is YAML; docs/recipes.md shows one. A method or a column more is a line more in it. Settings of a run stand in
the file, in a table or in a column, and the nearest one counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, model_validator
from typing_extensions import Self

from dart_eval.evaluation.task_names import aliases
from dart_eval.models.demo_model import ALIAS
from dart_eval.results.inputs import DENSE
from dart_eval.results.metrics import kind_of
from dart_eval.results.paper import ANY, FIELDS, MEAN, Claim, Part, Sheet
from dart_eval.sweep.options import RunConfig, checked, read_settings
from dart_eval.sweep.plan import methods_of, settings_of
from dart_eval.util.bits import parse as parse_bits
from dart_eval.util.errors import UserError, naming
from dart_eval.util.text import Json
from dart_eval.util.yamls import read_mapping

SHIPPED = Path(__file__).parents[1] / "data"
TAKEN = {MEAN, ANY, "method", "sparsity", "effective", "read"}  # columns of these names have another meaning


def _of_run(value: object, info: ValidationInfo) -> Any:
    """Return an option of `dart-eval run` as it has it."""
    try:
        return None if value is None else checked(str(info.field_name).replace("task", "tasks"), value)
    except UserError as error:
        raise ValueError(str(error)) from None


Option = Annotated[Any, BeforeValidator(_of_run)]
One = Annotated[tuple[Any, ...], Field(max_length=1), BeforeValidator(_of_run)]


class Settings(Part):
    """Options of a run, and two of papers: the length of generated texts, and the share of --limit."""

    scope: Option = None
    ffn_bits: One | None = None
    num_fewshot: Option = None
    limit: Option = None
    max_length: Option = None
    chat_template: Option = None
    gen_kwargs: Option = None
    max_new_tokens: int | None = None
    limit_share: float | None = None


class Row(Part):
    """A method, with a scope, bits and sparsities of its own, or for `only` one model."""

    method: One
    sparsity: Option = ()
    scope: Option = None
    ffn_bits: One | None = None
    only: str = ""


Methods = dict[str, Annotated[Row, BeforeValidator(lambda row: row if isinstance(row, dict) else {"method": row})]]


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
    methods: Methods = Field({})
    sparsity: Option = ()
    columns: dict[str, Column] = Field(min_length=1)
    mean: bool = False
    note: str = ""
    reported: tuple[Reported, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        metrics = {column.metric for column in self.columns.values()}
        if self.mean and (len(metrics) > 1 or "" in metrics or kind_of(*metrics).kind != "mean"):
            raise ValueError("a mean needs columns of one metric, no cost or perplexity")
        if any(bool(column.metric) == bool(column.field) for column in self.columns.values()):
            raise ValueError("a column has either a metric or a field")
        unknown = {head for reported in self.reported for head in reported.values} - self.columns.keys()
        if wrong := unknown | (TAKEN & self.columns.keys()):
            raise ValueError(f"these cannot be columns, or are reported without one: {', '.join(sorted(wrong))}")
        return self


class File(Settings):
    """A paper's file."""

    about: str = ""
    methods: Methods = Field({})
    sparsity: Option = ()
    tables: tuple[Table, ...] = Field(min_length=1)
    claims: tuple[Claim, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        tables = {table.name: table for table in self.tables}
        if len(tables) < len(self.tables):
            raise ValueError("two tables have one name, which is that of their files")
        for claim in (claim for claim in self.claims if not claim.shape):
            table = tables.get(claim.table)
            costs = [head for head, column in table.columns.items() if column.field] if table else []
            if table is None or not (
                {*claim.rows} <= (table.methods or self.methods).keys()
                and claim.sparsity in (table.sparsity or self.sparsity)
                and claim.column in ([MEAN, ANY, *table.columns] if claim.at_most is None else costs)
            ):
                raise ValueError(f"claim {claim.claim!r}: no table {claim.table!r} has its rows, sparsity and column")
        return self


class PaperSpec(NamedTuple):
    """A paper: its subject, its tables, the sweeps that fill them, and the claims that they test."""

    about: str
    sheets: Sequence[Sheet]
    sweeps: Sequence[RunConfig]
    claims: Sequence[Claim]


def load(name: str, base: RunConfig) -> PaperSpec:
    """Return the paper of a file, or a shipped one (`smoke`, `dart`), to be run with the settings of `base`.

    Args:
        base: model, data, output and the rest; its limit overrides those in the file.

    Raises:
        UserError: the file cannot be read, or something in it is not understood, with its place.
    """
    shipped = {p.stem.removeprefix("paper-"): p for p in sorted(SHIPPED.glob("paper-*.yaml"))}
    path = shipped.get(name, Path(name))
    data = read_mapping(path, "paper", "tables: ...", f"give a YAML file, or one of: {', '.join(shipped)}")
    try:
        file = File.model_validate(data)
    except ValidationError as error:
        one = error.errors(include_url=False)[0]
        place = ".".join(map(str, one["loc"])) or "claims"
        raise UserError(f"{path}, {place}: {one['msg'].removeprefix('Value error, ')}", "see docs/recipes.md") from None
    with naming(f"{path}: "):
        sheets, sweeps = zip(*(_sheet(table, file, base) for table in file.tables), strict=True)
    there = {(sheet.name, row) for sheet in sheets for row in sheet.cells["row"]}  # some rows are of another model
    claims = [claim for claim in file.claims if {(claim.table, row) for row in claim.rows} <= there]
    return PaperSpec(file.about, sheets, list(dict.fromkeys(itertools.chain(*sweeps))), claims)


def _config(settings: Sequence[Settings], base: RunConfig) -> RunConfig:
    """Return the configuration of cells: the nearest setting counts, and the limit of the command before theirs."""
    asked: Json = {}
    for part in settings:
        asked |= part.model_dump(include={*Settings.model_fields}, exclude_unset=True)
    given = {name: value for name, value in asked.items() if value is not None}
    share, tokens = given.pop("limit_share", 1.0), given.pop("max_new_tokens", None)
    if tokens is not None:
        told = read_settings(given.get("gen_kwargs") or {})
        given["gen_kwargs"] = checked("gen_kwargs", {**told, "max_gen_toks": tokens})
    if base.limit is not None:
        given["limit"] = base.limit * share if base.limit < 1 else max(1, round(base.limit * share))
    return replace(base, **given)


def _sheet(table: Table, file: File, base: RunConfig) -> tuple[Sheet, list[RunConfig]]:
    """Return a table with the cells that it wants, and the sweeps that fill it."""
    model, short = Path(base.model or ALIAS).name.lower(), aliases(base.include_path)
    rows = {label: row for label, row in (table.methods or file.methods).items() if row.only.lower() in ("", model)}
    sparsity = table.sparsity or file.sparsity
    tasks = {head: [t for name in c.task for t in short.get(name, (name,))] for head, c in table.columns.items()}
    metrics = {head: column.metric or column.field for head, column in table.columns.items()}
    parts = {**{head: [head] for head in tasks}, **({MEAN: [*tasks]} if table.mean else {})}  # of each column shown
    configs: dict[tuple[str, str], RunConfig] = {}  # (row, column) -> what its cells run with, but for their tasks
    sweeps: dict[RunConfig, tuple[Json, Json]] = {}  # without methods and tasks -> these
    columns = {head: _config((file, table, column), base) for head, column in table.columns.items()}
    for head, (label, row) in itertools.product(columns, rows.items()):
        own = row.model_dump(include={"scope", "ffn_bits"}, exclude_none=True)
        levels = tuple(level for level in sparsity if level in (row.sparsity or sparsity))
        config = replace(columns[head], sparsity=levels, **own)
        configs[label, head] = replace(config, method=row.method)
        if levels:
            methods, names = sweeps.setdefault(config, ({}, {}))
            methods[row.method[0]] = None
            names |= dict.fromkeys(tasks[head])

    def cells_of(label: str, level: float) -> Iterator[Json]:
        """Yield the cells of a line, for each column and task, those of the mean among them."""
        for head, part, task in ((h, p, t) for h, of_head in parts.items() for p in of_head for t in tasks[p]):
            config = configs[label, part]
            (method,), bits = methods_of(config), parse_bits(config.ffn_bits[0])
            asked = settings_of(config) | {
                "method": method.name, "params": method.params(), "task": task, "sparsity": level * method.sized,
                "ffn_bits": bits and bits.text, **({"scope": "scored"} if method.name == DENSE else {}),
            }  # fmt: skip
            yield {
                **{name: asked[name] for name in ("method", "params", "task", "sparsity", "scope")},
                "asked": asked,
                "row": label, "column": head, "metric": metrics[part], "bits": str(asked["ffn_bits"]),
                "share": 1 / len(parts[head]) / len(tasks[part]), "value": None,
            }  # fmt: skip

    lines: list[list[Json]] = []
    sources = list(dict.fromkeys(reported.source for reported in table.reported))
    for block, level in enumerate((0.0, *sparsity)):
        measured = len(lines)
        for label, row in rows.items():
            sized = methods_of(configs[label, next(iter(tasks))])[0].sized
            if (block > 0 and level in row.sparsity) if row.sparsity else sized == (block > 0):
                lines.append([{"block": block, "level": level, **cell} for cell in cells_of(label, level)])
        for one in (r for r in table.reported if len(lines) > measured and r.sparsity == level):
            cell = {"row": f"{one.label} [{sources.index(one.source) + 1}]", "sparsity": level}
            cell |= {"block": block, "level": level}
            lines.append([cell | {"column": h, "metric": metrics[h], "value": v} for h, v in one.values.items()])
    if not lines or not sparsity:
        raise UserError(f"table {table.name!r} has no row for this model, or no sparsity", "see docs/recipes.md")
    cells = [{"line": i, **cell} for i, line in enumerate(lines) for cell in line]
    notes = [*filter(None, [table.note]), *(f"[{i}] reported: {source}." for i, source in enumerate(sources, 1))]
    sheet = Sheet(table.name, table.title, notes, pd.DataFrame(cells, dtype=object))
    return sheet, [replace(c, method=tuple(m), tasks=tuple(t)) for c, (m, t) in sweeps.items()]
