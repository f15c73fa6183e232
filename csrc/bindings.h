// What the compiled modules show Python, the same on every platform.
#ifndef JAXCONV_BINDINGS_H_
#define JAXCONV_BINDINGS_H_

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "kernel_table.h"
#include "xla/ffi/api/c_api.h"

namespace jaxconv {

namespace py = ::pybind11;

inline py::capsule HandlerCapsule(XLA_FFI_Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler));
}

// Defines the problem, the verdicts on it and the module's versions.
// `Device` must already be bound. Each module has its own Problem, since each has its own copy of
// it.
template <class Device, class Table>
void BindTable(py::module_& m, const Table& (*table)()) {
  py::class_<Problem>(m, "Problem", py::module_local(),
                      "A problem for the kernel table; see csrc/problem.h.")
      .def(py::init([](int pass, int in_dtype, int out_dtype, int precision, bool channels_last,
                       bool bias, int64_t n, int64_t ci, int64_t co, int64_t groups, Sizes isize,
                       Sizes osize, Sizes k, Sizes stride, Sizes dilation, Sizes pad) {
             return Problem{static_cast<Pass>(pass),
                            static_cast<DType>(in_dtype),
                            static_cast<DType>(out_dtype),
                            static_cast<Precision>(precision),
                            channels_last,
                            bias,
                            n,
                            ci,
                            co,
                            groups,
                            isize,
                            osize,
                            k,
                            stride,
                            dilation,
                            pad};
           }),
           py::kw_only(), py::arg("pass_"), py::arg("in_dtype"), py::arg("out_dtype"),
           py::arg("precision"), py::arg("channels_last"), py::arg("bias"), py::arg("n"),
           py::arg("ci"), py::arg("co"), py::arg("groups"), py::arg("isize"), py::arg("osize"),
           py::arg("k"), py::arg("stride"), py::arg("dilation"), py::arg("pad"));
  m.def(
      "verdicts",
      [table](const Problem& problem, const Device& device) {
        std::vector<std::tuple<std::string, std::string, double, int64_t>> rows;
        for (const Verdict& v : Verdicts(table(), problem, device)) {
          rows.emplace_back(v.name, v.refusal, v.seconds, v.workspace);
        }
        return rows;
      },
      py::arg("problem"), py::arg("device"),
      "What every kernel of the problem's pass says: (name, refusal, seconds, workspace bytes).");
  m.def(
      "choose",
      [table](const Problem& problem, const Device& device, const std::string& name) {
        const auto* row = Choose(table(), problem, device, name, kNoWorkspaceLimit);
        return row == nullptr ? std::string() : std::string(row->name);
      },
      py::arg("problem"), py::arg("device"), py::arg("name") = "",
      "The kernel that runs the problem, of those called `name` if given; '' if none takes it.");
  m.def(
      "kernel_names",
      [table](int pass) {
        std::vector<std::string> names;
        for (const auto& row : table()) {
          if (row.pass == static_cast<Pass>(pass)) names.emplace_back(row.name);
        }
        return names;
      },
      py::arg("pass_"), "The names of a pass's kernels.");
  m.attr("XLA_FFI_API_VERSION") = py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.attr("VERSION") = JAXCONV_VERSION;
}

}  // namespace jaxconv

#endif  // JAXCONV_BINDINGS_H_
