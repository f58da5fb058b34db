"""`lighteval custom`: a model under a method in lighteval's own command line, with the numbers of `dart-eval run`.

    lighteval custom "method=griffin,sparsity=0.5" "$(python -m dart_eval.sweep.lighteval_model)" "arc:easy|0"

The command prints the path of this file, and the name of the model holds the arguments. Few-shot examples, prompts and
metrics are lighteval's. Tokens, scores and texts are those of lm-eval's `--model dart`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lighteval.models.abstract_model import LightevalModel
from lighteval.models.custom.custom_model import CustomModelConfig
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.prompt_manager import PromptManager
from lighteval.tasks.requests import Doc
from lm_eval.api.instance import Instance
from lm_eval.utils import simple_parse_args_string

from dart_eval.sweep.dart_lm import DartLM


class DartModel(LightevalModel):
    """A model that is pruned as long as this object lives.

    Args:
        config: its `model_name` holds the arguments of `DartLM` (`pretrained=./llama,method=griffin,sparsity=0.5`), or
            is a model alone. `chat_template=False` leaves out the tokenizer's template, which lighteval uses.
    """

    def __init__(self, config: CustomModelConfig) -> None:
        name = config.model_name
        given: dict[str, Any] = simple_parse_args_string(name) if "=" in name else {"pretrained": name}
        chat = given.pop("chat_template", True)
        self.config, self._lm = config, DartLM(**given)
        self._chat = chat and self.tokenizer.chat_template is not None
        self._prompts = PromptManager(self._chat, self.tokenizer, config.system_prompt)
        # lighteval's cache of answers knows neither the weights nor our version.
        self._cache = SimpleNamespace(_init_registry=lambda registry: None)

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self._lm.tokenizer

    @property
    def add_special_tokens(self) -> bool:
        """Whether prompts have the tokenizer's special tokens: a chat template writes its own."""
        return not self._chat

    @property
    def max_length(self) -> int:
        """Tokens, context and continuation together."""
        return self._lm.max_length

    def loglikelihood(self, docs: list[Doc]) -> list[ModelResponse]:
        """Return the log-likelihood of each choice of each document, after its prompt."""
        prompts = [self._prompts.prepare_prompt(doc) for doc in docs]
        asked = [(prompt, choice) for prompt, doc in zip(prompts, docs, strict=True) for choice in doc.choices]
        answers = iter(self._lm.loglikelihood(_instances("loglikelihood", asked)))
        responses = []
        for prompt, doc in zip(prompts, docs, strict=True):
            scores = [next(answers) for _ in doc.choices]
            tokens = [self._lm._encode_pair(prompt, choice) for choice in doc.choices]
            responses.append(ModelResponse(
                input=prompt, input_tokens=tokens[0][0], output_tokens=[after for _, after in tokens],
                logprobs=[value for value, _ in scores], argmax_logits_eq_gold=[greedy for _, greedy in scores],
            ))  # fmt: skip
        return responses

    def loglikelihood_rolling(self, docs: list[Doc]) -> list[ModelResponse]:
        """Return the log-likelihood of each document: that of its scored tokens, scaled up to all its bytes."""
        texts = ["".join([self._prompts.prepare_prompt(doc), *(doc.choices or ())]) for doc in docs]
        answers: list[Any] = self._lm.loglikelihood_rolling(
            _instances("loglikelihood_rolling", [(text,) for text in texts])
        )
        return [
            ModelResponse(input=text, logprobs=[float(a) / a.coverage if a.coverage else 0.0])
            for text, a in zip(texts, answers, strict=True)
        ]

    def greedy_until(self, docs: list[Doc]) -> list[ModelResponse]:
        """Return the texts that follow each document's prompt; several samples are drawn."""
        asked = []
        for doc in docs:
            settings = {"until": [] if self._chat else list(doc.stop_sequences or ()), "do_sample": doc.num_samples > 1}
            if doc.generation_size is not None and doc.generation_size > 0:
                settings["max_gen_toks"] = doc.generation_size
            asked += [(self._prompts.prepare_prompt(doc), settings)] * doc.num_samples
        answers = iter(zip(asked, self._lm.generate_until(_instances("generate_until", asked)), strict=True))
        responses = []
        for doc in docs:
            pairs = [next(answers) for _ in range(doc.num_samples)]
            texts = [text for _, text in pairs]
            tokens = [self._lm.tok_encode(text, add_special_tokens=False) for text in texts]
            responses.append(ModelResponse(input=pairs[0][0][0], text=texts, output_tokens=tokens))
        return responses


def _instances(kind: Any, asked: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, arguments, i, metadata=(kind, i, 1)) for i, arguments in enumerate(asked)]


if __name__ == "__main__":
    print(__file__)
