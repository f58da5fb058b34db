"""docs/models.md from the rows of the matrix, and the line of each row."""

from tests.matrix.check import CLAIMS
from tests.matrix.test_images import KINDS
from tests.matrix.types import NOT_MADE, OTHERS, VARIANTS

HEAD = """# Models

*Made by `scripts/models_page.py` with transformers {version}; a test makes every row anew.*

Each type of causal language model in transformers, as a tiny random model: what this project does with it, and the
line that a user sees where it is refused. A model is looked at before it is pruned: one whose FFN does something else
than its family's is refused too.

**masked**: a decoded token under a mask equals one of the model without those neurons. **generation**: without sparsity
it generates what the model does, and at 50 % every decoded token reads half of the FFN. **scoring**: answers in batches
with padding and a shared context score as each one alone does, and as plain forwards do. **choices**: tokens choose
their neurons, by |h| exactly the largest. **previews**: they choose by the first bits of the weights. **dart**: the
sparsity is spread by depth (of several FFNs in one layer by what they add together), and new masks come while it
decodes. **copied**: copies of the kept neurons' weights are multiplied, and give the same numbers; so do kernels
that read the rows alone which a token chooses.

Of mixtures of experts the sparsity is the share of the routed neurons, those of a token's experts, that it does not
read; their activations count with the router's weight. A mask has equally many neurons of each expert of a layer; a
layer with one more or less makes up for what is rounded, and no token reads more than the label. A mask ranks the
neurons of an expert by the prompt's tokens that had it, be it a single one; those of an expert that none had by the
norms of their columns of down. Experts that every token has are ordinary FFNs.

{right} of {all} types pass the first four checks, and {good} all seven.

| type | FFN | masked | generation | scoring | choices | previews | dart | copied |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
REFUSED = """
## Refused

| type | what it says |
| --- | --- |
"""
IMAGES = """
## Images beside text

Of these the language model is pruned where they are given text alone. Tests hold masks, generation, scoring and choices
of tiny ones to what the table above says of its columns: {kinds}.
"""
OTHER_TYPES = """
## No causal language models by themselves

transformers lists these among the causal ones, too. They are encoders with a head, translators, models of speech or
images, and drafts for another model: {names}.
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
