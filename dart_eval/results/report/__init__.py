"""The report: one self-contained HTML page of a results folder, which trusts no name or text in it."""
