# shellcheck shell=bash
# install_packages PACKAGE[=COMMAND]...
# Installs the Debian packages that are missing, and says which; does nothing, quickly, if there are none.
# A package written with a command counts as there if the command is, however it was installed.
install_packages() {
  local item package missing=() as_root=()
  for item in "$@"; do
    package=${item%%=*}
    if [[ $item == *=* ]] && command -v "${item#*=}" >/dev/null; then continue; fi
    if [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) == installed ]]; then continue; fi
    missing+=("$package")
  done
  if ((${#missing[@]} == 0)); then return 0; fi

  if ! command -v apt-get >/dev/null; then
    echo "No apt-get here; going on without looking for: ${missing[*]}" >&2
    return 0
  fi
  if ((EUID != 0)); then
    if ! command -v sudo >/dev/null; then
      echo "Please install, as root: apt-get install ${missing[*]}" >&2
      return 1
    fi
    as_root=(sudo)
  fi
  echo "Installing: ${missing[*]}"
  "${as_root[@]}" apt-get update -qq </dev/null >/dev/null || return
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -qq --no-install-recommends "${missing[@]}" </dev/null >/dev/null
}

# What every build needs.
# shellcheck disable=SC2034  # for the scripts which read this file
build_packages=("cmake=cmake" "ninja-build=ninja" "g++=c++" libeigen3-dev)
