// Checks that every stage makes of a view.
#include <kvfold/detail/rows.hpp>
#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/view/strided.hpp>

#include <limits>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

namespace kvfold::test {
namespace {

/// Heads with rows of one number, whose positions and log masses can be spoilt.
class Heads {
 public:
  Heads(Index heads, Index rows)
      : shape_{.kv_heads = heads, .group_size = 1, .key_dim = 1, .value_dim = 1},
        numbers_(static_cast<std::size_t>(heads * rows)),
        rows_(static_cast<std::size_t>(heads), rows),
        masses_(numbers_.size()) {
    for (Index i = 0; i < heads * rows; ++i) positions_.push_back(i % rows);
  }

  [[nodiscard]] StridedView<float> view() {
    const Index rows = rows_.front();
    return {.layer = shape_,
            .keys = numbers_.data(),
            .key_strides = {.head = rows, .token = 1},
            .values = numbers_.data(),
            .value_strides = {.head = rows, .token = 1},
            .rows = rows_,
            .positions = positions_,
            .position_stride = rows,
            .log_masses = masses_,
            .log_mass_stride = rows};
  }
  Position& position(Index h, Index t) { return positions_[static_cast<std::size_t>(h * rows_.front() + t)]; }
  float& mass(Index h, Index t) { return masses_[static_cast<std::size_t>(h * rows_.front() + t)]; }

 private:
  LayerShape shape_;
  std::vector<float> numbers_;
  std::vector<Index> rows_;
  std::vector<Position> positions_;
  std::vector<float> masses_;
};

/// Few rows, which are looked at one head after the other, and many, which are looked at side by side.
class CheckedView : public testing::TestWithParam<Index> {
 protected:
  /// This is said of the view, whatever the executor.
  void expect(StatusCode code, std::string_view argument, Index head, Index row) {
    SerialExecutor alone;
    ThreadPool pool(3);
    const StridedView<float> view = heads_.view();
    for (const Status& status : {detail::check_view(view, alone), detail::check_view(view, pool)}) {
      EXPECT_EQ(status.code(), code);
      EXPECT_EQ(status.argument(), argument);
      EXPECT_EQ(status.head(), head);
      EXPECT_EQ(status.row(), row);
    }
  }

  Index last_ = GetParam() - 1;
  Heads heads_{4, GetParam()};
};

TEST_P(CheckedView, IsFineWithPositionsInOrderAndMassesThatAreNumbers) {
  heads_.position(2, last_) = heads_.position(2, last_ - 1);
  heads_.mass(1, 0) = -3.f;
  const Status fine{};
  expect(fine.code(), fine.argument(), fine.head(), fine.row());
}

TEST_P(CheckedView, TellsTheRowThatComesBeforeTheOneBefore) {
  heads_.position(2, last_) = 0;
  heads_.position(3, 1) = -1;
  expect(StatusCode::invalid_argument, "view", 2, last_);
}

TEST_P(CheckedView, TellsTheFirstMassThatIsNoNumber) {
  for (const float mass : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    heads_.mass(3, 0) = heads_.mass(1, last_) = mass;
    expect(StatusCode::not_finite, "log_mass", 1, last_);
  }
}

TEST_P(CheckedView, ComplainsOfTheEarliestHeadWhateverIsWrongWithIt) {
  heads_.position(2, 1) = -1;
  heads_.mass(1, 2) = std::numeric_limits<float>::quiet_NaN();
  expect(StatusCode::not_finite, "log_mass", 1, 2);
  heads_.position(0, 1) = -1;
  expect(StatusCode::invalid_argument, "view", 0, 1);
}

INSTANTIATE_TEST_SUITE_P(Rows, CheckedView, testing::Values(3, detail::kFewToCheck / 2));

}  // namespace
}  // namespace kvfold::test
