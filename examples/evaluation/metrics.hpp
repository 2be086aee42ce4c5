/// \file
/// How well a model predicts: negative log likelihood, and divergence from a reference.
#pragma once

#include <kvfold/exec/thread_pool.hpp>

#include <span>

#include "decoder/decoder.hpp"

namespace evaluation {

/// Turns logits into log probabilities, in place.
void log_softmax(decoder::Matrix& logits, kvfold::ThreadPool& pool);

/// -mean of the log probability of each row's next token. `next` has one token per row.
double negative_log_likelihood(const decoder::Matrix& log_probabilities, std::span<const decoder::Token> next);

/// Mean over rows of KL(reference || other), in nats.
double mean_kl(const decoder::Matrix& reference, const decoder::Matrix& other, kvfold::ThreadPool& pool);

}  // namespace evaluation
