#include "decoder/decoder.hpp"

#include <kvfold/throwing.hpp>

#include <cmath>
#include <fstream>
#include <numeric>
#include <stdexcept>

#include <nlohmann/json.hpp>

#include "decoder/safetensors.hpp"

namespace decoder {
namespace {

Matrix read_matrix(const Safetensors& file, const std::string& name, Eigen::Index rows, Eigen::Index columns) {
  const std::vector<float> data = file.read(name, {rows, columns});
  return Eigen::Map<const Matrix>(data.data(), rows, columns);
}

Eigen::VectorXf read_vector(const Safetensors& file, const std::string& name, Eigen::Index size) {
  const std::vector<float> data = file.read(name, {size});
  return Eigen::Map<const Eigen::VectorXf>(data.data(), size);
}

}  // namespace

Config Config::load(const std::filesystem::path& file) {
  std::ifstream in(file);
  if (!in) throw std::runtime_error(file.string() + ": cannot be opened");
  const auto json = nlohmann::json::parse(in, nullptr, false);
  if (!json.is_object()) throw std::runtime_error(file.string() + ": is not a JSON object");
  const auto wanted = [&](const char* name) -> Eigen::Index {
    if (!json.contains(name) || !json[name].is_number_integer() || json[name] < 1) {
      throw std::runtime_error(file.string() + ": needs a positive whole number " + name);
    }
    return json[name];
  };
  Config c;
  c.hidden_size = wanted("hidden_size");
  c.intermediate_size = wanted("intermediate_size");
  c.layers = wanted("num_hidden_layers");
  c.query_heads = wanted("num_attention_heads");
  c.kv_heads = json.contains("num_key_value_heads") ? wanted("num_key_value_heads") : c.query_heads;
  c.head_dim = json.contains("head_dim") ? wanted("head_dim") : c.hidden_size / c.query_heads;
  c.vocab_size = wanted("vocab_size");
  c.max_positions = wanted("max_position_embeddings");
  c.rms_norm_eps = json.value("rms_norm_eps", c.rms_norm_eps);
  c.rope_theta = json.value("rope_theta", c.rope_theta);
  c.tied_output = json.value("tie_word_embeddings", false);
  c.tokenizer = json.value("tokenizer", std::string("tokenizer.json"));
  const std::string layout = json.value("rope_layout", std::string("half_split"));
  if (layout != "half_split" && layout != "adjacent") {
    throw std::runtime_error(file.string() + ": rope_layout must be half_split or adjacent");
  }
  c.rope = layout == "adjacent" ? kvfold::RopeKind::adjacent : kvfold::RopeKind::half_split;
  if (c.query_heads % c.kv_heads != 0 || c.head_dim % 2 != 0) {
    throw std::runtime_error(file.string() + ": heads must divide evenly into groups, and head_dim must be even");
  }
  return c;
}

kvfold::LayerShape Config::layer_shape() const {
  return {.kv_heads = kv_heads, .group_size = query_heads / kv_heads, .key_dim = head_dim, .value_dim = head_dim};
}

Sequence Sequence::clone() const {
  Sequence copy;
  copy.next = next;
  for (const Cache& cache : layers) copy.layers.push_back(kvfold::or_throw(cache.clone()));
  return copy;
}

kvfold::Index Sequence::rows() const {
  kvfold::Index sum = 0;
  for (const Cache& cache : layers) {
    for (kvfold::Index h = 0; h < cache.shape().kv_heads; ++h) sum += cache.size(h);
  }
  return sum;
}

kvfold::Index Sequence::live_bytes() const {
  kvfold::Index sum = 0;
  for (const Cache& cache : layers) sum += cache.live_bytes();
  return sum;
}

Decoder::Decoder(const std::filesystem::path& directory, kvfold::ThreadPool& pool)
    : config_(Config::load(directory / "config.json")), pool_(pool) {
  const Safetensors file(directory / "model.safetensors");
  const auto& c = config_;
  embedding_ = read_matrix(file, "model.embed_tokens.weight", c.vocab_size, c.hidden_size);
  if (!c.tied_output) output_ = read_matrix(file, "lm_head.weight", c.vocab_size, c.hidden_size);
  final_norm_ = read_vector(file, "model.norm.weight", c.hidden_size);
  const Eigen::Index query_width = c.query_heads * c.head_dim, kv_width = c.kv_heads * c.head_dim;
  for (Eigen::Index i = 0; i < c.layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    Layer layer;
    layer.query = read_matrix(file, prefix + "self_attn.q_proj.weight", query_width, c.hidden_size);
    layer.key = read_matrix(file, prefix + "self_attn.k_proj.weight", kv_width, c.hidden_size);
    layer.value = read_matrix(file, prefix + "self_attn.v_proj.weight", kv_width, c.hidden_size);
    layer.output = read_matrix(file, prefix + "self_attn.o_proj.weight", c.hidden_size, query_width);
    layer.gate = read_matrix(file, prefix + "mlp.gate_proj.weight", c.intermediate_size, c.hidden_size);
    layer.up = read_matrix(file, prefix + "mlp.up_proj.weight", c.intermediate_size, c.hidden_size);
    layer.down = read_matrix(file, prefix + "mlp.down_proj.weight", c.hidden_size, c.intermediate_size);
    layer.attention_norm = read_vector(file, prefix + "input_layernorm.weight", c.hidden_size);
    layer.mlp_norm = read_vector(file, prefix + "post_attention_layernorm.weight", c.hidden_size);
    layers_.push_back(std::move(layer));
  }
  kvfold::or_throw(workspace_.reserve(kvfold::attend_workspace_bytes(c.layer_shape(), pool_.concurrency())));
}

Sequence Decoder::new_sequence() const {
  Sequence sequence;
  const kvfold::Rope rope{
      .kind = config_.rope, .rotary_dim = config_.head_dim, .theta = config_.rope_theta, .inv_freq = {}};
  for (Eigen::Index i = 0; i < config_.layers; ++i) {
    sequence.layers.push_back(kvfold::or_throw(Cache::create(config_.layer_shape(), rope)));
  }
  return sequence;
}

/// x * weight^T, with the columns of the result spread over the pool.
Matrix Decoder::multiply(const Matrix& x, const Matrix& weight) {
  constexpr Eigen::Index kColumns = 64;  // a multiple of every vector width
  Matrix out(x.rows(), weight.rows());
  const Eigen::Index parts = pool_.concurrency();
  const Eigen::Index width = ((weight.rows() + parts - 1) / parts + kColumns - 1) / kColumns * kColumns;
  auto task = [&](kvfold::Index i, kvfold::Index) {
    const Eigen::Index first = i * width, count = std::min(width, weight.rows() - first);
    if (count > 0) out.middleCols(first, count).noalias() = x * weight.middleRows(first, count).transpose();
  };
  pool_.run(parts, task);
  return out;
}

Matrix Decoder::normalise(const Matrix& x, const Eigen::VectorXf& weight) const {
  Matrix out(x.rows(), x.cols());
  for (Eigen::Index i = 0; i < x.rows(); ++i) {
    const float inverse = 1.f / std::sqrt(x.row(i).squaredNorm() / static_cast<float>(x.cols()) + config_.rms_norm_eps);
    out.row(i) = (x.row(i) * inverse).cwiseProduct(weight.transpose());
  }
  return out;
}

/// RoPE, in place: rows are [heads][head_dim].
void Decoder::rotate(Matrix& rows, Eigen::Index heads, std::span<const kvfold::Position> positions) const {
  const Eigen::Index dim = config_.head_dim, half = dim / 2;
  const bool split = config_.rope == kvfold::RopeKind::half_split;
  Eigen::VectorXf cosine(half), sine(half);
  for (Eigen::Index t = 0; t < rows.rows(); ++t) {
    for (Eigen::Index i = 0; i < half; ++i) {
      const double angle = static_cast<double>(positions[static_cast<std::size_t>(t)]) *
                           std::pow(config_.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
      cosine[i] = static_cast<float>(std::cos(angle));
      sine[i] = static_cast<float>(std::sin(angle));
    }
    for (Eigen::Index h = 0; h < heads; ++h) {
      float* x = rows.row(t).data() + h * dim;
      for (Eigen::Index i = 0; i < half; ++i) {
        float& a = split ? x[i] : x[2 * i];
        float& b = split ? x[i + half] : x[2 * i + 1];
        const float rotated = a * cosine[i] - b * sine[i];
        b = a * sine[i] + b * cosine[i];
        a = rotated;
      }
    }
  }
}

Matrix Decoder::attention(std::size_t index, const Matrix& x, std::span<const kvfold::Position> positions, Cache& cache,
                          const Observer& observe) {
  const Layer& layer = layers_[index];
  const Eigen::Index dim = config_.head_dim;
  Matrix queries = multiply(x, layer.query), keys = multiply(x, layer.key);
  const Matrix values = multiply(x, layer.value);
  rotate(queries, config_.query_heads, positions);
  rotate(keys, config_.kv_heads, positions);

  // New rows go into the cache first; then each query sees what is at or before its own position.
  const auto token_major = kvfold::Strides::token_major(config_.kv_heads, dim);
  kvfold::or_throw(cache.append(keys.data(), token_major, values.data(), token_major, positions));
  Matrix out(x.rows(), config_.query_heads * dim);
  std::vector<float> log_sum_exp(static_cast<std::size_t>(config_.query_heads * x.rows()));
  kvfold::QueryRows rows = kvfold::token_major_queries(queries.data(), config_.query_heads, dim, positions);
  kvfold::or_throw(kvfold::attend(
      cache, rows, {.data = out.data(), .head_stride = dim, .row_stride = out.cols(), .log_sum_exp = log_sum_exp},
      workspace_.get(), pool_));
  if (observe) {
    rows.log_sum_exp = log_sum_exp;
    observe(index, rows);
  }
  return multiply(out, layer.output);
}

Matrix Decoder::forward(std::span<const Token> tokens, Sequence& sequence, Logits logits, const Observer& observe) {
  const auto n = static_cast<Eigen::Index>(tokens.size());
  if (n == 0) return Matrix(0, config_.vocab_size);
  if (sequence.next + n > config_.max_positions)
    throw std::runtime_error("the sequence is longer than the model can read");
  std::vector<kvfold::Position> positions(tokens.size());
  std::iota(positions.begin(), positions.end(), sequence.next);

  Matrix x(n, config_.hidden_size);
  for (Eigen::Index t = 0; t < n; ++t) {
    const Token token = tokens[static_cast<std::size_t>(t)];
    if (token < 0 || token >= config_.vocab_size) throw std::runtime_error("token outside of the vocabulary");
    x.row(t) = embedding_.row(token);
  }
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    x += attention(i, normalise(x, layer.attention_norm), positions, sequence.layers[i], observe);
    const Matrix normed = normalise(x, layer.mlp_norm);
    Matrix gate = multiply(normed, layer.gate);
    const Matrix up = multiply(normed, layer.up);
    gate.array() *= up.array() / (1.f + (-gate.array()).exp());
    x += multiply(gate, layer.down);
  }
  sequence.next += n;
  if (logits == Logits::none) return Matrix(0, config_.vocab_size);
  const Matrix last = logits == Logits::last ? Matrix(x.bottomRows(1)) : x;
  return multiply(normalise(last, final_norm_), config_.tied_output ? embedding_ : output_);
}

void Decoder::prefill(std::span<const Token> tokens, Sequence& sequence, std::size_t chunk, const Observer& observe) {
  for (std::size_t first = 0; first < tokens.size(); first += chunk) {
    forward(tokens.subspan(first, std::min(chunk, tokens.size() - first)), sequence, Logits::none, observe);
  }
}

}  // namespace decoder
