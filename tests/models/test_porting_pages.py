"""The porting pages about libraries that `make test` does not have, each as a program of its own.

A process for each: Keras reads its backend from the environment when it is imported, and torch and JAX share no state.
"""

import subprocess
import sys
from pathlib import Path

import pages
import pytest

PORTING = Path(__file__).parents[2] / "docs" / "porting"


@pytest.mark.models
@pytest.mark.parametrize("page", ["transformers", "onnx", "keras", "mlx"])
def test_the_page_runs(page, tmp_path):
    program = tmp_path / f"{page}_page.py"  # not the library's own name
    program.write_text(pages.program(PORTING / f"{page}.md"))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
