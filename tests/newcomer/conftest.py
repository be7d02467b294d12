"""A new user's machine: the wheel in an environment of its own, an empty home, and the ``engine`` command."""

import shlex
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
from PIL import Image
from support.timed import run
from support.wheel import ROOT, build_wheel

PHOTO = ROOT / "benchmarks" / "photos" / "life-crop.jpg"


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Folder of an environment with the wheel, and with the packages that it needs from the running one.

    A path in a .pth file does not read the .pth files found there: an editable installation stays out of reach.
    """
    folder = tmp_path_factory.mktemp("newcomer")
    wheel = build_wheel(tmp_path_factory.mktemp("tree"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(pip, check=True)
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    with open(f"{packages}/dependencies.pth", "w") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    return folder / "venv"


class Machine:
    """Commands in one folder with one home; each is recorded for the table at the end of the tests."""

    def __init__(self, venv, folder, home, record):
        self.venv, self.folder, self._record = venv, folder, record
        self._environment = {
            "PATH": f"{venv / 'bin'}:/usr/bin:/bin",
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_DATA_HOME": str(home / "data"),
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",  # lines arrive when they are printed, as on a terminal
        }

    def __call__(self, line, code=0, interrupt=None):
        """Run a command line; it must end with this exit code, without a traceback."""
        words = shlex.split(line)
        done = run(words, self.folder, self._environment, interrupt)
        self._record("command", (line, done.wall, done.cpu, done.peak))
        assert done.code == code, f"{line}\n{done.out}\n{done.err}"
        assert "Traceback" not in done.out + done.err
        return done

    def refuses(self, line, code):
        """The only line on stderr of a command that must be refused."""
        done = self(line, code)
        (text,) = done.err.splitlines()
        assert text.startswith("engine: "), text
        return text

    def pixels(self, name):
        """A picture in the folder, float64 [height, width, channels]."""
        with Image.open(self.folder / name) as image:
            return np.asarray(image).astype(float)

    def photo(self, name, width, height):
        """Write the photograph in this size."""
        with Image.open(PHOTO) as image:
            image.resize((width, height), Image.Resampling.LANCZOS).save(self.folder / name)

    def names(self):
        """Names in the folder."""
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Home that has rendered before, as most commands find it."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def machine(installed, home, tmp_path, record_property):
    """Machine with an empty working folder."""
    return Machine(installed, tmp_path, home, record_property)


@pytest.fixture
def new_machine(installed, tmp_path_factory, tmp_path, record_property):
    """Machine on which nothing has been rendered."""
    return Machine(installed, tmp_path, tmp_path_factory.mktemp("home"), record_property)
