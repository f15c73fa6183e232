// The kernel table of a platform, and the choice among its rows: host code that needs no device.
#ifndef JAXCONV_KERNEL_TABLE_H_
#define JAXCONV_KERNEL_TABLE_H_

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "problem.h"

namespace jaxconv {

// A row. `Device` describes what the choice may depend on, `Launch` is the platform's entry point.
template <class Device, class Launch>
struct Kernel {
  const char* name;  // kernels of one design share a name over the passes
  Pass pass;
  // Why the kernel does not take the problem: a sentence's end; empty where it takes it.
  std::string (*refuse)(const Problem&, const Device&);
  int64_t (*workspace)(const Problem&, const Device&);  // bytes
  double (*seconds)(const Problem&, const Device&);     // the cost model: what a run should take
  Launch launch;
};

struct Verdict {
  std::string name;
  std::string refusal;  // empty: the kernel takes the problem
  double seconds;
  int64_t workspace;
};

inline constexpr int64_t kNoWorkspaceLimit = std::numeric_limits<int64_t>::max();

// What every row of the problem's pass says of it.
template <class Table, class Device>
std::vector<Verdict> Verdicts(const Table& table, const Problem& problem, const Device& device) {
  std::vector<Verdict> verdicts;
  for (const auto& row : table) {
    if (row.pass != problem.pass) continue;
    Verdict v{row.name, row.refuse(problem, device), 0, 0};
    if (v.refusal.empty()) {
      v.seconds = row.seconds(problem, device);
      v.workspace = row.workspace(problem, device);
    }
    verdicts.push_back(v);
  }
  return verdicts;
}

// The fastest row that takes the problem within the workspace, or null. A name narrows the table
// to the rows that bear it.
template <class Table, class Device>
auto Choose(const Table& table, const Problem& problem, const Device& device, std::string_view name,
            int64_t workspace_limit) -> decltype(&*table.begin()) {
  decltype(&*table.begin()) best = nullptr;
  double best_seconds = std::numeric_limits<double>::infinity();
  for (const auto& row : table) {
    if (row.pass != problem.pass || (!name.empty() && name != row.name)) continue;
    if (!row.refuse(problem, device).empty()) continue;
    if (row.workspace(problem, device) > workspace_limit) continue;
    const double seconds = row.seconds(problem, device);
    if (best == nullptr || seconds < best_seconds) {
      best = &row;
      best_seconds = seconds;
    }
  }
  return best;
}

}  // namespace jaxconv

#endif  // JAXCONV_KERNEL_TABLE_H_
