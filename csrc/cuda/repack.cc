#include "cuda/repack.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "cuda/across.h"
#include "cuda/dense.h"
#include "cuda/dense_grad.h"
#include "cuda/plan_memo.h"
#include "cuda/sum_parts.cuh"

namespace jaxconv::cuda {
namespace {

// Of a chunk's pixels, and of the parts of a weight gradient. Smaller chunks stay in the L2 cache,
// but leave multiprocessors idle and cost launches.
constexpr int64_t kMostPixels = int64_t{64} << 20, kMostParts = int64_t{32} << 20;
// Of the copies, in bytes of planes, and of what a launch costs beside.
constexpr double kCopyBandwidth = 1.5e12, kLaunch = 2e-6;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// One tensor, and its part that a chunk needs: rows of `axis`, the outermost that has several.
struct Tensor {
  DType dtype;
  int64_t channels, plane, rows, row;  // pixels of a channel; rows, and pixels of one
  int64_t chunk_rows, first, step;     // chunk b has `chunk_rows` rows from first + b * step on
  int64_t offset;                      // of its pixels in the workspace

  int64_t PixelBytes(int64_t pixels) const { return pixels * channels * SizeOf(dtype); }
};

struct RepackPlan {
  std::string refusal;
  Problem chunk;       // the same for all chunks
  Tensor from, other;  // a source; and the result, or the other source of a weight gradient
  int64_t images, bands, chunk_bands;  // of a chunk; of an image; of that in a chunk
  int64_t chunks;
  int64_t parts_offset, inner_offset, workspace;
  double seconds;
  DensePlan dense;
  const DenseGradPlan* grad;  // of a weight gradient, this or the other
  const AcrossPlan* across;

