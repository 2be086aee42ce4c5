// Shows that the machinery notices both halves of a pair.
#include <concepts>

template <class T>
concept HasRows = requires(const T& t) {
  { t.rows() } -> std::convertible_to<int>;
};

struct Table {
#ifndef KVFOLD_COMPILE_FAIL
  int rows() const { return 0; }
#endif
};

static_assert(HasRows<Table>);
