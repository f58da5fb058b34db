"""Write docs/methods.md from the registry. A test says when the page is out of date."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from method_cards import card

from dart_eval.cli.describe import part_rows
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.registry import BUILT_IN, PARTS

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
SLOTS = {
    "score": "how much a neuron matters, from the tokens of a context, a calibration text, or the weights",
    "mask": "which neurons a sequence may use",
    "draw": "how a mask from the prompt is taken from the scores",
    "remask": "when a mask from the prompt is made anew while a sequence is decoded, and from what",
    "choice": "which neurons of the mask a token computes, matrix by matrix",
    "image": "what a token reads of gate and up before it chooses",
    "allocation": "how the sparsity is spread over layers",
    "compensation": "what stands in for the neurons that were left out",
    "entries": "which weights inside the matrices a token reads, where that is no matter of neurons",
    "routing": "which of its experts a token has",
}
HEAD = """# Methods and their parts

*Made by `scripts/methods_page.py` from the code; `dart-eval ls methods` and `dart-eval ls parts` show the same.*

A pruning method is a composition of parts. `griffin` makes a mask from the prompt and keeps it; give it another part
in the slot `remask`, and it follows the text:

```console
dart-eval run --tasks smoke_drift --method griffin,griffin:remask=drift:remask.window=8
```

A colon separates settings. `SLOT=PART` puts a part into a slot, and `SLOT.FIELD=VALUE` sets a field of the part that
is there. Their order does not matter. In a YAML file and in Python the second method is written so:

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

A method is known by its parts, however it is spelled. `dart:remask=never:allocation=uniform:score.norm=l2` has the
parts of `griffin`, and is not run beside it.

**Sparsity counts bytes.** At sparsity 0.7 a decoded token reads 0.3 of the FFN's weights, whatever the parts. `griffin`
reads all three matrices for 30 % of the neurons. `dart-choice` has 48 % of them in its mask: a token reads gate for
these, up for the 26 % that it takes of them, and down for the 16 % with the largest |h|. Together they are
(.48 + .26 + .16) / 3 = .30 of the weights. In general a token that reads gate (or up) for the whole mask reads

    (mask + taken + written) / 3

of the weights of a gated FFN, and (mask + taken) / 2 of a plain one. Here `mask` is the share of the neurons that are
in the mask, `taken` the share that the token takes, and `written` the share of which it reads down (`write_share` of
those taken). Each layer's counts are rounded down, and what is left over goes to the largest fractions, so that the sum
over all layers is exact to the neuron. Where the mask is everything (`cats`), gate alone is a third of the weights, and
a sparsity that leaves less than that is refused. Only `top-p` has no sparsity: what it reads differs from token to
token, and is measured. With `choice.threshold=calibrated` a token takes all neurons above a number, which each layer
has from the calibration text for that sparsity: what is read then varies around the label, and is measured too.

**`dart-plus` in five sentences.** FFN weights are served as whole numbers with a scale for 128 weights. Every token
reads the first bits of gate and up, as one stream: the preview. It then reads the other bits, and a whole column of
down, for the neurons that the preview leaves most open. As many other neurons write what the preview shows, through
the first bits of their columns of down. So the more a neuron matters to a token, the more bits of it are read.

```
                gate, up (rows)            down (columns)
neuron          first bits   other bits    first bits   other bits
most open       read         read          read         read
next            read                       read
all others      read
```

| read | weights as | first bits | columns of gate and up that a preview reads |
|---|---|---|---|
| .36 to .51 | 8 bits | 4 | all |
| .25 to .36 | 6 bits | 4 | all |
| .19 to .25 | 6 bits | 3 | all |
| .13 to .19 | 5 bits | 3 | a fifth in 3 bits, three fifths in 2 |
| below .13 | 4 bits | 3 | a fifth in 3 bits, three tenths in 2 |

The share that is read settles the rest ([setting](../results/setting.md) says how the table was chosen). In the last
two rows columns are skipped in tiles of 64: those in which x has the smallest norm. Columns lie in the order of their
mean square on the calibration text there. `image.code`, `image.group`, `image.bits`, `choice.fine`, `choice.rough` and
`choice.tile` set all this by hand.

