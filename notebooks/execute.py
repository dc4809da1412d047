"""Runs the notebooks from clean kernels and stores what they print: python notebooks/execute.py [NAME ...]

What is stored is what a reader needs: no progress bars and warnings, nothing about times and versions, of which the
hashes of the code that travels are one.
"""

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent
CODE_HASH = re.compile(r"\bsha256 [0-9a-f]{64}\b")
SECONDS = 900  # for one cell; one of them trains for eight minutes


def executed(path: Path) -> Any:
    """The notebook with the outputs of a fresh run in its own folder.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    return _cleaned(notebook)


def _cleaned(notebook: Any) -> Any:
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _merged([output for output in cell.outputs if output.get("name") != "stderr"])
            for output in cell.outputs:
                if "text" in output:
                    output.text = CODE_HASH.sub("sha256 ...", output.text)
                _keep_smaller_image(output.get("data", {}))
    return notebook


def _merged(outputs: list[Any]) -> list[Any]:
    """Text that came in pieces, as they happened to arrive, becomes one output."""
    merged: list[Any] = []
    for output in outputs:
        if merged and output.output_type == merged[-1].output_type == "stream":
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def _keep_smaller_image(data: dict[str, Any]) -> None:
    """PIL shows each image twice, as PNG and as JPEG."""
    forms = sorted((name for name in data if name.startswith("image/")), key=lambda name: len(data[name]))
    for name in forms[1:]:
        del data[name]


def main() -> None:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            nbformat.write(executed(path), path)
            print(f"Executed {path.name}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
