// Runs a decoded call on a platform's kernel table: find the row, check it once more, launch.
#ifndef JAXCONV_DISPATCH_H_
#define JAXCONV_DISPATCH_H_

#include <string>

#include "ffi_common.h"
#include "kernel_table.h"

namespace jaxconv {

// `run(row, problem, operands)` launches and returns an ffi::Error. The row has to get by with so
// many bytes of workspace.
template <class Table, class Device, class Run>
ffi::Error Dispatch(const Table& table, const Device& device, const Call& call,
                    int64_t workspace_bytes, Run run) {
  const auto* row = Choose(table, call.problem, device, call.kernel, workspace_bytes);
  if (row == nullptr) {
    std::string what = "jaxconv: no kernel";
    if (!call.kernel.empty()) what += " named " + std::string(call.kernel);
    what += " takes the problem within " + std::to_string(workspace_bytes) + " bytes of workspace:";
    for (const Verdict& v : Verdicts(table, call.problem, device)) {
      what += " " + v.name + ": ";
      what += v.refusal.empty() ? "wants " + std::to_string(v.workspace) + " bytes" : v.refusal;
      what += ";";
    }
    return ffi::Error::InvalidArgument(what);
  }
  return call.ForEach([&](const Operands& operands) { return run(*row, call.problem, operands); });
}

}  // namespace jaxconv

#endif  // JAXCONV_DISPATCH_H_
