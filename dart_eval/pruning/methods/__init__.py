"""One small file per method. The registry in `dart_eval.pruning.registry` lists them."""
