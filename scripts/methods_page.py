"""Write docs/methods.md from the registry. A test says when the page is out of date."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

from method_cards import card

from dart_eval.cli.describe import part_rows
from dart_eval.pruning.masks.allocations import FromTable, shipped_tables
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.registry import BUILT_IN, PARTS

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
SLOTS = {
    "score": "how much a neuron matters, by the tokens of a context, a calibration text, or the weights",
    "mask": "which neurons a sequence may use",
    "draw": "how scores become a mask from the prompt",
    "remask": "when decoding replaces the mask from the prompt, and from which tokens",
    "choice": "which neurons of the mask a token computes, matrix by matrix",
    "image": "the preview: what a token reads of gate and up before it chooses",
    "allocation": "how the sparsity is spread over layers",
    "compensation": "what replaces the neurons that are left out",
    "entries": "which weights of a matrix a token reads, in methods that do not prune neurons",
    "routing": "which of its experts a token uses",
}
HEAD = """# Methods and their parts

*Made by `scripts/methods_page.py` from the code; `dart-eval ls methods` and `dart-eval ls parts` show the same.*

A method is a composition of parts, one per slot. `griffin` makes a mask from the prompt and keeps it. With another part
in the slot `remask` it follows the text:

```console
dart-eval run --tasks smoke_drift --method griffin,griffin:remask=drift:remask.window=8
```

Colons separate settings. `SLOT=PART` puts a part into a slot, and `SLOT.FIELD=VALUE` sets a field of that part. The
order does not matter. YAML and Python spell the second method like this:

```yaml
method:
  - griffin
  - griffin: {remask: {part: drift, window: 8}}
```

```python
from dart_eval import prune
from dart_eval.pruning.masks.remasks import OnDrift

with prune(model, "griffin", sparsity=0.7, remask=OnDrift(window=8)) as session:
    model.generate(**inputs)
```

A method is identified by its parts, not its spelling. `dart:remask=never:allocation=uniform:score.norm=l2` has the
parts of `griffin`, so a run with both evaluates them only once.

**Sparsity counts bytes.** At sparsity 0.7 a decoded token reads 30 % of the FFN weights, whatever the method. `griffin`
reads all three matrices for 30 % of the neurons. `dart-choice` has 48 % of the neurons in its mask. A token reads gate
for the whole mask, up for the 26 % of the neurons that it chooses, and down for the 16 % with the largest |h|. The sum
is (.48 + .26 + .16) / 3 = .30. In general, a token that reads gate (or up) for the whole mask reads

    (mask + chosen + written) / 3

of the weights of a gated FFN, and (mask + chosen) / 2 of a plain one. `mask` is the share of neurons in the mask,
`chosen` the share that the token chooses, and `written` the share whose down columns it reads (`write_share` of the
chosen ones). The count of each layer is rounded down, and the remainder goes to the layers with the largest fractions.
So all layers together meet the sparsity exactly, to the neuron.

- `cats` has all neurons in its mask. Gate alone is a third of the weights, so a lower read is refused.
- `top-p` has no sparsity. Its read differs from token to token, and is measured.
- With `choice.threshold=calibrated` a token chooses all neurons above a threshold. The calibration text sets it for
  each layer and sparsity. The read then varies around the label, and is measured.

**`dart-plus` in five sentences.** FFN weights are stored as codes, and 128 codes share a scale. Every token reads the
first bits of gate and up as one stream: the preview. For the neurons with the least certain previews it also reads the
other bits, and whole columns of down. An equal number of other neurons write their previewed values through the first
bits of their down columns. A neuron that matters more to a token is thus read with more bits.

```
                gate, up (rows)            down (columns)
neuron          first bits   other bits    first bits   other bits
least certain   read         read          read         read
next            read                       read
all others      read
```

| read | bits of a code | first bits | columns of gate and up in the preview |
|---|---|---|---|
| .36 to .51 | 8 | 4 | all |
| .25 to .36 | 6 | 4 | all |
| .19 to .25 | 6 | 3 | all |
| .13 to .19 | 5 | 3 | a fifth in 3 bits, three fifths in 2 |
| below .13 | 4 | 3 | a fifth in 3 bits, three tenths in 2 |

