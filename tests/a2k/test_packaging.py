"""The wheel, installed outside the checkout, has all it needs to redraw a picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]

SCRIPT = """
import a2k, a2k_kernels, importlib.metadata, pathlib, sys
installed = pathlib.Path(sys.argv[1])
for package in (a2k, a2k_kernels):
    folder = pathlib.Path(package.__file__).parent
    assert folder.parent == installed, folder
    assert (folder / "py.typed").is_file()
assert importlib.metadata.version("a2k") == a2k.__version__
print(a2k.StyleTransfer().stylize("photo.png", "style.png").size)
"""


@pytest.mark.slow
def test_wheel_stylizes_outside_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels, installed, work = (tmp_path / name for name in ("wheels", "installed", "work"))
    work.mkdir()
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", ROOT, source], check=True)  # no stale build folder, no untracked file
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, source], check=True)
    (wheel,) = wheels.glob("a2k-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)

    Image.effect_mandelbrot((65, 48), (-3, -2.5, 2, 2.5), 100).convert("RGB").save(work / "photo.png")
    Image.linear_gradient("L").convert("RGB").save(work / "style.png")
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", SCRIPT, installed]
    result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "(65, 48)", result.stderr
    scripts = (installed / "bin" / "a2k").read_text()
    assert "a2k.cli" in scripts
