/// \file
/// What rows may be stored in.
#pragma once

#include "kvfold/storage/elements.hpp"

namespace kvfold {

template <class E>
concept Stored = Element<E>;
template <Stored E>
inline constexpr Index kUnit = 1;
template <Stored E>
inline constexpr bool kRowScaled = false;
template <Stored E>
inline constexpr bool kMayBeScaled = false;

}  // namespace kvfold