The read sets the rest of the table ([setting](../results/setting.md) says how the table was chosen). In the last two
rows the preview skips columns in tiles of 64: the tiles where x has the smallest norm. For this the columns are sorted
by their mean x^2 on the calibration text. `image.code`, `image.group`, `image.bits`, `choice.fine`, `choice.rough` and
`choice.tile` set the table's values by hand.

- **Memory.** Prompts multiply the codes, too, so the model needs no other weights. The extra memory is the previews'
  uncertainties and norms, 16 bits a row each.
- **KL.** KL from dense is not measured under `dart-plus`: dense would have to run every context separately.
- **Sparsities.** A token cannot read more than all codes, so sparsities between 0 and about .49 are refused.
- **Rounded weights.** Weights that `--ffn-bits` rounds, or that a checkpoint stores as codes (GGUF, GPTQ, AWQ,
  torchao), do not change. The preview reads half of their bits.
- **Ranking.** Uncertainty counts by its effect on the output: |h| times the norm of the neuron's down column.
- **Bytes.** All scales, uncertainties and norms count. The sparsity is met to within less than a neuron.

A **preview** (slot `image`) is the first bits of the weights (`image=first-bits`, nothing is stored twice), a coarse
copy (`image=copy`), or another image listed below. Its bits count as read. If it uses only the largest entries of x
(`choice.thin` of `prox`), only the columns of these entries count, together with the scales of all groups.

**Candidates are read to be ranked.** At sparsity 0.7 a token of `pop` reads gate and up for 32.5 % of the neurons:
22.5 % core and 10 % candidates. It reads down for 25 %, so the sum is (2 * .325 + .25) / 3 = .30.

**GRIFFIN can draw its mask.** `griffin:draw=sample` draws neurons in proportion to their scores.
`griffin:draw=sample:draw.best=0.5` fills half of the mask with the highest scores, and draws the other half.
`draw.seed` (or `--seed`) is the seed of the draw.

**Rounding is the control.** `--ffn-bits 4` first rounds the FFN weights to 4 bits, with a scale of 16 bits for every 32
weights. The read is relative to the bytes of the model's own 16-bit weights: rounding alone reads 4.5 / 16 = 28 %. Most
methods also run on rounded weights; their sparsity then refers to the rounded bytes. `rounding`, `grinqh`, `decdec` and
all methods that read graded bits (`graded-*`, `oracle-layers`, `bits-by-position`) need 16-bit weights. On 4 bits,
`griffin` at sparsity 0.5 reads half of the codes, and half of the scales of gate and up. It reads all scales of down,
since each belongs to 32 neurons. The sum is 14.6 % of the 16-bit bytes. Methods with previews (`dart-plus`) subtract
these scales first and read 14.1 %.

These codes are symmetric. `--ffn-bits q4_k` rounds as llama.cpp's Q4_K does. There 32 weights share a scale and a
minimum of 6 bits each, as multiples of two 16-bit factors that 256 weights share. That is also 4.5 bits a weight, with
a fifth less squared error on normally distributed weights. `q3_k` has 3.44 bits (16 weights share a scale of 6 bits,
without a minimum), and `q5_k` 5.5. With `--ffn-bits` prompts run on rounded weights, too. Under the method `rounding`
prompts run on the original weights, as under a pruner, and only decoded tokens read rounded ones.

**Other granularities.** `teal` and `wina` leave out input channels: the columns of a matrix whose inputs matter least
to a token. `wanda` leaves out single weights, the same for every text. The read counts the remaining weights
and, with `entries.pattern=2:4`, 2 bits for the position of each. These methods prune no neurons, so the board shows
them in separate levels, and does not test them against methods that prune neurons.

`graded-both` reads gate and up twice: columns in graded bits for all neurons, then 2 more bits for the quarter of them
whose h is least certain. These bits are scattered over rows and columns: no memory layout lets a kernel read only them.
The second read of `graded-rows` takes whole rows of a tenth of the neurons again, as a kernel could.

