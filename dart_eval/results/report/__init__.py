"""The report: one self-contained HTML page of a results folder, for people.

`build` goes from the boards and their records to the page's data, `charts` draws, `page` puts all into the template.
The page asks the network for nothing and trusts no name or text in it.
"""

from dart_eval.results.report.build import Report, build

__all__ = ["Report", "build"]
