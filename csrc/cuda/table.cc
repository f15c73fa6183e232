#include "cuda/table.h"

#include "cuda/across.h"
#include "cuda/correlate.h"
#include "cuda/dense.h"
#include "cuda/dense_grad.h"
#include "cuda/depthwise.h"
#include "cuda/direct.h"
#include "cuda/planes.h"
#include "cuda/repack.h"
#include "cuda/rows.h"
#include "cuda/thin.h"
#include "cuda/weight_grad.h"

namespace jaxconv::cuda {

const std::vector<Row>& Table() {
  static const std::vector<Row> table = [] {
    std::vector<Row> rows;
    AddDirect(rows);
    AddDepthwise(rows);
    AddWeightGrad(rows);
    AddDense(rows);
    AddDenseGrad(rows);
    AddAcross(rows);
    AddCorrelate(rows);
    AddRows(rows);
    AddThin(rows);
    AddPlanes(rows);
    AddRepack(rows);
    return rows;
  }();
  return table;
}

}  // namespace jaxconv::cuda
