// What the processor says of itself, against what Linux says of it.
#include <kvfold/detail/processor.hpp>

#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvfold::test {
namespace {

using testing::Contains;
using testing::Not;

/// Of the first processor in /proc/cpuinfo; none on other systems and other kinds of processors.
std::vector<std::string> flags_of_processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("flags")) continue;
    std::istringstream words(line);
    return {std::istream_iterator<std::string>(words), {}};
  }
  return {};
}

TEST(Processor, HasAvxVnniWhereLinuxSaysSo) {
  const std::vector<std::string> flags = flags_of_processor();
  if (flags.empty()) GTEST_SKIP() << "nothing to compare with";
  if (detail::has_avx_vnni()) {
    EXPECT_THAT(flags, Contains("avx_vnni"));
  } else if (KVFOLD_ENABLE_DISPATCH) {
    EXPECT_THAT(flags, Not(Contains("avx_vnni")));
  }
}

}  // namespace
}  // namespace kvfold::test
