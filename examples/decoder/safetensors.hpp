/// \file
/// Reads the safetensors format: an 8-byte length, a JSON header, and tensors one after the other.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace decoder {

/// The tensors of one file, in memory as they are stored.
class Safetensors {
 public:
  /// Throws std::runtime_error when the file is missing, cut short or not safetensors.
  explicit Safetensors(const std::filesystem::path& file);

  /// The tensor as fp32, whatever it is stored as (F32, F16 or BF16). Throws when it is missing, of another shape or type.
  [[nodiscard]] std::vector<float> read(const std::string& name, const std::vector<std::int64_t>& shape) const;
  [[nodiscard]] bool contains(const std::string& name) const { return tensors_.contains(name); }

 private:
  struct Tensor {
    std::string type;
    std::vector<std::int64_t> shape;
    std::size_t begin, end;  // bytes, from the start of the data
  };

  std::string file_;
  std::vector<char> data_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace decoder
