"""Installs llama.cpp from PyPI into a private virtual environment; prints the folder of its headers and libraries."""

import subprocess
import sys

sys.dont_write_bytecode = True

import prepare_smollm2_env as env  # noqa: E402

# Brings llama.cpp's source, builds it, and installs headers, libraries and CMake package files beside itself.
REQUIREMENTS = ("llama-cpp-python==0.3.36",)


def main():
    python = env.ensure_venv("llama", REQUIREMENTS, " (compiled here: some ten minutes)")
    print(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"], check=True,
                         capture_output=True, text=True).stdout.strip())


if __name__ == "__main__":
    env.run_main(main)
