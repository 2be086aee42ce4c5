// What the processor says of itself, against what Linux says of it.
#include <kvfold/detail/processor.hpp>

#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvfold::test {
namespace {

using testing::Contains;
using testing::Not;

/// Words that /proc/cpuinfo says of the first processor under a name; none on other systems and other kinds of processors.
std::vector<std::string> words_of_processor(std::string_view name) {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(name)) continue;
    std::istringstream words(line);
    return {std::istream_iterator<std::string>(words), {}};
  }
  return {};
}

TEST(Processor, HasAvxVnniWhereLinuxSaysSo) {
  const std::vector<std::string> flags = words_of_processor("flags");
  if (flags.empty()) GTEST_SKIP() << "nothing to compare with";
  if (detail::has_avx_vnni()) {
    EXPECT_THAT(flags, Contains("avx_vnni"));
  } else if (KVFOLD_ENABLE_DISPATCH) {
    EXPECT_THAT(flags, Not(Contains("avx_vnni")));
  }
}

TEST(Processor, IsAmdsWhereLinuxSaysSo) {
  const std::vector<std::string> vendor = words_of_processor("vendor_id");
  if (vendor.empty()) GTEST_SKIP() << "nothing to compare with";
  if (detail::is_amd()) {
    EXPECT_THAT(vendor, Contains("AuthenticAMD"));
  } else if (KVFOLD_ENABLE_DISPATCH) {
    EXPECT_THAT(vendor, Not(Contains("AuthenticAMD")));
  }
}

}  // namespace
}  // namespace kvfold::test
