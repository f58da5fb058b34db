"""What tests of the evaluation share."""

import pytest

from dart_eval.evaluation.tasks import Tasks

INDEX = {}  # lm-eval's thousands of tasks


@pytest.fixture(scope="module", autouse=True)
def indexed_once():
    """The entries that all tasks would be looked for in anew are made by the first that look for one."""
    stock = Tasks.index_all

    def index_all(self):
        if not INDEX:
            stock(every := Tasks())
            INDEX.update(every.manager.task_index)
        if not self._complete:
            self.manager._index, self._complete = {**INDEX, **self.manager._index}, True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tasks, "index_all", index_all)
        yield
