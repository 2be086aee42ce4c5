/// \file
/// Rotating keys by a difference of positions.
#pragma once

#include <cmath>

#include "kvfold/detail/rows.hpp"
#include "kvfold/view/concepts.hpp"

namespace kvfold::detail {

/// Whether a policy that moves keys between positions can work with this rotation.
[[nodiscard]] inline Status check_rope(const Rope& rope, Index key_dim) noexcept {
  if (rope.kind == RopeKind::unknown) {
    return {StatusCode::unsupported, "view", "rope() is unknown, but the options need to un-rotate keys"};
  }
  if (rope.kind == RopeKind::none || rope.kind == RopeKind::pre_rope) return {};
  const Index width = rope.rotary_dim == 0 ? key_dim : rope.rotary_dim;
  if (width < 2 || width % 2 != 0 || width > key_dim) {
    return {StatusCode::invalid_argument, "view", "rope().rotary_dim must be even and at most key_dim"};
  }
  if (!rope.inv_freq.empty() && static_cast<Index>(rope.inv_freq.size()) != width / 2) {
    return {StatusCode::size_mismatch, "view", "rope().inv_freq must have rotary_dim / 2 entries"};
  }
  for (const float f : rope.inv_freq) {
    if (!std::isfinite(f)) return {StatusCode::not_finite, "view", "rope().inv_freq has a NaN or an infinity"};
  }
  if (!(rope.theta > 0.0) || !std::isfinite(rope.theta)) {
    return {StatusCode::invalid_argument, "view", "rope().theta must be a positive number"};
  }
  return {};
}

/// The same for a view, whose keys must not have their channels mixed before they are un-rotated.
template <KVCacheView V>
[[nodiscard]] Status check_rope(const V& view) noexcept {
  const Rope rope = rope_of(view);
  if (Status bad = check_rope(rope, view.shape().key_dim); !bad.ok()) return bad;
  const bool rotates = rope.kind == RopeKind::half_split || rope.kind == RopeKind::adjacent;
  if (rotates && channel_rotation_of(view).key_block > 1) {
    return {StatusCode::unsupported, "view",
            "channel_rotation() mixes the channels of keys, but the options need to un-rotate keys"};
  }
  return {};
}

/// Turns a key at position p into the key at p + delta. Angles in fp64. No-op for caches without rotation.
inline void rotate(float* key, Index key_dim, const Rope& rope, double delta) noexcept {
  if ((rope.kind != RopeKind::half_split && rope.kind != RopeKind::adjacent) || delta == 0.0) return;
  const Index width = rope.rotary_dim == 0 ? key_dim : rope.rotary_dim;
  const Index half = width / 2;
  for (Index i = 0; i < half; ++i) {
    const double frequency = rope.inv_freq.empty()
                                 ? std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(width))
                                 : static_cast<double>(rope.inv_freq[at(i)]);
    const double c = std::cos(delta * frequency), s = std::sin(delta * frequency);
    float& x = rope.kind == RopeKind::half_split ? key[i] : key[2 * i];
    float& y = rope.kind == RopeKind::half_split ? key[i + half] : key[2 * i + 1];
    const double a = static_cast<double>(x), b = static_cast<double>(y);
    x = static_cast<float>(a * c - b * s);
    y = static_cast<float>(a * s + b * c);
  }
}

}  // namespace kvfold::detail
