// Links only if the headers define nothing twice; passes only if both translation units mean the same object.
#include <kvfold/kvfold.hpp>

#include <cstdio>

const int* other_version();

int main() {
  if (other_version() != &kvfold::kVersionMajor) {
    std::puts("the two translation units see different objects");
    return 1;
  }
}
