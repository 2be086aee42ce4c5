/// The version of kvfold. CMake reads it from here, so this is the only place where it is written down.
#pragma once

#define KVFOLD_VERSION_MAJOR 0
#define KVFOLD_VERSION_MINOR 1
#define KVFOLD_VERSION_PATCH 0

namespace kvfold {

inline constexpr int kVersionMajor = KVFOLD_VERSION_MAJOR;
inline constexpr int kVersionMinor = KVFOLD_VERSION_MINOR;
inline constexpr int kVersionPatch = KVFOLD_VERSION_PATCH;

}  // namespace kvfold
