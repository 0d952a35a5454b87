// The ops for CUDA tensors: results, workspaces and the launches, on the tensors' device and its current stream. A shared
// object of its own, which only a torch with CUDA loads: the current stream lives in libtorch_cuda.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cuda/kernels.h"
#include "schemas.h"
#include "tensors.h"

namespace {

using namespace rlhf_kernels::tensors;
using rlhf_kernels::GaeArguments;
using rlhf_kernels::KlShaping;
using rlhf_kernels::LogProbGradient;
using rlhf_kernels::LogProbResults;
using rlhf_kernels::Moments;
using rlhf_kernels::OnlineSoftmax;
using rlhf_kernels::Sequences;
namespace cuda = rlhf_kernels::cuda;

// The device of a tensor, made current as long as this lives, and its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : device_index_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type_));
#if !defined(RLHF_CUDA_EMULATED)
    guard_.emplace(device_index_);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index_, &stream));
#endif
  }

  Tensor empty(const std::vector<int64_t>& shape, ScalarType type = ScalarType::Float) const {
    return allocate(shape, type, device_type_, device_index_);
  }
  Tensor empty_like(const Tensor& tensor) const { return empty(sizes(tensor)); }
  Tensor nothing() const { return empty({0}); }
  Tensor bytes(int64_t count) const { return empty({count}, ScalarType::Byte); }
  Tensor zeros(const std::vector<int64_t>& shape, ScalarType type = ScalarType::Float) const {
    Tensor result = empty(shape, type);
    return torch::stable::zero_(result);
  }

  cuda::Stream stream = nullptr;

 private:
  int32_t device_type_ = 0, device_index_;
#if !defined(RLHF_CUDA_EMULATED)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

// ------------------------------------------------------------------------------------------------------- log_prob

std::tuple<Tensor, Tensor, Tensor, Tensor> selective_log_softmax(Tensor logits, Tensor index, Tensor wanted,
                                                                 double temperature, bool with_entropy,
                                                                 bool /*inplace_backward: for autograd*/) {
  const Launch launch(logits);
  if (logits.stride(logits.dim() - 1) != 1) logits = torch::stable::contiguous(logits);
  const Tensor dense_index = cast(index, ScalarType::Long), dense_wanted = dense(wanted);
  Tensor logprobs = launch.empty_like(index), maxima = launch.empty_like(index), log_sums = launch.empty_like(index),
         entropies = with_entropy ? launch.empty_like(index) : launch.nothing();
  const auto in = log_prob_arguments(logits, dense_index, data<uint8_t>(dense_wanted), temperature);
  const LogProbResults out{mutable_data<float>(logprobs), with_entropy ? mutable_data<float>(entropies) : nullptr,
                           mutable_data<float>(maxima), mutable_data<float>(log_sums)};
  const int64_t rows = index.numel(), chunks = cuda::log_prob_chunks(in.vocabulary);
  const bool several = chunks > 1 && rows > 0;
  const Tensor sums = launch.bytes(several ? rows * chunks * static_cast<int64_t>(sizeof(OnlineSoftmax)) : 0);
  const Tensor tickets = several ? launch.zeros({rows}, ScalarType::Int) : launch.nothing();
  cuda::log_prob(in, out, rows, mutable_data<OnlineSoftmax>(sums), mutable_data<unsigned>(tickets), launch.stream);
  return {logprobs, entropies, maxima, log_sums};
}

void log_prob_backward(const Launch& launch, const Tensor& logits, const Tensor& index, const Tensor& wanted,
                       double temperature, const Tensor& entropies, const Tensor& maxima, const Tensor& log_sums,
                       const Tensor& grad_logprobs, const OptionalTensor& grad_entropies, const Tensor& gradient) {
  const Tensor dense_index = cast(index, ScalarType::Long), dense_wanted = dense(wanted);
  const Tensor slopes = cast(grad_logprobs, ScalarType::Float);
  const OptionalTensor entropy_slopes = as_float(grad_entropies);
  const LogProbGradient out{data<float>(entropies), data<float>(maxima), data<float>(log_sums),
                            data<float>(slopes), data<float>(entropy_slopes), gradient.mutable_data_ptr(),
                            rows_of(gradient)};
  cuda::log_prob_backward(log_prob_arguments(logits, dense_index, data<uint8_t>(dense_wanted), temperature), out,
                          index.numel(), launch.stream);
}

