"""Write docs/options.md from the list of options. A test says when the page is out of date."""

from __future__ import annotations

from pathlib import Path

from dart_eval.cli import options
from dart_eval.sweep.options import DEFAULTS, about, choices_of, default_of, help_of

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """# Options of a run

*Made by `scripts/options_page.py` from the code; `dart-eval run --help` shows the same.*

```yaml
model: ./my-model
tasks: [arc, hellaswag]
method: [dense, dart, griffin:remask=drift]
sparsity: 0.5:0.7:0.1
limit: 0.1
```

is what `dart-eval run --model ./my-model --tasks arc,hellaswag --method dense,dart,griffin:remask=drift --sparsity
0.5:0.7:0.1 --limit 0.1` says; `dart-eval run --config run.yaml` reads it, and the command line wins over it. In Python
the options of `dart_eval.evaluate` have the same names. On the command line they may be written with dashes or, as in
lm-eval, with underscores.

An option that takes a list may be given again: `--tasks arc --tasks hellaswag` asks both.

Who comes from lm-eval may write `--model_args pretrained=NAME,dtype=bfloat16`, `--apply_chat_template`,
`--fewshot_as_multiturn`, `--gen_kwargs`, `--system_instruction`, `--include_path` and `--output_path`; among the
`model_args` also `peft`, `load_in_4bit`, `enable_thinking` and `think_end_token`.
"""


def page() -> str:
    """The text of docs/options.md."""
    lines = [HEAD]
    for panel in options.PANELS:
        lines += [f"## {panel}\n", "| option | what it means | default |", "| --- | --- | --- |"]
        for name in DEFAULTS:
            if about(name).panel == panel:
                words = f" One of {', '.join(choices_of(name))}." if choices_of(name) else ""
                default = default_of(name) or ("off" if DEFAULTS[name] is False else "")
                lines.append(f"| `{name}` | {_cell(help_of(name) + words)} | {_cell(default)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
