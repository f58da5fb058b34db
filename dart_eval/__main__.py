"""`python -m dart_eval` is `dart-eval`."""

from dart_eval.cli import main

if __name__ == "__main__":
    main()