Tensor selective_log_softmax_backward(Tensor logits, Tensor index, Tensor wanted, double temperature, Tensor entropies,
                                      Tensor maxima, Tensor log_sums, Tensor grad_logprobs,
                                      OptionalTensor grad_entropies) {
  const Launch launch(logits);
  if (logits.stride(logits.dim() - 1) != 1) logits = torch::stable::contiguous(logits);
  Tensor gradient = launch.empty(sizes(logits), logits.scalar_type());
  log_prob_backward(launch, logits, index, wanted, temperature, entropies, maxima, log_sums, grad_logprobs,
                    grad_entropies, gradient);
  return gradient;
}

void selective_log_softmax_backward_(Tensor logits, Tensor index, Tensor wanted, double temperature, Tensor entropies,
                                     Tensor maxima, Tensor log_sums, Tensor grad_logprobs,
                                     OptionalTensor grad_entropies) {
  if (logits.stride(logits.dim() - 1) != 1) {
    const Tensor gradient = selective_log_softmax_backward(logits, index, wanted, temperature, entropies, maxima,
                                                           log_sums, grad_logprobs, grad_entropies);
    torch::stable::copy_(logits, gradient);
    return;
  }
  const Launch launch(logits);
  log_prob_backward(launch, logits, index, wanted, temperature, entropies, maxima, log_sums, grad_logprobs,
                    grad_entropies, logits);
}

// ------------------------------------------------------------------------------------------------- kl_reward, gae

struct TokenRows {
  int64_t count, length;

  explicit TokenRows(const Tensor& tensor)
      : count(tensor.dim() == 2 ? tensor.size(0) : 1), length(tensor.size(tensor.dim() - 1)) {}
};

Tensor kl_penalty(Tensor logprobs, Tensor ref_logprobs, std::string estimator) {
  const Launch launch(logprobs);
  Tensor result = launch.empty_like(logprobs);
  const TokenRows rows(logprobs);
  cuda::kl_penalty(view_of(logprobs), view_of(ref_logprobs), rows.count, rows.length, estimator_of(estimator),
                   mutable_data<float>(result), launch.stream);
  return result;
}

Tensor kl_penalty_backward(Tensor logprobs, Tensor ref_logprobs, std::string estimator, Tensor gradient) {
  const Launch launch(logprobs);
  const Tensor slopes = cast(gradient, ScalarType::Float);
  Tensor result = launch.empty_like(logprobs);
  const TokenRows rows(logprobs);
  cuda::kl_penalty_backward(view_of(logprobs), view_of(ref_logprobs), rows.count, rows.length, estimator_of(estimator),
                            data<float>(slopes), mutable_data<float>(result), launch.stream);
  return result;
}

// (B, T), or (N,) cut by boundaries, which a kernel can't check.
Sequences sequences_of(const Tensor& like, const OptionalTensor& boundaries) {
  if (boundaries) return {boundaries->size(0) - 1, like.size(0), data<int64_t>(boundaries)};
  return {like.size(0), like.size(1), nullptr};
}

std::tuple<Tensor, Tensor> kl_shaped_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor wanted,
                                             double beta, std::string estimator, std::optional<double> score_clip) {
  const Launch launch(logprobs);
  const Tensor mask = dense(wanted), row_scores = cast(scores, ScalarType::Float);
  Tensor rewards = launch.empty_like(logprobs), kl = launch.empty_like(logprobs);
  cuda::kl_shaped_rewards(shaping_of(row_scores, logprobs, ref_logprobs, beta, estimator, score_clip, rewards, kl),
                          sequences_of(logprobs, std::nullopt), data<uint8_t>(mask), launch.stream);
  return {rewards, kl};
}

