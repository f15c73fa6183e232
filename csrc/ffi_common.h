// From an XLA FFI call to problems and pointers, the same on every platform. Whatever the caller
// handed in is checked here: a wrong buffer or attribute becomes an FFI error.
#ifndef JAXCONV_FFI_COMMON_H_
#define JAXCONV_FFI_COMMON_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jaxconv {

namespace ffi = ::xla::ffi;

// The attributes of every jaxconv FFI call. Sizes are not among them: they are read off the
// buffers.
struct Attributes {
  ffi::Span<const int64_t> stride, dilation, pad;  // one value a spatial axis
  int64_t groups;
  int64_t stack;            // leading axes that stack whole problems; size 1 broadcasts an operand
  int64_t channels_last;    // 0 or 1
  int64_t precision;        // jaxconv::Precision
  std::string_view kernel;  // a row of the kernel table, or empty: choose one at the call
};

// One FFI call: a problem, solved once for each element of the stack.
struct Call {
  Problem problem;
  Operands operands;                   // of the first element
  int64_t out_bytes, workspace_bytes;  // of the whole stack
  std::string_view kernel;

  // Runs `body(operands)`, which returns an ffi::Error, for each element of the stack.
  template <class Body>
  ffi::Error ForEach(Body body) const;

  // The stack: sizes, and by how many bytes each pointer moves along each axis (0: broadcast).
  struct Axis {
    int64_t size, x, w, y, bias, out;
  };
  std::vector<Axis> stack;
};

// Reads and checks a call. The forward takes (x, w) or (x, w, bias), the input gradient (y, w),
// the weight gradient (x, y); results are the output and, if there are two, a workspace of bytes.
ffi::ErrorOr<Call> DecodeCall(Pass pass, const ffi::RemainingArgs& args,
                              const ffi::RemainingRets& rets, const Attributes& attributes);

// Whether JAXCONV_POISON=1: handlers then fill the output and the workspace with NaN (bytes of
// ones) before a kernel runs, so that tests see an element that is not written.
bool Poisoned();
inline constexpr int kPoison = 0xff;

// The attribute bindings shared by all handlers, in the order of Attributes' members.
#define JAXCONV_BIND_ATTRIBUTES()                        \
  RemainingArgs()                                        \
      .RemainingRets()                                   \
      .Attr<::xla::ffi::Span<const int64_t>>("stride")   \
      .Attr<::xla::ffi::Span<const int64_t>>("dilation") \
      .Attr<::xla::ffi::Span<const int64_t>>("pad")      \
      .Attr<int64_t>("groups")                           \
      .Attr<int64_t>("stack")                            \
      .Attr<int64_t>("channels_last")                    \
      .Attr<int64_t>("precision")                        \
      .Attr<std::string_view>("kernel")

template <class Body>
ffi::Error Call::ForEach(Body body) const {
  int64_t count = 1;
  for (const Axis& axis : stack) count *= axis.size;
  std::vector<int64_t> index(stack.size(), 0);
  for (int64_t i = 0; i < count; ++i) {
    Operands shifted = operands;
    const auto shift = [](const void* p, int64_t bytes) -> const void* {
      return p == nullptr ? nullptr : static_cast<const char*>(p) + bytes;
    };
    for (size_t a = 0; a < stack.size(); ++a) {
      shifted.x = shift(shifted.x, index[a] * stack[a].x);
      shifted.w = shift(shifted.w, index[a] * stack[a].w);
      shifted.y = shift(shifted.y, index[a] * stack[a].y);
      shifted.bias = shift(shifted.bias, index[a] * stack[a].bias);
      shifted.out = static_cast<char*>(shifted.out) + index[a] * stack[a].out;
    }
    if (ffi::Error error = body(shifted); error.failure()) return error;
    for (size_t a = stack.size(); a-- > 0;) {  // the next index, last axis fastest
      if (++index[a] < stack[a].size) break;
      index[a] = 0;
    }
  }
  return ffi::Error::Success();
}

}  // namespace jaxconv

#endif  // JAXCONV_FFI_COMMON_H_
