/// \file
/// Views on DLPack tensors. Works with the header of any DLPack version, and includes none.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <type_traits>

#include "kvfold/detail/extent.hpp"
#include "kvfold/detail/rows.hpp"
#include "kvfold/status.hpp"
#include "kvfold/view/strided.hpp"

namespace kvfold {

/// Anything with the members of DLPack's `DLTensor`: shape and strides are [ndim], strides count elements and may be
/// null (then the tensor is compact, the last axis fastest); the first element is at data + byte_offset.
// clang-format off
template <class T>
concept DlpackTensor = requires(const T& t) {
  { t.data } -> std::convertible_to<void*>;
  static_cast<std::int64_t>(t.device.device_type);
  { t.ndim } -> std::convertible_to<std::int64_t>;
  { t.dtype.code } -> std::convertible_to<std::int64_t>;
  { t.dtype.bits } -> std::convertible_to<std::int64_t>;
  { t.dtype.lanes } -> std::convertible_to<std::int64_t>;
  { t.shape } -> std::convertible_to<const std::int64_t*>;
  { t.strides } -> std::convertible_to<const std::int64_t*>;
  { t.byte_offset } -> std::convertible_to<std::uint64_t>;
};
// clang-format on

/// The type code and bits by which DLPack names an element type. To be specialised for other element types.
template <class E>
struct DlpackType;
template <>
struct DlpackType<float> {
  static constexpr std::int64_t kCode = 2, kBits = 32;
};
template <>
struct DlpackType<Float16> {
  static constexpr std::int64_t kCode = 2, kBits = 16;
};
template <>
struct DlpackType<BFloat16> {
  static constexpr std::int64_t kCode = 4, kBits = 16;
};
template <>
struct DlpackType<Float8E4M3> {
  static constexpr std::int64_t kCode = 10, kBits = 8;
};

/// Which axis of a tensor is which, counted from 0. Axes that are not named must have size 1.
struct TensorAxes {
  Index head = 0;
  Index token = 1;
  Index dim = 2;
  Index batch = -1;    ///< -1: there is none
  Index sequence = 0;  ///< of the batch axis, the entry that the view is of

  /// `[H][T][D]`.
  [[nodiscard]] static constexpr TensorAxes head_major() noexcept { return {}; }
  /// `[T][H][D]`.
  [[nodiscard]] static constexpr TensorAxes token_major() noexcept { return {.head = 1, .token = 0}; }
  /// `[B][H][T][D]`, entry b.
  [[nodiscard]] static constexpr TensorAxes batch_head_major(Index b) noexcept {
    return {.head = 1, .token = 2, .dim = 3, .batch = 0, .sequence = b};
  }
  /// `[B][T][H][D]`, entry b.
  [[nodiscard]] static constexpr TensorAxes batch_token_major(Index b) noexcept {
    return {.head = 2, .token = 1, .dim = 3, .batch = 0, .sequence = b};
  }
};

namespace detail {

/// Where the rows of one sequence lie in a tensor.
template <class E>
struct TensorRows {
  E* data = nullptr;
  Index heads = 0, tokens = 0, width = 0;
  Index batch = 0;  // 0: there is no such axis
  Strides strides;
};

/// The memory of kDLCPU, kDLCUDAHost and kDLROCMHost can be read and written by the processor.
[[nodiscard]] constexpr bool is_host_memory(std::int64_t device_type) noexcept {
  return device_type == 1 || device_type == 3 || device_type == 11;
}

/// The number of a device type. Newer engines have numbers that an older header's enum does not name.
template <class D>
[[nodiscard]] std::int64_t device_number(const D& type) noexcept {
  if constexpr (std::is_enum_v<D>) {
    std::underlying_type_t<D> number;
    std::memcpy(&number, &type, sizeof number);
    return static_cast<std::int64_t>(number);
  } else {
    return static_cast<std::int64_t>(type);
  }
}

/// Checks a tensor and finds its rows. `name` is the argument that statuses name.
template <class E, DlpackTensor T>
class TensorReader {
 public:
  TensorReader(const T& tensor, const TensorAxes& axes, const char* name) noexcept
      : tensor_(tensor), axes_(axes), name_(name) {}

