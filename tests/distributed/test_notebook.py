"""The notebook of docs/notebooks: every cell runs, and it shows what the stored page shows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel matplotlib")
nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel matplotlib")
pytest.importorskip("ipykernel", reason="pip install ipykernel")
pytest.importorskip("matplotlib", reason="pip install matplotlib")
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "tour.ipynb"
# In the place of the notebook's own parameters: what a test has time for.
SMALL = "height, width, num_frames = 64, 64, 17\nsteps = 8"
CELL_SECONDS = 600


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def shown(cell: Any) -> set[str]:
    """Which of these a cell shows: text, PNG, WebP. Pillow adds a JPEG to each PNG of its own."""
    kinds = {"text" for one in cell.outputs if one.output_type == "stream" and one.name == "stdout"}
    return kinds | {
        kind
        for one in cell.outputs
        for kind in one.get("data", {})
        if kind in ("image/png", "image/webp")
    }


def text_of(cell: Any) -> str:
    return "".join(one.text for one in cell.outputs if one.output_type == "stream")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_cell_of_the_notebook_runs_and_shows_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This interpreter's kernel, whatever kernels the user has, and no file outside of tmp_path.
    monkeypatch.setenv("JUPYTER_PATH", str(Path(sys.prefix) / "share" / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook, stored = read(), {cell.id: cell for cell in code_cells(read())}
    (own,) = (
        cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", ())
    )
    own.source += f"\n{SMALL}"
    nbclient.NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    ).execute()

    made = code_cells(notebook)
    for cell in made:
        assert shown(cell) == shown(stored[cell.id]), cell.source
    texts = "\n".join(text_of(cell) for cell in made)
    assert "(17, 64, 64, 3) uint8 frames" in texts
    assert "ok - 2 ranks, 3 measured runs" in texts
    kinds = [kind for cell in made for kind in sorted(shown(cell)) if kind != "text"]
    assert kinds == ["image/png", "image/webp"] * 2 + ["image/png"] * 3


def test_the_stored_notebook_was_run_from_top_to_bottom_and_is_small() -> None:
    notebook = read()
    nbformat.validate(notebook)
    made = code_cells(notebook)
    assert [cell.execution_count for cell in made] == list(range(1, len(made) + 1))
    assert NOTEBOOK.stat().st_size < 500_000
    pictures = [
        one.data[kind]
        for cell in made
        for one in cell.outputs
        for kind in one.get("data", {})
        if kind in ("image/png", "image/webp")
    ]
    assert len(set(pictures)) == len(pictures) == 7
    texts = "\n".join(text_of(cell) for cell in made)
    assert not re.search(r"(?<![\w.])/(?:tmp|home|root|work|usr)/", texts)
    # Each code cell is explained by the cell above it.
    before = dict(zip((cell.id for cell in notebook.cells[1:]), notebook.cells, strict=False))
    assert all(before[cell.id].cell_type == "markdown" for cell in made)
