// The compiled module jaxconv._cuda: FFI handlers for XLA's CUDA platform, and its kernel table.
// The CUDA runtime is linked statically and nothing here needs a driver until a handler runs.
#include <cuda_runtime_api.h>

#include "bindings.h"
#include "cuda/table.h"
#include "dispatch.h"

namespace jaxconv::cuda {
namespace {

ffi::Error CudaError(const char* what, cudaError_t status) {
  return ffi::Error::Internal(std::string("jaxconv: ") + what + ": " + cudaGetErrorString(status));
}

template <Pass pass>
ffi::Error Handle(cudaStream_t stream, int32_t ordinal, ffi::RemainingArgs args,
                  ffi::RemainingRets rets, ffi::Span<const int64_t> stride,
                  ffi::Span<const int64_t> dilation, ffi::Span<const int64_t> pad, int64_t groups,
                  int64_t stack, int64_t channels_last, int64_t precision,
                  std::string_view kernel) {
  const Attributes attributes{stride, dilation,      pad,       groups,
                              stack,  channels_last, precision, kernel};
  const auto call = DecodeCall(pass, args, rets, attributes);
  if (!call.has_value()) return call.error();
  if (Poisoned()) {
    for (const auto& [data, bytes] : {std::pair{call->operands.out, call->out_bytes},
                                      std::pair{call->operands.workspace, call->workspace_bytes}}) {
      if (bytes == 0) continue;
      if (const cudaError_t status =
              cudaMemsetAsync(data, kPoison, static_cast<size_t>(bytes), stream);
          status != cudaSuccess) {
        return CudaError("cannot poison", status);
      }
    }
  }
  int major = 0, minor = 0, multiprocessors = 0;
  for (const auto& [value, attribute] :
       {std::pair{&major, cudaDevAttrComputeCapabilityMajor},
        std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
        std::pair{&multiprocessors, cudaDevAttrMultiProcessorCount}}) {
    if (const cudaError_t status = cudaDeviceGetAttribute(value, attribute, ordinal);
        status != cudaSuccess) {
      return CudaError("cannot read the device's attributes", status);
    }
  }
  const Device device{10 * major + minor, multiprocessors};
  return Dispatch(Table(), device, *call, call->workspace_bytes,
                  [&](const Row& row, const Problem& problem, const Operands& operands) {
                    const cudaError_t status = row.launch(problem, operands, device, stream);
                    return status == cudaSuccess ? ffi::Error::Success()
                                                 : CudaError(row.name, status);
                  });
}

// What a handler launches depends on shapes and attributes only, so XLA may capture it in a graph.
#define JAXCONV_CUDA_HANDLER(name, pass)                               \
  XLA_FFI_DEFINE_HANDLER(name, Handle<pass>,                           \
                         ffi::Ffi::Bind()                              \
                             .Ctx<ffi::PlatformStream<cudaStream_t>>() \
                             .Ctx<ffi::DeviceOrdinal>()                \
                             .JAXCONV_BIND_ATTRIBUTES(),               \
                         {ffi::Traits::kCmdBufferCompatible})
JAXCONV_CUDA_HANDLER(kForwardHandler, Pass::kForward);
JAXCONV_CUDA_HANDLER(kInputGradHandler, Pass::kInputGrad);
JAXCONV_CUDA_HANDLER(kWeightGradHandler, Pass::kWeightGrad);

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of jaxconv.";
  py::class_<Device>(m, "Device", "What the choice of a CUDA kernel depends on.")
      .def(py::init([](int compute_capability, int multiprocessors) {
             return Device{compute_capability, multiprocessors};
           }),
           py::kw_only(), py::arg("compute_capability"), py::arg("multiprocessors"));
  BindTable<Device>(m, &Table);
  m.def("handlers", [] {
    py::dict handlers;
    handlers["forward"] = HandlerCapsule(kForwardHandler);
    handlers["input_grad"] = HandlerCapsule(kInputGradHandler);
    handlers["weight_grad"] = HandlerCapsule(kWeightGradHandler);
    return handlers;
  });
}

}  // namespace jaxconv::cuda
