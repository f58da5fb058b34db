"""The options of a method in words: what `dart-eval ls` prints and docs/methods.md holds."""

from __future__ import annotations

from dart_eval.pruning.method import Method, Option, text_of


def described(method: Method) -> list[tuple[str, str]]:
    """Return the options that count as a user types them, with their values, and what they mean."""
    values = ((path, text_of(getattr(method, one.field)), one) for path, one in method.valid_options().items())
    return [(f"{path}={value}", meaning(one)) for path, value, one in values]


def meaning(option: Option) -> str:
    """Return the meaning of an option in one line, with its words and bounds."""
    if option.words:
        return f"{option.help} ({', '.join(option.words)})"
    bounds = (("at least", option.least), ("above", option.above), ("at most", option.most))
    words = ", ".join(f"{word} {bound:.10g}" for word, bound in bounds if bound is not None)
    return f"{option.help} ({words})" if words else option.help
