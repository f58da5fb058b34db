"""lm-eval's index of task names, which several sets of tasks share."""

from __future__ import annotations

from lm_eval.tasks import TaskManager


class Index:
    """lm-eval's index of task names: of some folders, and of its own thousands once somebody asks, which takes seconds.

    Args:
        folders: with YAML files.
    """

    def __init__(self, folders: list[str]) -> None:
        self.folders, self.complete = folders, False
        self.manager = TaskManager(include_path=folders, include_defaults=False)

    def whole(self) -> TaskManager:
        """The index with lm-eval's own tasks."""
        if not self.complete:
            self.manager, self.complete = TaskManager(include_path=self.folders, include_defaults=True), True
        return self.manager
