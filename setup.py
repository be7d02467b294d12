"""Build the viewer's page with npm before the package is collected. Without npm, the package has no page, and says so."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
SOURCES = ROOT / "viewer"
PAGE = ROOT / "engine" / "view" / "static" / "app.js"


def build_page() -> None:
    """Run npm, unless the page is newer than its sources. A source distribution has the page, and no sources of it."""
    sources = [SOURCES / "package.json", SOURCES / "package-lock.json", SOURCES / "build.mjs", *SOURCES.glob("src/*")]
    if not sources[0].is_file():
        return
    if PAGE.is_file() and PAGE.stat().st_mtime >= max(path.stat().st_mtime for path in sources):
        return
    npm = shutil.which("npm")
    if npm is None:
        sys.stderr.write("npm is not there: engine view has no page until it is built (docs/viewer.md)\n")
        return
    try:
        for words in (["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"], ["run", "build"]):
            subprocess.run([npm, *words], cwd=SOURCES, check=True, timeout=120, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"the page of engine view is not built ({error}); see docs/viewer.md\n")


class BuildPy(build_py):
    """``build_py`` with the page."""

    def run(self) -> None:
        """Build the page, then collect the package."""
        build_page()
        self.__dict__.pop("data_files", None)  # listed before the page was there
        super().run()


class Sdist(sdist):
    """``sdist`` with the page."""

    def run(self) -> None:
        """Build the page, then collect the sources."""
        build_page()
        super().run()


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
