// Launches of the weight gradient: the product, then the sum of its parts.
#include "cuda/dtypes.cuh"
#include "cuda/sum_parts.cuh"
#include "cuda/weight_grad.h"

namespace jaxconv::cuda {
namespace {

cudaError_t LaunchPlan(const WeightGradPlan& plan, const Problem& p, cudaStream_t stream) {
  const WeightGradArgs& a = plan.args;
  const auto launch = [&](auto in) {
    using In = decltype(in);
    return p.channels_last
               ? LaunchWeightGradVariant<In, true>(plan.variant, a, plan.blocks, stream)
               : LaunchWeightGradVariant<In, false>(plan.variant, a, plan.blocks, stream);
  };
  switch (p.in_dtype) {
    case DType::kF32:
      return launch(float{});
    case DType::kBF16:
      return launch(__nv_bfloat16{});
    case DType::kF16:
      return launch(__half{});
    case DType::kF64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t LaunchWeightGrad(const Problem& p, const Operands& ops, const Device& device,
                             cudaStream_t stream) {
  if (p.WElements() == 0) return cudaSuccess;
  if (p.XElements() == 0 || p.YElements() == 0) {
    return cudaMemsetAsync(ops.out, 0, static_cast<size_t>(p.WElements() * SizeOf(p.out_dtype)),
                           stream);
  }
  WeightGradPlan plan = PlanWeightGrad(p, device);
  if (!plan.refusal.empty()) return cudaErrorInvalidValue;
  WeightGradArgs& a = plan.args;
  a.x = ops.x;
  a.y = ops.y;
  a.out = a.parts > 1 ? ops.workspace : ops.out;
  a.kept = reinterpret_cast<float*>(static_cast<char*>(ops.workspace) + plan.kept_offset);
  a.out_dtype = static_cast<int32_t>(a.parts > 1 ? DType::kF32 : p.out_dtype);
  // An element of a stack can begin anywhere.
  const bool x_aligned = reinterpret_cast<uintptr_t>(ops.x) % 16 == 0;
  const bool y_aligned = reinterpret_cast<uintptr_t>(ops.y) % 16 == 0;
  if (!x_aligned || !y_aligned) a.vector = 4;
  a.x_aligned = a.x_aligned && x_aligned;
  a.y_aligned = a.y_aligned && y_aligned;
  if (const cudaError_t status = LaunchPlan(plan, p, stream);
      status != cudaSuccess || a.parts == 1) {
    return status;
  }
  return SumParts(static_cast<const float*>(ops.workspace), a.parts, p.WElements(), p.out_dtype,
                  ops.out, stream);
}

}  // namespace jaxconv::cuda
