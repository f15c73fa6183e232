#include "cuda/table.h"

#include "cuda/direct.h"

namespace jaxconv::cuda {

const std::vector<Row>& Table() {
  static const std::vector<Row> table = [] {
    std::vector<Row> rows;
    AddDirect(rows);
    return rows;
  }();
  return table;
}

}  // namespace jaxconv::cuda