`graded-layers` reads every matrix in full, for example in 4 bits, or in 5 where a token's input is large. The number of
tokens above the threshold varies with the text, so a record has the measured read. `bits-by-position` starts with the
higher number of bits (at sparsity 0.7 for 172 decoded tokens), then reads the lower one. Its read is 30 % at 256 tokens
(`entries.length`), higher on shorter texts and lower on longer ones.

**Experts.** `fewer-experts` gives a token only the best of its routed experts. It is the control for pruning the
experts' neurons, at equal bytes. It meets a sparsity in whole experts, and never reads more than the label. A sparsity
that leaves a layer without an expert is skipped with a note. `drop-experts` removes half of the experts for all decoded
tokens, after REAP. A token still uses the same number of experts, so it saves memory and no reads. Its read is 1.00,
and the board shows it in a level of its own. `graded-experts` reads all experts of a token, in more bits where the
router's weight is larger. Every token reads the same number of bits. With `routing.rank=none` all experts have the same
bits, which is the control for the router's weight. Shared experts are read whole by all three, and all three are
refused for models without experts.

An **upper bound** uses information that is available only afterwards: the activations of the token for which it
chooses, or later tokens. It bounds methods that read neurons whole. A method that reads fewer bits of more neurons,
such as `dart-plus`, can exceed it.
"""

TABLES = """`dart:allocation=table:llama-3.1-8b-70` takes a shipped table, at `--sparsity 0.7`. These are the tables of
the public code of DART. A name gives the model, the pruned percentage and the ablation: `no-mag` is
`allocation.magnitude=off` of `allocation=depth`, and `no-border` is `allocation.protect=off`. Three tables do not match
their names: `llama-3.2-3b-50` keeps .575, `llama-3.2-3b-50-no-mag-no-border` .514 and `llama-3.2-3b-72` .916 of the
neurons. A message names the sparsity that fits. `llama-3.2-3b-50-commented-out` is a comment in that code. It differs
from `llama-3.2-3b-50` in eight layers, and keeps .500. All names:
{}."""


def page() -> str:
    """The text of docs/methods.md."""
    lines = [HEAD, "## Methods\n", "| name | what it does | its parts |", "| --- | --- | --- |"]
    for method in BUILT_IN:
        spelled = dataclasses.replace(method, name=Pruner.name).spec
        named = ", ".join(f"`{part}`" for part in spelled.split(":")[1:]) or "the defaults"
        lines.append(f"| `{method.name}` | {_cell(method.summary)} | {_cell(named)} |")
    lines.append(
        "\nThe defaults are `mask=everything`, `choice=none`, `allocation=uniform` and `compensation=none`. A method "
        "with `entries` has no other part but an allocation, and one with a `routing` has no other part.\n"
    )
    lines.append("## One by one\n")
    lines.append(
        "The lowest read is the smallest share of the FFN weight bytes that the method takes, in steps of 1 %, on the\n"
        "shape of Llama 3.1 8B. For most methods a second program follows the paper alone; a test compares both. In\n"
        "formulas and programs a = act(gate x), u = up x and h = a u; `Plain` is a model that is run by hand.\n"
    )
    for method in BUILT_IN:
        lines += card(method)
    for slot, what in SLOTS.items():
        lines.append(f"## {slot}: {what}\n")
        for cls in PARTS:
            if cls.slot == slot:
                (title, summary), *fields = part_rows(cls)
                lines.append(f"**`{title}`** {summary}.\n")
                if fields:
                    lines += ["| field and default | what it means |", "| --- | --- |"]
                    lines += [f"| `{_cell(left.strip())}` | {_cell(text)} |" for left, text in fields] + [""]
                if cls is FromTable:
                    names = ", ".join(f"`{name}`" for name in shipped_tables())
                    lines.append(TABLES.format(textwrap.fill(names, 120, break_on_hyphens=False)) + "\n")
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
