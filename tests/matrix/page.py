"""docs/models.md from the rows of the matrix, and the line of each row."""

from tests.matrix.check import CLAIMS
from tests.matrix.test_images import KINDS
from tests.matrix.types import NOT_MADE, OTHERS, VARIANTS

HEAD = """# Models

*Made by `scripts/models_page.py` with transformers {version}; a test makes every row anew.*

Each row is a type of causal language model in transformers, checked on a tiny random model. It says what works, and
shows the line that a user sees where the type is refused. Every model is verified before it is pruned: one whose FFN
computes something other than its family's FFN is refused, too.

**masked**: a token decoded under a mask gives the same logits as in a model without the pruned neurons. **generation**:
at sparsity 0 the text is the model's own, and at 50 % every decoded token reads half of the FFN. **scoring**: answers
in batches, with padding and a shared context, score the same as each one alone and as in plain forwards. **choices**:
tokens choose their neurons, and a choice by |h| takes exactly the largest. **dart**: sparsity is spread by depth (for
several FFNs in one layer, by what they add together), and re-masks happen while decoding. **copied**: multiplying
copies of the mask's weights gives the same numbers.

In a mixture of experts, sparsity is the share of the routed neurons (those of a token's experts) that the token does
not read. Activations count with the router's weight. A mask has equally many neurons of each expert of a layer. Layers
with one more or one fewer make up for rounding, and no token reads more than the label. A mask ranks an expert's
neurons by the prompt tokens that used it, even if only one did. If none did, it ranks them by the norms of their down
columns. Experts that every token uses are ordinary FFNs.

{right} of {all} types pass the first four checks, and {good} all six.

| type | FFN | masked | generation | scoring | choices | dart | copied |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
REFUSED = """
## Refused

| type | what it says |
| --- | --- |
"""
IMAGES = """
## Images beside text

In these types the language model is pruned, if the input is text alone. On a tiny model of each, tests check what the
table above calls masked, generation, scoring and choices: {kinds}.
"""
OTHER_TYPES = """
## Not causal language models by themselves

transformers also lists these types as causal language models. They are encoders with a head, translation models, models
of speech or images, and draft models for another model: {names}.
"""
LEFT_OUT = """
## Not measured

| type | why |
| --- | --- |
"""


def line(row):
    """A row of one of the two tables."""
    if row.refused:
        return f"| `{row.type}` | {row.refused} |"
    return f"| `{row.type}` | {row.kind} | " + " | ".join(row.claims[claim] or "yes" for claim in CLAIMS) + " |"


def page(rows, version):
    """The text of docs/models.md."""
    taken, refused = [r for r in rows if not r.refused], [r for r in rows if r.refused]
    types = [r for r in taken if r.type not in VARIANTS]
    good = sum(not any(r.claims.values()) for r in types)
    right = sum(not any(r.claims[claim] for claim in CLAIMS[:4]) for r in types)
    text = HEAD.format(version=version, good=good, right=right, all=len(types) + len(refused)) + "\n".join(
        map(line, taken)
    )
    text += "\n" + REFUSED + "\n".join(map(line, refused))
    text += "\n" + IMAGES.format(kinds=_listed(KINDS)) + OTHER_TYPES.format(names=_listed(OTHERS))
    return text + LEFT_OUT + "\n".join(f"| `{name}` | {why} |" for name, why in NOT_MADE.items()) + "\n"


def _listed(names):
    return ", ".join(f"`{name}`" for name in sorted(names))