  [[nodiscard]] Result<TensorRows<E>> read() const noexcept {
    if (Status bad = check_type(); !bad.ok()) return bad;
    if (Status bad = check_axes(); !bad.ok()) return bad;
    Layout layout;
    if (Status bad = find_layout(layout); !bad.ok()) return bad;
    const Result<E*> first = find_data(layout);
    if (!first.ok()) return first.status();
    const auto size = [&](Index axis) { return layout[at(axis)].size; };
    const auto stride = [&](Index axis) { return layout[at(axis)].stride; };
    TensorRows<E> rows{.data = first.value(),
                       .heads = size(axes_.head),
                       .tokens = size(axes_.token),
                       .width = size(axes_.dim),
                       .strides = {stride(axes_.head), stride(axes_.token), stride(axes_.dim)}};
    if (axes_.batch >= 0) {
      rows.batch = size(axes_.batch);
      rows.data += axes_.sequence * stride(axes_.batch);
    }
    return rows;
  }

 private:
  static constexpr Index kMaxAxes = 8;
  using Layout = std::array<Extent, kMaxAxes>;

  [[nodiscard]] Status error(StatusCode code, const char* detail) const noexcept { return {code, name_, detail}; }
  [[nodiscard]] Index axis_count() const noexcept { return static_cast<Index>(tensor_.ndim); }

  [[nodiscard]] Status check_type() const noexcept {
    using Type = DlpackType<std::remove_const_t<E>>;
    if (!is_host_memory(device_number(tensor_.device.device_type))) {
      return error(StatusCode::unsupported, "device is not the host: copy the tensor there first");
    }
    if (tensor_.dtype.lanes != 1) return error(StatusCode::unsupported, "dtype.lanes must be 1");
    if (tensor_.dtype.code != Type::kCode || tensor_.dtype.bits != Type::kBits) {
      return error(StatusCode::unsupported, "dtype is not the element type of the view");
    }
    return {};
  }

  [[nodiscard]] Status check_axes() const noexcept {
    if (axis_count() < 3 || axis_count() > kMaxAxes) {
      return error(StatusCode::invalid_argument, "ndim must be in [3, 8]");
    }
    if (tensor_.shape == nullptr) return error(StatusCode::invalid_argument, "shape is null");
    const Index named[] = {axes_.head, axes_.token, axes_.dim, axes_.batch};
    const std::size_t count = axes_.batch == -1 ? 3 : 4;
    for (std::size_t i = 0; i < count; ++i) {
      if (named[i] < 0 || named[i] >= axis_count()) {
        return error(StatusCode::invalid_argument, "its axes must be in [0, ndim)");
      }
      for (std::size_t j = 0; j < i; ++j) {
        if (named[i] == named[j]) return error(StatusCode::invalid_argument, "two of its axes are the same");
      }
    }
    for (Index axis = 0; axis < axis_count(); ++axis) {
      const bool is_named = std::find(named, named + count, axis) != named + count;
      if (!is_named && tensor_.shape[axis] != 1) {
        return error(StatusCode::size_mismatch, "an axis that is neither head, token, dim nor batch must have size 1");
      }
    }
    return {};
  }

  /// Sizes and strides of all axes, those that it has not with size 1.
  [[nodiscard]] Status find_layout(Layout& layout) const noexcept {
    layout.fill({1, 0});
    Index compact = 1;
    for (Index axis = axis_count() - 1; axis >= 0; --axis) {
      const std::int64_t size = tensor_.shape[axis];
      if (size < 1) return error(StatusCode::invalid_argument, "sizes of its axes must be at least 1");
      const Index stride = tensor_.strides == nullptr ? compact : static_cast<Index>(tensor_.strides[axis]);
      if (stride < 0) return error(StatusCode::invalid_argument, "strides must not be negative");
      if (!std::is_const_v<E> && stride == 0 && size > 1) {
        return error(StatusCode::unsupported, "an axis of stride 0 repeats its entries: they cannot be written apart");
      }
      layout[at(axis)] = {static_cast<Index>(size), stride};
      compact = product({compact, static_cast<Index>(size)});
      if (compact < 0) return error(StatusCode::invalid_argument, "the product of its sizes overflows");
    }
    if (axes_.batch >= 0 && (axes_.sequence < 0 || axes_.sequence >= layout[at(axes_.batch)].size)) {
      return error(StatusCode::invalid_argument, "sequence is not in [0, size of the batch axis)");
    }
    return {};
  }

