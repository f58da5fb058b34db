"""Tables in Markdown and LaTeX: bold cells, and texts that would break them."""

import shutil
import subprocess

import pytest

from dart_eval.results.show import Table, latex, markdown
from tests.helpers.records import table_body

HOSTILE = Table(
    "50 % of A_1 & $B$ #3", ["method", "a|b", "{c}"],
    [["x_y^z~", "1 ± 2", r"\input{x}"], ["<b>", '"q"', "p | q"], ["- [1]", "", ""]],
    ["100 % sure_ & done < 3"], frozenset({(0, 1)}),
)  # fmt: skip


def test_markdown_marks_bold_and_keeps_its_columns():
    body = table_body(markdown(HOSTILE).replace(r"\|", "/"))
    assert body[1] == ["x_y^z~", "**1 ± 2**", r"\input{x}"]
    assert [len(row) for row in body] == [3, 3, 3, 3]


def test_latex_escapes():
    text = latex(HOSTILE)
    assert r"\textbf{1 $\pm$ 2}" in text and r"\textbackslash{}input\{x\}" in text


@pytest.mark.process
def test_latex_compiles(tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("no LaTeX at hand (pdflatex)")
    document = "\n".join([
        r"\documentclass{article}", r"\usepackage[T1]{fontenc}", r"\usepackage{booktabs}", r"\begin{document}",
        latex(HOSTILE), r"\end{document}",
    ])  # fmt: skip
    (tmp_path / "t.tex").write_text(document, encoding="utf-8")
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
