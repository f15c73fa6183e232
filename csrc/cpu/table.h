// The CPU's kernel table.
#ifndef JAXCONV_CPU_TABLE_H_
#define JAXCONV_CPU_TABLE_H_

#include <functional>
#include <vector>

#include "kernel_table.h"
#include "problem.h"

namespace jaxconv::cpu {

struct Device {
  int threads;
  int vector_bytes;  // of the widest vectors that there are kernels for
};

// What this machine has.
int VectorBytes();

// Threads to share work with. `For` runs task(0) ... task(count - 1), in any order and on any
// thread, and returns when all are done.
class Parallel {
 public:
  virtual ~Parallel() = default;
  virtual void For(int64_t count, const std::function<void(int64_t)>& task) const = 0;
};

using Launch = void (*)(const Problem&, const Operands&, const Parallel&);
using Row = Kernel<Device, Launch>;

const std::vector<Row>& Table();

// Adds the rows of a design whose forward and input gradient are launched alike: `row` as it is,
// and the same for the other passes.
inline void AddRows(std::vector<Row>& rows, Row row, Launch weight_grad) {
  rows.push_back(row);
  row.pass = Pass::kInputGrad;
  rows.push_back(row);
  row.pass = Pass::kWeightGrad;
  row.launch = weight_grad;
  rows.push_back(row);
}

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_TABLE_H_
