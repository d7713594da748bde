"""The tutorials as they are kept: run from top to bottom, with pictures, small and clean.

They run by ``pip install ".[tutorials]" && pytest --nbmake -n auto tutorials``.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 250_000


@pytest.fixture(params=TUTORIALS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def test_there_are_tutorials() -> None:
    assert TUTORIALS


def test_it_starts_with_its_question_and_an_equation(path: Path) -> None:
    assert re.fullmatch(r"\d\d_[a-z_]+", path.stem)
    first = load(path)["cells"][0]
    text = "".join(first["source"])
    assert first["cell_type"] == "markdown"
    assert text.startswith("# ")
    assert "?" in text
    assert "$$" in text


def test_it_was_run_from_top_to_bottom_without_errors(path: Path) -> None:
    notebook = load(path)
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {output["output_type"] for output in outputs(notebook)}
    assert "error" not in kinds
    streams = {output["name"] for output in outputs(notebook) if output["output_type"] == "stream"}
    assert streams <= {"stdout"}, "neither warnings nor progress bars"


def test_its_pictures_are_there(path: Path) -> None:
    """Axes that a cell ends with show their figure, in a notebook as users run it."""
    pictures = [
        base64.b64decode(output["data"]["image/png"])
        for output in outputs(load(path))
        if "image/png" in output.get("data", {})
    ]
    assert pictures
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_it_is_small_and_of_no_machine(path: Path) -> None:
    notebook, text = load(path), path.read_text(encoding="utf-8")
    assert path.stat().st_size < MOST_BYTES
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all("execution" not in cell["metadata"] for cell in notebook["cells"])
    prose = re.sub(r'"image/png": "[^"]*"', "", text)
    found = re.search(r"/home/|/root/|/tmp/|/work/|site-packages|0x[0-9a-f]{8}", prose)
    assert found is None, found


def test_its_links_lead_to_tutorials(path: Path) -> None:
    for name in re.findall(r"\]\((\w+\.ipynb)\)", path.read_text(encoding="utf-8")):
        assert (FOLDER / name).is_file(), name
