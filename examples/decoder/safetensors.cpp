#include "decoder/safetensors.hpp"

#include <kvfold/storage/elements.hpp>

#include <cstring>
#include <fstream>
#include <stdexcept>

#include <nlohmann/json.hpp>

namespace decoder {
namespace {

[[noreturn]] void fail(const std::string& file, const std::string& what) {
  throw std::runtime_error(file + ": " + what);
}

template <class Element>
void convert(const char* from, std::vector<float>& to) {
  // Tensors start at any byte, so elements are copied before they are read as such.
  std::vector<Element> elements(to.size());
  std::memcpy(elements.data(), from, to.size() * sizeof(Element));
  kvfold::load_floats(elements.data(), static_cast<kvfold::Index>(to.size()), to.data());
}

}  // namespace

Safetensors::Safetensors(const std::filesystem::path& file) : file_(file.string()) {
  std::ifstream in(file, std::ios::binary | std::ios::ate);
  if (!in) fail(file_, "cannot be opened");
  const auto size = static_cast<std::uint64_t>(in.tellg());
  in.seekg(0);
  unsigned char prefix[8] = {};
  if (size < sizeof prefix || !in.read(reinterpret_cast<char*>(prefix), sizeof prefix)) fail(file_, "is too short");
  std::uint64_t header_size = 0;
  for (int i = 7; i >= 0; --i) header_size = header_size << 8 | prefix[i];
  if (header_size > size - sizeof prefix) fail(file_, "has a header longer than the file");
  std::string header(header_size, '\0');
  in.read(header.data(), static_cast<std::streamsize>(header_size));
  data_.resize(size - sizeof prefix - header_size);
  if (!in.read(data_.data(), static_cast<std::streamsize>(data_.size()))) fail(file_, "cannot be read");

  const auto json = nlohmann::json::parse(header, nullptr, false);
  if (!json.is_object()) fail(file_, "has a header that is not JSON");
  for (const auto& [name, entry] : json.items()) {
    if (name == "__metadata__") continue;
    Tensor tensor{entry.at("dtype"), entry.at("shape"), entry.at("data_offsets").at(0), entry.at("data_offsets").at(1)};
    if (tensor.begin > tensor.end || tensor.end > data_.size())
      fail(file_, "tensor " + name + " lies outside of the file");
    tensors_.emplace(name, std::move(tensor));
  }
}

std::vector<float> Safetensors::read(const std::string& name, const std::vector<std::int64_t>& shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) fail(file_, "has no tensor " + name);
  const Tensor& tensor = found->second;
  if (tensor.shape != shape) fail(file_, "tensor " + name + " has another shape than the config says");
  std::size_t count = 1;
  for (const auto n : shape) count *= static_cast<std::size_t>(n);
  const std::size_t width = tensor.type == "F32" ? 4 : 2;
  if (tensor.type != "F32" && tensor.type != "F16" && tensor.type != "BF16") {
    fail(file_, "tensor " + name + " has type " + tensor.type + "; F32, F16 and BF16 are known");
  }
  if (tensor.end - tensor.begin != count * width) fail(file_, "tensor " + name + " has not the bytes of its shape");
  std::vector<float> out(count);
  const char* from = data_.data() + tensor.begin;
  if (tensor.type == "F32") convert<float>(from, out);
  if (tensor.type == "F16") convert<kvfold::Float16>(from, out);
  if (tensor.type == "BF16") convert<kvfold::BFloat16>(from, out);
  return out;
}

}  // namespace decoder
