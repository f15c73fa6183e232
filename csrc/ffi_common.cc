#include "ffi_common.h"

#include <cstdlib>
#include <optional>

namespace jaxconv {
namespace {

// Sizes and attribute values are bounded so that no product of two of them, and no sum of a few
// such products, can overflow 64 bits; products of more are checked.
constexpr int64_t kMaxValue = int64_t{1} << 30;
constexpr int64_t kMaxElements = int64_t{1} << 60;

const char* NameOf(Pass pass) {
  switch (pass) {
    case Pass::kForward:
      return "forward";
    case Pass::kInputGrad:
      return "input_grad";
    case Pass::kWeightGrad:
      return "weight_grad";
  }
  return "unknown pass";
}

std::optional<DType> DTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32:
      return DType::kF32;
    case ffi::DataType::BF16:
      return DType::kBF16;
    case ffi::DataType::F16:
      return DType::kF16;
    case ffi::DataType::F64:
      return DType::kF64;
    default:
      return std::nullopt;
  }
}

std::string ToString(ffi::Span<const int64_t> values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  }
  return text + ")";
}

// x, w or y of a call: its buffer and what its shape says. Shapes are
//   x, y  (*stack, *batch, c, *s)  or, channels last,  (*stack, *batch, *s, c)
//   w     (*stack, ci, co / groups, *k)
struct Tensor {
  ffi::AnyBuffer buffer;
  ffi::Span<const int64_t> dims;
  int64_t batch = 1;
  int64_t c = 0;
  Sizes s = {1, 1, 1};
};

class Decoder {
 public:
  Decoder(Pass pass, const Attributes& attributes) : pass_(pass), attr_(attributes) {}

  ffi::ErrorOr<Call> Decode(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets);

 private:
  ffi::Unexpected<ffi::Error> Invalid(const std::string& what) const {
    return ffi::Unexpected(
        ffi::Error::InvalidArgument(std::string("jaxconv ") + NameOf(pass_) + ": " + what));
  }

  std::string CheckAttributes() const;
  std::string ReadActivation(Tensor& t) const;
  std::string ReadWeight(Tensor& t) const;
  bool Elements(ffi::Span<const int64_t> dims) const;

  size_t rank() const { return attr_.stride.size(); }

  const Pass pass_;
  const Attributes& attr_;
};

std::string Decoder::CheckAttributes() const {
  if (rank() < 1 || rank() > kAxes) {
    return "stride must have 1 to 3 values, got " + ToString(attr_.stride);
  }
  if (attr_.dilation.size() != rank() || attr_.pad.size() != rank()) {
    return "stride, dilation and pad must have one value an axis, got " + ToString(attr_.stride) +
           ", " + ToString(attr_.dilation) + " and " + ToString(attr_.pad);
  }
  for (size_t a = 0; a < rank(); ++a) {
    if (attr_.stride[a] < 1 || attr_.stride[a] > kMaxValue) {
      return "stride must be positive and at most 2**30, got " + ToString(attr_.stride);
    }
    if (attr_.dilation[a] < 1 || attr_.dilation[a] > kMaxValue) {
      return "dilation must be positive and at most 2**30, got " + ToString(attr_.dilation);
    }
    if (attr_.pad[a] < -kMaxValue || attr_.pad[a] > kMaxValue) {
      return "pad must lie within +-2**30, got " + ToString(attr_.pad);
    }
  }
  if (attr_.groups < 1) return "groups must be positive, got " + std::to_string(attr_.groups);
  if (attr_.stack < 0) return "stack must not be negative, got " + std::to_string(attr_.stack);
  if (attr_.channels_last != 0 && attr_.channels_last != 1) {
    return "channels_last must be 0 or 1, got " + std::to_string(attr_.channels_last);
  }
  if (attr_.precision != static_cast<int64_t>(Precision::kDefault) &&
      attr_.precision != static_cast<int64_t>(Precision::kHighest)) {
    return "precision must be 0 or 1, got " + std::to_string(attr_.precision);
  }
  return "";
}

// Whether the dimensions are in range and their product fits.
bool Decoder::Elements(ffi::Span<const int64_t> dims) const {
  int64_t count = 1;
  for (const int64_t d : dims) {
    if (d < 0) return false;
    if (d > 0 && count > kMaxElements / d) return false;
    count *= d > 0 ? d : 1;
  }
  return true;
}