std::tuple<Tensor, Tensor> advantages_of(const Launch& launch, const Tensor& like, GaeArguments in,
                                         const KlShaping* shaping, bool whiten) {
  Tensor advantages = launch.empty_like(like), returns = launch.empty_like(like);
  const Tensor moments = launch.bytes(whiten ? in.sequences.count * static_cast<int64_t>(sizeof(Moments)) : 0);
  in.advantages = mutable_data<float>(advantages);
  in.returns = mutable_data<float>(returns);
  in.moments = whiten ? mutable_data<Moments>(moments) : nullptr;
  if (shaping) {
    cuda::ppo_advantages(in, *shaping, like.numel(), launch.stream);
  } else {
    cuda::gae(in, like.numel(), launch.stream);
  }
  return {advantages, returns};
}

std::tuple<Tensor, Tensor> masked_gae(Tensor rewards, Tensor values, Tensor wanted, double gamma, double lam,
                                      OptionalTensor bootstrap, bool whiten, OptionalTensor cu_seqlens) {
  const Launch launch(rewards);
  const Tensor mask = dense(wanted);
  const OptionalTensor last = as_float(bootstrap), boundaries = as_int64(cu_seqlens);
  return advantages_of(launch, rewards,
                       {view_of(rewards), view_of(values), data<uint8_t>(mask), sequences_of(rewards, boundaries), gamma,
                        lam, data<float>(last), nullptr, nullptr, nullptr},
                       nullptr, whiten);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_advantages(Tensor scores, Tensor logprobs, Tensor ref_logprobs,
                                                          Tensor values, Tensor wanted, double beta, double gamma,
                                                          double lam, bool whiten, OptionalTensor bootstrap,
                                                          std::string estimator, std::optional<double> score_clip,
                                                          OptionalTensor cu_seqlens) {
  const Launch launch(logprobs);
  const Tensor mask = dense(wanted), row_scores = cast(scores, ScalarType::Float);
  const OptionalTensor last = as_float(bootstrap), boundaries = as_int64(cu_seqlens);
  Tensor rewards = launch.empty_like(logprobs), kl = launch.empty_like(logprobs);
  const auto shaping = shaping_of(row_scores, logprobs, ref_logprobs, beta, estimator, score_clip, rewards, kl);
  const auto [advantages, returns] = advantages_of(
      launch, logprobs,
      {{}, view_of(values), data<uint8_t>(mask), sequences_of(logprobs, boundaries), gamma, lam, data<float>(last),
       nullptr, nullptr, nullptr},
      &shaping, whiten);
  return {advantages, returns, rewards, kl};
}

// ------------------------------------------------------------------------------------------------------- ppo_loss

cuda::Reduction reduction_of(const std::string& name) {
  if (name == "token-mean") return cuda::Reduction::token_mean;
  return name == "seq-mean-token-mean" ? cuda::Reduction::seq_mean_token_mean : cuda::Reduction::seq_mean_token_sum;
}

// run(arguments, workspace) launches.
template <class Run>
std::tuple<Tensor, Tensor, Tensor> token_loss(const Launch& launch, const Tensor& first, const Tensor& second,
                                              const Tensor& third, const Tensor& wanted, const std::string& reduction,
                                              bool with_gradient, int64_t statistics, Run&& run) {
  Tensor gradient = with_gradient ? launch.empty_like(first) : launch.nothing();
  if (first.numel() == 0) return {launch.zeros({}), launch.zeros({statistics}), gradient};
  const Tensor mask = dense(wanted);
  Tensor loss = launch.empty({}), values = launch.empty({statistics});
  cuda::TokenLoss in{{view_of(first), view_of(second), view_of(third)}, data<uint8_t>(mask), TokenRows(first).count,
                     TokenRows(first).length, reduction_of(reduction),
                     with_gradient ? mutable_data<float>(gradient) : nullptr, mutable_data<float>(loss),
                     mutable_data<float>(values)};
  // Where rows mean nothing, and nothing lies between them, a short one need not have a block.
  if (in.reduction == cuda::Reduction::token_mean && first.is_contiguous() && second.is_contiguous() &&
      third.is_contiguous()) {
    in.length = first.numel();
    in.rows = 1;
    for (auto& view : in.inputs) view.stride = 1;
  }
  const Tensor workspace = launch.bytes(cuda::token_loss_workspace(in.rows, in.length));
  run(in, workspace.mutable_data_ptr());
  return {loss, values, gradient};
}

std::tuple<Tensor, Tensor, Tensor> ppo_policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages,
                                                   Tensor wanted, double clip_low, double clip_high,
                                                   std::optional<double> dual_clip, std::string reduction,
                                                   bool with_gradient) {
  const Launch launch(logprobs);
  return token_loss(launch, logprobs, old_logprobs, advantages, wanted, reduction, with_gradient, 4,
                    [&](const cuda::TokenLoss& in, void* workspace) {
                      cuda::ppo_policy_loss(in, policy_clip(clip_low, clip_high, dual_clip), workspace, launch.stream);
                    });
}

