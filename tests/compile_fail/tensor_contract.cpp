// A struct with all that DLPack's DLTensor has. The compile-fail half leaves one member out: -DWITHOUT_STRIDES leaves
// out strides.
#include <kvfold/view/dlpack.hpp>

struct Tensor {
#ifndef WITHOUT_DATA
  void* data;
#endif
#ifndef WITHOUT_DEVICE
  struct {
    int device_type;
  } device;
#endif
#ifndef WITHOUT_NDIM
  int ndim;
#endif
#ifndef WITHOUT_DTYPE
  struct {
    unsigned char code, bits;
    unsigned short lanes;
  } dtype;
#endif
#ifndef WITHOUT_SHAPE
  std::int64_t* shape;
#endif
#ifndef WITHOUT_STRIDES
  std::int64_t* strides;
#endif
#ifndef WITHOUT_BYTE_OFFSET
  std::uint64_t byte_offset;
#endif
};

kvfold::Status view_of(const Tensor& keys, const Tensor& values, std::span<kvfold::Index> rows) {
  return kvfold::view_of_tensors<float>(keys, {}, values, {}, rows).status();
}
