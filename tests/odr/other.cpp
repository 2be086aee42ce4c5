#include <kvfold/kvfold.hpp>

const int* other_version() { return &kvfold::kVersionMajor; }
