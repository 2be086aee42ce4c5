// DLPack tensors as views: the header's struct where it is installed, and one that only looks like it.
#include <kvfold/compressor.hpp>
#include <kvfold/view/dlpack.hpp>

#include <cstdint>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "merge_oracle.hpp"

#if __has_include(<dlpack/dlpack.h>)
#include <dlpack/dlpack.h>
#define HAS_DLPACK_HEADER 1
#else
#define HAS_DLPACK_HEADER 0
#endif

namespace kvfold::test {
namespace {

/// The members of DLTensor, with types of an engine's own.
struct LookAlike {
  struct Device {
    std::int32_t device_type, device_id;
  };
  struct Type {
    std::uint8_t code, bits;
    std::uint16_t lanes;
  };
  void* data;
  Device device;
  std::int32_t ndim;
  Type dtype;
  const std::int64_t* shape;
  const std::int64_t* strides;
  std::uint64_t byte_offset;
};

static_assert(DlpackTensor<LookAlike>);
static_assert(!DlpackTensor<int>);

#if HAS_DLPACK_HEADER
static_assert(DlpackTensor<DLTensor>);
static_assert(DlpackType<float>::kCode == kDLFloat && DlpackType<Float16>::kCode == kDLFloat);
static_assert(DlpackType<BFloat16>::kCode == kDLBfloat);
static_assert(detail::is_host_memory(kDLCPU) && detail::is_host_memory(kDLCUDAHost) &&
              detail::is_host_memory(kDLROCMHost));
static_assert(!detail::is_host_memory(kDLCUDA) && !detail::is_host_memory(kDLROCM) &&
              !detail::is_host_memory(kDLMetal));
using TensorTypes = testing::Types<LookAlike, DLTensor>;
#else
using TensorTypes = testing::Types<LookAlike>;
#endif

/// A tensor that owns its sizes and strides.
template <class T, class E>
struct Owned {
  std::vector<E> data;
  std::vector<std::int64_t> shape, strides;
  T tensor{};