  [[nodiscard]] Result<E*> find_data(const Layout& layout) const noexcept {
    const Index elements = spanned_elements(layout, sizeof(E));
    const auto address = reinterpret_cast<std::uintptr_t>(static_cast<const void*>(tensor_.data));
    const std::uintptr_t room = std::numeric_limits<std::uintptr_t>::max() - address;  // bytes above the address
    const std::uint64_t offset = tensor_.byte_offset;
    if (elements < 0 || offset > room || static_cast<std::uintptr_t>(elements) * sizeof(E) > room - offset) {
      return error(StatusCode::invalid_argument, "strides or byte_offset overflow");
    }
    if (tensor_.data == nullptr) return error(StatusCode::invalid_argument, "data is null");
    if ((address + offset) % alignof(E) != 0) {
      return error(StatusCode::invalid_argument, "data + byte_offset is not aligned to its elements");
    }
    return reinterpret_cast<E*>(static_cast<std::byte*>(static_cast<void*>(tensor_.data)) + offset);
  }

  const T& tensor_;
  const TensorAxes& axes_;
  const char* name_;
};

}  // namespace detail

/// A view on one sequence of two DLPack tensors (`dl_tensor` of managed ones), whose memory stays the engine's and must
/// outlive the view. Nothing is copied, and the tensors themselves are not needed any more.
///
/// \tparam K, V element types, which the tensors must have; `const` ones make a view that cannot be written
/// \param rows  [H] rows in use of each head, in [0, size of the token axis]; kept by the view, and shrunk by `apply`
/// \param group_size G, query heads per KV head
/// \returns the view, or a status that names `keys`, `values` (device, dtype, lanes, ndim, axes, sizes, strides, data,
/// byte_offset), `group_size` or `rows`. Positions, log masses, rotation and row counts are as in a new `StridedView`:
/// set them on the result. Cost O(H).
template <class K, class V = K, DlpackTensor T>
[[nodiscard]] Result<StridedView<K, V>> view_of_tensors(const T& keys, const TensorAxes& key_axes, const T& values,
                                                        const TensorAxes& value_axes, std::span<Index> rows,
                                                        Index group_size = 1) noexcept {
  const auto k = detail::TensorReader<K, T>(keys, key_axes, "keys").read();
  if (!k.ok()) return k.status();
  const auto v = detail::TensorReader<V, T>(values, value_axes, "values").read();
  if (!v.ok()) return v.status();
  if (v->heads != k->heads) return Status{StatusCode::size_mismatch, "values", "has other heads than keys"};
  if (v->batch != k->batch && v->batch != 0 && k->batch != 0) {
    return Status{StatusCode::size_mismatch, "values", "has other sequences than keys"};
  }
  if (v->tokens != k->tokens) return Status{StatusCode::size_mismatch, "values", "has other tokens than keys"};
  if (k->heads > kMaxHeads) return Status{StatusCode::invalid_argument, "keys", "has more than kMaxHeads heads"};
  if (k->width > kMaxWidth) return Status{StatusCode::invalid_argument, "keys", "has more than kMaxWidth channels"};
  if (v->width > kMaxWidth) return Status{StatusCode::invalid_argument, "values", "has more than kMaxWidth channels"};
  if (group_size < 1 || group_size > kMaxHeads) {
    return Status{StatusCode::invalid_argument, "group_size", "must be in [1, kMaxHeads]"};
  }
  if (static_cast<Index>(rows.size()) != k->heads) {
    return Status{StatusCode::size_mismatch, "rows", "must have one entry per head"};
  }
  for (std::size_t h = 0; h < rows.size(); ++h) {
    if (rows[h] < 0 || rows[h] > k->tokens) {
      return Status{StatusCode::invalid_argument, "rows", "must be in [0, size of the token axis]",
                    static_cast<Index>(h)};
    }
  }
  return StridedView<K, V>{.layer = {k->heads, group_size, k->width, v->width},
                           .keys = k->data,
                           .key_strides = k->strides,
                           .values = v->data,
                           .value_strides = v->strides,
                           .rows = rows};
}

}  // namespace kvfold