std::string Decoder::ReadActivation(Tensor& t) const {
  const size_t stack = static_cast<size_t>(attr_.stack);
  if (t.dims.size() < stack + 1 + rank() || !Elements(t.dims)) {
    return "an operand of shape " + ToString(t.dims) + " is not (*stack, *batch, c, *s) with " +
           std::to_string(stack) + " stack and " + std::to_string(rank()) + " spatial axes";
  }
  const size_t lead = t.dims.size() - 1 - rank();
  for (size_t i = stack; i < lead; ++i) t.batch *= t.dims[i];
  t.c = attr_.channels_last != 0 ? t.dims[t.dims.size() - 1] : t.dims[lead];
  const size_t first = attr_.channels_last != 0 ? lead : lead + 1;
  for (size_t a = 0; a < rank(); ++a) t.s[kAxes - rank() + a] = t.dims[first + a];
  for (const int64_t s : t.s) {
    if (s > kMaxValue) return "a spatial size above 2**30 in shape " + ToString(t.dims);
  }
  return "";
}

std::string Decoder::ReadWeight(Tensor& t) const {
  const size_t stack = static_cast<size_t>(attr_.stack);
  if (t.dims.size() != stack + 2 + rank() || !Elements(t.dims)) {
    return "a weight of shape " + ToString(t.dims) + " is not (*stack, ci, co/groups, *k) with " +
           std::to_string(stack) + " stack and " + std::to_string(rank()) + " spatial axes";
  }
  for (size_t a = 0; a < rank(); ++a) t.s[kAxes - rank() + a] = t.dims[stack + 2 + a];
  for (const int64_t s : t.s) {
    if (s < 1 || s > kMaxValue) return "kernel sizes must be positive, got " + ToString(t.dims);
  }
  return "";
}