  int64_t GradParts() const { return across != nullptr ? across->args.parts : grad->args.parts; }
};

// Images or bands that a weight gradient wants at once. Of 16 bits it contracts over neighbouring
// pixels instead.
int64_t StreamsOf(const Problem& p) { return SizeOf(p.in_dtype) == 4 ? Streams(p) : 1; }

Tensor TensorOf(DType dtype, int64_t channels, const Sizes& size, int axis) {
  Tensor t{};
  t.dtype = dtype;
  t.channels = channels;
  t.plane = Product(size);
  t.rows = t.chunk_rows = size[axis];
  t.row = t.plane / t.rows;
  return t;
}

// Cuts images into bands of `rows` rows of the result (weight gradient: of x) each. With one
// geometry for all of them there is one plan, and the weights are packed once: rows that a band
// wants from outside of the source are zeros, and what the last one has too many is dropped.
void CutRows(const Problem& p, int axis, int64_t rows, RepackPlan& plan) {
  Problem& chunk = plan.chunk;
  const int64_t s = p.stride[axis], reach = (p.k[axis] - 1) * p.dilation[axis];
  plan.bands = CeilDiv(plan.other.rows, rows);
  plan.other.chunk_rows = plan.other.step = rows;
  if (p.pass == Pass::kForward) {
    // Output o hears inputs (o + pad - t * dilation) / stride; bands begin at multiples of the
    // stride, so that their phases agree.
    plan.from.first = -FloorDiv(reach - p.pad[axis], s);
    plan.from.step = rows / s;
    plan.from.chunk_rows = FloorDiv(rows - 1 + p.pad[axis], s) - plan.from.first + 1;
    chunk.osize[axis] = rows;
    chunk.isize[axis] = plan.from.chunk_rows;
    chunk.pad[axis] = p.pad[axis] - s * plan.from.first;
  } else {
    // Input i meets outputs i * stride - pad + t * dilation.
    plan.from.first = -p.pad[axis];
    plan.from.step = rows * s;
    plan.from.chunk_rows = (rows - 1) * s + reach + 1;
    chunk.isize[axis] = rows;
    chunk.osize[axis] = plan.from.chunk_rows;
    chunk.pad[axis] = 0;
  }
}

// Of a chunk.
int64_t PixelBytes(const RepackPlan& plan) {
  const auto bytes = [](const Tensor& t) { return t.PixelBytes(t.chunk_rows * t.row); };
  return plan.images * plan.chunk_bands * (bytes(plan.from) + bytes(plan.other));
}

// Cuts the problem into chunks; false where no band is small enough.
bool Cut(const Problem& p, RepackPlan& plan) {
  const int axis = OutermostAxis(p);
  const bool forward = p.pass == Pass::kForward;
  // Sources and results, as `CutRows` wants them: y's rows reach further than x's.
  const Tensor x = TensorOf(p.in_dtype, p.ci, p.isize, axis);
  const Tensor y = TensorOf(forward ? p.out_dtype : p.in_dtype, p.co, p.osize, axis);
  plan.from = forward ? x : y;
  plan.other = forward ? y : x;
  if (p.pass == Pass::kInputGrad) plan.other.dtype = p.out_dtype;
  plan.chunk = p;
  plan.chunk.channels_last = true;
  plan.images = plan.bands = plan.chunk_bands = 1;
  if (p.pass == Pass::kWeightGrad) {
    plan.images = std::min(p.n, StreamsOf(p));
    plan.chunk_bands = StreamsOf(p) / std::gcd(plan.images, StreamsOf(p));
  }
  if (const int64_t times = kMostPixels / PixelBytes(plan); plan.chunk_bands == 1 && times > 0) {
    const int64_t chunks = CeilDiv(p.n, times * plan.images);
    plan.images *= CeilDiv(CeilDiv(p.n, plan.images), chunks);
  } else {
    const int64_t unit = forward ? p.stride[axis] : 1;
    int64_t rows = RoundUp(CeilDiv(plan.other.rows, plan.chunk_bands), unit);
    for (CutRows(p, axis, rows, plan); PixelBytes(plan) > kMostPixels;) {
      // Bytes are linear in rows, so this ends after a few turns.
      rows = std::min(rows - unit, rows * kMostPixels / PixelBytes(plan) / unit * unit);
      if (rows < unit) return false;
      CutRows(p, axis, rows, plan);
    }
    // Bands of equal size. Those of the last chunk that are not there are zeros.
    const int64_t bands = RoundUp(plan.bands, plan.chunk_bands);
    CutRows(p, axis, RoundUp(CeilDiv(plan.other.rows, bands), unit), plan);
  }
  plan.chunk.n = plan.images * plan.chunk_bands;
  plan.chunks = CeilDiv(p.n, plan.images) * CeilDiv(plan.bands, plan.chunk_bands);
  return true;
}

RepackPlan MakePlan(const Problem& p, const Device& device) {
  RepackPlan plan{};
  plan.grad = nullptr;
  plan.across = nullptr;
  const auto refused = [&](std::string why) {
    plan.refusal = std::move(why);
    return plan;
  };
  if (p.channels_last && (p.pass != Pass::kWeightGrad || p.n % StreamsOf(p) == 0)) {
    return refused("is for channels first, and for float32 weight gradients of few images");
  }
  if (p.Empty()) return refused("has nothing to read or write");
  for (const auto& [channels, bytes] :
       {std::pair{p.ci, SizeOf(p.in_dtype)}, std::pair{p.co, SizeOf(p.in_dtype)}}) {
    if (channels * bytes % 16 != 0) return refused("needs pixels of a multiple of 16 bytes");
  }
  if (!Cut(p, plan)) return refused("finds a row of the image too large for a chunk");
  const auto bytes = [&](const Tensor& t) {
    return RoundUp(t.PixelBytes(plan.chunk.n * t.chunk_rows * t.row), 1024);
  };
  plan.other.offset = bytes(plan.from);
  plan.parts_offset = plan.other.offset + bytes(plan.other);
  plan.inner_offset = plan.parts_offset;
  double inner = 0;
  if (p.pass == Pass::kWeightGrad) {
    const DenseGradPlan& grad = PlanDenseGrad(plan.chunk, device);
    const AcrossPlan& across = PlanAcross(plan.chunk, device);
    if (!grad.refusal.empty() && !across.refusal.empty()) return refused(grad.refusal);
    if (grad.refusal.empty()) plan.grad = &grad;
    if (across.refusal.empty() && (plan.grad == nullptr || across.seconds < grad.seconds)) {
      plan.across = &across;
    }
    const int64_t parts = plan.chunks * plan.GradParts();
    if (parts > 1) {
      const int64_t all = 4 * parts * p.WElements();
      if (all > kMostParts) return refused("has no room for the weight gradients of its chunks");
      plan.inner_offset += RoundUp(all, 1024);
    }
    const auto [workspace, seconds] = plan.across != nullptr
                                          ? std::pair{across.workspace, across.seconds}
                                          : std::pair{grad.workspace, grad.seconds};
    plan.workspace = plan.inner_offset + workspace;
    // Several chunks took 1.1 to 2.0 times as long as they were expected to (six layers, H100).
    const double slower = plan.chunks > 1 ? 1.5 : 1.0;
    inner = slower * static_cast<double>(plan.chunks) * seconds;
  } else {
    plan.dense = PlanDense(plan.chunk, device);
    if (!plan.dense.refusal.empty()) return refused(plan.dense.refusal);
    plan.workspace = plan.inner_offset + plan.dense.Workspace();
    inner = static_cast<double>(plan.chunks) * (plan.dense.seconds - plan.dense.pack_seconds) +
            plan.dense.pack_seconds;
  }
  const auto copied = static_cast<double>(PixelBytes(plan));
  plan.seconds = inner + static_cast<double>(plan.chunks) * (2 * kLaunch + copied / kCopyBandwidth);
  return plan;
}

const RepackPlan& PlanOf(const Problem& p, const Device& d) {
  return Remember<RepackPlan>(p, d, [&] { return MakePlan(p, d); });
}

RepackCopy CopyOf(const Problem& p, const RepackPlan& plan, const Tensor& t, int64_t image,
                  int64_t band) {
  RepackCopy c{};
  c.channels = t.channels;
  c.plane = t.plane;
  c.first = (t.first + band * t.step) * t.row;
  c.step = t.step * t.row;
  c.count = t.chunk_rows * t.row;
  c.images = static_cast<int>(plan.images);
  c.bands = static_cast<int>(plan.chunk_bands);
  c.valid_images = static_cast<int>(std::min(plan.images, p.n - image));
  c.element = static_cast<int>(SizeOf(t.dtype));
  c.last = p.channels_last;
  return c;
}

cudaError_t LaunchRepack(const Problem& p, const Operands& ops, const Device& d,
                         cudaStream_t stream) {
  const RepackPlan& plan = PlanOf(p, d);
  const bool forward = p.pass == Pass::kForward, grad = p.pass == Pass::kWeightGrad;
  char* workspace = static_cast<char*>(ops.workspace);
  char* pixels = workspace + plan.other.offset;
  const void* from = forward ? ops.x : ops.y;
  const void* other = grad ? ops.x : ops.out;

  Operands chunk = ops;
  (forward ? chunk.x : chunk.y) = workspace;
  if (grad) {
    chunk.x = pixels;
  } else {
    chunk.out = pixels;
  }
  chunk.workspace = workspace + plan.inner_offset;
  DenseLaunch dense;
  DenseGradLaunch dense_grad;
  cudaError_t status = cudaSuccess;
  if (!grad) {
    status = PrepareDense(plan.chunk, chunk, plan.dense, dense);
  } else if (plan.across == nullptr) {
    status = PrepareDenseGrad(plan.chunk, chunk, *plan.grad, dense_grad);
  }
  const int64_t parts = grad ? plan.GradParts() * plan.chunks : 0;
  float* part = reinterpret_cast<float*>(workspace + plan.parts_offset);

  bool first = true;
  for (int64_t image = 0; image < p.n; image += plan.images) {
    for (int64_t band = 0; band < plan.bands && status == cudaSuccess; band += plan.chunk_bands) {
      const auto of_image = [&](const Tensor& t, const void* data) {
        return const_cast<char*>(static_cast<const char*>(data)) + t.PixelBytes(image * t.plane);
      };
      const RepackCopy source = CopyOf(p, plan, plan.from, image, band);
      const RepackCopy target = CopyOf(p, plan, plan.other, image, band);
      status = CopyToPixels(source, of_image(plan.from, from), workspace, stream);
      if (status != cudaSuccess) return status;
      if (grad) {
        status = CopyToPixels(target, of_image(plan.other, other), pixels, stream);
        if (status != cudaSuccess) return status;
        void* const to = parts > 1 ? part : ops.out;
        const DType dtype = parts > 1 ? DType::kF32 : p.out_dtype;
        part += plan.GradParts() * p.WElements();
        if (plan.across != nullptr) {
          status = RunAcrossParts(plan.chunk, *plan.across, chunk, to, dtype, stream);
        } else {
          dense_grad.args.out = to;
          dense_grad.args.out_dtype = static_cast<int32_t>(dtype);
          status = RunDenseGrad(plan.chunk, *plan.grad, dense_grad, stream);
        }
      } else {
        status = RunDense(plan.chunk, plan.dense, dense, first, stream);
        first = false;
        if (status != cudaSuccess) return status;
        status = CopyFromPixels(target, pixels, of_image(plan.other, other), stream);
      }
    }
  }
  if (status != cudaSuccess || parts <= 1) return status;
  return SumParts(reinterpret_cast<float*>(workspace + plan.parts_offset), static_cast<int>(parts),
                  p.WElements(), p.out_dtype, ops.out, stream);
}

}  // namespace

void AddRepack(std::vector<Row>& rows) {
  for (Pass pass : {Pass::kForward, Pass::kInputGrad, Pass::kWeightGrad}) {
    rows.push_back(
        {"repack", pass, [](const Problem& p, const Device& d) { return PlanOf(p, d).refusal; },
         [](const Problem& p, const Device& d) { return PlanOf(p, d).workspace; },
         [](const Problem& p, const Device& d) { return PlanOf(p, d).seconds; }, LaunchRepack});
  }
}

}  // namespace jaxconv::cuda