std::tuple<Tensor, Tensor, Tensor> ppo_value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor wanted,
                                                  std::optional<double> clip_range, std::string reduction,
                                                  bool with_gradient) {
  const Launch launch(values);
  return token_loss(launch, values, old_values, returns, wanted, reduction, with_gradient, 3,
                    [&](const cuda::TokenLoss& in, void* workspace) {
                      cuda::ppo_value_loss(in, static_cast<float>(clip_range.value_or(-1.0)), workspace, launch.stream);
                    });
}

// --------------------------------------------------------------------------------------------------- ranking_loss

std::tuple<Tensor, Tensor, Tensor> pairwise_ranking_loss(Tensor scores, Tensor ranks, OptionalTensor offsets,
                                                         OptionalTensor wanted, double margin, bool with_gradient) {
  const Launch launch(scores);
  Tensor gradient = with_gradient ? launch.empty_like(scores) : launch.nothing();
  const OptionalTensor boundaries = as_int64(offsets);
  const auto prompts = sequences_of(scores, boundaries);
  if (scores.numel() == 0) return {launch.zeros({}), launch.zeros({}), gradient};
  const Tensor values = dense(scores), dense_ranks = cast(ranks, ScalarType::Long);
  const OptionalTensor mask = dense(wanted);
  Tensor loss = launch.empty({}), accuracy = launch.empty({});
  const Tensor workspace = launch.bytes(cuda::ranking_workspace(prompts.count));
  cuda::ranking_loss({values.const_data_ptr(), dtype_of(values), data<int64_t>(dense_ranks), data<uint8_t>(mask), prompts,
                      scores.numel(), static_cast<float>(margin), with_gradient ? mutable_data<float>(gradient) : nullptr,
                      mutable_data<float>(loss), mutable_data<float>(accuracy)},
                     workspace.mutable_data_ptr(), launch.stream);
  return {loss, accuracy, gradient};
}

}  // namespace

#if defined(RLHF_CUDA_EMULATED)
STABLE_TORCH_LIBRARY(rlhf_kernels_emulated, library) { rlhf_kernels::define_ops(library); }
STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_emulated, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CUDA, library) {
#endif
  // Triton's kernels take the places that are left free.
  if (cuda::driver_is_too_old()) return;
  library.impl("selective_log_softmax", TORCH_BOX(&selective_log_softmax));
  library.impl("selective_log_softmax_backward", TORCH_BOX(&selective_log_softmax_backward));
  library.impl("selective_log_softmax_backward_", TORCH_BOX(&selective_log_softmax_backward_));
  library.impl("kl_penalty", TORCH_BOX(&kl_penalty));
  library.impl("kl_penalty_backward", TORCH_BOX(&kl_penalty_backward));
  library.impl("kl_shaped_rewards", TORCH_BOX(&kl_shaped_rewards));
  library.impl("masked_gae", TORCH_BOX(&masked_gae));
  library.impl("ppo_advantages", TORCH_BOX(&ppo_advantages));
  library.impl("ppo_policy_loss", TORCH_BOX(&ppo_policy_loss));
  library.impl("ppo_value_loss", TORCH_BOX(&ppo_value_loss));
  library.impl("pairwise_ranking_loss", TORCH_BOX(&pairwise_ranking_loss));
}

// Whether the ops are not registered as the driver is too old, with CUDA's versions: see cuda::versions().
extern "C" __attribute__((visibility("default"))) bool rlhf_kernels_driver_is_too_old(int* built_with, int* driver) {
  *built_with = cuda::versions().built_with;
  *driver = cuda::versions().driver;
  return cuda::driver_is_too_old();
}