  /// Filled with 0, 1, 2, ... in the order of memory.
  explicit Owned(std::vector<std::int64_t> sizes) : shape(std::move(sizes)) {
    Index count = 1;
    for (const std::int64_t size : shape) count *= size;
    for (Index i = 0; i < count; ++i) data.push_back(from_float<E>(static_cast<float>(i)));
    tensor.data = data.data();
    set_device(1);
    tensor.ndim = static_cast<std::int32_t>(shape.size());
    tensor.dtype = {static_cast<std::uint8_t>(DlpackType<E>::kCode), static_cast<std::uint8_t>(DlpackType<E>::kBits),
                    1};
    tensor.shape = shape.data();
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  /// Any number, also one that the enum of the header does not have.
  void set_device(int type) {
    static_assert(sizeof tensor.device.device_type == sizeof type);
    std::memcpy(&tensor.device.device_type, &type, sizeof type);
  }
  void set_strides(std::vector<std::int64_t> s) {
    strides = std::move(s);
    tensor.strides = strides.data();
  }
};

std::vector<float> key(const auto& view, Index h, Index t) {
  std::vector<float> out(ix(view.shape().key_dim));
  view.read_keys(h, t, 1, out);
  return out;
}

std::vector<float> value(const auto& view, Index h, Index t) {
  std::vector<float> out(ix(view.shape().value_dim));
  view.read_values(h, t, 1, out);
  return out;
}

void expect_refused(const Status& status, StatusCode code, std::string_view argument) {
  EXPECT_EQ(status.code(), code) << status.argument() << ": " << status.detail();
  EXPECT_EQ(status.argument(), argument) << status.detail();
}

template <class T>
class Dlpack : public testing::Test {
 protected:
  std::vector<Index> rows{3, 3};  // [H]
};
TYPED_TEST_SUITE(Dlpack, TensorTypes);

using Floats = std::vector<float>;

TYPED_TEST(Dlpack, CompactTensorsHaveNoStrides) {
  const Owned<TypeParam, float> keys({2, 3, 4}), values({2, 3, 5});
  const auto view = view_of_tensors<float>(keys.tensor, TensorAxes::head_major(), values.tensor,
                                           TensorAxes::head_major(), this->rows, 6);
  ASSERT_TRUE(view.ok()) << view.status().detail();
  EXPECT_EQ(view->shape(), (LayerShape{2, 6, 4, 5}));
  EXPECT_EQ(view->size(1), 3);
  EXPECT_EQ(key(view.value(), 1, 2), (Floats{20, 21, 22, 23}));
  EXPECT_EQ(value(view.value(), 1, 0), (Floats{15, 16, 17, 18, 19}));
}

TYPED_TEST(Dlpack, AxesMayBeInAnyOrder) {
  const Owned<TypeParam, float> keys({3, 2, 4}), values({2, 5, 3});  // [T][H][D], [H][E][T]
  const auto view = view_of_tensors<float>(keys.tensor, TensorAxes::token_major(), values.tensor,
                                           {.head = 0, .token = 2, .dim = 1}, this->rows);
  ASSERT_TRUE(view.ok()) << view.status().detail();
  EXPECT_EQ(view->shape(), (LayerShape{2, 1, 4, 5}));
  EXPECT_EQ(key(view.value(), 1, 2), (Floats{20, 21, 22, 23}));
  EXPECT_EQ(value(view.value(), 1, 2), (Floats{17, 20, 23, 26, 29}));
}

TYPED_TEST(Dlpack, SequencesOfABatchAreViewsOfTheirOwn) {
  const Owned<TypeParam, float> keys({2, 2, 3, 4}), values({2, 3, 2, 5});
  for (const Index b : {0, 1}) {
    const auto view = view_of_tensors<float>(keys.tensor, TensorAxes::batch_head_major(b), values.tensor,
                                             TensorAxes::batch_token_major(b), this->rows);
    ASSERT_TRUE(view.ok()) << view.status().detail();
    const auto first = static_cast<float>(24 * b + 16), second = static_cast<float>(30 * b + 15);
    EXPECT_EQ(key(view.value(), 1, 1), (Floats{first, first + 1, first + 2, first + 3}));
    EXPECT_EQ(value(view.value(), 1, 1), (Floats{second, second + 1, second + 2, second + 3, second + 4}));
  }
}

TYPED_TEST(Dlpack, AxesOfSizeOneNeedNotBeNamed) {
  const Owned<TypeParam, float> keys({1, 2, 1, 3, 4}), values({2, 3, 5});
  const auto view =
      view_of_tensors<float>(keys.tensor, {.head = 1, .token = 3, .dim = 4}, values.tensor, {}, this->rows);
  ASSERT_TRUE(view.ok()) << view.status().detail();
  EXPECT_EQ(key(view.value(), 1, 2), (Floats{20, 21, 22, 23}));
}

TYPED_TEST(Dlpack, StridesCountElementsAndTheOffsetCountsBytes) {
  // K and V of one tensor [T][2][H][D], and a tensor that begins one row late.
  Owned<TypeParam, float> keys({4, 2, 2, 5}), values({4, 2, 2, 5});
  for (auto* t : {&keys, &values}) {
    t->shape = {3, 2, 4};
    t->tensor.shape = t->shape.data();
    t->tensor.ndim = 3;
    t->set_strides({20, 5, 1});
  }
  values.tensor.byte_offset = 30 * sizeof(float);
  const auto view = view_of_tensors<float>(keys.tensor, TensorAxes::token_major(), values.tensor,
                                           TensorAxes::token_major(), this->rows);
  ASSERT_TRUE(view.ok()) << view.status().detail();
  EXPECT_EQ(key(view.value(), 1, 2), (Floats{45, 46, 47, 48}));
  EXPECT_EQ(value(view.value(), 1, 2), (Floats{75, 76, 77, 78}));
}

TYPED_TEST(Dlpack, HalvesAndBfloatsAreRead) {
  const Owned<TypeParam, Float16> keys({2, 3, 4});
  const Owned<TypeParam, BFloat16> values({2, 3, 5});
  const auto view = view_of_tensors<Float16, BFloat16>(keys.tensor, {}, values.tensor, {}, this->rows);
  ASSERT_TRUE(view.ok()) << view.status().detail();
  EXPECT_EQ(key(view.value(), 1, 2), (Floats{20, 21, 22, 23}));
  EXPECT_EQ(value(view.value(), 1, 0), (Floats{15, 16, 17, 18, 19}));
}

TYPED_TEST(Dlpack, Fp8IsReadAndItsScaleIsSetOnTheView) {
  const Owned<TypeParam, Float8E4M3> keys({2, 3, 2}), values({2, 3, 2});
  auto view = view_of_tensors<const Float8E4M3>(keys.tensor, {}, values.tensor, {}, this->rows);
  ASSERT_TRUE(view.ok()) << view.status().detail();
  EXPECT_EQ(key(view.value(), 1, 2), (Floats{10, 11}));
  const float scale = 0.5f;
  view->key_scales = &scale;
  EXPECT_EQ(key(view.value(), 1, 2), (Floats{5, 5.5f}));
  EXPECT_EQ(value(view.value(), 0, 1), (Floats{2, 3}));
}

TYPED_TEST(Dlpack, ViewsAreCompressedInTheTensorsMemory) {
  Owned<TypeParam, float> keys({2, 3, 4}), values({2, 3, 5});
  auto view = view_of_tensors<float>(keys.tensor, {}, values.tensor, {}, this->rows).value();
  ASSERT_TRUE(StreamingLlm({.score = {.sinks = 0}, .budget = {.rows = 1}}).compress(view, NoEvidence{}).ok());
  EXPECT_EQ(this->rows, (std::vector<Index>{1, 1}));
  EXPECT_EQ(Floats(keys.data.begin() + 12, keys.data.begin() + 16), (Floats{20, 21, 22, 23}));
  EXPECT_EQ(Floats(values.data.begin(), values.data.begin() + 5), (Floats{10, 11, 12, 13, 14}));
}

TYPED_TEST(Dlpack, PinnedMemoryOfADeviceIsTheHostsToo) {
  for (const int device : {1, 3, 11}) {
    Owned<TypeParam, float> keys({2, 3, 4}), values({2, 3, 5});
    keys.set_device(device);
    EXPECT_TRUE(view_of_tensors<float>(keys.tensor, {}, values.tensor, {}, this->rows).ok()) << device;
  }
}

// --- Refusals --------------------------------------------------------------------------------------------------

/// Two good tensors, of which `change` breaks one; both take turns.
template <class T, class F>
void expect_tensor_refused(StatusCode code, F change) {
  const TensorAxes axes = TensorAxes::batch_head_major(1);
  std::vector<Index> rows{3, 3};
  for (const std::string_view name : {"keys", "values"}) {
    Owned<T, float> keys({2, 2, 3, 4}), values({2, 2, 3, 5});
    ASSERT_TRUE(view_of_tensors<float>(keys.tensor, axes, values.tensor, axes, rows).ok());
    change(name == "keys" ? keys : values);
    expect_refused(view_of_tensors<float>(keys.tensor, axes, values.tensor, axes, rows).status(), code, name);
  }
}

TYPED_TEST(Dlpack, RefusesMemoryThatTheHostCannotRead) {
  for (const int device : {0, 2, 4, 7, 8, 10, 13, 14, 17, 1000, -1}) {
    expect_tensor_refused<TypeParam>(StatusCode::unsupported, [&](auto& t) { t.set_device(device); });
  }
}

TYPED_TEST(Dlpack, RefusesOtherElementTypes) {
  constexpr auto kCode = StatusCode::unsupported;
  expect_tensor_refused<TypeParam>(kCode, [](auto& t) { t.tensor.dtype.code = 0; });
  expect_tensor_refused<TypeParam>(kCode, [](auto& t) { t.tensor.dtype.code = 4; });
  expect_tensor_refused<TypeParam>(kCode, [](auto& t) { t.tensor.dtype.bits = 16; });
  expect_tensor_refused<TypeParam>(kCode, [](auto& t) { t.tensor.dtype.lanes = 4; });
  expect_tensor_refused<TypeParam>(kCode, [](auto& t) { t.tensor.dtype.lanes = 0; });
  const Owned<TypeParam, Float16> halves({2, 3, 4});
  const Owned<TypeParam, BFloat16> bfloats({2, 3, 4});
  expect_refused((view_of_tensors<BFloat16>(halves.tensor, {}, bfloats.tensor, {}, this->rows).status()), kCode,
                 "keys");
  expect_refused((view_of_tensors<Float16>(halves.tensor, {}, bfloats.tensor, {}, this->rows).status()), kCode,
                 "values");
}

TYPED_TEST(Dlpack, RefusesNumbersOfAxesOutOfRange) {
  for (const int ndim : {0, -1, 2, 9, INT32_MIN, INT32_MAX}) {
    expect_tensor_refused<TypeParam>(StatusCode::invalid_argument, [&](auto& t) { t.tensor.ndim = ndim; });
  }
}

TYPED_TEST(Dlpack, RefusesPointersThatAreNull) {
  constexpr auto kCode = StatusCode::invalid_argument;
  expect_tensor_refused<TypeParam>(kCode, [](auto& t) { t.tensor.data = nullptr; });
  expect_tensor_refused<TypeParam>(kCode, [](auto& t) { t.tensor.shape = nullptr; });
}

TYPED_TEST(Dlpack, RefusesSizesBelowOneAndThoseThatOverflow) {
  for (const std::int64_t size : {std::int64_t{0}, std::int64_t{-1}, INT64_MIN}) {
    for (std::size_t axis = 0; axis < 4; ++axis) {
      expect_tensor_refused<TypeParam>(StatusCode::invalid_argument, [&](auto& t) { t.shape[axis] = size; });
    }
  }
  expect_tensor_refused<TypeParam>(StatusCode::invalid_argument, [](auto& t) { t.shape[0] = INT64_MAX; });
  expect_tensor_refused<TypeParam>(StatusCode::invalid_argument, [](auto& t) { t.shape[0] = INT64_MAX / 24; });
}

TYPED_TEST(Dlpack, RefusesStridesThatAreNegativeOrOverflow) {
  constexpr auto kCode = StatusCode::invalid_argument;
  for (std::size_t axis = 0; axis < 4; ++axis) {
    for (const std::int64_t stride : {std::int64_t{-1}, INT64_MIN, INT64_MAX, INT64_MAX / 4 + 1}) {
      expect_tensor_refused<TypeParam>(kCode, [&](auto& t) {
        t.set_strides({24, 12, 4, 1});
        t.strides[axis] = stride;
      });
    }
  }
}

TYPED_TEST(Dlpack, RefusesOffsetsThatOverflowOrAreNotAligned) {
  constexpr auto kCode = StatusCode::invalid_argument;
  expect_tensor_refused<TypeParam>(kCode, [](auto& t) { t.tensor.byte_offset = UINT64_MAX; });
  expect_tensor_refused<TypeParam>(kCode, [](auto& t) {
    t.tensor.byte_offset = UINT64_MAX - reinterpret_cast<std::uintptr_t>(t.data.data()) - 100;
  });
  expect_tensor_refused<TypeParam>(kCode, [](auto& t) { t.tensor.byte_offset = 2; });
  expect_tensor_refused<TypeParam>(kCode, [](auto& t) { t.tensor.data = reinterpret_cast<char*>(t.data.data()) + 1; });
}

TYPED_TEST(Dlpack, RefusesToWriteWhereEntriesAreRepeated) {
  expect_tensor_refused<TypeParam>(StatusCode::unsupported, [](auto& t) { t.set_strides({24, 0, 4, 1}); });
  Owned<TypeParam, float> keys({2, 3, 4}), values({2, 3, 5});
  keys.set_strides({0, 4, 1});
  const auto view = view_of_tensors<const float>(keys.tensor, {}, values.tensor, {}, this->rows);
  ASSERT_TRUE(view.ok()) << "to read them is possible";
  EXPECT_EQ(key(view.value(), 1, 1), key(view.value(), 0, 1));
}

TYPED_TEST(Dlpack, RefusesAxesThatDoNotFit) {
  const Owned<TypeParam, float> keys({2, 2, 3, 4}), values({2, 2, 3, 5});
  const TensorAxes good = TensorAxes::batch_head_major(0);
  const auto expect = [&](StatusCode code, const TensorAxes& bad) {
    expect_refused(view_of_tensors<float>(keys.tensor, bad, values.tensor, good, this->rows).status(), code, "keys");
    expect_refused(view_of_tensors<float>(keys.tensor, good, values.tensor, bad, this->rows).status(), code, "values");
  };
  for (const Index axis : {Index{-1}, Index{4}, INT64_MIN, INT64_MAX}) {
    expect(StatusCode::invalid_argument, {.head = axis, .token = 2, .dim = 3, .batch = 0});
    expect(StatusCode::invalid_argument, {.head = 1, .token = axis, .dim = 3, .batch = 0});
    expect(StatusCode::invalid_argument, {.head = 1, .token = 2, .dim = axis, .batch = 0});
  }
  for (const Index axis : {Index{-2}, Index{4}}) {
    expect(StatusCode::invalid_argument, {.head = 1, .token = 2, .dim = 3, .batch = axis});
  }
  expect(StatusCode::invalid_argument, {.head = 1, .token = 1, .dim = 3, .batch = 0});
  expect(StatusCode::invalid_argument, {.head = 1, .token = 2, .dim = 3, .batch = 3});
  expect(StatusCode::size_mismatch, {.head = 1, .token = 2, .dim = 3});
  for (const Index sequence : {Index{-1}, Index{2}, INT64_MAX}) {
    expect(StatusCode::invalid_argument, TensorAxes::batch_head_major(sequence));
  }
}

TYPED_TEST(Dlpack, RefusesSizesThatDisagree) {
  const auto expect = [&](const std::vector<std::int64_t>& sizes) {
    const Owned<TypeParam, float> keys({2, 2, 3, 4}), values(sizes);
    const TensorAxes axes = TensorAxes::batch_head_major(0);
    expect_refused(view_of_tensors<float>(keys.tensor, axes, values.tensor, axes, this->rows).status(),
                   StatusCode::size_mismatch, "values");
  };
  expect({3, 2, 3, 4});
  expect({2, 1, 3, 4});
  expect({2, 2, 4, 4});
}

TYPED_TEST(Dlpack, RefusesWidthsAndHeadsOutOfRange) {
  const auto expect = [&](std::int64_t heads, std::int64_t key_dim, std::int64_t value_dim, std::string_view argument) {
    Owned<TypeParam, float> keys({1, 1, 1}), values({1, 1, 1});  // nothing of them is read
    keys.shape = {heads, 1, key_dim};
    values.shape = {heads, 1, value_dim};
    expect_refused(view_of_tensors<float>(keys.tensor, {}, values.tensor, {}, this->rows).status(),
                   StatusCode::invalid_argument, argument);
  };
  expect(kMaxHeads + 1, 4, 4, "keys");
  expect(2, kMaxWidth + 1, 4, "keys");
  expect(2, 4, kMaxWidth + 1, "values");
}

TYPED_TEST(Dlpack, RefusesRowsAndGroupsThatDoNotFit) {
  const Owned<TypeParam, float> keys({2, 3, 4}), values({2, 3, 5});
  const auto status = [&](std::vector<Index> counts, Index group) {
    return view_of_tensors<float>(keys.tensor, {}, values.tensor, {}, counts, group).status();
  };
  expect_refused(status({3}, 1), StatusCode::size_mismatch, "rows");
  expect_refused(status({3, 3, 3}, 1), StatusCode::size_mismatch, "rows");
  expect_refused(status({3, 4}, 1), StatusCode::invalid_argument, "rows");
  expect_refused(status({3, -1}, 1), StatusCode::invalid_argument, "rows");
  EXPECT_EQ(status({3, 4}, 1).head(), 1);
  for (const Index group : {Index{0}, Index{-1}, kMaxHeads + 1, INT64_MAX}) {
    expect_refused(status({3, 3}, group), StatusCode::invalid_argument, "group_size");
  }
}

}  // namespace
}  // namespace kvfold::test