ffi::ErrorOr<Call> Decoder::Decode(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) {
  if (std::string what = CheckAttributes(); !what.empty()) return Invalid(what);
  const bool forward = pass_ == Pass::kForward;
  if (args.size() != 2 && !(forward && args.size() == 3)) {
    return Invalid("wrong number of operands: " + std::to_string(args.size()));
  }
  if (rets.size() != 1 && rets.size() != 2) {
    return Invalid("wrong number of results: " + std::to_string(rets.size()));
  }
  auto first = args.get<ffi::AnyBuffer>(0);
  auto second = args.get<ffi::AnyBuffer>(1);
  auto result = rets.get<ffi::AnyBuffer>(0);
  if (!first.has_value()) return ffi::Unexpected(first.error());
  if (!second.has_value()) return ffi::Unexpected(second.error());
  if (!result.has_value()) return ffi::Unexpected(result.error());
  const auto tensor = [](ffi::AnyBuffer buffer) { return Tensor{buffer, buffer.dimensions()}; };
  Tensor a = tensor(*first), b = tensor(*second), out = tensor(**result);
  Tensor& x = pass_ == Pass::kInputGrad ? out : a;
  Tensor& w = pass_ == Pass::kWeightGrad ? out : b;
  Tensor& y = forward ? out : pass_ == Pass::kInputGrad ? a : b;
  for (const std::string& what : {ReadActivation(x), ReadWeight(w), ReadActivation(y)}) {
    if (!what.empty()) return Invalid(what);
  }

  // Types.
  const std::optional<DType> in = DTypeOf(a.buffer.element_type());
  const std::optional<DType> to = DTypeOf(out.buffer.element_type());
  if (!in || !to || a.buffer.element_type() != b.buffer.element_type()) {
    return Invalid("operands must both be float32, bfloat16, float16 or float64");
  }
  if (*to != *in && !(*to == DType::kF32 && SizeOf(*in) == 2)) {
    return Invalid("the result must have the operands' type, or float32 for 16-bit operands");
  }

  // Shapes against each other.
  const size_t stack = static_cast<size_t>(attr_.stack);
  const int64_t groups = attr_.groups;
  if (x.batch != y.batch || x.dims.size() != y.dims.size()) {
    return Invalid("batch axes of x " + ToString(x.dims) + " and y " + ToString(y.dims) +
                   " differ");
  }
  const int64_t ci = w.dims[stack], cog = w.dims[stack + 1];
  if (ci % groups != 0 || x.c != ci || y.c / groups != cog || y.c % groups != 0) {
    return Invalid("channels of x " + ToString(x.dims) + ", w " + ToString(w.dims) + " and y " +
                   ToString(y.dims) + " do not agree for groups=" + std::to_string(groups));
  }

  Call call;
  call.kernel = attr_.kernel;
  Problem& p = call.problem;
  p = Problem{pass_,
              *in,
              *to,
              static_cast<Precision>(attr_.precision),
              attr_.channels_last != 0,
              args.size() == 3,
              x.batch,
              ci,
              y.c,
              groups,
              x.s,
              y.s,
              w.s,
              {1, 1, 1},
              {1, 1, 1},
              {0, 0, 0}};
  for (size_t i = 0; i < rank(); ++i) {
    const size_t axis = kAxes - rank() + i;
    p.stride[axis] = attr_.stride[i];
    p.dilation[axis] = attr_.dilation[i];
    p.pad[axis] = attr_.pad[i];
  }

  const auto data = [](const Tensor& t) -> const void* { return t.buffer.untyped_data(); };
  call.operands = Operands{data(x), data(w), data(y), nullptr, out.buffer.untyped_data(), nullptr};
  ffi::Span<const int64_t> bias_dims;
  if (p.bias) {
    auto bias = args.get<ffi::AnyBuffer>(2);
    if (!bias.has_value()) return ffi::Unexpected(bias.error());
    bias_dims = bias->dimensions();
    if (bias->element_type() != out.buffer.element_type() || bias_dims.size() != stack + 1 ||
        bias_dims[stack] != y.c) {
      return Invalid("a bias of shape " + ToString(bias_dims) +
                     " is not (*stack, co) in the result's type, for y of shape " +
                     ToString(y.dims));
    }
    call.operands.bias = bias->untyped_data();
  }

  // The stack: every axis has one size, or 1 in an operand that is broadcast along it.
  int64_t step_x = p.XElements() * SizeOf(*in), step_w = p.WElements() * SizeOf(*in);
  int64_t step_y = p.YElements() * SizeOf(*in), step_bias = y.c * SizeOf(*to);
  int64_t step_out = (forward                     ? p.YElements()
                      : pass_ == Pass::kInputGrad ? p.XElements()
                                                  : p.WElements()) *
                     SizeOf(*to);
  call.stack.resize(stack);
  for (size_t i = stack; i-- > 0;) {
    const int64_t size = out.dims[i];
    bool fits = true;
    const auto advance = [&](int64_t dim, int64_t& step) {
      fits &= dim == size || dim == 1;
      const int64_t move = dim == 1 ? 0 : step;
      step *= dim;
      return move;
    };
    Call::Axis& axis = call.stack[i];
    axis.size = size;
    axis.x = advance(x.dims[i], step_x);
    axis.w = advance(w.dims[i], step_w);
    axis.y = advance(y.dims[i], step_y);
    axis.bias = p.bias ? advance(bias_dims[i], step_bias) : 0;
    axis.out = step_out;
    step_out *= size;
    if (!fits) {
      return Invalid("stack axes of x " + ToString(x.dims) + ", w " + ToString(w.dims) + " and y " +
                     ToString(y.dims) + " differ");
    }
  }

  call.out_bytes = static_cast<int64_t>(out.buffer.size_bytes());
  call.workspace_bytes = 0;
  if (rets.size() == 2) {
    auto workspace = rets.get<ffi::AnyBuffer>(1);
    if (!workspace.has_value()) return ffi::Unexpected(workspace.error());
    call.operands.workspace = (*workspace)->untyped_data();
    call.workspace_bytes = static_cast<int64_t>((*workspace)->size_bytes());
  }
  return call;
}

}  // namespace

bool Poisoned() {
  static const bool poisoned = [] {
    const char* value = std::getenv("JAXCONV_POISON");
    return value != nullptr && std::string_view(value) == "1";
  }();
  return poisoned;
}

ffi::ErrorOr<Call> DecodeCall(Pass pass, const ffi::RemainingArgs& args,
                              const ffi::RemainingRets& rets, const Attributes& attributes) {
  return Decoder(pass, attributes).Decode(args, rets);
}

}  // namespace jaxconv
