"""The cases, and the numbers of each as plain data and numpy arrays."""

from functools import partial

import torch
from transformers import LogitsProcessor

from tests.golden import surface
from tests.golden.cases import CONFIGS, NEW_TOKENS, PROMPTS, QUESTIONS, SETTINGS, TEXTS, model, tokens
from tests.helpers.requests import words
from tests.helpers.sessions import generate


def measure(family, name):
    """The numbers of a setting on a family's model.

    Returns:
        `sequences`, of each prompt in a padded batch by masks; `copied`, the same of the first prompt alone (of all
        where they have one mask) on copies of the kept rows, which must equal it; `batch` and `alone`, what those two
        runs tell of all their sequences; `scores`, the answers in every scope; `cost`.
    """
    setting, tiny = SETTINGS[name], model(family)
    found = {}
    if setting.decodes:
        found["sequences"], found["batch"] = _decode(tiny, setting, "masked", PROMPTS)
        alone = PROMPTS if setting.shared_mask else PROMPTS[:1]
        found["copied"], found["alone"] = _decode(tiny, setting, "auto", alone)
    if setting.scores:
        found["scores"] = surface.scores(tiny, setting, QUESTIONS)
    found["cost"] = surface.costs(tiny, setting, context=len(PROMPTS[0]))
    return found


def _decode(tiny, setting, execution, prompts):
    """Numbers of each prompt, and of all together; the prompts are padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([(0,) * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([(0,) * (width - len(p)) + (1,) * len(p) for p in prompts])
    rows, first = range(len(prompts)), []

    class AfterThePrompt(LogitsProcessor):  # of a plain function transformers parses the signature at every token
        def __call__(self, input_ids, scores):
            first.extend(surface.masks(session, row) for row in rows if len(first) < len(rows))
            return scores

    with surface.session_of(tiny, setting, execution) as session:
        output = generate(tiny, ids, NEW_TOKENS, mask, logits_processor=[AfterThePrompt()])
        logits = torch.stack(output.logits, 1).float().numpy()
        sequences = [
            {
                "masks after the prompt": first[row],
                "masks after the last token": surface.masks(session, row),
                "text": output.sequences[row, width:].tolist(),
                "logits": logits[row],
                **surface.seen_of(session, row),
            }
            for row in rows
        ]
        return sequences, surface.seen_of_all(session)


def measure_texts(family, name):
    """The numbers of a setting as lm-eval's model: texts up to a stop sequence, and a perplexity."""
    prompts = [words(tokens(n, seed=30 + n)) for n in (9, 28, 17)]
    return surface.run_as_lm(model(family), SETTINGS[name], prompts, words(tokens(45, seed=7)), stop="w7")


# Name -> what measures it.
CASES = {
    f"{family}, {name}": partial(measure, family, name)
    for family in CONFIGS
    for name, setting in SETTINGS.items()
    if family in setting.families
}
CASES |= {f"{family}, {name}, texts": partial(measure_texts, family, name) for family in CONFIGS for name in TEXTS
          if family in SETTINGS[name].families}  # fmt: skip
