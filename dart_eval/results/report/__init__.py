"""The report: one self-contained HTML page of a results folder, for people.

`build` goes from records to text: each section's module turns records into plain data, `charts` draws (and knows no
records), `page` puts it into the template. The page asks the network for nothing and trusts no name or text in it.
"""

from dart_eval.results.report.build import Report, build

__all__ = ["Report", "build"]
