"""A fresh virtual environment into which distributions of this repository are installed, as users do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
THIRD_PARTY = ROOT / "tests" / "fixtures" / "third_party"
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("KERNELRY_", "PYTHON", "VIRTUAL_ENV"))}


class Venv:
    """A virtual environment of the running Python, and copies of the distributions to build in."""

    def __init__(self, folder):
        self.folder = folder / "venv"
        self.sources = folder / "sources"
        self.bin = self.folder / ("Scripts" if os.name == "nt" else "bin")
        build_outputs = shutil.ignore_patterns("__pycache__", "build", "dist", "*.egg-info")
        shutil.copytree(ROOT / "core", self.sources / "core", ignore=build_outputs)
        shutil.copytree(ROOT / "plugins", self.sources / "plugins", ignore=build_outputs)
        shutil.copytree(THIRD_PARTY, self.sources / "third_party", ignore=build_outputs)
        subprocess.run([sys.executable, "-m", "venv", self.folder], env=CLEAN, check=True)

    def pip(self, *arguments):
        done = self.run("pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:])
        assert done.returncode == 0, done.stderr

    def install(self, *what):
        """As pip does, in a tenth of the time where there is uv."""
        uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if uv is None:
            self.pip("install", *what)
            return
        command = [uv, "pip", "install", "--quiet", "--python", self.bin / "python", *what]
        done = subprocess.run(command, env=CLEAN, cwd=self.sources, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def python(self, code):
        """Runs code in which any warning is an error, and returns what it prints as JSON."""
        done = self.run("python", "-W", "error", "-c", code)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def run(self, command, *arguments, times=""):
        compiled = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # installing is tested here, not compiling
        environ = {**compiled, **CLEAN, "JAX_PLATFORMS": "cpu", "KERNELRY_MEASUREMENTS": times}
        command = [self.bin / command, *arguments]
        return subprocess.run(command, env=environ, cwd=self.sources, capture_output=True, text=True, check=False)

    def kernels(self):
        return self.python("import json, kernelry; print(json.dumps([k.name for k in kernelry.kernels()]))")

    def plugins(self):
        return self.python("import json, kernelry; print(json.dumps([p.name for p in kernelry.plugins()]))")
