// A view with all that compress() asks for. The compile-fail half leaves one member out: -DWITHOUT_SIZE leaves out size().
#include <kvfold/compressor.hpp>

struct View {
#ifndef WITHOUT_SHAPE
  kvfold::LayerShape shape() const noexcept;
#endif
#ifndef WITHOUT_SIZE
#ifndef WITHOUT_NOEXCEPT
  kvfold::Index size(kvfold::Index h) const noexcept;
#else
  kvfold::Index size(kvfold::Index h) const;
#endif
#endif
#ifndef WITHOUT_POSITION
  kvfold::Position position(kvfold::Index h, kvfold::Index t) const noexcept;
#endif
#ifndef WITHOUT_READ_KEYS
  void read_keys(kvfold::Index h, kvfold::Index t, kvfold::Index n, std::span<float> out) const noexcept;
#endif
#ifndef WITHOUT_READ_VALUES
  void read_values(kvfold::Index h, kvfold::Index t, kvfold::Index n, std::span<float> out) const noexcept;
#endif
#ifndef WITHOUT_WRITE_KEY
  void write_key(kvfold::Index h, kvfold::Index t, std::span<const float> in) noexcept;
#endif
#ifndef WITHOUT_WRITE_VALUE
  void write_value(kvfold::Index h, kvfold::Index t, std::span<const float> in) noexcept;
#endif
#ifndef WITHOUT_MOVE_ROW
  void move_row(kvfold::Index h, kvfold::Index from, kvfold::Index to) noexcept;
#endif
#ifndef WITHOUT_RESIZE
  void resize(kvfold::Index h, kvfold::Index n) noexcept;
#endif
};

kvfold::Status compress(View& view, const kvfold::QueryRows& queries) {
  return kvfold::EmsEvict().compress(view, queries).status();
}