Prompts multiply the whole numbers, too, so the model needs no other weights: doubts and norms of 16 bits a row are all
that is kept beside them. KL from dense is not told under `dart-plus`: dense would need contexts of its own. More than
all of the whole numbers cannot be read, so sparsities between 0 and about .49 are refused. Weights that `--ffn-bits`
has rounded, or that a checkpoint stores as whole numbers (GGUF, GPTQ, AWQ, torchao), stay as they are, and the preview
reads half of their bits. What a value mends is measured on what the neuron writes, |h| times the norm of its column of
down. Bytes count with all scales, doubts and norms, and the label is met to less than a neuron.

An **image** is what a token reads of gate and up before it chooses: the first bits of the weights
(`image=first-bits`, nothing is stored twice) or a coarse copy (`image=copy`). It counts with its bits. Where x is
thinned to its largest entries (`choice.thin` of `prox`), an image counts with those columns alone, and with the scales
of all groups.

**Candidates are read to be ranked.** At sparsity 0.7 a token of `pop` reads gate and up for 32.5 % of the neurons: the
22.5 % that are sure, and 10 % as candidates. It reads down for 25 %, so that (2 * .325 + .25) / 3 = .30.

**GRIFFIN can draw its mask.** `griffin:draw=sample` draws neurons in proportion to their scores, and
`griffin:draw=sample:draw.best=0.5` draws half of the mask, beside the neurons with the highest scores. `draw.seed` (or
`--seed`) decides what is drawn.

**Rounding is the control.** `--ffn-bits 4` rounds the FFN weights to 4 bits, with a scale of 16 bits for every 32
weights, before anything else. Read counts bytes against the model's own 16 bits: rounding alone reads 4.5 / 16 = .28.
Every method runs on such weights too, and its sparsity then is of these weights. `griffin` at sparsity 0.5 on 4 bits
reads half of their codes and of the scales of gate and up. Of down it reads all scales, since each stands for 32
neurons: 14.6 % of the 16-bit bytes in all. Choices through previews (`dart-plus`) pay for these scales first: 14.1 %.

These codes are symmetric. `--ffn-bits q4_k` rounds as llama.cpp's Q4_K does: 32 weights share a scale and a minimum of
6 bits, and 256 weights share the factors of 16 bits that these are multiples of. That is 4.5 bits a weight, too, with a
fifth less squared error on normally distributed weights. `q3_k` (3.44 bits; 16 weights share a scale of 6 bits, and
there is no minimum) and `q5_k` (5.5) are its neighbours. With `--ffn-bits` prompts run on rounded weights; under the
method `rounding` they run on the weights as they are, as they do under a pruner, and decoded tokens read rounded ones.

**Another granularity.** `teal` and `wina` leave out input channels: columns of a matrix, those whose inputs matter
least to a token. `wanda` leaves out single weights, the same for every text. Read counts the weights that are left,
and with `entries.pattern=2:4` the 2 bits that say where each of them stands. They prune no neurons, so the board shows
them in levels of their own, and tests no method of neurons against them.

**Experts** can be left out whole, too. A token of `fewer-experts` has the best of its routed experts alone: the control
for pruners of their neurons, at equal bytes. It meets a sparsity in whole experts and never reads more than the label;
one that leaves a layer no expert is left out with a line. `drop-experts` takes half of the experts out for all tokens,
after REAP. A token then has as many as before, so it saves memory and no reads: its read is 1.00, and the board shows
it in a level of its own. Both are refused for models without experts.

An **upper bound** uses what can be known only afterwards: the activations of the very token for which it chooses, or
tokens that come later. It bounds methods that read neurons whole; one that reads fewer bits of more neurons, as
`dart-plus` does, can keep more.
"""


def page() -> str:
    """The text of docs/methods.md."""
    lines = [HEAD, "## Methods\n", "| name | what it does | its parts |", "| --- | --- | --- |"]
    for method in BUILT_IN:
        spelled = dataclasses.replace(method, name=Pruner.name).spec
        named = ", ".join(f"`{part}`" for part in spelled.split(":")[1:]) or "only those below"
        lines.append(f"| `{method.name}` | {_cell(method.summary)} | {_cell(named)} |")
    lines.append(
        "\nParts that are not named are `mask=everything`, `choice=none`, `allocation=uniform` and "
        "`compensation=none`; a method with `entries` or a `routing` has none of the others but an allocation.\n"
    )
    lines.append("## One by one\n")
    lines.append(
        "What every token reads before anything is chosen sets the lowest read (on the shape of Llama 3.1 8B). A\n"
        "second program derives each method from its paper alone, and the package must agree with it. In the programs\n"
        "a, u and h are act(gate x), up x and their product, and `Plain` is a model that is run by hand.\n"
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
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
