"""Execute docs/notebook.ipynb again and keep its outputs, without Jupyter.

python docs/notebook.py     in a folder with runs/demo, or it trains that first (about ten minutes on two cores)
"""

import ast
import base64
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import matplotlib

NOTEBOOK: Final = Path(__file__).parent / "notebook.ipynb"


def code_cells(notebook: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Its cells of code, in order."""
    return (cell for cell in notebook["cells"] if cell["cell_type"] == "code")


def execute(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs of one cell, as Jupyter would keep them: text, the value of a last expression, figures."""
    from matplotlib import pyplot

    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(text)})
    if value is not None:
        outputs.append({"output_type": "execute_result", "metadata": {}, "data": {"text/plain": lines(repr(value))}})
    for number in pyplot.get_fignums():
        picture = io.BytesIO()
        pyplot.figure(number).savefig(picture, format="png", dpi=72, bbox_inches="tight", metadata={"Software": None})
        data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
        pyplot.close(number)
    return outputs


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    matplotlib.use("Agg")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for count, cell in enumerate(code_cells(notebook), start=1):
        cell["outputs"] = execute("".join(cell["source"]), names)
        cell["execution_count"] = count
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = count
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stderr.write(f"wrote {NOTEBOOK.name}: {NOTEBOOK.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
